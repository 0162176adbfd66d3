"""The records of a folder as a picture: a line for each row, a dot for each mode."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fusepass.bench.results import Record, best, over_inductor, read_all, sound
from fusepass.bench.rows import Mode, compiler, torch_mode

COLORS = {"eager": "#8c8c8c", "inductor": "#3b7dd8", "fusepass": "#e4572e"}
NOTE: dict[str, Any] = {"fontsize": 9, "color": "#606060"}
MARKERS = {None: "o", "reduce-overhead": "s", "max-autotune": "^"}


def draw(folder: Path, kind: str) -> Path | None:
    """Write `<kind>.png` for the records of a kind, "decode" or "prefill"; its path, or None without records."""
    records = read_all(folder, kind)
    if not records:
        return None
    figure = Figure(figsize=(10, 1.7 + 0.42 * len(records)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for y, record in enumerate(records):
        _line(axes, y, record, "percent_of_ideal" if kind == "decode" else "tflops")
    shared, labels = _labels(records)
    axes.set_yticks(range(len(records)), labels)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * (100 if kind == "decode" else axes.get_xlim()[1]))  # room for the text
    if kind == "decode":
        axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of the ideal: weights and K/V read once" if kind == "decode" else "TFLOP/s", loc="left")
    axes.set_title("text: fusepass's best mode, and how many times as fast as Inductor's best", loc="left", **NOTE)
    figure.suptitle(f"{kind.capitalize()}, {shared}", x=0.01, ha="left", weight="bold")
    present = [mode.value for mode in Mode if any(mode.value in record["modes"] for record in records)]
    handles = [Line2D([], [], linestyle="", label=mode, **_dot(mode)) for mode in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    path = folder / f"{kind}.png"
    figure.savefig(path)
    return path


def _labels(records: list[Record]) -> tuple[str, list[str]]:
    """What all records share, and for each one what it does not."""
    parts = [
        {
            "gpu": record["gpu"],
            "dtype": record["dtype"],
            "model": Path(record["model"]).name,
            "batch": f"batch {record['batch']}",
            "shape": f"context {record['context']}" if record["tokens"] == 1 else f"{record['tokens']} tokens",
        }
        for record in records
    ]
    own = [key for key in parts[0] if key in ("model", "batch") or len({part[key] for part in parts}) > 1]
    shared = ", ".join(text for key, text in parts[0].items() if key not in own)
    return shared, [", ".join(part[key] for key in own) for part in parts]


def _line(axes: Axes, y: int, record: Record, key: str) -> None:
    """The dots of a row, the gap between Inductor's and fusepass's best, and fusepass's speed as text."""
    modes = {name: mode[key] for name, mode in record["modes"].items() if sound(mode)}
    for name, x in modes.items():
        axes.plot(x, y, linestyle="", **_dot(name))
    ours, rival = best(record, "fusepass"), best(record, "inductor")
    if ours and rival:
        axes.plot([modes[rival], modes[ours]], [y, y], color=COLORS["fusepass"], linewidth=2, alpha=0.35, zorder=1)
    if ours:
        ratio = over_inductor(record, ours)
        text = f"{record['modes'][ours]['tokens_per_s']:,.0f} tok/s" + (f", {ratio:.2f}x" if ratio else "")
        axes.annotate(text, (max(modes.values()), y), (9, 0), textcoords="offset points", va="center", fontsize=9)


def _dot(mode: str) -> dict[str, Any]:
    return {"color": COLORS[compiler(mode)], "marker": MARKERS[torch_mode(mode)], "markersize": 6}
