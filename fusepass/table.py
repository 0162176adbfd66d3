"""A report as a table for people."""

from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fusepass.report import CODES, GraphReport, Report, Work, collapse

_WIDTH = 120  # where there is no terminal to ask


def render(report: Report) -> str:
    """The report as text: sites collapsed over layers, what was refused and why, totals. Coloured on a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH, force_terminal=False)
    with console.capture() as captured:
        console.print(_all(report))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))


def _all(report: Report) -> RenderableType:
    parts: list[RenderableType] = []
    for graph in report.graphs:
        if len(report.graphs) > 1 or graph.untouched:
            parts.append(Text(f"graph {graph.compile_id}{f': untouched: {graph.untouched}' * bool(graph.untouched)}"))
        if graph.sites:
            parts.append(_sites(graph))
            parts.extend(_refused(graph))
    if not report.sites:
        parts.append(Text("no region of the model matches a fusion"))
    if report.stopped:
        parts.append(Text(f"not traced to the end: {report.stopped}", style="red"))
    parts.append(_totals(report))
    return Group(*parts)


def _sites(graph: GraphReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("module", "fusion", "", "op"):
        table.add_column(name, overflow="fold")
    table.add_column("sites", justify="right")
    for path, site, count in collapse(graph.sites):
        state = Text("fused", "green") if site.fused else Text(f"refused: {site.code}", "red")
        op = site.op if site.op != site.fusion else None  # named where it is a join's
        table.add_row(Text(path or "(top level)"), Text(site.fusion), state, Text(op or ""), str(count))
    return table


def _refused(graph: GraphReport) -> list[Text]:
    rows = [row for row in collapse(graph.sites) if not row[1].fused]
    lines = [Text("\nrefused", style="bold")] if rows else []
    for path, site, count in rows:
        lines.append(Text(f"{path or '(top level)'}  {site.fusion} x{count}: {site.reason}", style="red"))
        if site.source:
            lines.append(Text(f"    {site.source}", style="dim"))
    for code in dict.fromkeys(site.code for _, site, _ in rows if site.code):
        lines.append(Text(f"    {code}: {CODES.get(code, 'a reason of another package')}", style="dim"))
    return lines


def _totals(report: Report) -> Table:
    def total(part: Callable[[Work], int], of: str) -> int:
        return sum(part(getattr(graph, of)) for graph in report.graphs)

    operators, reads = (
        [total(part, of) for of in ("work_before", "work_after")]
        for part in (lambda work: work.operators, lambda work: work.activation_reads)
    )
    size = total(lambda work: work.weight_bytes, "work_before")
    grid = Table.grid(padding=(0, 2))
    fused = len([site for site in report.sites if site.fused])
    grid.add_row("\nsites", f"\n{fused:,} fused, {len(report.sites) - fused:,} refused")
    grid.add_row("operators", f"{operators[0]:,} -> {operators[1]:,}")
    grid.add_row("activation reads", f"{reads[0]:,} -> {reads[1]:,} ({reads[0] - reads[1]:,} saved)")
    grid.add_row("weights", f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB")
    return grid
