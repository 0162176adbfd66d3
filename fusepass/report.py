"""What happened to each graph: sites, and one report a compiled graph."""

import dataclasses
import difflib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
"""Of `Report.to_json`; docs/report-schema.md describes it. It changes when a field goes or changes its meaning."""

CODES: dict[str, str] = {
    "autocast": "autocast is in force, so the ops of this region run in other dtypes than the graph shows",
    "device": "the tensors of the region are not all on one CUDA (or CPU) device",
    "dtype": "the dtypes of activation, weights and result are not the ones the op computes in",
    "extra-user": "a value inside the region is also used outside it",
    "grad": "the region needs a gradient and the op has no backward",
    "mode": "grad or inference mode is switched in the middle of the region",
    "mutation": "something the region reads is written in place in its middle",
    "opaque": "an operator of its own stands where the operators of the region were expected",
    "order": "a result of the region is used before the region's last input exists",
    "rotary": "the rotary embedding is not the half-split form over the whole head",
    "shape": "a tensor does not have the shape that the op takes",
    "strides": "the op lays its result out in memory differently than the graph does",
    "structure": "a near miss: it looks like the region and has another operator in one place",
    "tensor-subclass": "an input is not a plain tensor (DTensor, quantised tensor, ...)",
    "weight-layout": "a weight is not a contiguous tensor of the expected number of dimensions",
}
"""Every reason a site can be refused for: `Site.code` and what it means."""


def one_line(fault: BaseException) -> str:
    """A fault as one line of at most 300 characters."""
    text = next((line.strip() for line in str(fault).splitlines() if line.strip()), "")
    return f"{type(fault).__name__}: {text}"[:300]


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor that a site reads."""

    name: str
    """Its node in the graph before."""
    shape: tuple[int | str, ...]
    """A symbolic size is a string."""
    dtype: str
    """E.g. "bfloat16"."""
    weight: bool
    """Whether it is a weight, norm weight or bias, and not an activation."""


@dataclass(frozen=True, slots=True)
class Site:
    """One place in one graph where a fusion applied or was refused."""

    fusion: str
    """Name of the fusion, e.g. "norm_qkv_rope"."""
    path: str
    """Module path in the user's model, e.g. "model.layers.3.self_attn"."""
    source: str
    """The user's line: "file.py:42, in forward: code"."""
    code: str | None = None
    """Why it was refused, one of `CODES`; None when fused."""
    reason: str | None = None
    """The same in a sentence about this site; None when fused."""
    op: str | None = None
    """The op that runs it: of the fusion's own name, or of a join that took it in; None when refused."""
    call: str | None = None
    """The node of that op in the graph after; None when refused."""
    nodes: tuple[str, ...] = ()
    """The nodes of the region in the graph before."""
    inputs: tuple[Input, ...] = ()
    """What the region reads."""

    @property
    def fused(self) -> bool:
        return self.code is None

    def __str__(self) -> str:
        state = "fused" if self.fused else f"refused ({self.code}): {self.reason}"
        return f"{self.path or 'the top level'}: {self.fusion} {state}"


@dataclass(frozen=True, slots=True)
class Work:
    """How much a graph does, run operator by operator (Inductor fuses some of what is left)."""

    operators: int = 0
    """Calls that compute a tensor; views, results picked out of a tuple and reads of shapes are none."""
    activation_reads: int = 0
    """How often an operator reads an activation: every tensor but the parameters."""
    weight_bytes: int = 0
    """Size of the parameters that are read, each once."""


@dataclass
class GraphReport:
    """What fusepass did to one graph that Dynamo captured."""

    compile_id: str
    """Dynamo's id of the graph, e.g. "0/0"; `fusepass.explain` counts its own, from "0"."""
    sites: list[Site] = field(default_factory=list)
    untouched: str | None = None
    """Why no fusion was tried (a CPU graph, a fault); None when they were."""
    faults: list[str] = field(default_factory=list)
    """What `options={"verify": True}` found wrong, in sentences; the graph then runs the original eagerly."""
    work_before: Work = Work()
    work_after: Work = Work()
    before: str | None = None
    """The graph as Dynamo captured it, as readable code. Kept by `fusepass.explain`, and when compiling under
    TORCH_LOGS="+fusepass" or TORCH_TRACE; else None, since printing takes a third of the time of rewriting."""
    after: str | None = None
    """The same after rewriting."""

    def diff(self) -> str:
        """`before` and `after` as a unified diff. Raises ValueError where they were not kept."""
        if self.before is None or self.after is None:
            raise ValueError(f'graph {self.compile_id} has no code; use fusepass.explain or TORCH_LOGS="+fusepass"')
        before, after = (text.splitlines(keepends=True) for text in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, "before", "after"))

    def counts(self) -> Counter[str]:
        """Number of fused sites by fusion."""
        return Counter(site.fusion for site in self.sites if site.fused)

    def summary(self) -> str:
        """One line: what was fused and what was refused."""
        if self.untouched:
            return f"graph {self.compile_id}: untouched: {self.untouched}"
        fused = ", ".join(f"{name} x{count}" for name, count in sorted(self.counts().items())) or "nothing"
        refused = Counter(site.code for site in self.sites if not site.fused)
        tail = "".join(f", {count} refused ({code})" for code, count in sorted(refused.items(), key=str))
        return f"graph {self.compile_id}: fused {fused}{tail}"


@dataclass
class Report:
    """What happens to a model: `fusepass.explain` returns one; `Report(fusepass.reports())` is of what was compiled.

    `str(report)` is a table with a line for all layers that are alike, in colour if stdout is a terminal.
    """

    graphs: list[GraphReport]
    stopped: str | None = None
    """Why the model was not traced to its end; None when it was. Then `graphs` holds what came before."""

    @property
    def sites(self) -> list[Site]:
        """The sites of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    def counts(self) -> Counter[str]:
        """Number of fused sites by fusion."""
        return sum((graph.counts() for graph in self.graphs), Counter())

    def to_json(self) -> str:
        """A JSON object as docs/report-schema.md describes it."""
        content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        for graph in content["graphs"]:
            for site in graph["sites"]:
                site["fused"] = site["code"] is None
        return json.dumps(content, indent=2)

    def to_html(self, path: str | PathLike[str], title: str = "fusepass") -> None:
        """Write a page to look at: one file, without network. What it shows beside what `str` does: the code before
        and after, as far as the graphs keep it, with the sites linked, and the reference of each op.

        `title`: a name for the model. Raises ImportError where jinja2 is missing (`pip install fusepass[html]`).
        """
        from fusepass.html import page

        Path(path).write_text(page(self, title), encoding="utf-8")

    def __str__(self) -> str:
        from fusepass.table import render

        return render(self)


_reports: dict[str, tuple[object, list[GraphReport]]] = {}


def record(report: GraphReport, attempt: object) -> None:
    """Keep `report`, of a graph of one of Dynamo's attempts at a frame. Of those of one compile id the last attempt
    wins: it makes several graphs where DDP splits the frame into its buckets."""
    before, graphs = _reports.pop(report.compile_id, (None, []))
    _reports[report.compile_id] = attempt, [*(graphs if attempt == before else []), report]


def reports() -> list[GraphReport]:
    """The report of every graph compiled in this process, in order of compilation."""
    return [report for _, graphs in _reports.values() for report in graphs]


def reset() -> None:
    """Forget all reports."""
    _reports.clear()


def collapse(sites: Sequence[Site]) -> list[tuple[str, Site, int]]:
    """Sites that differ only in numbers, as (path with ranges, one of them, how many): `model.layers.{0-27}.self_attn`.
    In order of first appearance."""
    groups = [[sites[i] for i in same] for same in alike(sites)]
    return [(ranged([site.path for site in same]), same[0], len(same)) for same in groups]


def alike(sites: Sequence[Site]) -> list[list[int]]:
    """The places in `sites` of those that differ only in numbers (of the path, of nodes in the reason)."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, site in enumerate(sites):
        key = (site.path, site.fusion, site.op or "", site.code or "", site.reason or "")
        groups.setdefault(tuple(re.sub(r"\d+", "#", text) for text in key), []).append(i)
    return list(groups.values())


def ranged(paths: Sequence[str]) -> str:
    """Paths that differ only in numbers, as one with ranges."""
    columns = zip(*(re.findall(r"\d+", path) for path in paths))
    ranges = iter([_range(sorted({int(number) for number in column})) for column in columns])
    return re.sub(r"\d+", lambda _: next(ranges), paths[0])


def _range(numbers: list[int]) -> str:
    """[0] as "0", [0, 1, 2, 4] as "{0-2,4}"."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
