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
from tests.gate import FACTOR, reference
from tests.ops.sites import DEVICE, DTYPES, QWEN3, SMALL, Site, Sizes, Tensors, as_tuple, decoder_layer, redraw

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
    draws: int = DRAWS

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.seq}", self.strategy or "default", str(self.dtype).removeprefix("torch.")]
        words += ["high"] * self.high + [str(self.sizes)] * (self.sizes != SMALL) + [self.family, *self.config]
        return "-".join(words)

    @property
    def launches(self) -> int:
        """Every row of activations is a draw; weights are drawn for each launch. (The interpreter is slow.)"""
        return max(8 if DEVICE == "cuda" else 2, self.draws // (self.batch * self.seq))


def rms_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want, each channel (last dimension) in units of its own size."""
    difference, want = (t.reshape(-1, want.shape[-1]) for t in (got.double() - want, want))
    return float((difference / want.square().mean(0).sqrt()).square().mean().sqrt())


def _in_f64(t: Tensor | None) -> Tensor | None:
    """Masks may be bool or none, positions are integers."""
    return t if t is None or not t.is_floating_point() else t.double()


Run = Callable[[nn.Module, Tensors], Tensors]


def assert_as_exact_as_eager(
    site: Site,
    case: Case,
    *,
    change: Callable[[nn.Module], None] | None = None,
    run: Run | None = None,
    yardstick: Run | None = None,
) -> None:
    """The gate. `change` alters the layer; `run` stands in for the op, `yardstick` for the eager modules."""
    layer = decoder_layer(case.sizes, case.dtype, case.family, **case.config)
    if change is not None:
        change(layer)
    draws: list[tuple[Tensors, Tensors, Tensors]] = []
    for _ in range(case.launches):
        redraw(layer)
        inputs = site.inputs(layer, case.batch, case.seq)
        exact = site.eager(reference(layer), *map(_in_f64, inputs))
        eager = yardstick(layer, inputs) if yardstick else site.eager(layer, *inputs)
        with poisoned(), force_strategy(case.strategy) if case.strategy else nullcontext():
            got = run(layer, inputs) if run else site.run(layer, inputs, case.high)
        draws.append((got, eager, exact))
    # Summation order alone moves a single f32 ratio between 0.45 and 2.2.
    longest = max(case.sizes.hidden, case.sizes.intermediate, case.sizes.heads * case.sizes.head_dim)
    floor = torch.finfo(torch.float32).eps * longest**0.5 if case.dtype == torch.float32 else 0.0
    # by output and by who computed it, the draws
    for index, computed in enumerate(zip(*(zip(*draw, strict=True) for draw in draws))):
        got, eager, exact = (torch.cat(drawn) for drawn in zip(*computed))
        assert (got.shape, got.dtype) == (eager.shape, eager.dtype)
        assert eager.isfinite().all(), "the gate would judge nothing"
        assert got.isfinite().all(), f"output {index} has elements that no kernel wrote, or overflows"
        ours, theirs = rms_error(got, exact), rms_error(eager, exact)
        assert ours <= max(FACTOR * theirs, floor), f"output {index}: error {ours:.3e}, eager's {theirs:.3e}"


def assert_keeps_f32(site: Site, case: Case) -> None:
    """In the op's own kernels "high" rounds no more often than the reference, which keeps f32 through the region. (A
    library GEMM returns its products rounded: there "high" passes the gate and promises no more.)"""

    def in_f32(layer: nn.Module, inputs: Tensors) -> Tensors:
        return as_tuple(site.op.reference(*site.named(layer, inputs, high=True).values()))

    assert_as_exact_as_eager(site, case, yardstick=in_f32)


STEPS: list[tuple[int, int, Strategy]] = [
    (1, 1, "rows"), (2, 1, "rows"), (1, 3, "rows"), (2, 2, "rows"),
    (1, 1, "skinny"), (1, 7, "skinny"), (4, 4, "skinny"), (1, 17, "skinny"),
    (1, 1, "library"), (5, 13, "library"),
]  # fmt: skip
"""Batch, sequence, strategy: each number of rows that the kernels tell apart."""
FORM_STEPS: list[tuple[int, int, Strategy]] = [(2, 2, "rows"), (1, 7, "skinny"), (2, 4, "library")]
"""Enough to see that a form of the span is right."""


def small_cases() -> Iterator[Case]:
    f16, f32 = DTYPES
    yield from (Case(*step, f16) for step in STEPS)
    yield from (Case(*step, f16, high=True) for step in STEPS[::2])
    yield from (Case(*step, f32) for step in STEPS[1::2])
    yield from (Case(*step, f32, high=True) for step in FORM_STEPS)
    yield Case(2, 64, "library", f16)
    # Head sizes that are no power of two; and enough of K for two steps of every kernel's loop.
    for sizes in (Sizes(40, 136, 4, 1, 24), Sizes(96, 104, 3, 3, 32), Sizes(1100, 1030, 2, 1, 16)):
        yield from (Case(*step, f16, sizes=sizes) for step in ((2, 2, "rows"), (1, 7, "skinny")))


def real_cases() -> Iterator[Case]:
    """The sizes of Qwen3-0.6B, Qwen3-4B, Qwen2.5-0.5B and a layer with heads of 96; the op chooses the strategy."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    yield from (Case(rows, 1, None, bf16, sizes=QWEN3) for rows in (1, 2, 7, 16, 17, 128))
    yield Case(4, 1, "rows", bf16, sizes=QWEN3)
    for dtype, high, sizes, family, steps in (
        (f16, False, QWEN3, "qwen3", ((1, 1), (1, 17), (1, 128))),
        (f32, False, QWEN3, "qwen3", ((1, 1), (17, 1), (2, 64))),
        (bf16, True, QWEN3, "qwen3", ((1, 1), (17, 1), (2, 64))),
        (bf16, False, Sizes(2560, 9728, 32, 8, 128), "qwen3", ((1, 1), (16, 1), (2, 64))),
        (bf16, False, Sizes(896, 4864, 14, 2, 64), "qwen2", ((1, 1), (1, 7), (1, 128))),
        (f16, True, Sizes(1152, 4864, 12, 4, 96), "llama", ((2, 1), (1, 17), (1, 128))),
    ):
        yield from (Case(*step, None, dtype, high, sizes, family) for step in steps)


CASES = [*small_cases(), *(pytest.param(case, marks=pytest.mark.gpu) for case in real_cases())]
"""Every strategy, both precisions; on a GPU, real sizes."""
HIGH_CASES = [Case(*step, torch.float16, high=True) for step in FORM_STEPS if step[2] != "library"]
FORM_CASES = [Case(*step, torch.float16) for step in FORM_STEPS]
F32_CASES = [Case(*step, torch.float32) for step in FORM_STEPS]
