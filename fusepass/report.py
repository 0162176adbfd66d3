"""What happened to each graph: sites, and one report a compiled graph."""

import re
from collections import Counter
from dataclasses import dataclass, field

CODES: dict[str, str] = {
    "autocast": "autocast is in force, so the ops of this region run in other dtypes than the graph shows",
    "device": "the tensors of the region are not all on one CUDA (or CPU) device",
    "dtype": "the dtypes of activation, weights and result are not the ones the op computes in",
    "extra-user": "a value inside the region is also used outside it",
    "grad": "the region needs a gradient and the op has no backward",
    "mutation": "something the region reads is written in place in its middle",
    "order": "a result of the region is used before the region's last input exists",
    "shape": "a tensor does not have the shape that the op takes",
    "strides": "the op lays its result out in memory differently than the graph does",
    "tensor-subclass": "an input is not a plain tensor (DTensor, quantised tensor, ...)",
    "weight-layout": "a weight is not a contiguous tensor of the expected number of dimensions",
}
"""Every reason a site can be refused for: `Site.code` and what it means."""


@dataclass(frozen=True)
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

    @property
    def fused(self) -> bool:
        return self.code is None


@dataclass
class GraphReport:
    """What fusepass did to one graph that Dynamo captured."""

    compile_id: str
    """Dynamo's id of the graph, e.g. "0/0"."""
    sites: list[Site] = field(default_factory=list)
    untouched: str | None = None
    """Why no fusion was tried (a CPU graph, a fault); None when they were."""

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


_reports: dict[str, GraphReport] = {}


def record(report: GraphReport) -> None:
    """Keep `report`. Dynamo may hand one frame to a backend more than once: the last report of a compile id wins."""
    _reports.pop(report.compile_id, None)
    _reports[report.compile_id] = report


def reports() -> list[GraphReport]:
    """The report of every graph compiled in this process, in order of compilation."""
    return list(_reports.values())


def reset() -> None:
    """Forget all reports."""
    _reports.clear()


def collapse(sites: list[Site]) -> list[tuple[str, Site, int]]:
    """Sites that differ only in the numbers of their path, as (path with ranges, one of them, how many):
    `model.layers.{0-27}.self_attn`. In order of first appearance."""
    groups: dict[tuple[str, str, str | None], list[Site]] = {}
    for site in sites:
        groups.setdefault((re.sub(r"\d+", "#", site.path), site.fusion, site.code), []).append(site)
    rows = []
    for same in groups.values():
        columns = list(zip(*(re.findall(r"\d+", site.path) for site in same)))
        ranges = iter([_range(sorted({int(number) for number in column})) for column in columns])
        rows.append((re.sub(r"\d+", lambda _: next(ranges), same[0].path), same[0], len(same)))  # noqa: B023
    return rows


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    dense = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}-{numbers[-1]}}}" if dense else f"{{{','.join(map(str, numbers))}}}"
