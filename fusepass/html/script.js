"use strict";

const { graphs, codes, references } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const LINE = 20; // px, as --line in the style
const SPARE = 12; // lines rendered outside the view, so that scrolling shows no gap

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, attributes);
  element.append(...children);
  return element;
}

/** A name or a path, to be broken where a reader would. */
function breakable(name) {
  return name.split(/(?<=[._/])/).flatMap((part) => [part, make("wbr")]);
}

function stateOf(site) {
  return site.code ? "refused" : "fused";
}

/** One side of the code. Only the lines in view are in the document: a graph of 64 layers has ten thousand. */
class Pane {
  constructor(id) {
    this.box = byId(id);
    this.sheet = this.box.firstElementChild;
    this.drawn = new Map();
    this.title = document.querySelector(`#name-${id} small`);
    this.box.addEventListener("scroll", () => redraw(false), { passive: true });
    this.sheet.addEventListener("click", (event) => this.clicked(event));
  }

  show({ lines, sites, folds }) {
    this.lines = lines;
    this.sites = sites;
    this.folds = folds.map(([start, end, name]) => ({ start, end, name, open: false }));
    this.owners = lines.map(() => []);
    sites.forEach((at, site) => at.forEach((line) => this.owners[line].push(site)));
    for (let i = lines.length - 2; i >= 0; i--) {
      if (lines[i].startsWith("#") && !this.owners[i].length) this.owners[i] = this.owners[i + 1];
    }
    this.title.textContent = `${lines.length.toLocaleString("en")} lines`;
    const longest = lines.reduce((most, line) => Math.max(most, line.startsWith("return") ? 0 : line.length), 0);
    this.sheet.style.width = `calc(${Math.min(longest, 600)}ch + 30px)`;
    this.box.scrollTo(0, 0);
    this.lay();
  }

  /** What is in which row: the number of a line, or a closed fold. */
  lay() {
    this.rows = [];
    this.rowOf = new Map();
    const folds = this.folds.values();
    let fold = folds.next().value;
    for (let line = 0; line < this.lines.length; line++) {
      while (fold && fold.start < line) fold = folds.next().value;
      if (fold?.start === line) this.rows.push(fold);
      if (fold?.start === line && !fold.open) {
        line = fold.end - 1;
      } else {
        this.rowOf.set(line, this.rows.length);
        this.rows.push(line);
      }
    }
    this.sheet.style.height = `${this.rows.length * LINE}px`;
  }

  /** `afresh`: also what is in the document already. The rest keeps its focus. */
  draw(afresh) {
    if (afresh) {
      this.drawn.clear();
      this.sheet.replaceChildren();
    }
    const first = Math.max(0, Math.floor(this.box.scrollTop / LINE) - SPARE);
    const last = Math.min(this.rows.length, first + Math.ceil(this.box.clientHeight / LINE) + 2 * SPARE);
    for (const [row, element] of this.drawn) {
      if (row >= first && row < last) continue;
      element.remove();
      this.drawn.delete(row);
    }
    for (let row = first; row < last; row++) {
      if (this.drawn.has(row)) continue;
      const element = typeof this.rows[row] === "number" ? this.line(this.rows[row]) : this.fold(this.rows[row]);
      element.style.top = `${row * LINE}px`;
      this.drawn.set(row, element);
      this.sheet.append(element);
    }
  }

  fold(fold) {
    const text = `${fold.open ? "▾" : "▸"} ${fold.name} · ${(fold.end - fold.start).toLocaleString("en")} lines`;
    return make("button", { className: "line fold", fold, textContent: text });
  }

  line(line) {
    const owners = this.owners[line];
    const classes = ["line"];
    if (owners.length) classes.push(stateOf(graphs[shown].sites[owners[0]]));
    if (owners[0] !== this.owners[line - 1]?.[0]) classes.push("begin");
    if (owners.includes(chosen)) classes.push("chosen");
    if (hits[hit]?.[0] === this && hits[hit][1] === line) classes.push("hit");
    const element = make("div", { className: classes.join(" ") });
    element.dataset.line = line;
    const [, name, type = "", rest] = /^(?:(\w+)(: "[^"]*")?(?= = ))?(.*)$/.exec(this.lines[line]);
    if (name) element.append(make("b", {}, ...marked(name)), make("i", {}, ...marked(type)));
    element.append(...(rest.startsWith("#") ? [make("i", {}, ...marked(rest))] : marked(rest)));
    return element;
  }

  clicked({ target }) {
    const element = target.closest(".line");
    if (element?.fold) {
      element.fold.open = !element.fold.open;
      this.lay();
      redraw();
      this.box.focus();
    } else if (element) {
      const owners = this.owners[element.dataset.line];
      if (owners.length) choose(shown, owners[(owners.indexOf(chosen) + 1) % owners.length], this);
    }
  }

  /** Bring a line into view, at a third of the height. */
  reveal(line) {
    const fold = this.folds.find(({ start, end }) => start <= line && line < end);
    if (fold && !fold.open) {
      fold.open = true;
      this.lay();
    }
    this.box.scrollTo(0, this.rowOf.get(line) * LINE - this.box.clientHeight / 3);
  }

  /** Where a site is on the screen, [top, bottom] from the top of the pane; null inside a closed fold. */
  extent(site) {
    const at = this.sites[site];
    const [top, bottom] = [this.rowOf.get(at[0]), this.rowOf.get(at.at(-1))];
    if (top === undefined || bottom === undefined) return null;
    return [top * LINE - this.box.scrollTop, (bottom + 1) * LINE - this.box.scrollTop];
  }
}

const panes = [new Pane("before"), new Pane("after")];
const links = byId("links");
let shown = -1; // which graph
let chosen = -1; // which of its sites
let query = "";
let hits = []; // where the search found something: [pane, line]
let hit = -1; // which of them was gone to
let waiting = null;

/** In the next frame, once. `afresh`: see `Pane.draw`. */
function redraw(afresh = true) {
  if (waiting) {
    waiting.afresh ||= afresh;
    return;
  }
  const request = (waiting = { afresh });
  requestAnimationFrame(() => {
    waiting = null;
    if (!graphs[shown]?.code) return;
    panes.forEach((pane) => pane.draw(request.afresh));
    drawLinks();
  });
}

/** A band between the panes from each site before to its op after. */
function drawLinks() {
  const { height, width } = links.getBoundingClientRect();
  const offset = panes[0].box.getBoundingClientRect().top - links.getBoundingClientRect().top;
  const inside = ([top, bottom]) => bottom > 0 && top < height;
  const bands = [];
  graphs[shown].sites.forEach((site, i) => {
    const [left, right] = panes.map((pane) => pane.extent(i));
    if (!left || !right || !(inside(left) || inside(right))) return;
    const [a, b, c, d] = [...left, ...right].map((y) => Math.max(-height, Math.min(2 * height, y)) + offset);
    const band = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const half = width / 2;
    band.setAttribute("d", `M0 ${a}C${half} ${a} ${half} ${c} ${width} ${c}V${d}C${half} ${d} ${half} ${b} 0 ${b}Z`);
    band.setAttribute("class", `${stateOf(site)}${i === chosen ? " chosen" : ""}`);
    bands.push(band);
  });
  links.replaceChildren(...bands);
}

function showGraph(number) {
  if (number === shown) return;
  [shown, chosen] = [number, -1];
  const code = graphs[number]?.code;
  byId("no-code").hidden = Boolean(code) || !graphs.length;
  for (const element of [...document.querySelectorAll(".side"), links]) element.toggleAttribute("hidden", !code);
  if (code) panes.forEach((pane, i) => pane.show(code[i]));
  redraw();
}

/** Select a site and show it in the tree, in the code and by itself. `from`: the pane that stays where it is. */
function choose(graph, site, from = null) {
  showGraph(graph);
  chosen = site;
  for (const item of items) item.setAttribute("aria-selected", item.graph === graph && item.sites.includes(site));
  if (site >= 0 && graphs[graph].code) {
    for (const pane of panes) if (pane !== from && pane.sites[site].length) pane.reveal(pane.sites[site][0]);
  }
  describe();
  redraw();
}

function describe() {
  const detail = byId("detail");
  const site = graphs[shown]?.sites[chosen];
  if (!site) return detail.replaceChildren();
  const alike = items.find((item) => item.graph === shown && item.sites.includes(chosen)).sites;
  const state = make("span", { className: stateOf(site), textContent: stateOf(site) });
  const parts = [make("h2", {}, site.fusion, state), make("div", { className: "path", textContent: site.path || "(top level)" })];
  if (alike.length > 1) {
    const place = `${alike.indexOf(chosen) + 1} of ${alike.length}`;
    const stepper = (text, label, by) => make("button", { textContent: text, ariaLabel: label, onclick: () => stepLayer(by) });
    const [back, on] = [stepper("‹", "layer before", -1), stepper("›", "layer after", 1)];
    parts.push(make("div", { className: "stepper" }, back, place, on));
  }
  if (site.code) {
    parts.push(make("p", {}, site.reason), make("p", { className: "dim", textContent: `${site.code}: ${codes[site.code] ?? ""}` }));
  } else {
    parts.push(make("p", {}, `${site.nodes} nodes of the graph → ${site.op === site.fusion ? "one op" : `part of ${site.op}`}`));
  }
  if (site.source) {
    const [, place, code] = /^(.*?), in \S+: (.*)$/.exec(site.source) ?? [, site.source, ""];
    const file = make("span", { title: place }, ...breakable(place.replace(/^.*site-packages\//, "")));
    parts.push(make("p", { className: "source" }, file, make("code", { textContent: code })));
  }
  if (site.inputs.length) {
    const layer = /^.*?\.\d+\.(?=.)/.exec(site.path)?.[0] ?? "";
    const rows = site.inputs.map(([name, shape, dtype]) => {
      const short = name.startsWith(layer) ? name.slice(layer.length) : name;
      return make("tr", {}, make("td", { title: name }, ...breakable(short)), make("td", {}, `${dtype}[${shape.join(", ")}]`));
    });
    const head = ["reads", "shape"].map((textContent) => make("th", { textContent, scope: "col" }));
    parts.push(make("table", {}, make("tr", {}, ...head), ...rows));
  }
  for (const name of new Set([site.fusion, site.op])) {
    if (references[name]) parts.push(make("button", { textContent: `Reference of ${name}`, onclick: () => refer(name) }), " ");
  }
  detail.replaceChildren(...parts);
  detail.scrollTo(0, 0);
}

function refer(name) {
  byId("reference-name").textContent = name;
  byId("reference").querySelector("pre").textContent = references[name];
  byId("reference").showModal();
}

/** Go to the next site in the order of the code, not into closed folds. */
function step(by) {
  if (!graphs[shown]?.code) return;
  const row = (site) => panes[0].rowOf.get(panes[0].sites[site][0]);
  const order = [...panes[0].sites.keys()].filter((site) => row(site) !== undefined).sort((a, b) => row(a) - row(b));
  const next = order.indexOf(chosen) + (chosen < 0 && by < 0 ? order.length : by);
  if (order[next] !== undefined) choose(shown, order[next]);
}

/** Go to the same site of another layer. */
function stepLayer(by) {
  const alike = items.find((item) => item.graph === shown && item.sites.includes(chosen))?.sites ?? [];
  const next = alike[alike.indexOf(chosen) + by];
  if (next === undefined) return;
  const label = document.activeElement?.ariaLabel;
  choose(shown, next);
  document.querySelector(`.stepper [aria-label="${label}"]`)?.focus();
}

// The tree: https://www.w3.org/WAI/ARIA/apg/patterns/treeview/

const tree = byId("tree");
const items = [...tree.querySelectorAll("[role=treeitem]")];
for (const item of items) {
  item.graph = item.dataset.graph === undefined ? -1 : Number(item.dataset.graph);
  item.sites = item.dataset.sites?.split(" ").map(Number) ?? [];
  item.parent = item.parentElement.closest("[role=treeitem]");
  const { graph, sites } = item;
  item.texts = sites.map((i) =>
    Object.values(graphs[graph].sites[i]).filter((text) => typeof text === "string").join(" ").toLowerCase());
}

function visible() {
  return items.filter((item) => item.offsetParent !== null);
}

function focusItem(item) {
  if (!item) return;
  for (const other of items) other.tabIndex = other === item ? 0 : -1;
  item.focus();
}

function expand(item, open) {
  item.setAttribute("aria-expanded", open);
}

/** What Enter or a click on an item does. */
function activate(item) {
  if (item.sites.length) {
    const here = item.graph === shown && item.sites.includes(chosen);
    choose(item.graph, here ? chosen : item.sites[item.texts.findIndex((text) => text.includes(query))]);
    if (matchMedia("(max-width: 800px)").matches) byId("detail").scrollIntoView();
  } else if (item.graph >= 0 && item.graph !== shown) {
    choose(item.graph, -1);
  } else {
    expand(item, item.getAttribute("aria-expanded") === "false");
  }
}

tree.addEventListener("click", ({ target }) => {
  const item = target.closest("[role=treeitem]");
  if (!item) return;
  focusItem(item);
  activate(item);
});

tree.addEventListener("keydown", (event) => {
  const item = event.target.closest("[role=treeitem]");
  const seen = visible();
  const at = seen.indexOf(item);
  const open = item.getAttribute("aria-expanded");
  const actions = {
    ArrowDown: () => focusItem(seen[at + 1]),
    ArrowUp: () => focusItem(seen[at - 1]),
    Home: () => focusItem(seen[0]),
    End: () => focusItem(seen.at(-1)),
    ArrowRight: () => (open === "false" ? expand(item, true) : open && focusItem(seen[at + 1])),
    ArrowLeft: () => (open === "true" ? expand(item, false) : focusItem(item.parent)),
    Enter: () => activate(item),
    " ": () => activate(item),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});

// Search: what the tree shows, and marks in the code.

const search = byId("search");
function marked(text) {
  const parts = [];
  let from = 0;
  for (let at = query ? text.toLowerCase().indexOf(query) : -1; at >= 0; at = text.toLowerCase().indexOf(query, from)) {
    parts.push(text.slice(from, at), make("mark", { textContent: text.slice(at, at + query.length) }));
    from = at + query.length;
  }
  return [...parts, text.slice(from)];
}

function find() {
  query = search.value.trim().toLowerCase();
  let sites = 0;
  for (const item of items) {
    const found = item.texts.filter((text) => text.includes(query)).length;
    item.hidden = Boolean(query) && !found;
    sites += found;
    for (let { parent } = item; found && parent; { parent } = parent) {
      parent.hidden = false;
      if (query) expand(parent, true);
    }
  }
  hits = [];
  hit = -1;
  if (query && graphs[shown]?.code) {
    for (const pane of panes) {
      pane.lines.forEach((line, i) => line.toLowerCase().includes(query) && hits.push([pane, i]));
    }
  }
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
  byId("found").textContent = query ? `${count(sites, "site")}, ${count(hits.length, "line")}${hits.length ? " · Enter: next" : ""}` : "";
  const reachable = visible();
  if (!reachable.some((item) => item.tabIndex === 0) && reachable[0]) {
    for (const item of items) item.tabIndex = item === reachable[0] ? 0 : -1;
  }
  redraw();
}

search.addEventListener("input", find);
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && hits.length) {
    hit = event.shiftKey ? (hit > 0 ? hit : hits.length) - 1 : (hit + 1) % hits.length;
    const [pane, line] = hits[hit];
    pane.reveal(line);
    redraw();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("reference").open) return;
  if (event.key === "Escape") {
    if (query || document.activeElement === search) {
      search.value = "";
      find();
      search.blur();
    } else {
      choose(shown, -1);
    }
    return;
  }
  const actions = { "/": () => search.focus(), n: () => step(1), p: () => step(-1), ",": () => stepLayer(-1), ".": () => stepLayer(1) };
  if (event.target === search || !actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});

new ResizeObserver(redraw).observe(byId("code"));
find();
if (graphs.length) showGraph(0);
// Begin with what was refused, else where the code begins.
const refused = graphs[0]?.sites.findIndex((site) => site.code) ?? -1;
if (refused >= 0) choose(0, refused);
else step(1);
