"""The gate every op passes: as close to the exact result as eager is, up to a tenth.

Both errors are taken against the same modules in f64, over fresh weights and activations. Each output channel counts
in units of its own size, so that neither a large norm weight nor an outlier channel hides an error in the others.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepass.ops import force_strategy
from fusepass.ops.library import Strategy
from tests.ops.sites import DEVICE, DTYPES, QWEN3, SMALL, Site, Sizes, Tensors, decoder_layer, exact, redraw

MARGIN = 1.1
DRAWS = 32


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element which no kernel wrote shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuBLAS asks for a workspace setting that these tests do not need
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """One step of one layer: `batch` sequences of `seq` tokens, run by the given strategy (None: the op's choice)."""

    batch: int
    seq: int
    strategy: Strategy | None
    dtype: torch.dtype
    high: bool = False
    sizes: Sizes = SMALL
    family: str = "qwen3"
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.seq}", self.strategy or "default", str(self.dtype).removeprefix("torch.")]
        words += ["high"] * self.high + [str(self.sizes)] * (self.sizes != SMALL) + [self.family, *self.config]
        return "-".join(words)

    @property
    def launches(self) -> int:
        """The interpreter is slow: there a row of activations is a draw."""
        return DRAWS if DEVICE == "cuda" else max(2, DRAWS // (self.batch * self.seq))


def rms_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want, each channel (last dimension) in units of its own size."""
    difference, want = (t.reshape(-1, want.shape[-1]) for t in (got.double() - want, want))
    return float((difference / want.square().mean(0).sqrt()).square().mean().sqrt())


def assert_as_exact_as_eager(
    site: Site,
    case: Case,
    run: Callable[[nn.Module, Tensors, bool], Tensors] | None = None,
    change: Callable[[nn.Module], None] | None = None,
) -> None:
    """The gate. `run` replaces the op; `change` alters the layer once."""
    layer = decoder_layer(case.sizes, case.dtype, case.family, **case.config)
    if change is not None:
        change(layer)
    draws: list[tuple[Tensors, Tensors, Tensors]] = []
    for _ in range(case.launches):
        redraw(layer)
        inputs = site.inputs(layer, case.batch, case.seq)
        want = site.eager(exact(layer), *(t.double() for t in inputs))
        eager = site.eager(layer, *inputs)
        with poisoned(), force_strategy(case.strategy) if case.strategy else nullcontext():
            draws.append(((run or site.run)(layer, inputs, case.high), eager, want))
    # outputs[i] is an output's draws by the op, by eager and exactly
    outputs = [[torch.cat(drawn) for drawn in zip(*draw)] for draw in zip(*(zip(*draw) for draw in draws))]
    floor = 0.0
    if case.dtype == torch.float32:
        # Summation order alone moves a ratio between 0.45 and 2.2.
        floor = torch.finfo(torch.float32).eps * max(case.sizes.hidden, case.sizes.intermediate) ** 0.5
    for index, (got, eager, want) in enumerate(outputs):
        assert got.shape == eager.shape
        assert got.dtype == eager.dtype
        assert eager.isfinite().all(), "the gate would judge nothing"
        assert got.isfinite().all(), f"output {index} has elements that no kernel wrote, or overflows"
        ours, theirs = rms_error(got, want), rms_error(eager, want)
        assert ours <= max(MARGIN * theirs, floor), f"output {index}: error {ours:.3e}, eager's {theirs:.3e}"


def _small_cases() -> Iterator[Case]:
    steps: list[tuple[int, int, Strategy]] = [
        (1, 1, "rows"), (2, 1, "rows"), (1, 3, "rows"), (2, 2, "rows"),
        (1, 1, "skinny"), (1, 7, "skinny"), (4, 4, "skinny"), (1, 17, "skinny"),
        (1, 1, "library"), (2, 64, "library"),
    ]  # fmt: skip
    for dtype in DTYPES:
        for high in (False, True):
            yield from (Case(*step, dtype, high) for step in steps)
    # Head sizes that are no power of two; and enough of K for two steps of every kernel's loop.
    for sizes in (Sizes(40, 136, 4, 1, 24), Sizes(96, 104, 3, 3, 32), Sizes(1100, 1030, 2, 1, 16)):
        yield from (Case(*step, torch.float16, sizes=sizes) for step in ((2, 2, "rows"), (1, 7, "skinny")))


def _real_cases() -> Iterator[Case]:
    """The sizes of Qwen3-0.6B, Qwen3-4B, Qwen2.5-0.5B and a layer with heads of 96; the op chooses the strategy."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for rows in (1, 2, 7, 16, 17, 128):
        yield Case(rows, 1, None, bf16, sizes=QWEN3)
    few, prompt = ((1, 1), (17, 1), (2, 64)), ((1, 1), (1, 17), (1, 128))
    for dtype, high, sizes, family, steps in (
        (f16, False, QWEN3, "qwen3", prompt),
        (f32, False, QWEN3, "qwen3", few),
        (bf16, True, QWEN3, "qwen3", few),
        (bf16, False, Sizes(2560, 9728, 32, 8, 128), "qwen3", few),
        (bf16, False, Sizes(896, 4864, 14, 2, 64), "qwen2", prompt),
        (f16, True, Sizes(1152, 4864, 12, 4, 96), "llama", few),
    ):
        yield from (Case(*step, None, dtype, high, sizes, family) for step in steps)


CASES = [*_small_cases(), *(pytest.param(case, marks=pytest.mark.gpu) for case in _real_cases())]
"""Every strategy and both precisions; with a GPU, real sizes."""


def case_id(case: Case) -> str:
    return str(case)
