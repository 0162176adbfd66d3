"""Device functions that several kernels share.

`HIGH` is the precision option as a constexpr: False rounds to the activation's dtype wherever the eager
graph would have stored a tensor ("match"), True keeps f32 ("high").
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr, EARLY: tl.constexpr):
    """The first statement of every kernel.

    With programmatic dependent launch (PDL) the kernel may run while the one before it in the stream still does. What
    that one wrote may be read, and anything may be written, only behind the wait. An EARLY kernel reads weights
    first and waits at `before_activations`: nothing in the step writes them. It lets the next kernel begin at once,
    where a kernel that waits here lets it begin after the wait, so that no early read ever overtakes what ran before
    the first kernel of a graph (an update of the weights, say).
    """
    if EARLY:
        gdc_launch_dependents()
    elif PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def before_activations(EARLY: tl.constexpr):
    """Where an EARLY kernel waits for the kernels before it. Every kernel of a chain waits before it ends: waiting for
    the previous kernel is waiting for all earlier ones only if that one has waited too."""
    if EARLY:
        gdc_wait()


@triton.jit
def prefetch(ptr, BYTES: tl.constexpr):
    """Ask for BYTES from `ptr` on, in whole units of 16, to be brought to L2: one instruction of one thread (sm_90,
    https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-prefetch).
    Changes nothing that a kernel can read, so it may run before the wait whatever writes there."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred first;
            .reg .u32 thread;
            .reg .u64 from;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            and.b64 from, $1, -16;
            @first cp.async.bulk.prefetch.L2.global [from], $2;
            mov.u32 $0, 0;
        }""",
        "=r,l,r", [ptr.to(tl.int64), BYTES // 16 * 16], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def stored(x, dtype: tl.constexpr, HIGH: tl.constexpr):
    """`x` (f32) as it reads back after eager has stored it in `dtype`."""
    if HIGH:
        return x
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def normalise(x, weight, rstd, dtype: tl.constexpr, HIGH: tl.constexpr):
    """Hugging Face's RMSNorm after the statistics: round x * rstd, multiply by the weight, round."""
    return stored(stored(x * rstd, dtype, HIGH) * weight, dtype, HIGH)


@triton.jit
def norm_rope(
    lo, hi, weight_ptr, weight_lo, weight_hi, eps, cos_lo, cos_hi, sin_lo, sin_hi,
    D: tl.constexpr, dtype: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """The halves [heads, D / 2] (f32) of heads, normalised if there is a weight, and rotated, in `dtype`."""
    if weight_ptr is not None:
        rstd = tl.rsqrt((tl.sum(lo * lo, 1) + tl.sum(hi * hi, 1)) / D + eps)[:, None]
        lo = normalise(lo, weight_lo, rstd, dtype, HIGH)
        hi = normalise(hi, weight_hi, rstd, dtype, HIGH)
    # q * cos + rotate_half(q) * sin, https://arxiv.org/abs/2104.09864, each product rounded as eager stores it: in
    # kernels that are launched with enable_fp_fusion=HIGH. Else LLVM multiplies in 16 bits and contracts product and
    # sum to one instruction, which rounds once: on an H200 22 % of the keys had other bits than eager's.
    out_lo = stored(lo * cos_lo, dtype, HIGH) - stored(hi * sin_lo, dtype, HIGH)
    out_hi = stored(hi * cos_hi, dtype, HIGH) + stored(lo * sin_hi, dtype, HIGH)
    return out_lo.to(dtype), out_hi.to(dtype)


@triton.jit
def load_halves(ptr, stride, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """The two halves of a vector of 2 * HALF numbers, each [1, BLOCK_H] in f32; zeros if there is none."""
    if ptr is None:
        return 0.0, 0.0
    else:
        h = tl.arange(0, BLOCK_H)[None, :]
        lo = tl.load(ptr + h * stride, h < HALF, other=0.0).to(tl.float32)
        hi = tl.load(ptr + (HALF + h) * stride, h < HALF, other=0.0).to(tl.float32)
        return lo, hi


@triton.jit
def inverse_rms(x_ptr, K: tl.constexpr, eps, BLOCK_K: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of one contiguous row, in f32. Programs that share a row recompute it: the row
    is a few KB and stays in L2, while a kernel of its own would cost a launch."""
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, k < K, other=0.0).to(tl.float32)
        total += x * x
    return tl.rsqrt(tl.sum(total) / K + eps)


@triton.jit
def gated(gate, up, dtype: tl.constexpr, ACTIVATION: tl.constexpr, HIGH: tl.constexpr):
    """activation(gate) * up in f32; ACTIVATION is "silu" or "gelu_tanh"."""
    gate = stored(gate, dtype, HIGH)
    if ACTIVATION == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    else:
        # 0.5 x (1 + tanh(y)) = x sigmoid(2 y), y = sqrt(2/pi) (x + 0.044715 x^3): https://arxiv.org/abs/1606.08415
        activated = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    return stored(activated, dtype, HIGH) * stored(up, dtype, HIGH)
