"""Write the README's section of results, and its pictures, from the records that `fusepass bench` wrote.

python benchmarks/readme_table.py
"""

from itertools import groupby
from pathlib import Path

from fusepass.bench.models import DIMENSIONS
from fusepass.bench.picture import draw
from fusepass.bench.results import Record, best, over_inductor, read_all, sound

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
COLUMNS = ("eager", "inductor", "inductor-reduce-overhead", "inductor-max-autotune")
HEAD = {
    "decode": "| | eager | Inductor | reduce-overhead | max-autotune | fusepass | over Inductor's best | of the ideal "
    "| kernels a step, Inductor's best → ours |",
    "prefill": "| | eager | Inductor | reduce-overhead | max-autotune | fusepass | over Inductor's best | TFLOP/s |",
}
CAPTION = {
    "decode": "Decode, tokens per second: one step of the whole Hugging Face model, embedding to logits, {weights}"
    "static cache of {cache}, context {context}, {dtype}. The ideal reads every weight and the used keys and values "
    "once, at the bandwidth measured in the same run.",
    "prefill": "Prefill, milliseconds: one forward of the whole prompt, {weights}static cache of {cache}, {dtype}.",
}


def row(record: Record, kind: str) -> str:
    """One model and shape: each of Inductor's modes, the best of ours, and the gain over the best of Inductor's."""
    modes = record["modes"]

    def cell(name: str | None) -> str:
        if name is None or not sound(modes.get(name, {})):
            return "-"
        return f"{modes[name]['tokens_per_s']:,.0f}" if kind == "decode" else f"{modes[name]['ms']:.2f}"

    ours, rival = best(record, "fusepass"), best(record, "inductor")
    gain = over_inductor(record, ours) if ours else None
    cells = [*map(cell, COLUMNS), f"**{cell(ours)}**", f"{gain:.2f}x" if gain else "-"]
    if kind == "decode":
        cells.append(f"{modes[ours]['percent_of_ideal']:.0f} %" if ours else "-")
        cells.append(" → ".join(str(modes[name].get("kernels", "-")) if name else "-" for name in (rival, ours)))
    else:
        cells.append(f"{modes[ours]['tflops']:.0f}" if ours else "-")
    shape = f", {record['tokens']} tokens" if kind == "prefill" else ""
    return f"| {Path(record['model']).name}, batch {record['batch']}{shape} | {' | '.join(cells)} |"


def table(records: list[Record], kind: str) -> str:
    """The records of one GPU, kind, context and dtype, under a caption that says what they were measured with."""

    def shared(name: str) -> str:
        *others, last = dict.fromkeys(str(record[name]) for record in records)
        return f"{', '.join(others)} and {last}" if others else last

    versions = ", ".join(f"{name} {shared(name)}" for name in ("torch", "triton", "transformers", "commit"))
    weights = "random weights, " if all(record["model"] in DIMENSIONS for record in records) else ""
    caption = CAPTION[kind].format(weights=weights, **{name: shared(name) for name in ("cache", "context", "dtype")})
    head = HEAD[kind]
    rule = "|".join(["---"] * (head.count("|") - 1))
    return (
        f"{caption} {shared('gpu')}, {versions}; the modes of a row in one process, interleaved.\n\n"
        f"{head}\n|{rule}|\n" + "\n".join(row(record, kind) for record in records)
    )


def folders() -> list[Path]:
    """One folder a GPU."""
    return sorted(path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir())


def section() -> str:
    """The tables and pictures of every GPU that has records."""
    parts = []
    for folder in folders():
        for kind in HEAD:
            records = sorted(read_all(folder, kind), key=lambda record: (record["context"], record["dtype"]))
            for _, same in groupby(records, key=lambda record: (record["context"], record["dtype"])):
                parts.append(table(list(same), kind))
            if records:
                parts.append(f"![{kind}: a line a row, a dot a mode]({folder.relative_to(ROOT) / kind}.png)")
    return "\n\n".join(parts)


def main() -> None:
    for folder in folders():
        for kind in HEAD:
            draw(folder, kind)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{section()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
