"""One activation row on tensor cores: weights go from memory to the operand of `mma` in one load, without a move.

By multiply-adds (`gemv`) a weight takes three instructions, two of them to unpack it, and while the first programs of
a kernel work through theirs, few weights are on their way. One `mma` takes 256 weights. It wants them spread over the
threads of a warp (lane 4 g + t has k = 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of rows g and g + 8,
https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float), where memory is
read best by 16 contiguous bytes a thread. So the rows of the `mma` are not those of the weights: its 16 rows of 16 k
are 2 rows of weights with 128 of K, cut into 8 parts, and its 8 columns are the 8 parts of the activations:

    mma row 8 p + 4 r + a, k = 8 h + 2 t + j:    weight of row r at  32 a + 8 t + 4 h + 2 p + j
    mma column 2 a + p, the same k:              activation at       32 a + 8 t + 4 h + 2 p + j

What a row has with the columns of other parts is dropped: 7 of 8 products, on units that were idle. Layers and head on
an H200: Qwen3-4B (8 layers) 591 -> 583 us with these kernels for o, gate and up; 0.6B 537 -> 511 for all but o. With 8
rows and 32 of K instead, without the parts a, they were slower than `gemv`: 64 contiguous bytes of a row are too few.

For NVIDIA GPUs from sm_80 on: for others Triton makes multiply-adds of this, or fails.
"""

import triton
import triton.language as tl

from fusepass.kernels.common import before_activations, begin, normalise, stored
from fusepass.kernels.common import gated as gated_value

CHUNK = tl.constexpr(128)
"""How much of K an `mma` takes."""


@triton.jit
def _load_weights(
    w_ptr, up_ptr, first, N, tile: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """A tile of K, CHUNKS for each warp, of PAIRS of rows, as operand [WARPS, PAIRS * 16, CHUNKS * 16]. Pairs are
    consecutive rows from `first` on, or, with `up_ptr`, a row there and one in `w_ptr`."""
    BLOCK_K: tl.constexpr = CHUNKS * WARPS * CHUNK
    i = tl.arange(0, CHUNKS * PAIRS * WARPS * 8)
    a = i % 4
    r = i // 4 % 2
    warp = i // 8 % WARPS
    pair = i // (8 * WARPS) % PAIRS
    chunk = i // (8 * WARPS * PAIRS)
    if up_ptr is None:
        row = tl.minimum(first + 2 * pair + r, N - 1)  # a clamped row costs no predicate; its result is not stored
    else:
        w_ptr = tl.where(r == 0, w_ptr, up_ptr)
        row = tl.minimum(first + pair, N - 1)
    k = ((warp * CHUNKS + chunk) * CHUNK + a * 32 + tile * BLOCK_K)[:, None] + tl.arange(0, 32)[None, :]
    pointers = (w_ptr + row.to(tl.int64) * K)[:, None] + k
    if (tile + 1) * BLOCK_K <= K:
        w = tl.load(pointers, eviction_policy="evict_first")
    else:
        w = tl.load(pointers, k < K, other=0.0, eviction_policy="evict_first")
    # Of operands behind a `tl.join`, as the activations are, Triton (3.6, 3.7) takes k by fours (kWidth = 4): first two
    # of each of two chunks. In another order the products are the same, but registers are moved, or shared memory used.
    w = tl.reshape(w, [CHUNKS // 2, 2, PAIRS, WARPS, 8, 4, 2, 2, 2])  # chunk / 2, chunk, pair, warp, ra, t, h, p, j
    w = tl.permute(w, [3, 2, 7, 4, 0, 6, 5, 1, 8])  # warp, pair, p, ra, chunk / 2, h, t, chunk, j
    return tl.reshape(w, [WARPS, PAIRS * 16, CHUNKS * 16])


@triton.jit
def _load_chunk(ptr, i: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """Each warp's i-th chunk of a vector, [WARPS, h, t, j, ap]: a thread holds no more than its part."""
    n = tl.arange(0, WARPS * 8)
    start = ((i // CHUNKS * WARPS + n // 8) * CHUNKS + i % CHUNKS) * CHUNK + n // 2 % 4 * 32
    k = start[:, None] + tl.arange(0, 32)[None, :]
    x = tl.load(ptr + k, k < K, other=0.0)
    # Two numbers (j) are chosen as one of 32 bits; of loaded ones nothing has to be unpacked or packed for that.
    low, high = tl.split(tl.reshape(x.to(tl.int16, bitcast=True), [WARPS * 8, 16, 2]))
    both = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    first, second = tl.split(tl.reshape(both, [WARPS, 8, 4, 2, 2]))  # warp, ap, t, h; p
    p = (tl.arange(0, 8) % 2)[None, :, None, None]
    own = tl.where(p == 0, first, second)
    own = tl.join(own.to(tl.int16), (own >> 16).to(tl.int16)).to(x.dtype, bitcast=True)
    return tl.permute(own, [0, 3, 2, 4, 1])


@triton.jit
def _load_vector(ptr, K: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """All chunks of a vector, if there is one."""
    chunks = ()
    if ptr is not None:
        for i in tl.static_range((K + CHUNKS * WARPS * CHUNK - 1) // (CHUNKS * WARPS * CHUNK) * CHUNKS):
            chunks += (_load_chunk(ptr, i, K, CHUNKS, WARPS),)
    return chunks


@triton.jit
def _normalise(chunks, norm, eps, K: tl.constexpr):
    """The chunks of a row, normalised if there is a norm."""
    if len(norm) == 0:
        return chunks
    else:
        squares = tl.zeros(chunks[0].shape, tl.float32)
        for i in tl.static_range(len(chunks)):
            x = chunks[i].to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares) / K + eps)
        normalised = ()
        for i in tl.static_range(len(chunks)):
            x = normalise(chunks[i].to(tl.float32), norm[i].to(tl.float32), rstd, chunks[i].dtype, False)
            normalised += (x.to(chunks[i].dtype),)
        return normalised


@triton.jit
def _operand(chunks, tile: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """A tile of the activations, [WARPS, CHUNKS * 16, 8], in the order of `_load_weights`."""
    half = tl.arange(0, CHUNKS // 2)[None, :, None, None, None, None, None]
    c = half * 2 + tl.arange(0, 2)[None, None, None, None, :, None, None]
    x = tl.reshape(chunks[tile * CHUNKS], [WARPS, 1, 2, 4, 1, 2, 8])
    x = tl.broadcast_to(x, [WARPS, CHUNKS // 2, 2, 4, 2, 2, 8])
    for i in tl.static_range(1, CHUNKS):  # c is known when this is compiled: nothing is chosen at run time
        x = tl.where(c == i, tl.reshape(chunks[tile * CHUNKS + i], [WARPS, 1, 2, 4, 1, 2, 8]), x)
    return tl.reshape(x, [WARPS, CHUNKS * 16, 8])


@triton.jit
def _multiply(
    weights, chunks, w_ptr, up_ptr, first, N, K: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """[PAIRS, 2] products of the rows with the activations, in f32; `weights` has the first AHEAD tiles."""
    BLOCK_K: tl.constexpr = CHUNKS * WARPS * CHUNK
    # Two sums in turn: an `mma` waits some 30 cycles for the one before it in its sum. (Of two tiles Triton makes one.)
    sums = (tl.zeros([WARPS, PAIRS * 16, 8], tl.float32),) * 2
    for tile in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        w = weights[0]
        weights = weights[1:]
        if (tile + AHEAD) * BLOCK_K < K:
            weights += (_load_weights(w_ptr, up_ptr, first, N, tile + AHEAD, K, PAIRS, CHUNKS, WARPS),)
        sums = (sums[1], tl.dot(w, _operand(chunks, tile, CHUNKS, WARPS), sums[0], input_precision="ieee"))
    y = tl.reshape(sums[0] + sums[1], [WARPS, PAIRS, 2, 2, 4, 4, 2])  # warp, pair, p, r, a; column's a, column's p
    y = tl.permute(y, [0, 1, 3, 4, 5, 2, 6])
    a = tl.arange(0, 4)
    p = tl.arange(0, 2)
    own = (a[:, None] == a[None, :])[:, :, None, None] & (p[:, None] == p[None, :])[None, None, :, :]
    y = tl.where(own[None, None, None], y, 0.0)
    return tl.sum(tl.sum(tl.reshape(y, [WARPS, PAIRS, 2, 64]), 3), 0)


@triton.jit
def linear_mma_kernel(
    x_ptr, x_stride, norm_ptr, eps,
    w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr, N0, N1, N2,
    residual_ptr, residual_stride,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What `gemv.linear_rows_kernel` does with the same arguments, for one row of 16-bit numbers and not HIGH."""
    tl.static_assert(M == 1 and not HIGH)
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
    first = block * BLOCK_N
    weights = ()
    for tile in tl.static_range(AHEAD):
        weights += (_load_weights(w_ptr, None, first, N, tile, K, BLOCK_N // 2, CHUNKS, WARPS),)
    norm = _load_vector(norm_ptr, K, CHUNKS, WARPS)
    n = first + tl.arange(0, BLOCK_N)
    bias = 0.0
    residual = 0.0
    if b0_ptr is not None:
        bias = tl.load(b_ptr + n, n < N, other=0.0).to(tl.float32)
    before_activations(EARLY)

    x = _load_vector(x_ptr, K, CHUNKS, WARPS)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + n, n < N, other=0.0).to(tl.float32)
    x = _normalise(x, norm, eps, K)
    y = _multiply(weights, x, w_ptr, None, first, N, K, BLOCK_N // 2, CHUNKS, WARPS, AHEAD)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    y = tl.reshape(y, [BLOCK_N]) + bias
    if residual_ptr is not None:
        y = stored(y, dtype, HIGH) + residual
    tl.store(y_ptr + n, y.to(dtype), n < N)


@triton.jit
def gated_mma_kernel(
    x_ptr, x_stride, norm_ptr, eps,
    gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, y_ptr, N,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, ACTIVATION: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What `gemv.gated_rows_kernel` does with the same arguments, for one row of 16-bit numbers and not HIGH."""
    tl.static_assert(M == 1 and not HIGH)
    begin(PDL, EARLY)
    first = tl.program_id(0) * BLOCK_N
    weights = ()
    for tile in tl.static_range(AHEAD):
        weights += (_load_weights(gate_ptr, up_ptr, first, N, tile, K, BLOCK_N, CHUNKS, WARPS),)
    norm = _load_vector(norm_ptr, K, CHUNKS, WARPS)
    n = first + tl.arange(0, BLOCK_N)
    gate_bias, up_bias = 0.0, 0.0
    if gate_bias_ptr is not None:
        gate_bias = tl.load(gate_bias_ptr + n, n < N, other=0.0).to(tl.float32)
        up_bias = tl.load(up_bias_ptr + n, n < N, other=0.0).to(tl.float32)
    before_activations(EARLY)

    x = _normalise(_load_vector(x_ptr, K, CHUNKS, WARPS), norm, eps, K)
    gate, up = tl.split(_multiply(weights, x, gate_ptr, up_ptr, first, N, K, BLOCK_N, CHUNKS, WARPS, AHEAD))
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + n, gated_value(gate + gate_bias, up + up_bias, dtype, ACTIVATION, HIGH).to(dtype), n < N)
