"""Attention against SDPA: exactness, masks of every kind, layouts, and what torch.compile relies on."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusepass.kernels import attention as kernels
from fusepass.kernels.attention_plan import Plan
from fusepass.kernels.launch import cdiv
from fusepass.ops import OPS
from tests.ops.gate import poisoned
from tests.ops.sites import DEVICE, DTYPES

OP = OPS["attention"]
MARGIN = 1.1
DRAWS = 32
Shape = tuple[int, int, int, int, int, int]
"""Batch, heads, K/V heads, queries, length of the cache, head size."""
Mask = Callable[[Shape, torch.dtype], Tensor | None]

SHAPES: list[Shape] = [
    (1, 6, 2, 1, 150, 16), (2, 4, 4, 1, 37, 24), (3, 7, 1, 2, 200, 32), (1, 2, 1, 1, 1, 16), (1, 2, 1, 1, 90, 24),
]  # fmt: skip
"""For the interpreter: one split and several, groups and heads that are no power of two, one position, and so few
queries that the combine takes heads in halves."""
LENGTHS = ((1, 1), (1, 511), (3, 1000), (1, 4096), (2, 77))
REAL: list[Shape] = [
    (LENGTHS[i % 5][0], 2 * group, 2, 1, LENGTHS[i % 5][1], size)
    for i, (size, group) in enumerate(itertools.product((64, 96, 128), (1, 2, 4, 8)))
] + [
    (1, 16, 8, 8, 700, 128), (1, 4, 1, 1, 3000, 256),
    # So many groups that long splits go through the pipeline, of 2, 7, 2 and 16 queries.
    (32, 16, 8, 1, 600, 128), (64, 14, 2, 1, 900, 64), (16, 8, 4, 1, 500, 256), (20, 32, 2, 1, 1000, 128),
]  # fmt: skip


def left_padded(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A static cache filled to two thirds; each of four sequences begins later than the one before."""
    batch, _, _, seq, length, _ = shape
    t = torch.arange(length, device=DEVICE)
    fill = 2 * length // 3 - torch.arange(seq, device=DEVICE).flip(0)[:, None]
    begin = (torch.arange(batch, device=DEVICE) % 4 * length // 5)[:, None, None, None]
    return ((t <= fill) & (t >= begin)) | (t == fill.clamp(min=0))


def window(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A window near the end with holes in it."""
    t = torch.arange(shape[4], device=DEVICE)
    return ((t >= shape[4] // 2) & (t % 5 != 1) | (t == shape[4] - 1)).expand(1, 1, shape[3], -1)


def expanded(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Strides of zero in batch, heads and queries."""
    return window(shape, dtype).expand(shape[0], shape[1], -1, -1)


def per_head(shape: Shape, dtype: torch.dtype) -> Tensor:
    batch, heads, _, seq, length, _ = shape
    mask = torch.rand(batch, heads, seq, length, device=DEVICE) > 0.7
    return mask | (torch.arange(length, device=DEVICE) == length // 2)


def additive(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Numbers, and -inf where `left_padded` hides."""
    mask = left_padded(shape, dtype)
    return torch.randn(mask.shape, device=DEVICE).to(dtype).masked_fill(~mask, -math.inf)


def lowest(shape: Shape, dtype: torch.dtype) -> Tensor:
    """The lowest finite number where `window` hides, as transformers writes it."""
    mask = window(shape, dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=DEVICE).masked_fill(~mask, torch.finfo(dtype).min)


def no_mask(shape: Shape, dtype: torch.dtype) -> None:
    return None


MASKS = [no_mask, left_padded, window, expanded, per_head, additive, lowest]
CASES = [*itertools.product(SHAPES, DTYPES, MASKS)]
# At real sizes every mask in bf16, and one in each of the other dtypes.
ON_GPU = [*itertools.product(REAL, [torch.bfloat16], MASKS)]
ON_GPU += [(shape, dtype, MASKS[i % len(MASKS)]) for i, shape in enumerate(REAL) for dtype in DTYPES]
CASES += [pytest.param(*case, marks=pytest.mark.gpu) for case in ON_GPU]


def draw(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q as [B, S, H, D] in memory, k and v as views of a longer cache."""
    batch, heads, kv_heads, seq, length, size = shape
    q = torch.randn(batch, seq, heads, size, device=DEVICE).to(dtype).transpose(1, 2)
    cache = torch.randn(2, batch, kv_heads, length + 9, size, device=DEVICE).to(dtype)
    k, v = cache[:, :, :, 4 : length + 4]
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return OP.reference(q.double(), k.double(), v.double(), mask, scale)


def rms_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference."""
    return float((got.double() - want).square().mean().sqrt())


@pytest.mark.parametrize(("shape", "dtype", "mask"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_as_exact_as_eager(shape: Shape, dtype: torch.dtype, mask: Mask) -> None:
    seen: tuple[list[Tensor], ...] = ([], [], [])
    # in the interpreter a query is a draw
    for _ in range(DRAWS if DEVICE == "cuda" else cdiv(DRAWS, math.prod(shape[:2]))):
        arguments = (*draw(shape, dtype), mask(shape, dtype), 1.3 * shape[5] ** -0.5)
        with poisoned():
            ours = OP.overload(*arguments)
        for found, result in zip(seen, (ours, OP.reference(*arguments), exact(*arguments))):
            found.append(result.flatten(0, 2))
    ours, eager, want = map(torch.cat, seen)
    assert ours.isfinite().all()
    floor = torch.finfo(dtype).eps * (3 if dtype == torch.float32 else 0)  # summation order alone moves an f32 ratio
    assert rms_error(ours, want) <= max(MARGIN * rms_error(eager, want), floor)


@pytest.mark.parametrize("mask", [no_mask, left_padded, window, per_head, lowest])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("ahead", "stages", "primed"), [(True, 0, False), (False, 3, False), (True, 3, False), (False, 3, True)]
)
@pytest.mark.parametrize("heads", [6, 14])
def test_many_blocks_a_split(
    heads: int, ahead: bool, stages: int, primed: bool, splits: int, mask: Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 and of 14 queries. With both loops: 10 visible blocks of one split go through the pipeline, 4 and less of
    three do not."""
    monkeypatch.setattr(kernels, "plan", lambda *_: Plan(16, splits, ahead, stages, primed))
    shape, draws = (2, heads, 2, 2, 150, 16), []
    for _ in range(cdiv(DRAWS, math.prod(shape[:2]) * shape[3])):
        arguments = (*draw(shape, torch.float16), mask(shape, torch.float16), 0.3)
        with poisoned():
            ours = OP.overload(*arguments)
        draws.append((ours, OP.reference(*arguments), exact(*arguments)))
    ours, eager, want = map(torch.cat, zip(*draws))
    assert rms_error(ours, want) <= MARGIN * rms_error(eager, want)


@pytest.mark.parametrize("length", [9, 150])
@pytest.mark.parametrize("hidden", [False, -math.inf, "lowest"])
def test_a_row_that_sees_nothing_gives_what_sdpa_gives(length: int, hidden: float | str) -> None:
    q, k, v = draw((2, 4, 2, 1, length, 16), torch.float32)
    if hidden is False:
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device=DEVICE)
        hides: float = 0
    else:
        mask = torch.zeros(2, 1, 1, length, device=DEVICE)
        hides = torch.finfo(torch.float32).min if hidden == "lowest" else -math.inf
    mask[1] = hides
    got, want = OP.overload(q, k, v, mask, 0.3), OP.reference(q, k, v, mask, 0.3)
    torch.testing.assert_close(got, want)
    # The lowest finite number takes from all alike; -inf and False leave nothing.
    mean = v[1].mean(1).repeat_interleave(2, 0)[:, None]
    torch.testing.assert_close(got[1], mean if hidden == "lowest" else torch.zeros_like(mean))


def test_hidden_positions_are_not_read() -> None:
    shape = (1, 4, 2, 1, 1500, 16)
    q, k, v = draw(shape, torch.float32)
    mask = (torch.arange(1500, device=DEVICE) < 100)[None, None, None]
    want = OP.reference(q, k, v, mask, 0.25)
    for x in (k, v):
        x[:, :, 128:] = math.nan  # whole blocks
    torch.testing.assert_close(OP.overload(q, k, v, mask, 0.25), want)
    torch.testing.assert_close(OP.overload(q, k, v, torch.where(mask, 0.0, -3e38), 0.25), want)


@pytest.mark.gpu
@pytest.mark.parametrize("begin", [0, 20000, 32768 - 512])
def test_a_large_cache_that_is_nearly_empty(begin: int) -> None:
    q, k, v = draw((1, 16, 8, 1, 32768, 128), torch.bfloat16)
    t = torch.arange(32768, device=DEVICE)
    mask = ((t >= begin) & (t < begin + 512))[None, None, None]
    got, want = OP.overload(q, k, v, mask, 0.1), exact(q, k, v, mask, 0.1)
    assert rms_error(got, want) <= MARGIN * rms_error(OP.reference(q, k, v, mask, 0.1), want)
    for x in (k, v):
        x[:, :, : begin // 64 * 64] = math.nan
        x[:, :, begin + 576 :] = math.nan
    assert torch.equal(OP.overload(q, k, v, mask, 0.1), got)


@pytest.mark.gpu
def test_a_cache_of_more_than_2_to_the_31_elements() -> None:
    cache = torch.zeros(2, 1, 8, (1 << 21) + 64, 128, dtype=torch.bfloat16, device=DEVICE)
    k, v = cache[:, :, :, : 1 << 21]
    q = torch.randn(1, 16, 1, 128, device=DEVICE).bfloat16()
    v[..., -7:, :] = torch.randn(7, 128, device=DEVICE).bfloat16()
    mask = (torch.arange(1 << 21, device=DEVICE) >= (1 << 21) - 7)[None, None, None]
    want = v[:, :, -7:].double().mean(2, keepdim=True).repeat_interleave(2, 1)
    assert rms_error(OP.overload(q, k, v, mask, 0.1), want) < 5e-3


@pytest.mark.parametrize("shape", [*SHAPES, (2, 6, 2, 40, 50, 16)], ids=str)
def test_fake_reference_and_launch_give_one_layout(shape: Shape) -> None:
    arguments = (*draw(shape, torch.float16), None, 0.25)
    with FakeTensorMode() as mode:
        fake = OP.overload(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    real = [OP.reference(*arguments), OP.overload(*arguments)]
    for result in (fake, *real):
        assert result.shape == arguments[0].shape
        assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("seq", [1, 3, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_accepts_the_op(seq: int, masked: bool) -> None:
    shape = (2, 4, 2, seq, 50, 16)
    mask = left_padded(shape, torch.float16) if masked else None
    torch.library.opcheck(OP.overload, (*draw(shape, torch.float16), mask, 0.25))


def test_two_runs_give_the_same_bits() -> None:
    shape = (1, 6, 2, 1, 700, 32)
    arguments = (*draw(shape, torch.float16), left_padded(shape, torch.float16), 0.2)
    assert torch.equal(OP.overload(*arguments), OP.overload(*arguments))


@pytest.mark.parametrize("how", ["strided", "contiguous", "no batch", "no keys"])
def test_other_layouts_and_empty_tensors(how: str) -> None:
    q, k, v = draw((2, 4, 2, 1, 20, 16), torch.float32)
    if how == "strided":
        q, k, v = (x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v))
    elif how == "contiguous":
        q, k, v = (x.contiguous() for x in (q, k, v))
    elif how == "no batch":
        q, k, v = (x[:0] for x in (q, k, v))
    else:
        k, v = k[:, :, :0], v[:, :, :0]
    torch.testing.assert_close(OP.overload(q, k, v, None, 0.25), OP.reference(q, k, v, None, 0.25))


@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_an_impossible_argument_is_named(name: str) -> None:
    q, k, v = draw((2, 4, 2, 1, 20, 16), torch.float32)
    arguments = {"q": q, "k": k, "v": v, "mask": torch.zeros(2, 1, 1, 20, device=DEVICE)}
    arguments[name] = arguments[name][..., :-1] if name == "mask" else arguments[name][0]
    with pytest.raises(ValueError, match=f"argument '{name}'"):
        OP.overload(*arguments.values(), 0.25)
