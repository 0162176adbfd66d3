"""The row-vector path: 1 to 4 activation rows against weights that are read once, by plain f32 multiply-adds.

A program owns BLOCK_N output features for all M rows and walks K in tiles of BLOCK_K. The first AHEAD tiles of weights
are asked for before anything that comes from the previous kernel (the activations, their norm): weights are most of
the bytes, and those loads hide the latency of the rest. Weights are read with `evict_first`: nobody reads them again
in this step.

One row in 16 bits may take tensor cores instead (`gemv_mma`), where the tables have measured that.

Tiles and rows are tuples, walked by loops that the compiler unrolls: several tiles are on their way at once, each in a
register of its own, whatever K is. Layers and head of Qwen3-1.7B (15 layers) on H200s: 613 us in a loop, 580 so.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusepass import tuning
from fusepass.kernels.common import before_activations, begin, inverse_rms, normalise, stored
from fusepass.kernels.common import gated as gated_value
from fusepass.kernels.gemv_mma import CHUNK, gated_mma_kernel, linear_mma_kernel
from fusepass.kernels.launch import block_k, cdiv, interpreted, interpreter_block_n, next_power_of_2, pdl_options, run

MOST_HELD = 64
"""Activations that a thread may hold in registers."""


@triton.jit
def _load_weight(w_ptr, rows, tile: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K] weights of a tile of K, as they are stored: in half the registers that f32 takes."""
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    w_ptr += rows.to(tl.int64)[:, None] * K + k[None, :]
    if (tile + 1) * BLOCK_K <= K:
        return tl.load(w_ptr, eviction_policy="evict_first")
    else:
        return tl.load(w_ptr, (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_vector(ptr, tile: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of a vector as [1, BLOCK_K] in f32: activations, or the weight of a norm."""
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    return tl.load(ptr + k, k < K, other=0.0).to(tl.float32)


@triton.jit
def _load_whole(ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr):
    """All tiles of a vector; none, if there is no vector or it is not held in registers."""
    tiles = ()
    if ptr is not None and HELD:
        for tile in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            tiles += (_load_vector(ptr, tile, K, BLOCK_K),)
    return tiles


@triton.jit
def _load_rows(x_ptr, x_stride, M: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr):
    """Where each row of activations begins, and the tiles of each."""
    pointers, rows = (), ()
    for _ in tl.static_range(M):
        pointers += (x_ptr,)
        rows += (_load_whole(x_ptr, K, BLOCK_K, HELD),)
        x_ptr += x_stride
    return pointers, rows


@triton.jit
def _rstds(pointers, rows, norm_ptr, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr):
    """1 / rms of each row, if there is a norm."""
    rstds = ()
    for m in tl.static_range(len(pointers)):
        if norm_ptr is None:
            rstds += (1.0,)
        elif HELD:
            squares = tl.zeros([1, BLOCK_K], tl.float32)
            for tile in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
                squares += rows[m][tile] * rows[m][tile]
            rstds += (tl.rsqrt(tl.sum(squares) / K + eps),)
        else:
            rstds += (inverse_rms(pointers[m], K, eps, BLOCK_K),)
    return rstds


@triton.jit
def _activations(
    pointer, row, norm_ptr, norm, rstd, tile: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """A tile of one row of activations, normalised if there is a norm."""
    x = row[tile] if HELD else _load_vector(pointer, tile, K, BLOCK_K)
    if norm_ptr is None:
        return x
    else:
        weight = norm[tile] if HELD else _load_vector(norm_ptr, tile, K, BLOCK_K)
        return normalise(x, weight, rstd, pointer.dtype.element_ty, HIGH)


@triton.jit
def linear_rows_kernel(
    x_ptr, x_stride, norm_ptr, eps,
    w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr, N0, N1, N2,
    residual_ptr, residual_stride,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    HELD: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y_i[m, :] = norm(x[m, :]) @ w_i.T + b_i (+ residual[m, :]) for one weight, or for three in one launch.

    x: [M, K]; w_i: [N_i, K] contiguous; y_i: [M, N_i] contiguous. norm, biases, w1, w2 and residual may be None.
    """
    begin(PDL, EARLY)
    block = tl.program_id(0)
    w_ptr, b_ptr, y_ptr, N = w0_ptr, b0_ptr, y0_ptr, N0
    if w1_ptr is not None:
        blocks0, blocks1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
        if block >= blocks0 + blocks1:
            block -= blocks0 + blocks1
            w_ptr, y_ptr, N = w2_ptr, y2_ptr, N2
            if b0_ptr is not None:
                b_ptr = b2_ptr
        elif block >= blocks0:
            block -= blocks0
            w_ptr, y_ptr, N = w1_ptr, y1_ptr, N1
            if b0_ptr is not None:
                b_ptr = b1_ptr
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)  # a clamped row costs no predicate; its result is not stored
    weights = ()
    for tile in tl.static_range(AHEAD):
        weights += (_load_weight(w_ptr, rows, tile, K, BLOCK_K),)
    norm = _load_whole(norm_ptr, K, BLOCK_K, HELD)
    bias = 0.0
    if b0_ptr is not None:
        bias = tl.load(b_ptr + n, n < N, other=0.0).to(tl.float32)
    before_activations(EARLY)

    # Everything that the result depends on is asked for before the first reduction: one trip to L2, not three.
    x_ptrs, x = _load_rows(x_ptr, x_stride, M, K, BLOCK_K, HELD)
    residuals = ()
    if residual_ptr is not None:
        for _ in tl.static_range(M):
            residuals += (tl.load(residual_ptr + n, n < N, other=0.0).to(tl.float32),)
            residual_ptr += residual_stride
    rstds = _rstds(x_ptrs, x, norm_ptr, eps, K, BLOCK_K, HELD)
    sums = (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),) * M
    for tile in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        w = weights[0].to(tl.float32)
        weights = weights[1:]
        if (tile + AHEAD) * BLOCK_K < K:
            weights += (_load_weight(w_ptr, rows, tile + AHEAD, K, BLOCK_K),)
        added = ()
        for m in tl.static_range(M):
            added += (
                sums[m] + w * _activations(x_ptrs[m], x[m], norm_ptr, norm, rstds[m], tile, K, BLOCK_K, HELD, HIGH),
            )
        sums = added
    for m in tl.static_range(M):
        y = tl.sum(sums[m], 1) + bias
        if residual_ptr is not None:
            y = stored(y, y_ptr.dtype.element_ty, HIGH) + residuals[m]
        tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)


@triton.jit
def gated_rows_kernel(
    x_ptr, x_stride, norm_ptr, eps,
    gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, y_ptr, N,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    HELD: tl.constexpr, ACTIVATION: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y[m, :] = activation(norm(x[m, :]) @ gate.T) * (norm(x[m, :]) @ up.T); shapes as in `linear_rows_kernel`."""
    begin(PDL, EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    gates, ups = (), ()
    for tile in tl.static_range(AHEAD):
        gates += (_load_weight(gate_ptr, rows, tile, K, BLOCK_K),)
        ups += (_load_weight(up_ptr, rows, tile, K, BLOCK_K),)
    norm = _load_whole(norm_ptr, K, BLOCK_K, HELD)
    gate_bias, up_bias = 0.0, 0.0
    if gate_bias_ptr is not None:
        gate_bias = tl.load(gate_bias_ptr + n, n < N, other=0.0).to(tl.float32)
        up_bias = tl.load(up_bias_ptr + n, n < N, other=0.0).to(tl.float32)
    before_activations(EARLY)

    x_ptrs, x = _load_rows(x_ptr, x_stride, M, K, BLOCK_K, HELD)
    rstds = _rstds(x_ptrs, x, norm_ptr, eps, K, BLOCK_K, HELD)
    gate_sums = (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),) * M
    up_sums = gate_sums
    for tile in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        gate, up = gates[0].to(tl.float32), ups[0].to(tl.float32)
        gates, ups = gates[1:], ups[1:]
        if (tile + AHEAD) * BLOCK_K < K:
            gates += (_load_weight(gate_ptr, rows, tile + AHEAD, K, BLOCK_K),)
            ups += (_load_weight(up_ptr, rows, tile + AHEAD, K, BLOCK_K),)
        gates_added, ups_added = (), ()
        for m in tl.static_range(M):
            act = _activations(x_ptrs[m], x[m], norm_ptr, norm, rstds[m], tile, K, BLOCK_K, HELD, HIGH)
            gates_added += (gate_sums[m] + gate * act,)
            ups_added += (up_sums[m] + up * act,)
        gate_sums, up_sums = gates_added, ups_added
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    for m in tl.static_range(M):
        gate, up = tl.sum(gate_sums[m], 1) + gate_bias, tl.sum(up_sums[m], 1) + up_bias
        tl.store(y_ptr + m * N + n, gated_value(gate, up, dtype, ACTIVATION, HIGH).to(dtype), n < N)


def _config(kernel: str, m: int, n: int, k: int, dtype: torch.dtype, high: bool = False) -> dict[str, int]:
    """Block sizes and warps: measured ones if there are, else safe ones. AHEAD: tiles of weights that are asked for
    before they are needed. CHUNKS: the kernel is one of `gemv_mma`. HELD: whether registers hold all activations (and
    the weight of the norm), so that they are read once for the norm's statistics and for the product."""
    found = tuning.lookup(kernel, m, n, k, dtype)
    if found and "CHUNKS" in found and high:
        found = None  # tensor cores have no f32 activations, and nobody has measured what is best instead
    config = {"AHEAD": 1, **(found or _safe_config(kernel, m, n, k, dtype))}
    threads = 32 * config["num_warps"]
    if "CHUNKS" in config:
        config["WARPS"] = config["num_warps"]
        tile_k = config["CHUNKS"] * config["WARPS"] * CHUNK.value
    else:
        tile_k = config["BLOCK_K"]
        # A thread loads 16 bytes at a time.
        config["HELD"] = tile_k >= k or m * k <= MOST_HELD * min(threads, tile_k * dtype.itemsize // 16)
    config["AHEAD"] = min(config["AHEAD"], cdiv(k, tile_k))
    return config


def _safe_config(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """One row: 2-4 features a program with as much of K as registers hold were 10-20 % faster on an H200 than larger
    tiles. More rows need accumulators for each, and a long K its activations: their tiles are smaller."""
    if interpreted():
        return {"BLOCK_N": interpreter_block_n(n), "BLOCK_K": block_k(k, 1024), "num_warps": 1}
    tile_n, tile_k = 1, 1024
    if m == 1:
        tile_n = 4 if kernel == "linears" and n >= 4096 and k <= 4096 else 2  # a walk with 4 spills on a B200
        tile_k = (2048 if k < 4096 else 4096) * 2 // dtype.itemsize
    elif m == 2 and k <= 8192:
        tile_n = 2
    # The walk along K is unrolled: not more than 16 steps.
    return {"BLOCK_N": tile_n, "BLOCK_K": block_k(k, max(tile_k, next_power_of_2(cdiv(k, 16)))), "num_warps": 4}


def linears(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    residual: Tensor | None,
    high: bool,
    early: bool,
) -> None:
    """Launch `linear_rows_kernel` or `linear_mma_kernel`: one weight or three; biases all or none. Shapes as in
    `project`; 1 to 4 rows."""
    m, k = x.shape
    sizes = [w.shape[0] for w in weights]
    pad = [None] * (3 - len(weights))
    config = _config("linears", m, sum(sizes), k, x.dtype, high)
    grid = (sum(cdiv(n, config["BLOCK_N"]) for n in sizes),)
    run(
        linear_mma_kernel if "CHUNKS" in config else linear_rows_kernel, grid,
        x, x.stride(0), norm_weight, eps, *weights, *pad, *biases, *pad, *outs, *pad, *sizes, *(0 for _ in pad),
        residual, 0 if residual is None else residual.stride(0), M=m, K=k, HIGH=high,
        **pdl_options(early), **config,
    )  # fmt: skip


def gated(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out: Tensor,
    activation: str,
    high: bool,
    early: bool,
) -> None:
    """Launch `gated_rows_kernel` or `gated_mma_kernel`. x: [M, K] of 1 to 4 rows; gate, up: [N, K]; out: [M, N]; biases
    both or none."""
    m, k = x.shape
    n = gate.shape[0]
    config = _config("gated", m, n, k, x.dtype, high)
    run(
        gated_mma_kernel if "CHUNKS" in config else gated_rows_kernel, (cdiv(n, config["BLOCK_N"]),),
        x, x.stride(0), norm_weight, eps, gate, up, gate_bias, up_bias, out, n,
        M=m, K=k, ACTIVATION=activation, HIGH=high, **pdl_options(early), **config,
    )  # fmt: skip
