"""`fusepass::norm_qkv_rope`: RMSNorm, the q/k/v linears, the norm of each q and k head, and RoPE."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusepass.ops import rms_norm
from fusepass.ops.library import broadcasts, define, expect, expect_activation, expect_parameter
from fusepass.ops.project import as_rows, project

OP = "norm_qkv_rope"


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H * D] as [B, H, S, D], the view that attention reads."""
    return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim).transpose(1, 2)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    lo, hi = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-hi, lo), dim=-1) * sin


def reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_eps: float,
    k_norm_weight: Tensor | None,
    k_norm_eps: float,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    high: bool,
    early: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [B, Hq, S, D], rotated keys [B, Hkv, S, D] and values [B, Hkv, S, D].

    x: [B, S, K]; norm_weight: [K] or None; q: [Hq * D, K]; k, v: [Hkv * D, K]; biases: of the weights' first size, or
    None; q_norm_weight, k_norm_weight: [D] or None; cos, sin: broadcastable to [B, 1, S, D]; D = head_dim, even.
    The three results lie in memory as [B, S, H, D]. RoPE is the half-split form of https://arxiv.org/abs/2104.09864.
    Rounds to x's dtype where eager would, unless `high`. `early`: see `fusepass.ops.library.define`.
    """
    h = x if norm_weight is None else rms_norm.reference(x, norm_weight, norm_eps, high)
    dtype = x.dtype
    if high:
        h, q, k, v, cos, sin = (t.float() for t in (h, q, k, v, cos, sin))
        q_bias, k_bias, v_bias, q_norm_weight, k_norm_weight = (
            None if t is None else t.float() for t in (q_bias, k_bias, v_bias, q_norm_weight, k_norm_weight)
        )
    query = heads(F.linear(h, q, q_bias), head_dim)
    key = heads(F.linear(h, k, k_bias), head_dim)
    value = heads(F.linear(h, v, v_bias), head_dim)
    if q_norm_weight is not None:
        query = rms_norm.reference(query, q_norm_weight, q_norm_eps, high)
    if k_norm_weight is not None:
        key = rms_norm.reference(key, k_norm_weight, k_norm_eps, high)
    return _rope(query, cos, sin).to(dtype), _rope(key, cos, sin).to(dtype), value.to(dtype)


def check_projection(
    op: str,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_eps: float,
    k_norm_weight: Tensor | None,
    k_norm_eps: float,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    *settings: bool,
) -> None:
    """Raise ValueError unless the arguments of `reference` fit one another (high and early do); it names `op`."""
    expect_activation(op, "x", x, ndim=3)
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"fusepass::{op}: head_dim is {head_dim}; expected a positive even number")
    expect_parameter(op, "norm_weight", norm_weight, x, x.shape[-1])
    for name, weight, bias in (("q", q, q_bias), ("k", k, k_bias), ("v", v, v_bias)):
        expect_parameter(op, name, weight, x, -1, x.shape[-1])
        expect(weight.shape[0] % head_dim == 0, op, name, weight, f"a multiple of head_dim ({head_dim}) rows")
        expect_parameter(op, f"{name}_bias", bias, x, weight.shape[0])
    expect_parameter(op, "q_norm_weight", q_norm_weight, x, head_dim)
    expect_parameter(op, "k_norm_weight", k_norm_weight, x, head_dim)
    for name, table in (("cos", cos), ("sin", sin)):
        same = table.dim() == 4 and table.shape[1] == 1 and table.shape[3] == head_dim
        same = same and all(broadcasts(table.shape[i], x.shape[i // 2]) for i in (0, 2))
        same = same and table.dtype == x.dtype and table.device == x.device
        expect(same, op, name, table, f"{x.dtype} broadcastable to [{x.shape[0]}, 1, {x.shape[1]}, {head_dim}]")


def _fake(
    x: Tensor, norm_weight: Tensor | None, norm_eps: float, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    head_dim = rest[9]
    return tuple(heads(x.new_empty(*x.shape[:2], w.shape[0]), head_dim) for w in (q, k, v))


def _launch(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_eps: float,
    k_norm_weight: Tensor | None,
    k_norm_eps: float,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    high: bool,
    early: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusepass.kernels.rope import qk_norm_rope

    batch, seq, _ = x.shape
    query, key, value = (x.new_empty(batch, seq, w.shape[0]) for w in (q, k, v))
    if batch * seq:
        # "high" keeps the projections in f32 up to the rotation, where the kernels can (a library GEMM cannot).
        rows = as_rows(x)
        raw = [torch.empty_like(t, dtype=torch.float32) if high else t for t in (query, key, value)]
        outs = [as_rows(t) for t in raw]
        project(rows, norm_weight, norm_eps, [q, k, v], [q_bias, k_bias, v_bias], outs, None, high, early)
        if high:
            value.copy_(raw[2])
        qk_norm_rope(
            raw[0],
            raw[1],
            query,
            key,
            q_norm_weight,
            k_norm_weight,
            q_norm_eps,
            k_norm_eps,
            cos,
            sin,
            head_dim,
            high,
            early=True,  # behind a kernel of ours: see `project`
        )
    return heads(query, head_dim), heads(key, head_dim), heads(value, head_dim)


norm_qkv_rope = define(
    "norm_qkv_rope(Tensor x, Tensor? norm_weight, float norm_eps, Tensor q, Tensor k, Tensor v, Tensor? q_bias, "
    "Tensor? k_bias, Tensor? v_bias, Tensor? q_norm_weight, float q_norm_eps, Tensor? k_norm_weight, "
    "float k_norm_eps, Tensor cos, Tensor sin, int head_dim, bool high, bool early=False) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    launch=_launch,
    check=functools.partial(check_projection, OP),
)
