"""`fusepass::self_attention`: what `norm_qkv_rope` and `attention` do, and the write to a static cache between them.

For one token, the kernel that attends also normalises and rotates q and k and writes the cache. A layer of Qwen3-0.6B
then runs three kernels less, and none of Inductor's, behind which no weights could be loaded ahead.
"""

from typing import Any

import torch
from torch import Tensor

from fusepass.ops.attention import attention, check_cache, takes
from fusepass.ops.library import define, expect
from fusepass.ops.norm_qkv_rope import check_projection, heads, norm_qkv_rope
from fusepass.ops.project import as_rows, project

OP = "self_attention"
_PROJECTION = 16
"""How many of the first arguments are those of `norm_qkv_rope`."""


def _parts(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of `norm_qkv_rope` but for its last two, and the others: k_cache, v_cache, position, mask, scale,
    high, early."""
    return args[:_PROJECTION], (*args[_PROJECTION:], False)[:7]


def reference(*args: Any) -> Tensor:
    """Attention of x's tokens over the cache, after their keys and values are written to it at `position`.

    The first 16 arguments, mask and scale are those of `fusepass::norm_qkv_rope` and `fusepass::attention`. k_cache,
    v_cache: [B, Hkv, T, D], written in place; position: int64 [S], the same for the whole batch. Returns [B, Hq, S, D],
    which lies in memory as [B, S, Hq, D]. Raises IndexError for a position outside the cache; on a GPU nothing is
    written there. `early`: as in `fusepass.ops.library.define`; the mask and the cache, too, are then read early.
    """
    projection, (k_cache, v_cache, position, mask, scale, high, _) = _parts(args)
    query, key, value = norm_qkv_rope.reference(*projection, high)
    k_cache.index_copy_(2, position, key)
    v_cache.index_copy_(2, position, value)
    return attention.reference(query, k_cache, v_cache, mask, scale)


def _check(*args: Any) -> None:
    projection, (k_cache, v_cache, position, mask, *_) = _parts(args)
    check_projection(OP, *projection)
    x, q, k, v, head_dim = args[0], args[3], args[4], args[5], args[15]
    batch, seq, _ = x.shape
    expect(v.shape == k.shape, OP, "v", v, f"the shape of k, {tuple(k.shape)}")
    shape = batch, q.shape[0] // head_dim, seq, head_dim
    check_cache(OP, x, shape, mask, k_cache=k_cache, v_cache=v_cache)
    expect(k_cache.shape[1] * head_dim == k.shape[0], OP, "k_cache", k_cache, f"{k.shape[0] // head_dim} heads")
    same = position.shape == (seq,) and position.dtype == torch.int64 and position.device == x.device
    expect(same, OP, "position", position, f"torch.int64 of shape [{seq}] on {x.device}")


def _fake(*args: Any) -> Tensor:
    x, q, head_dim = args[0], args[3], args[15]
    return heads(x.new_empty(*x.shape[:2], q.shape[0]), head_dim)


def _launch(*args: Any) -> Tensor:
    from fusepass.kernels.attention import NewToken
    from fusepass.kernels.attention import attention as attend

    projection, (k_cache, v_cache, position, mask, scale, high, early) = _parts(args)
    x, norm_weight, norm_eps, q, k, v, *biases = projection[:9]
    q_norm_weight, q_norm_eps, k_norm_weight, k_norm_eps, cos, sin, head_dim = projection[9:]
    if x.shape[1] != 1 or not takes(q.shape[0] // k.shape[0], x, k_cache, v_cache):
        query, key, value = norm_qkv_rope.launch(*projection, high, early)
        k_cache.index_copy_(2, position, key)
        v_cache.index_copy_(2, position, value)
        return attention.launch(query, k_cache, v_cache, mask, scale)

    # "high" keeps the projections in f32 up to the rotation.
    dtype = torch.float32 if high else x.dtype
    raw = [x.new_empty(*x.shape[:2], w.shape[0], dtype=dtype) for w in (q, k, v)]
    outs = [as_rows(t) for t in raw]
    project(as_rows(x), norm_weight, norm_eps, [q, k, v], biases, outs, None, high, early)
    out = _fake(*args)
    new = NewToken(raw[1], raw[2], q_norm_weight, q_norm_eps, k_norm_weight, k_norm_eps, cos, sin, position)
    # The kernel before this one is ours. Either it waited before it let this one begin, or `early` promises that the
    # mask and the cache may be read now.
    attend(heads(raw[0], head_dim), k_cache, v_cache, mask, scale, out, new, high, early=True)
    return out


self_attention = define(
    "self_attention(Tensor x, Tensor? norm_weight, float norm_eps, Tensor q, Tensor k, Tensor v, Tensor? q_bias, "
    "Tensor? k_bias, Tensor? v_bias, Tensor? q_norm_weight, float q_norm_eps, Tensor? k_norm_weight, "
    "float k_norm_eps, Tensor cos, Tensor sin, int head_dim, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, "
    "Tensor? mask, float scale, bool high, bool early=False) -> Tensor",
    fake=_fake,
    reference=reference,
    launch=_launch,
    check=_check,
)
