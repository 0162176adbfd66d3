"""What there is to measure: a row is one model at one shape under all modes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal


class Mode(str, Enum):
    """Who compiles, and torch.compile's `mode` where it is not the default."""

    EAGER = "eager"
    INDUCTOR = "inductor"
    INDUCTOR_REDUCE_OVERHEAD = "inductor-reduce-overhead"
    INDUCTOR_MAX_AUTOTUNE = "inductor-max-autotune"
    FUSEPASS = "fusepass"
    FUSEPASS_REDUCE_OVERHEAD = "fusepass-reduce-overhead"
    FUSEPASS_MAX_AUTOTUNE = "fusepass-max-autotune"


WARM_UP = 4
"""Calls before a mode is at full speed: compile, warm up, record the CUDA graph, replay it."""


def compiler(mode: str) -> str:
    """Who compiles in this mode: "eager", "inductor" or "fusepass"."""
    return mode.partition("-")[0]


def torch_mode(mode: str) -> str | None:
    """The `mode` argument of `torch.compile`."""
    return mode.partition("-")[2] or None


@dataclass(frozen=True)
class Row:
    """One model at one shape: its modes are measured together, interleaved, and recorded in one file."""

    model: str
    """A name of `models.DIMENSIONS`, a folder with a checkpoint, or a name on the hub."""
    batch: int
    context: int
    """Tokens a sequence has in the cache before the forward that is measured."""
    tokens: int
    """Tokens a sequence has in that forward: 1 is a decode step, more a prefill."""
    cache: int
    """Length of the static cache."""
    dtype: str
    modes: tuple[str, ...]
    steps: int
    """Decode steps between two events; a prefill is measured one forward at a time, a tenth as often."""
    rounds: int
    """Times that every mode is measured; the median is reported."""
    device: str

    @property
    def kind(self) -> Literal["decode", "prefill"]:
        return "decode" if self.tokens == 1 else "prefill"

    @property
    def forwards(self) -> tuple[int, int]:
        """How often a round is timed, and the forwards each time."""
        return (1, self.steps) if self.kind == "decode" else (max(1, self.steps // 10), 1)

    @property
    def label(self) -> str:
        """For people: "Qwen3-0.6B decode, batch 1, context 512"."""
        shape = f"context {self.context}" if self.kind == "decode" else f"{self.tokens} tokens"
        return f"{Path(self.model).name} {self.kind}, batch {self.batch}, {shape}"

    @property
    def file(self) -> str:
        """Name of the file that records it: "decode-Qwen3-0.6B-b1-c512-bfloat16.json"."""
        shape = f"c{self.context}" if self.kind == "decode" else f"s{self.tokens}"
        return f"{self.kind}-{Path(self.model).name}-b{self.batch}-{shape}-{self.dtype}.json"


def plan(
    models: Iterable[str],
    batches: Iterable[int],
    prefill: Sequence[int],
    *,
    decode: bool,
    context: int,
    cache: int,
    dtype: str,
    modes: tuple[str, ...],
    steps: int,
    rounds: int,
    device: str,
) -> list[Row]:
    """The rows in the order they are measured. Raises ValueError for none, if a decode row would outgrow its cache, and
    if two rows would be recorded in one file."""
    if decode and (needed := context + max(steps, WARM_UP)) > cache:
        raise ValueError(f"a context of {context} and {steps} steps need a cache of {needed}, --cache is {cache}")
    if not decode and not prefill:
        raise ValueError("--no-decode without --prefill: nothing to measure")
    shapes = ([(context, 1, cache)] if decode else []) + [(0, tokens, max(cache, tokens)) for tokens in prefill]
    rows = [
        Row(model, batch, *shape, dtype, modes, steps, rounds, device)
        for model in dict.fromkeys(map(_named, models))
        for batch in dict.fromkeys(batches)
        for shape in dict.fromkeys(shapes)
    ]
    files: dict[str, Row] = {}
    for row in rows:
        if (other := files.setdefault(row.file, row)) is not row:
            raise ValueError(f"{other.model} and {row.model} would share the record {row.file}: use an --out for each")
    return rows


def _named(model: str) -> str:
    """The model by a name that files and labels can bear: a folder given as "." or ".." by its path."""
    return model if Path(model).name.strip(".") else str(Path(model).resolve())
