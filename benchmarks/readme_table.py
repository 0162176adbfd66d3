"""Write the README's table of results from the recorded JSON.

python benchmarks/readme_table.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def row(result: dict) -> str:
    """One model and batch: tokens per second of each variant, and the gain over Inductor's best."""
    speed = {name: row["tokens_per_s"] for name, row in result["rows"].items()}
    ours = max(value for name, value in speed.items() if name.startswith("fusepass"))
    best = max(value for name, value in speed.items() if name.startswith("inductor"))
    share = max(row["percent_of_ideal"] for name, row in result["rows"].items() if name.startswith("fusepass"))

    def cell(name: str) -> str:
        return f"{speed[name]:,.0f}" if name in speed else "-"

    cells = [cell(n) for n in ("eager", "inductor", "inductor reduce-overhead", "inductor max-autotune")]
    cells += [f"**{ours:,.0f}**", f"{ours / best:.2f}x", f"{share:.0f} %"]
    return f"| {result['model']}, batch {result['batch']} | {' | '.join(cells)} |"


def section() -> str:
    """The table of every GPU that has results."""
    parts = []
    for folder in sorted(path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir()):
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("decode-*.json"))]
        if not results:
            continue
        one = results[0]
        parts.append(
            "Decode, tokens per second: one step of the whole Hugging Face model, embedding to logits, bf16, random "
            f"weights, static cache of {one['cache']}, context {one['context']}. {one['gpu']}, torch {one['torch']}, "
            f"Triton {one['triton']}, transformers {one['transformers']}, commit {one['commit']}; all columns in one "
            "process, interleaved. The ideal reads every weight and the used keys and values once, at the bandwidth "
            "measured in the same run.\n\n"
            "| | eager | Inductor | reduce-overhead | max-autotune | fusepass | over Inductor's best | of the ideal |\n"
            "|---|---|---|---|---|---|---|---|\n" + "\n".join(map(row, results))
        )
    return "\n\n".join(parts)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1] if END in rest else rest
    readme.write_text(f"{before}{BEGIN}\n{section()}\n{END}{after}")


if __name__ == "__main__":
    main()
