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


def check_cache(op: str, x: Tensor, shape: tuple[int, ...], mask: Tensor | None, **caches: Tensor) -> None:
    """Raise ValueError unless keys and values (as the op names them) and mask fit queries of `shape` [B, Hq, S, D], and
    x's dtype and device."""
    batch, heads, seq, size = shape
    for name, cache in caches.items():
        same = cache.dim() == 4 and cache.shape[0] == batch and cache.shape[3] == size and cache.shape[1] > 0
        same = same and heads % cache.shape[1] == 0 and cache.dtype == x.dtype and cache.device == x.device
        wanted = f"[{batch}, a divisor of {heads}, any, {size}]"
        expect(same, op, name, cache, f"a {x.dtype} tensor of shape {wanted} on {x.device}")
    (_, k), (name, v) = caches.items()
    expect(v.shape == k.shape, op, name, v, f"the shape of the keys, {tuple(k.shape)}")
    if mask is not None:
        sizes = zip(mask.shape, (batch, heads, seq, k.shape[2]))
        fits = mask.dim() == 4 and all(got == 1 or got == want for got, want in sizes)
        fits = fits and mask.dtype in (torch.bool, x.dtype) and mask.device == x.device
        wanted = f"[{batch}, {heads}, {seq}, {k.shape[2]}]"
        expect(fits, op, "mask", mask, f"torch.bool or {x.dtype}, broadcastable to {wanted}, on {x.device}")


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    expect_activation(OP, "q", q, ndim=4)
    check_cache(OP, q, tuple(q.shape), mask, k=k, v=v)


def _output(q: Tensor) -> Tensor:
    batch, heads, seq, size = q.shape
    return q.new_empty(batch, seq, heads, size).transpose(1, 2)


def takes(queries: int, *tensors: Tensor) -> bool:
    """Whether the kernel takes so many queries a K/V head, and these tensors: none empty, the last dimension dense."""
    return queries <= ROWS_LIMIT and all(t.numel() and t.stride(-1) == 1 for t in tensors)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return _output(q)


def _launch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from fusepass.kernels.attention import attention

    if not takes(q.shape[2] * (q.shape[1] // k.shape[1]), q, k, v):
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
