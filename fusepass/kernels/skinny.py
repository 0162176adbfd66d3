"""The tensor-core path for few rows (batched decode): the weights are the M side of the product.

`tl.dot` needs at least 16 rows on its M side and rounds activation rows up; with A and B swapped the padding falls
on the N side, where 8 is the smallest tile, and every weight is read once whatever the number of rows. As in `gemv`,
AHEAD tiles of weights are loaded before anything that the previous kernel makes. The others go through a pipeline in
shared memory, which begins behind the wait (four layers and the head of Qwen3-8B for 8 rows: 731 us without tiles
ahead, which then lie in shared memory too, 712 with), or, HELD, through registers: then all activations are there, and
the norm may be taken in. What a pipeline reads can be brought to L2 before the wait (o_proj of Qwen3-0.6B for 8 rows: a
step of 842 us takes 832).

A program's small tile would keep one warp of several busy, in one long chain of products along K. So K is cut into
SLICES of a batched product, one a warp, summed at the end. Qwen3-0.6B's o_proj for 8 rows on an H200: 4.6 us without,
3.1 with 8 slices.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusepass import tuning
from fusepass.kernels.common import before_activations, begin, normalise, prefetch, stored
from fusepass.kernels.common import gated as gated_value
from fusepass.kernels.launch import cdiv, interpreted, interpreter_block_n, is_hip, next_power_of_2, pdl_options, run
from fusepass.kernels.rms_norm import rms_norm


@triton.jit
def _load_weight(w_ptr, rows, start, K: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr):
    """One K step's weights, [SLICES, BLOCK_N, BLOCK_K], or without the slices if there is one."""
    w_ptr += rows.to(tl.int64)[:, None] * K
    k = start + tl.arange(0, BLOCK_K)[None, :]
    if SLICES > 1:
        w_ptr = w_ptr[None, :, :]
        k = k[None, :, :] + tl.arange(0, SLICES)[:, None, None] * BLOCK_K
    return tl.load(w_ptr + k, k < K, other=0.0)


@triton.jit
def _load_x(x_ptr, x_stride, m, start, M, K: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr):
    """One K step's activations, transposed, [SLICES, BLOCK_K, BLOCK_M], or without the slices if there is one."""
    x_ptr += m.to(tl.int64)[None, :] * x_stride
    k = start + tl.arange(0, BLOCK_K)[:, None]
    present = (m < M)[None, :]
    if SLICES > 1:
        x_ptr = x_ptr[None, :, :]
        k = k[None, :, :] + tl.arange(0, SLICES)[:, None, None] * BLOCK_K
        present = present[None, :, :]
    return tl.load(x_ptr + k, (k < K) & present, other=0.0)


@triton.jit
def _load_norm(norm_ptr, start, K: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr):
    """One K step of the norm's weight, in the shape of activations of one row."""
    k = start + tl.arange(0, BLOCK_K)[:, None]
    if SLICES > 1:
        k = k[None, :, :] + tl.arange(0, SLICES)[:, None, None] * BLOCK_K
    return tl.load(norm_ptr + k, k < K, other=0.0).to(tl.float32)


@triton.jit
def _load_norms(norm_ptr, K: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr):
    """All steps of the norm's weight, if there is a norm."""
    norms = ()
    if norm_ptr is not None:
        for start in tl.static_range(0, K, SLICES * BLOCK_K):
            norms += (_load_norm(norm_ptr, start, K, SLICES, BLOCK_K),)
    return norms


@triton.jit
def _load_normalised(
    x_ptr, x_stride, norms, eps, m, M, END: tl.constexpr, K: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr,
    HIGH: tl.constexpr,
):  # fmt: skip
    """The activations of the K steps up to END, after the norm if there is one: then of all steps."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    steps = ()
    for start in tl.static_range(0, END, SLICES * BLOCK_K):
        steps += (_load_x(x_ptr, x_stride, m, start, M, K, SLICES, BLOCK_K),)
    if len(norms) == 0:
        return steps
    else:
        squares = tl.zeros([m.shape[0]], tl.float32)
        for i in tl.static_range(len(steps)):
            wide = steps[i].to(tl.float32)
            if SLICES > 1:
                squares += tl.sum(tl.sum(wide * wide, 1), 0)
            else:
                squares += tl.sum(wide * wide, 0)
        rstd = tl.rsqrt(squares / K + eps)[None, :]
        if SLICES > 1:
            rstd = rstd[None, :, :]
        normalised = ()
        for i in tl.static_range(len(steps)):
            normalised += (normalise(steps[i].to(tl.float32), norms[i], rstd, dtype, HIGH).to(dtype),)
        return normalised


@triton.jit
def _prefetch_rows(w_ptr, row, N, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bring the program's weights to L2, unless it has less than BLOCK_N rows."""
    if row + BLOCK_N <= N:
        prefetch(w_ptr + row.to(tl.int64) * K, BLOCK_N * K * (w_ptr.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _zeros(SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    if SLICES > 1:
        return tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    else:
        return tl.zeros([BLOCK_N, BLOCK_M], tl.float32)


@triton.jit
def _sum_slices(acc, SLICES: tl.constexpr):
    if SLICES > 1:
        return tl.sum(acc, 0)
    else:
        return acc


@triton.jit
def linear_skinny_kernel(
    x_ptr, x_stride, norm_ptr, eps,
    w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr, N0, N1, N2,
    residual_ptr, residual_stride, M,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, HELD: tl.constexpr, PREFETCH: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y_i = norm(x) @ w_i.T + b_i (+ residual) for one weight, or for three in one launch; M <= BLOCK_M.

    x: [M, K]; w_i: [N_i, K] contiguous; y_i: [M, N_i] contiguous. norm, biases, w1, w2 and residual may be None. There
    is a norm only where registers hold all activations.
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
    rows = tl.minimum(n, N - 1)
    m = tl.arange(0, BLOCK_M)
    STEP: tl.constexpr = SLICES * BLOCK_K
    acc = _zeros(SLICES, BLOCK_N, BLOCK_M)
    weights = ()
    for start in tl.static_range(0, AHEAD * STEP, STEP):
        weights += (_load_weight(w_ptr, rows, start, K, SLICES, BLOCK_K),)
    norms = _load_norms(norm_ptr, K, SLICES, BLOCK_K)
    if EARLY and PREFETCH and not HELD:
        _prefetch_rows(w_ptr, block * BLOCK_N, N, K, BLOCK_N)
    before_activations(EARLY)
    x = _load_normalised(x_ptr, x_stride, norms, eps, m, M, K if HELD else AHEAD * STEP, K, SLICES, BLOCK_K, HIGH)
    if not HELD:
        for start in range(AHEAD * STEP, K, STEP):
            next_w = _load_weight(w_ptr, rows, start, K, SLICES, BLOCK_K)
            next_x = _load_x(x_ptr, x_stride, m, start, M, K, SLICES, BLOCK_K)
            acc = tl.dot(next_w, next_x, acc, input_precision="ieee")
    for i in tl.static_range(len(x)):
        if HELD and (i + AHEAD) * STEP < K:
            weights += (_load_weight(w_ptr, rows, (i + AHEAD) * STEP, K, SLICES, BLOCK_K),)
        acc = tl.dot(weights[i], x[i], acc, input_precision="ieee")
    acc = _sum_slices(acc, SLICES)
    mask = (n < N)[:, None] & (m < M)[None, :]
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, n < N, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    m = m.to(tl.int64)[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + m * residual_stride + n[:, None], mask, other=0.0).to(tl.float32)
        acc = stored(acc, dtype, HIGH) + residual
    tl.store(y_ptr + m * N + n[:, None], acc.to(dtype), mask)


@triton.jit
def gated_skinny_kernel(
    x_ptr, x_stride, norm_ptr, eps, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, y_ptr, N, M,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, HELD: tl.constexpr, PREFETCH: tl.constexpr, ACTIVATION: tl.constexpr, HIGH: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y = activation(norm(x) @ gate.T + b) * (norm(x) @ up.T + b); shapes as in `linear_skinny_kernel`."""
    begin(PDL, EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    m = tl.arange(0, BLOCK_M)
    STEP: tl.constexpr = SLICES * BLOCK_K
    gate = _zeros(SLICES, BLOCK_N, BLOCK_M)
    up = _zeros(SLICES, BLOCK_N, BLOCK_M)
    gates, ups = (), ()
    for start in tl.static_range(0, AHEAD * STEP, STEP):
        gates += (_load_weight(gate_ptr, rows, start, K, SLICES, BLOCK_K),)
        ups += (_load_weight(up_ptr, rows, start, K, SLICES, BLOCK_K),)
    norms = _load_norms(norm_ptr, K, SLICES, BLOCK_K)
    if EARLY and PREFETCH and not HELD:
        _prefetch_rows(gate_ptr, tl.program_id(0) * BLOCK_N, N, K, BLOCK_N)
        _prefetch_rows(up_ptr, tl.program_id(0) * BLOCK_N, N, K, BLOCK_N)
    before_activations(EARLY)
    x = _load_normalised(x_ptr, x_stride, norms, eps, m, M, K if HELD else AHEAD * STEP, K, SLICES, BLOCK_K, HIGH)
    if not HELD:
        for start in range(AHEAD * STEP, K, STEP):
            next_gate = _load_weight(gate_ptr, rows, start, K, SLICES, BLOCK_K)
            next_up = _load_weight(up_ptr, rows, start, K, SLICES, BLOCK_K)
            next_x = _load_x(x_ptr, x_stride, m, start, M, K, SLICES, BLOCK_K)
            gate = tl.dot(next_gate, next_x, gate, input_precision="ieee")
            up = tl.dot(next_up, next_x, up, input_precision="ieee")
    for i in tl.static_range(len(x)):
        if HELD and (i + AHEAD) * STEP < K:
            gates += (_load_weight(gate_ptr, rows, (i + AHEAD) * STEP, K, SLICES, BLOCK_K),)
            ups += (_load_weight(up_ptr, rows, (i + AHEAD) * STEP, K, SLICES, BLOCK_K),)
        gate = tl.dot(gates[i], x[i], gate, input_precision="ieee")
        up = tl.dot(ups[i], x[i], up, input_precision="ieee")
    gate = _sum_slices(gate, SLICES)
    up = _sum_slices(up, SLICES)
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + n, n < N, other=0.0).to(tl.float32)[:, None]
        up += tl.load(up_bias_ptr + n, n < N, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(
        y_ptr + m.to(tl.int64)[None, :] * N + n[:, None], gated_value(gate, up, dtype, ACTIVATION, HIGH).to(dtype), mask
    )


def _config(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages: measured ones if there are, else safe ones. AHEAD: K steps of weights that
    are loaded before the activations are there. HELD, without a pipeline (one stage, or no step left for it): registers
    hold all activations. PREFETCH: whether a pipeline's weights are brought to L2 meanwhile."""
    block_m = max(8, next_power_of_2(m))
    config = tuning.lookup(f"skinny {kernel}", block_m, n, k, dtype) or _safe_config(block_m, n, dtype)
    steps = cdiv(k, config["SLICES"] * config["BLOCK_K"])
    ahead = min(config.get("AHEAD", int(steps == 1)), steps)
    held = ahead == steps or (ahead > 0 and config.get("num_stages", 1) == 1)
    return {"BLOCK_M": block_m, "PREFETCH": 0, **config, "AHEAD": ahead, "HELD": int(held)}


def _safe_config(block_m: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    """Small N tiles: Qwen3-0.6B's o_proj has 1024 features for 132 multiprocessors."""
    if interpreted():
        return {"BLOCK_N": interpreter_block_n(n), "SLICES": 2, "BLOCK_K": 128, "num_warps": 1, "num_stages": 1}
    wide = dtype == torch.float32  # f32 tiles are twice as large and spill at 64 x 64 x 64
    block_n = 16 if n < 4096 or (wide and block_m == 64) else 64
    block_k = 64 if wide else 256 if block_n == 16 else 128
    slices = 4 if block_n == 16 and not wide else 1
    tile = {"BLOCK_N": block_n, "SLICES": slices, "BLOCK_K": block_k // slices}
    return {**tile, "num_warps": 4, "num_stages": 2 if is_hip() else 3}


def _norm_apart(
    x: Tensor, norm_weight: Tensor | None, eps: float, config: dict[str, int], high: bool, early: bool
) -> tuple[Tensor, Tensor | None, bool]:
    """x, the norm's weight and `early` for the product: where registers do not hold all of K, the norm runs before."""
    if norm_weight is None or config["HELD"]:
        return x, norm_weight, early
    return rms_norm(x, norm_weight, eps, high, early), None, True  # behind a kernel of ours: see `project`


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
    """Launch `linear_skinny_kernel`: one weight or three; biases all or none. Shapes as in `project`; M <= 64."""
    m, k = x.shape
    sizes = [w.shape[0] for w in weights]
    pad = [None] * (3 - len(weights))
    config = _config("linears", m, sum(sizes), k, x.dtype)
    x, norm_weight, early = _norm_apart(x, norm_weight, eps, config, high, early)
    grid = (sum(cdiv(n, config["BLOCK_N"]) for n in sizes),)
    run(
        linear_skinny_kernel, grid,
        x, x.stride(0), norm_weight, eps, *weights, *pad, *biases, *pad, *outs, *pad, *sizes, *(0 for _ in pad),
        residual, 0 if residual is None else residual.stride(0), m, K=k, HIGH=high,
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
    """Launch `gated_skinny_kernel`. x: [M, K], M <= 64; gate, up: [N, K]; out: [M, N]; biases both or none."""
    m, k = x.shape
    n = gate.shape[0]
    config = _config("gated", m, n, k, x.dtype)
    x, norm_weight, early = _norm_apart(x, norm_weight, eps, config, high, early)
    run(
        gated_skinny_kernel, (cdiv(n, config["BLOCK_N"]),),
        x, x.stride(0), norm_weight, eps, gate, up, gate_bias, up_bias, out, n, m,
        K=k, ACTIVATION=activation, HIGH=high, **pdl_options(early), **config,
    )  # fmt: skip
