"""q/k norm and rotary position embedding in one pass over the projected q and k."""

import triton
import triton.language as tl
from torch import Tensor

from fusepass.kernels.common import before_activations, begin, load_halves, norm_rope
from fusepass.kernels.launch import cdiv, interpreted, next_power_of_2, pdl_options, run


@triton.jit
def _rotate_heads(
    raw_ptr, out_ptr, weight_ptr, eps, head, HEADS: tl.constexpr,
    row, cos_lo, cos_hi, sin_lo, sin_hi,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate BLOCK_H heads of one token. The two halves of a head are loaded, rotated and stored by
    the same threads, so `out_ptr` may be `raw_ptr`."""
    half: tl.constexpr = D // 2
    heads = head + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    mask = (heads < HEADS)[:, None] & (d < half)[None, :]
    offsets = row * HEADS * D + heads[:, None] * D + d[None, :]
    lo = tl.load(raw_ptr + offsets, mask, other=0.0).to(tl.float32)
    hi = tl.load(raw_ptr + offsets + half, mask, other=0.0).to(tl.float32)
    weight_lo, weight_hi = load_halves(weight_ptr, 1, half, BLOCK_D)
    lo, hi = norm_rope(lo, hi, weight_ptr, weight_lo, weight_hi, eps, cos_lo, cos_hi, sin_lo, sin_hi,
                       D, out_ptr.dtype.element_ty, HIGH)  # fmt: skip
    tl.store(out_ptr + offsets, lo, mask)
    tl.store(out_ptr + offsets + half, hi, mask)


@triton.jit
def qk_norm_rope_kernel(
    q_raw_ptr, k_raw_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_eps, k_eps,
    cos_ptr, sin_ptr, cos_stride_b, cos_stride_s, cos_stride_d, sin_stride_b, sin_stride_s, sin_stride_d,
    seq, q_blocks,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """q, k: [batch * seq, heads, D] contiguous; cos, sin: [batch, seq, D] with any strides (0 broadcasts)."""
    begin(PDL, EARLY)
    before_activations(EARLY)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    half: tl.constexpr = D // 2
    cos_ptr += row // seq * cos_stride_b + row % seq * cos_stride_s
    sin_ptr += row // seq * sin_stride_b + row % seq * sin_stride_s
    cos_lo, cos_hi = load_halves(cos_ptr, cos_stride_d, half, BLOCK_D)
    sin_lo, sin_hi = load_halves(sin_ptr, sin_stride_d, half, BLOCK_D)
    if block < q_blocks:
        _rotate_heads(q_raw_ptr, q_ptr, q_weight_ptr, q_eps, block * BLOCK_H, Q_HEADS,
                      row, cos_lo, cos_hi, sin_lo, sin_hi, D, BLOCK_H, BLOCK_D, HIGH)  # fmt: skip
    else:
        _rotate_heads(k_raw_ptr, k_ptr, k_weight_ptr, k_eps, (block - q_blocks) * BLOCK_H, K_HEADS,
                      row, cos_lo, cos_hi, sin_lo, sin_hi, D, BLOCK_H, BLOCK_D, HIGH)  # fmt: skip


def qk_norm_rope(
    q_raw: Tensor,
    k_raw: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    high: bool,
    early: bool,
) -> None:
    """Write the normalised (where there is a weight) and rotated `q_raw`, `k_raw` to `q`, `k`, which may be the same.

    q_raw, q: [B, S, Hq * D] contiguous; k_raw, k: [B, S, Hkv * D]; weights: [D]; cos, sin: broadcast to [B, 1, S, D].
    """
    batch, seq, q_size = q.shape
    q_heads, k_heads = q_size // head_dim, k.shape[2] // head_dim
    # 4 heads a program: one token of Qwen3-0.6B (16 + 8 heads) makes 6 programs of 4 warps.
    block_h = next_power_of_2(max(q_heads, k_heads)) if interpreted() else 4
    q_blocks, k_blocks = cdiv(q_heads, block_h), cdiv(k_heads, block_h)
    cos, sin = cos.expand(batch, 1, seq, head_dim), sin.expand(batch, 1, seq, head_dim)
    run(
        qk_norm_rope_kernel, (batch * seq, q_blocks + k_blocks),
        q_raw, k_raw, q, k, q_weight, k_weight, q_eps, k_eps,
        cos, sin, cos.stride(0), cos.stride(2), cos.stride(3), sin.stride(0), sin.stride(2), sin.stride(3),
        seq, q_blocks, Q_HEADS=q_heads, K_HEADS=k_heads, D=head_dim,
        BLOCK_H=block_h, BLOCK_D=next_power_of_2(head_dim // 2), HIGH=high, num_warps=4,
        enable_fp_fusion=high, **pdl_options(early),
    )  # fmt: skip
