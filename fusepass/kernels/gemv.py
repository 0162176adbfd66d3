"""The row-vector path: 1 to 4 activation rows against weights that are read once, by plain f32 multiply-adds.

A program owns BLOCK_N output features for all M rows and walks K in BLOCK_K steps. Its first weight tile is
loaded before anything it needs from the previous kernel (the norm's statistics, the activations): weights are most
of the bytes, and that load is what hides the latency of the rest. Weights are read with `evict_first`: nobody
reads them again in this step.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusepass import tuning
from fusepass.kernels.common import before_activations, begin, inverse_rms, normalise, stored
from fusepass.kernels.common import gated as gated_value
from fusepass.kernels.launch import block_k, cdiv, interpreted, interpreter_block_n, pdl_options, run


@triton.jit
def _load_weight(w_ptr, rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    w_ptr += rows.to(tl.int64)[:, None] * K + k[None, :]
    if K % BLOCK_K == 0:
        return tl.load(w_ptr, eviction_policy="evict_first")
    else:
        return tl.load(w_ptr, (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_vector(ptr, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K numbers as [1, BLOCK_K] in f32: activations, or the weight of a norm."""
    k = start + tl.arange(0, BLOCK_K)[None, :]
    return tl.load(ptr + k, k < K, other=0.0).to(tl.float32)


@triton.jit
def _load_whole(x_ptr, x_stride, row: tl.constexpr, M: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row, if there is one and a tile holds it: then it is read once, for its statistics and for the product."""
    if x_ptr is not None and row < M and BLOCK_K >= K:
        return _load_vector(x_ptr + row * x_stride, 0, K, BLOCK_K)
    else:
        return 0.0


@triton.jit
def _tile(x, x_ptr, x_stride, norm, norm_ptr, rstd, start, row: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
          HIGH: tl.constexpr):  # fmt: skip
    """BLOCK_K activations of a row, normalised if there is a norm: of `x` if that is the whole row, else loaded."""
    if BLOCK_K < K:
        x = _load_vector(x_ptr + row * x_stride, start, K, BLOCK_K)
        if norm_ptr is not None:
            norm = _load_vector(norm_ptr, start, K, BLOCK_K)
    if norm_ptr is None:
        return x
    else:
        return normalise(x, norm, rstd, x_ptr.dtype.element_ty, HIGH)


@triton.jit
def _multiply_add(acc, w, x, x_ptr, x_stride, norm, norm_ptr, rstd, start, row: tl.constexpr, M: tl.constexpr,
                  K: tl.constexpr, BLOCK_K: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """`acc` with the products of one weight tile and a row's activations, if there is such a row."""
    if row < M:
        return acc + w * _tile(x, x_ptr, x_stride, norm, norm_ptr, rstd, start, row, K, BLOCK_K, HIGH)
    else:
        return acc


@triton.jit
def _multiply_add_gated(gate, up, g, u, x, x_ptr, x_stride, norm, norm_ptr, rstd, start, row: tl.constexpr,
                        M: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """The same for the two tiles of a gated MLP."""
    if row < M:
        x = _tile(x, x_ptr, x_stride, norm, norm_ptr, rstd, start, row, K, BLOCK_K, HIGH)
        return gate + g * x, up + u * x
    else:
        return gate, up


@triton.jit
def _row_rstd(x, x_ptr, x_stride, norm_ptr, eps, row: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
              BLOCK_K: tl.constexpr):  # fmt: skip
    """1 / rms of a row whose first BLOCK_K numbers are `x`."""
    if norm_ptr is None or row >= M:
        return 1.0
    elif BLOCK_K >= K:
        return tl.rsqrt(tl.sum(x * x) / K + eps)
    else:
        return inverse_rms(x_ptr + row * x_stride, K, eps, BLOCK_K)


@triton.jit
def _load_residual(residual_ptr, residual_stride, row: tl.constexpr, M: tl.constexpr, n, N):
    if residual_ptr is None or row >= M:
        return 0.0
    else:
        return tl.load(residual_ptr + row * residual_stride + n, n < N, other=0.0).to(tl.float32)


@triton.jit
def _store_row(acc, y_ptr, bias, residual, residual_ptr, row: tl.constexpr, n, N, HIGH: tl.constexpr):
    """y[row, n] = sum over K of acc, plus bias, plus residual."""
    y = tl.sum(acc, 1) + bias
    if residual_ptr is not None:
        y = stored(y, y_ptr.dtype.element_ty, HIGH) + residual
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), n < N)


@triton.jit
def linear_rows_kernel(
    x_ptr, x_stride, norm_ptr, eps,
    w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr, N0, N1, N2,
    residual_ptr, residual_stride,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
    NEXT_FIRST: tl.constexpr,
    HIGH: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
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
    w = _load_weight(w_ptr, rows, 0, K, BLOCK_K).to(tl.float32)
    norm = _load_whole(norm_ptr, 0, 0, M, K, BLOCK_K)
    bias = 0.0
    if b0_ptr is not None:
        bias = tl.load(b_ptr + n, n < N, other=0.0).to(tl.float32)
    before_activations(EARLY)

    # Everything that the result depends on is asked for before the first reduction: one trip to L2, not three.
    x0 = _load_whole(x_ptr, x_stride, 0, M, K, BLOCK_K)
    x1 = _load_whole(x_ptr, x_stride, 1, M, K, BLOCK_K)
    x2 = _load_whole(x_ptr, x_stride, 2, M, K, BLOCK_K)
    x3 = _load_whole(x_ptr, x_stride, 3, M, K, BLOCK_K)
    residual0 = _load_residual(residual_ptr, residual_stride, 0, M, n, N)
    residual1 = _load_residual(residual_ptr, residual_stride, 1, M, n, N)
    residual2 = _load_residual(residual_ptr, residual_stride, 2, M, n, N)
    residual3 = _load_residual(residual_ptr, residual_stride, 3, M, n, N)
    rstd0 = _row_rstd(x0, x_ptr, x_stride, norm_ptr, eps, 0, M, K, BLOCK_K)
    rstd1 = _row_rstd(x1, x_ptr, x_stride, norm_ptr, eps, 1, M, K, BLOCK_K)
    rstd2 = _row_rstd(x2, x_ptr, x_stride, norm_ptr, eps, 2, M, K, BLOCK_K)
    rstd3 = _row_rstd(x3, x_ptr, x_stride, norm_ptr, eps, 3, M, K, BLOCK_K)
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    last: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    for start in tl.range(0, last, BLOCK_K, loop_unroll_factor=UNROLL):
        if NEXT_FIRST:
            next_w = _load_weight(w_ptr, rows, start + BLOCK_K, K, BLOCK_K).to(tl.float32)
        acc0 = _multiply_add(acc0, w, x0, x_ptr, x_stride, norm, norm_ptr, rstd0, start, 0, M, K, BLOCK_K, HIGH)
        acc1 = _multiply_add(acc1, w, x1, x_ptr, x_stride, norm, norm_ptr, rstd1, start, 1, M, K, BLOCK_K, HIGH)
        acc2 = _multiply_add(acc2, w, x2, x_ptr, x_stride, norm, norm_ptr, rstd2, start, 2, M, K, BLOCK_K, HIGH)
        acc3 = _multiply_add(acc3, w, x3, x_ptr, x_stride, norm, norm_ptr, rstd3, start, 3, M, K, BLOCK_K, HIGH)
        if not NEXT_FIRST:
            next_w = _load_weight(w_ptr, rows, start + BLOCK_K, K, BLOCK_K).to(tl.float32)
        w = next_w
    acc0 = _multiply_add(acc0, w, x0, x_ptr, x_stride, norm, norm_ptr, rstd0, last, 0, M, K, BLOCK_K, HIGH)
    acc1 = _multiply_add(acc1, w, x1, x_ptr, x_stride, norm, norm_ptr, rstd1, last, 1, M, K, BLOCK_K, HIGH)
    acc2 = _multiply_add(acc2, w, x2, x_ptr, x_stride, norm, norm_ptr, rstd2, last, 2, M, K, BLOCK_K, HIGH)
    acc3 = _multiply_add(acc3, w, x3, x_ptr, x_stride, norm, norm_ptr, rstd3, last, 3, M, K, BLOCK_K, HIGH)
    _store_row(acc0, y_ptr, bias, residual0, residual_ptr, 0, n, N, HIGH)
    if M > 1:
        _store_row(acc1, y_ptr, bias, residual1, residual_ptr, 1, n, N, HIGH)
    if M > 2:
        _store_row(acc2, y_ptr, bias, residual2, residual_ptr, 2, n, N, HIGH)
    if M > 3:
        _store_row(acc3, y_ptr, bias, residual3, residual_ptr, 3, n, N, HIGH)


@triton.jit
def _store_gated_row(
    gate, up, gate_bias, up_bias, y_ptr, row: tl.constexpr, n, N, ACTIVATION: tl.constexpr, HIGH: tl.constexpr
):  # fmt: skip
    gate, up = tl.sum(gate, 1) + gate_bias, tl.sum(up, 1) + up_bias
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + row * N + n, gated_value(gate, up, dtype, ACTIVATION, HIGH).to(dtype), n < N)


@triton.jit
def gated_rows_kernel(
    x_ptr, x_stride, norm_ptr, eps,
    gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, y_ptr, N,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
    NEXT_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y[m, :] = activation(norm(x[m, :]) @ gate.T) * (norm(x[m, :]) @ up.T); shapes as in `linear_rows_kernel`."""
    begin(PDL, EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    g = _load_weight(gate_ptr, rows, 0, K, BLOCK_K).to(tl.float32)
    u = _load_weight(up_ptr, rows, 0, K, BLOCK_K).to(tl.float32)
    norm = _load_whole(norm_ptr, 0, 0, M, K, BLOCK_K)
    gate_bias, up_bias = 0.0, 0.0
    if gate_bias_ptr is not None:
        gate_bias = tl.load(gate_bias_ptr + n, n < N, other=0.0).to(tl.float32)
        up_bias = tl.load(up_bias_ptr + n, n < N, other=0.0).to(tl.float32)
    before_activations(EARLY)

    x0 = _load_whole(x_ptr, x_stride, 0, M, K, BLOCK_K)
    x1 = _load_whole(x_ptr, x_stride, 1, M, K, BLOCK_K)
    x2 = _load_whole(x_ptr, x_stride, 2, M, K, BLOCK_K)
    x3 = _load_whole(x_ptr, x_stride, 3, M, K, BLOCK_K)
    rstd0 = _row_rstd(x0, x_ptr, x_stride, norm_ptr, eps, 0, M, K, BLOCK_K)
    rstd1 = _row_rstd(x1, x_ptr, x_stride, norm_ptr, eps, 1, M, K, BLOCK_K)
    rstd2 = _row_rstd(x2, x_ptr, x_stride, norm_ptr, eps, 2, M, K, BLOCK_K)
    rstd3 = _row_rstd(x3, x_ptr, x_stride, norm_ptr, eps, 3, M, K, BLOCK_K)
    gate0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    gate1, gate2, gate3, up0, up1, up2, up3 = gate0, gate0, gate0, gate0, gate0, gate0, gate0
    last: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    for start in tl.range(0, last, BLOCK_K, loop_unroll_factor=UNROLL):
        if NEXT_FIRST:
            next_g = _load_weight(gate_ptr, rows, start + BLOCK_K, K, BLOCK_K).to(tl.float32)
            next_u = _load_weight(up_ptr, rows, start + BLOCK_K, K, BLOCK_K).to(tl.float32)
        gate0, up0 = _multiply_add_gated(gate0, up0, g, u, x0, x_ptr, x_stride, norm, norm_ptr, rstd0, start, 0,
                                           M, K, BLOCK_K, HIGH)  # fmt: skip
        gate1, up1 = _multiply_add_gated(gate1, up1, g, u, x1, x_ptr, x_stride, norm, norm_ptr, rstd1, start, 1,
                                           M, K, BLOCK_K, HIGH)  # fmt: skip
        gate2, up2 = _multiply_add_gated(gate2, up2, g, u, x2, x_ptr, x_stride, norm, norm_ptr, rstd2, start, 2,
                                           M, K, BLOCK_K, HIGH)  # fmt: skip
        gate3, up3 = _multiply_add_gated(gate3, up3, g, u, x3, x_ptr, x_stride, norm, norm_ptr, rstd3, start, 3,
                                           M, K, BLOCK_K, HIGH)  # fmt: skip
        if not NEXT_FIRST:
            next_g = _load_weight(gate_ptr, rows, start + BLOCK_K, K, BLOCK_K).to(tl.float32)
            next_u = _load_weight(up_ptr, rows, start + BLOCK_K, K, BLOCK_K).to(tl.float32)
        g, u = next_g, next_u
    gate0, up0 = _multiply_add_gated(gate0, up0, g, u, x0, x_ptr, x_stride, norm, norm_ptr, rstd0, last, 0,
                                       M, K, BLOCK_K, HIGH)  # fmt: skip
    gate1, up1 = _multiply_add_gated(gate1, up1, g, u, x1, x_ptr, x_stride, norm, norm_ptr, rstd1, last, 1,
                                       M, K, BLOCK_K, HIGH)  # fmt: skip
    gate2, up2 = _multiply_add_gated(gate2, up2, g, u, x2, x_ptr, x_stride, norm, norm_ptr, rstd2, last, 2,
                                       M, K, BLOCK_K, HIGH)  # fmt: skip
    gate3, up3 = _multiply_add_gated(gate3, up3, g, u, x3, x_ptr, x_stride, norm, norm_ptr, rstd3, last, 3,
                                       M, K, BLOCK_K, HIGH)  # fmt: skip
    _store_gated_row(gate0, up0, gate_bias, up_bias, y_ptr, 0, n, N, ACTIVATION, HIGH)
    if M > 1:
        _store_gated_row(gate1, up1, gate_bias, up_bias, y_ptr, 1, n, N, ACTIVATION, HIGH)
    if M > 2:
        _store_gated_row(gate2, up2, gate_bias, up_bias, y_ptr, 2, n, N, ACTIVATION, HIGH)
    if M > 3:
        _store_gated_row(gate3, up3, gate_bias, up_bias, y_ptr, 3, n, N, ACTIVATION, HIGH)


def _config(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps: measured ones if there are, else safe ones. One row: 2-4 features a program with as much
    of K as registers hold were 10-20 % faster on an H200 than larger tiles; more rows need accumulators for each, so
    their tiles are smaller. NEXT_FIRST: whether the next weights are asked for before a tile is multiplied, or after:
    for one set of configs that made a step of Qwen3-4B 3 % slower, for another one of 1.7B 5 % faster."""
    if measured := tuning.lookup(kernel, m, n, k, dtype):
        return {"UNROLL": 1, "NEXT_FIRST": 1, **measured}
    if interpreted():
        tile_n, tile_k, warps = interpreter_block_n(n), 1024, 1
    elif m == 1:
        tile_n = 4 if kernel == "linears" and n >= 4096 and k <= 4096 else 2  # a walk with 4 spills on a B200
        tile_k, warps = (2048 if k < 4096 else 4096) * 2 // dtype.itemsize, 4
    else:
        tile_n, tile_k, warps = 2, 1024, 4
    return {"BLOCK_N": tile_n, "BLOCK_K": block_k(k, tile_k), "UNROLL": 1, "NEXT_FIRST": 1, "num_warps": warps}


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
    """Launch `linear_rows_kernel`: one weight or three; biases all or none. Shapes as in `project`; 1 to 4 rows."""
    m, k = x.shape
    sizes = [w.shape[0] for w in weights]
    pad = [None] * (3 - len(weights))
    config = _config("linears", m, sum(sizes), k, x.dtype)
    grid = (sum(cdiv(n, config["BLOCK_N"]) for n in sizes),)
    run(
        linear_rows_kernel, grid,
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
    """Launch `gated_rows_kernel`. x: [M, K] of 1 to 4 rows; gate, up: [N, K]; out: [M, N]; biases both or none."""
    m, k = x.shape
    n = gate.shape[0]
    config = _config("gated", m, n, k, x.dtype)
    run(
        gated_rows_kernel, (cdiv(n, config["BLOCK_N"]),),
        x, x.stride(0), norm_weight, eps, gate, up, gate_bias, up_bias, out, n,
        M=m, K=k, ACTIVATION=activation, HIGH=high, **pdl_options(early), **config,
    )  # fmt: skip
