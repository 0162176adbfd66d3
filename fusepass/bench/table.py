"""A record for people: a table with a line for each mode, and the progress on the way to it."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fusepass.bench.results import Record, best, failed, over_inductor, sound


def console() -> Console:
    """Standard output. Where it is no terminal, as wide as the table."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=140)


def show(record: Record, out: Console) -> None:
    """Print a record's table; nothing for a row that failed, or whose modes all did."""
    if failed(record):
        return
    prefill = record["tokens"] > 1
    ideal = "" if prefill else f", ideal {record['ideal_ms']:.3f} ms"
    table = Table(
        title=f"{record['gpu']}, {record['dtype']}, cache {record['cache']}, {record['bandwidth_tb_s']} TB/s{ideal}",
        title_justify="left",
    )
    columns = ["ms", "±", "tok/s", "x Inductor", "TFLOP/s" if prefill else "% ideal"]
    table.add_column("")
    for column in [*columns, "kernels", "graphs", "first s", "peak GB", "off eager"]:
        table.add_column(column, justify="right", no_wrap=True)
    winners = {best(record, "inductor"), best(record, "fusepass")}
    for name, mode in record["modes"].items():
        cells = [
            _number(mode, "ms", ".3f"),
            _number(mode, "spread_ms", ".3f"),
            _number(mode, "tokens_per_s", ",.0f"),
            f"{ratio:.2f}" if (ratio := over_inductor(record, name)) else "-",
            _number(mode, "tflops" if prefill else "percent_of_ideal", ".1f"),
            _number(mode, "kernels", "d"),
            _number(mode, "graph_replays", "d"),
            _number(mode, "first_calls_s", ".1f"),
            _number(mode, "peak_gb", ".2f"),
            _number(mode, "logits_error", ".1e") + (" WRONG" if mode.get("wrong") else ""),
        ]
        style = "bold" if name in winners else "" if sound(mode) else "red"
        table.add_row(name, *cells, style=style)
    out.print(table)


def _number(mode: dict[str, Any], key: str, form: str) -> str:
    return "-" if mode.get(key) is None else format(mode[key], form)


class Display(Progress):
    """Findings as lines that stay; in a terminal also what is being done, for how long, and how many rows are done."""

    def __init__(self, out: Console, rows: int) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
        super().__init__(*columns, TimeElapsedColumn(), console=out, transient=True, disable=not out.is_terminal)
        self.done = 0
        self.task = self.add_task("", total=rows)

    def tell(self, text: str, finding: bool) -> None:
        """Show a line of text: for good if it is a finding, until the next one otherwise."""
        if finding:
            self.console.print(f"  {escape(text)}", soft_wrap=True)
        else:
            self.reset(self.task, description=escape(text), completed=self.done)
