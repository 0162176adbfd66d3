"""The record of every causal LM, docs/causal-lms.json, and the page made from it, docs/causal-lms.md."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.causal_lms.judge import NEW, NOT_BUILT, NOT_COMPILED, NOT_RUN, OURS, PROMPT, SAME, TOLERANCE

FOLDER = Path(__file__).parent.parent.parent / "docs"
RECORD, PAGE = FOLDER / "causal-lms.json", FOLDER / "causal-lms.md"
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}

Records = dict[str, dict[str, Any]]
"""Model types and the fields of their `Verdict`, with the versions it was found with."""

_MEANING = {
    OURS: "what fails or differs because of fusepass",
    NOT_COMPILED: 'what fails or differs with `torch.compile(backend="eager")`, too',
    NOT_RUN: "what cannot generate without torch.compile",
    NOT_BUILT: "what cannot be built from a configuration alone",
}


def read() -> Records:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def write(records: Records) -> None:
    records = dict(sorted(records.items()))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in records.items())
    RECORD.write_text(f"{{\n{lines}\n}}\n")  # a model a line, so that a diff shows which changed
    PAGE.write_text(text(records))


def text(records: Records) -> str:
    """The page."""

    def versions(name: str) -> str:
        return " and ".join(sorted({record[name] for record in records.values()}))

    found = {outcome: [r for r in records.values() if r["outcome"] == outcome] for outcome in (SAME, *_MEANING)}
    same, ours = len(found[SAME]), len(found[OURS])
    fused = sum(bool(record["fused"]) for record in found[SAME])
    parts = [
        f"""# Every causal LM of transformers

Each model type that `AutoModelForCausalLM` knows, at test size (`tests/causal_lms`), generates {NEW} tokens from a
prompt of {PROMPT} with its own cache, eagerly and compiled with fusepass (`FUSEPASS_CPU=reference`, f32). {same} of
{len(records)} give eager's logits within {TOLERANCE:.0e} of the largest, {fused} of them with fused regions; {ours}
fail or differ because of fusepass. torch {versions("torch")}, transformers {versions("transformers")}.
`make all-models` goes on where it was stopped, and writes this page and [the record](causal-lms.json).
The [Qwen3 family](models.md) is held to exact counts in bfloat16.

A count is of places in the model, in whatever graph: `attention` is fused in decode steps only. What is refused is
counted where it is fused in no graph, with the first reason; what resembles no fusion is not listed.

| model | fused | refused |
|---|---|---|""",
        *map(_row, found[SAME]),
    ]
    for outcome, meaning in _MEANING.items():
        if found[outcome]:
            parts += ["", f"{meaning[0].upper()}{meaning[1:]}:", "", "| model | reason |", "|---|---|"]
            parts += [f"| {_name(record)} | {_cell(record['reason'])} |" for record in found[outcome]]
    return "\n".join(parts) + "\n"


def _row(record: dict[str, Any]) -> str:
    fused = ", ".join(f"{name} {count}" for name, count in record["fused"].items()) or "-"
    refused = "<br>".join(f"{name} {count}: {_cell(reason)}" for name, (count, reason) in record["refused"].items())
    return f"| {_name(record)} | {fused} | {refused} |"


def _name(record: dict[str, Any]) -> str:
    return f"`{record['cls']}` ({record['model_type']})" if record["cls"] else record["model_type"]


def _cell(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "\\<")
