"""The code of a graph, made readable and linked to the sites."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from fusepass.report import Site

_DELETED = re.compile(r";  (?:\w+ = )+None$")
_ALIAS = re.compile(r"\w+ = L_\w+$")
_NODE = re.compile(r'(\w+)(?:: "[^"]*")? = (?:(\w+)\[\d+\]$)?')
_WEIGHT = re.compile(r"\bl_\w+?_(?:(modules_\w+?)_)?(?:parameters|buffers)_(\w+?)_\b")
_SOURCE = re.compile(r"# File: (?:.*/)?(.+?) in \S+, code: ")
_NUMBERED = re.compile(r"_\d+(?=_|\b)|\.\d+(?=\.)")


def shortened(text: str) -> str:
    """`text` with weights under the names they have in the model: `model.layers.3.mlp.up_proj.weight`."""

    def name(found: re.Match[str]) -> str:
        modules = (found[1] or "").removeprefix("modules_").split("_modules_")
        return ".".join([*filter(None, modules), found[2]])

    return _WEIGHT.sub(name, text)


@dataclass
class Block:
    """A graph module: the graph itself, or one inside it, whose names are its own."""

    inputs: frozenset[str]
    line: dict[str, int] = field(default_factory=dict)
    """Where each node is computed."""
    results: dict[str, list[int]] = field(default_factory=dict)
    """Where the results of a node with several are picked out."""

    def lines(self, names: Iterable[str]) -> list[int]:
        found = {self.line[name] for name in names if name in self.line}
        return sorted(found.union(*(self.results.get(name, []) for name in names)))

    def has(self, site: Site) -> bool:
        weights = {item.name for item in site.inputs if item.weight}
        return self.line.keys() >= set(site.nodes) and self.inputs >= weights


class Code:
    """What `print_readable` printed, without what hides the computation: signatures, aliases, deletions, indentation.

    `lines` are those to show; a line that begins with `#` is the user's, for the ones after it.
    """

    def __init__(self, printed: str) -> None:
        self.lines: list[str] = []
        self.blocks: list[Block] = []
        for line in map(str.strip, printed.splitlines()):
            if line.startswith("def forward("):
                inputs = re.findall(r'(\w+): "', line)
                self.blocks.append(Block(frozenset(name.replace("L_", "l_", 1) for name in inputs)))
                line = f"def forward(self, ...):  # {len(inputs)} inputs"
            if not line or _ALIAS.match(line):
                continue
            line = _DELETED.sub("", line)
            if self.blocks and (node := _NODE.match(line)):
                self.blocks[-1].line[node[1]] = len(self.lines)
                if node[2]:
                    self.blocks[-1].results.setdefault(node[2], []).append(len(self.lines))
            self.lines.append(shortened(_SOURCE.sub(r"# \1  ", line)))


def located(sites: Sequence[Site], before: Code, after: Code) -> list[tuple[list[int], list[int]]]:
    """For each site its lines before and after: of its op, or of what became of its nodes where it was refused.

    Sites are in the order of the graph modules, whose names may be alike (checkpointed layers): a site is in the first
    one that has its nodes and weights, not before the last site's."""
    blocks, at = [], 0
    for site in sites:
        at = next((i for i in range(at, len(before.blocks)) if before.blocks[i].has(site)), at)
        blocks.append(at)
    calls = {(at, name): site.call for at, site in zip(blocks, sites) if site.call for name in site.nodes}
    return [
        (before.blocks[at].lines(site.nodes), after.blocks[at].lines([calls.get((at, n), n) for n in site.nodes]))
        for at, site in zip(blocks, sites)
    ]


def folds(lines: Sequence[str], sites: Sequence[Site], places: Sequence[list[int]]) -> list[tuple[int, int, str]]:
    """What repeats: (first line, line after the last, what it is) of layers whose code is that of the layer before, but
    for the numbers in names. A layer begins where the first of its sites does."""
    begins: dict[str, dict[str, int]] = {}
    for site, place in zip(sites, places):
        if place and (layer := re.match(r"(.*?)(?:^|\.)(\d+)(?=\.|$)", site.path)):
            start = place[0] - lines[place[0] - 1].startswith("#")
            known = begins.setdefault(layer[1], {})
            known[layer[2]] = min(start, known.get(layer[2], start))
    found = []
    for path, known in begins.items():
        layers = sorted(known.items(), key=lambda item: item[1])
        starts = [start for _, start in layers]
        ends = [*starts[1:], len(lines)]
        texts = [[_NUMBERED.sub("", line) for line in lines[start:end]] for start, end in zip(starts, ends)]
        if len(texts) > 1:  # nothing says where the last layer ends
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(texts[-1], texts[-2])))
            if 2 * same > len(texts[-2]):
                texts[-1], ends[-1] = texts[-2], starts[-1] + same
        first = 0
        for i in range(1, len(layers) + 1):
            if i < len(layers) and texts[i] == texts[first]:
                continue
            if i - first > 2:  # one fold for one layer would save little
                names = f"{path}.{layers[first + 1][0]}-{layers[i - 1][0]}".lstrip(".")
                found.append((starts[first + 1], ends[i - 1], f"{names}: the same as {layers[first][0]}"))
            first = i
    return sorted(found)
