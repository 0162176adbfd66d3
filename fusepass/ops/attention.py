"""`fusepass::attention`: grouped-query attention, K and V heads not repeated in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusepass.ops.library import define, expect, expect_activation

OP = "attention"

ROWS_LIMIT = 16
"""Most queries that share a K/V head (tokens times heads of a group) that the kernel takes; above it SDPA runs."""


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Every K/V head once for each of its query heads: transformers' `repeat_kv`."""
    if groups == 1:
        return x
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, size).reshape(batch, heads * groups, length, size)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v, [B, Hq, S, D], which lies in memory as [B, S, Hq, D].

    q: [B, Hq, S, D]; k, v: [B, Hkv, T, D], each head for Hq / Hkv heads of q; mask: bool (True: visible) or additive,
    broadcastable to [B, Hq, S, T], or None.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = _repeated(k, groups), _repeated(v, groups)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    expect_activation(OP, "q", q, ndim=4)
    batch, heads, seq, size = q.shape
    for name, x in (("k", k), ("v", v)):
        same = x.dim() == 4 and x.shape[0] == batch and x.shape[3] == size
        same = same and x.shape[1] > 0 and heads % x.shape[1] == 0 and x.dtype == q.dtype and x.device == q.device
        wanted = f"[{batch}, a divisor of {heads}, any, {size}]"
        expect(same, OP, name, x, f"a {q.dtype} tensor of shape {wanted} on {q.device}")
    expect(v.shape == k.shape, OP, "v", v, f"k's shape, {tuple(k.shape)}")
    if mask is not None:
        sizes = zip(mask.shape, (batch, heads, seq, k.shape[2]))
        fits = mask.dim() == 4 and all(got == 1 or got == want for got, want in sizes)
        fits = fits and mask.dtype in (torch.bool, q.dtype) and mask.device == q.device
        wanted = f"[{batch}, {heads}, {seq}, {k.shape[2]}]"
        expect(fits, OP, "mask", mask, f"torch.bool or {q.dtype}, broadcastable to {wanted}, on {q.device}")


def _output(q: Tensor) -> Tensor:
    batch, heads, seq, size = q.shape
    return q.new_empty(batch, seq, heads, size).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return _output(q)


def _launch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from fusepass.kernels.attention import attention

    few = q.shape[2] * (q.shape[1] // k.shape[1]) <= ROWS_LIMIT
    if not few or not q.numel() or not k.numel() or any(x.stride(3) != 1 for x in (q, k, v)):
        return reference(q, k, v, mask, scale)
    out = _output(q)
    attention(q, k, v, mask, scale, out)
    return out


attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    fake=_fake,
    reference=reference,
    launch=_launch,
    check=_check,
)
