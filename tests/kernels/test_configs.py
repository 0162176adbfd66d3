"""The numeric gate for launch configs: each way a kernel walks along K, and each config of the shipped tables."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusepass.tuning
from fusepass import tuning
from fusepass.kernels import gemv, skinny
from fusepass.kernels.launch import cdiv, next_power_of_2
from fusepass.ops import OPS
from tests.ops.gate import poisoned
from tests.ops.sites import DEVICE

MARGIN = 1.1
EPS = 1e-6
Config = dict[str, int]

ROWS: list[Config] = [
    {"BLOCK_N": 4, "BLOCK_K": 128, "num_warps": 1},  # a tile holds a row
    {"BLOCK_N": 4, "BLOCK_K": 32, "num_warps": 1},
    {"BLOCK_N": 2, "BLOCK_K": 32, "AHEAD": 2, "num_warps": 1},
    {"BLOCK_N": 8, "BLOCK_K": 16, "AHEAD": 7, "num_warps": 1},
]
SKINNY: list[Config] = [
    {"BLOCK_N": 16, "SLICES": slices, "BLOCK_K": block_k, "AHEAD": ahead, "num_warps": 1, "num_stages": stages}
    for slices, block_k, ahead, stages in [
        (1, 128, 1, 1), (4, 32, 1, 1),  # a tile holds a row
        (1, 32, 0, 3), (2, 16, 0, 3), (4, 16, 0, 2),  # a pipeline
        (1, 32, 1, 3), (2, 16, 2, 3), (4, 16, 2, 2),  # a pipeline behind 1 of 4 steps, 2 of 4, none left of 2
        (1, 32, 1, 1), (2, 16, 2, 1), (2, 16, 4, 1),  # of 4 steps, 1, 2 or all ahead
    ]
]  # fmt: skip
MMA: list[tuple[int, Config]] = [
    (K, {"BLOCK_N": BLOCK_N, "CHUNKS": CHUNKS, "AHEAD": AHEAD, "num_warps": num_warps})
    for K, BLOCK_N, CHUNKS, AHEAD, num_warps in [
        (100, 2, 2, 1, 1), (100, 8, 4, 1, 2),  # a tile holds the row, and more
        (600, 8, 2, 1, 1), (600, 16, 2, 3, 1), (1050, 16, 2, 2, 2), (1050, 8, 4, 1, 1), (1032, 8, 2, 1, 4),
    ]
]  # fmt: skip
K = 100


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def draw_unaligned(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The same, beginning 2 bytes behind a multiple of 16."""
    return draw(1 + math.prod(shape), dtype=dtype, scale=scale)[1:].view(shape)


def rms_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt())


def eager(
    kernel: str, x: Tensor, residual: Tensor, w0: Tensor, w1: Tensor, b0: Tensor, b1: Tensor, norm: Tensor | None = None
) -> Tensor:
    h = x if norm is None else OPS["rms_norm"].reference(x, norm, EPS, False)
    if kernel.endswith("gated"):
        return F.silu(F.linear(h, w0, b0)) * F.linear(h, w1, b1)
    return residual + F.linear(h, w0, b0)


def check(
    config: Config, kernel: str, m: int, n: int, k: int, dtype: torch.dtype, norm: bool, draws: int,
    draw_weights: Callable[..., Tensor] = draw,
) -> None:  # fmt: skip
    """`kernel` ("linears", "gated", or either after "skinny ") is as exact as eager: root mean square over draws."""
    rows = max(8, next_power_of_2(m)) if kernel.startswith("skinny") else m
    with tuning.override({tuning.key(kernel, rows, n, k, dtype): config}):
        kernels = skinny if kernel.startswith("skinny") else gemv
        assert config.items() <= kernels._config(kernel.removeprefix("skinny "), m, n, k, dtype).items()
        _check(kernel, m, n, k, dtype, norm, draws, draw_weights)


def _check(
    kernel: str, m: int, n: int, k: int, dtype: torch.dtype, norm: bool, draws: int,
    draw_weights: Callable[..., Tensor],
) -> None:  # fmt: skip
    kernels = skinny if kernel.startswith("skinny") else gemv
    results: tuple[list[Tensor], ...] = ([], [], [])
    for _ in range(draws):
        x, residual = draw(m, k, dtype=dtype), draw(m, n, dtype=dtype)
        weights = [draw_weights(n, k, dtype=dtype, scale=k**-0.5) for _ in range(2)]
        bias = [draw(n, dtype=dtype) for _ in range(2)]
        inputs = (x, residual, *weights, *bias, *([draw(k, dtype=dtype)] if norm else []))
        weight = inputs[6] if norm else None
        out = torch.empty(m, n, dtype=dtype, device=DEVICE)
        with poisoned():
            out.fill_(torch.nan)
            if kernel.endswith("gated"):
                kernels.gated(x, weight, EPS, *weights, *bias, out, "silu", False, True)
            else:
                kernels.linears(x, weight, EPS, weights[:1], bias[:1], [out], residual, False, True)

        for found, result in zip(results, (out, eager(kernel, *inputs), eager(kernel, *(t.double() for t in inputs)))):
            found.append(result)
    ours, theirs, exact = map(torch.cat, results)
    assert rms_error(ours, exact) <= MARGIN * rms_error(theirs, exact)


@pytest.mark.parametrize("kernel", ["linears", "gated"])
@pytest.mark.parametrize(
    ("config", "m", "norm"), [*zip(ROWS, (1, 2, 3, 4), [False] * 4), *zip(ROWS, (4, 1, 2, 3), [True] * 4)], ids=str
)
def test_rows_by_every_walk_along_k(config: Config, m: int, norm: bool, kernel: str) -> None:
    check(config, kernel, m, 13, K, torch.float16, norm, cdiv(32, m))


@pytest.mark.parametrize(("kernel", "norms"), [("linears", [False, True]), ("gated", [True, False])], ids=str)
@pytest.mark.parametrize(("k", "config", "which"), [(*case, i % 2) for i, case in enumerate(MMA)], ids=str)
def test_one_row_on_tensor_cores_by_every_walk_along_k(
    k: int, config: Config, which: int, kernel: str, norms: list[bool]
) -> None:
    """With the norm and without, in turn."""
    check(config, kernel, 1, 13, k, torch.float16, norms[which], 32)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["linears", "gated"])
@pytest.mark.parametrize(("k", "config"), MMA, ids=str)
def test_one_row_on_tensor_cores_with_weights_anywhere(k: int, config: Config, kernel: str) -> None:
    """Rows that are no multiple of 16 bytes, weights that begin 2 bytes behind one."""
    check(config, kernel, 1, 45, k, torch.bfloat16, True, 8, draw_unaligned)


def test_one_feature_at_a_time_on_tensor_cores() -> None:
    config = {"BLOCK_N": 1, "CHUNKS": 2, "AHEAD": 1, "num_warps": 2}
    check(config, "gated", 1, 5, K, torch.float16, True, 32)


def test_three_weights_in_one_launch_on_tensor_cores() -> None:
    """Each of another size, one of less than a block; with biases."""
    sizes, results = (5, 1, 40), ([], [], [])
    with tuning.override({tuning.key("linears", 1, sum(sizes), K, torch.float16): MMA[1][1]}), poisoned():
        for _ in range(16):
            x, norm, *biases = (draw(*shape, dtype=torch.float16) for shape in ((1, K), (K,), *((n,) for n in sizes)))
            weights = [draw(n, K, dtype=torch.float16, scale=K**-0.5) for n in sizes]
            outs = [torch.full((1, n), torch.nan, dtype=torch.float16, device=DEVICE) for n in sizes]
            gemv.linears(x, norm, EPS, weights, biases, outs, None, False, True)
            for found, dtype in zip(results[1:], (torch.float16, torch.float64), strict=True):
                h = OPS["rms_norm"].reference(x.to(dtype), norm.to(dtype), EPS, False)
                found += [F.linear(h, w.to(dtype), b.to(dtype)) for w, b in zip(weights, biases, strict=True)]
            results[0].extend(outs)
    ours, theirs, exact = (torch.cat(found, 1) for found in results)
    assert rms_error(ours, exact) <= MARGIN * rms_error(theirs, exact)


@pytest.mark.parametrize("kernel", ["linears", "gated"])
def test_rows_that_tensor_cores_have_not_are_left_to_others(kernel: str) -> None:
    """`high` keeps activations in f32: a table's config for the row in 16 bits is none for it."""
    with tuning.override({tuning.key(kernel, 1, 13, K, torch.float16): MMA[0][1]}):
        assert "CHUNKS" in gemv._config(kernel, 1, 13, K, torch.float16)
        assert "CHUNKS" not in gemv._config(kernel, 1, 13, K, torch.float16, high=True)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("at", [0, 37, 599])
def test_what_is_infinite_stays_where_it_is(at: int) -> None:
    """An `mma` multiplies each weight with activations of other parts of K too, and with the zeros behind K."""
    x = draw(1, 600, dtype=torch.float16)
    weight, residual = draw(13, 600, dtype=torch.float16), draw(1, 13, dtype=torch.float16)
    x[0, at] = torch.inf
    weight[:5, at], weight[7, (at + 300) % 600] = 0.0, torch.inf
    out = torch.full((1, 13), torch.nan, dtype=torch.float16, device=DEVICE)
    with tuning.override({tuning.key("linears", 1, 13, 600, torch.float16): MMA[3][1]}):
        gemv.linears(x, None, 0.0, [weight], [None], [out], residual, False, True)
    exact = residual.double() + F.linear(x.double(), weight.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["skinny linears", "skinny gated"])
@pytest.mark.parametrize("k", [96, 100, 4096])
def test_prefetched_weights_may_begin_and_end_anywhere(k: int, kernel: str) -> None:
    """Rows that are no multiple of 16 bytes, weights that begin 2 bytes behind one, a last tile of 8 rows in 16."""
    config = {**SKINNY[2], "PREFETCH": 1, "num_warps": 4}
    check(config, kernel, 8, 40, k, torch.bfloat16, False, 8, draw_unaligned)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kernel", ["skinny linears", "skinny gated"])
@pytest.mark.parametrize(("config", "m"), [*zip(SKINNY, (3, 8, 16, 11, 5, 8, 3, 16, 7, 12, 9), strict=True)], ids=str)
def test_skinny_by_every_walk_along_k(config: Config, m: int, kernel: str, norm: bool) -> None:
    check(config, kernel, m, 24, K, torch.float16, norm, 16)


TABLES = sorted(Path(fusepass.tuning.__file__).parent.glob("*.json"))
SHIPPED = [(table.stem, key, config) for table in TABLES for key, config in json.loads(table.read_text()).items()]


@pytest.mark.gpu
@pytest.mark.parametrize(("table", "key", "config"), SHIPPED, ids=lambda value: str(value))
def test_every_shipped_config(table: str, key: str, config: Config) -> None:
    if tuning.slug() != table:
        pytest.skip(f"the config is for {table}")
    found = re.fullmatch(r"((?:skinny )?\w+) m(\d+) n(\d+) k(\d+) (\w+)", key)
    assert found is not None
    m, n, k = map(int, found.group(2, 3, 4))
    for rows in {m, max(1, m // 2 + 1)} if "skinny" in key else {m}:
        check(config, found[1], rows, n, k, getattr(torch, found[5]), True, 2 if n * k > 2**28 else 8)
