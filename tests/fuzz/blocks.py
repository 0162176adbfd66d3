"""Decoder blocks made from a plan: how each step is spelled, what is missing or doubled, what is done in between.

A `Plan` is plain data, so that a failing one can be pasted into a test. Nothing here knows what fusepass recognises:
some spellings compute what Qwen3 does, some something else, and eager PyTorch is always right.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, HEAD_DIM, VOCAB, LENGTH, START = 20, 28, 8, 33, 11, 4

Spelling = Callable[..., Any]


def _slices(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]


def _repeat(x: Tensor, groups: int) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, size).reshape(batch, heads * groups, length, size)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


SPELLINGS: dict[str, dict[str, Spelling]] = {
    "widen": {
        "x.to(f32)": lambda x, wide: x.to(wide),
        "x.to(dtype=f32)": lambda x, wide: x.to(dtype=wide),
        "x.type(f32)": lambda x, wide: x.type(wide),
        "x.float()": lambda x, wide: x.float() if wide is torch.float32 else x.double(),
        "x.to(device, f32)": lambda x, wide: x.to(x.device, wide),
    },
    "square": {
        "h.pow(2)": lambda h: h.pow(2),
        "h ** 2": lambda h: h**2,
        "h.square()": lambda h: h.square(),
        "torch.square": lambda h: torch.square(h),
        "h * h": lambda h: h * h,
        "torch.mul(h, h)": lambda h: torch.mul(h, h),
        "torch.pow": lambda h: torch.pow(h, exponent=2),
    },
    "mean": {
        "s.mean(-1, keepdim=True)": lambda s: s.mean(-1, keepdim=True),
        "torch.mean": lambda s: torch.mean(s, dim=-1, keepdim=True),
        "s.mean(dim=[-1])": lambda s: s.mean(dim=[-1], keepdim=True),
        "s.mean(-1, True)": lambda s: s.mean(-1, True),
        "s.mean(last)": lambda s: s.mean(s.dim() - 1, keepdim=True),
        "s.sum / n": lambda s: s.sum(-1, keepdim=True) / s.shape[-1],
    },
    "shift": {
        "m + eps": lambda m, eps: m + eps,
        "eps + m": lambda m, eps: eps + m,
        "m.add(eps)": lambda m, eps: m.add(eps),
        "torch.add": lambda m, eps: torch.add(m, other=eps),
    },
    "rsqrt": {
        "torch.rsqrt": lambda v: torch.rsqrt(v),
        "v.rsqrt()": lambda v: v.rsqrt(),
        "v ** -0.5": lambda v: v**-0.5,
        "v.pow(-0.5)": lambda v: v.pow(-0.5),
        "1 / v.sqrt()": lambda v: 1 / v.sqrt(),
        "v.rsqrt_()": lambda v: v.rsqrt_(),
    },
    "scale": {
        "h * r": lambda h, r, x: h * r,
        "r * h": lambda h, r, x: r * h,
        "h.mul(r)": lambda h, r, x: h.mul(r),
        "torch.multiply": lambda h, r, x: torch.multiply(r, h),
    },
    "narrow": {
        "h.to(x.dtype)": lambda h, x: h.to(x.dtype),
        "h.type_as(x)": lambda h, x: h.type_as(x),
        "h.to(x)": lambda h, x: h.to(x),
    },
    "weigh": {
        "w * h": lambda w, h: w * h,
        "h * w": lambda w, h: h * w,
        "h.mul(w)": lambda w, h: h.mul(w),
        "torch.mul": lambda w, h: torch.mul(h, other=w),
        "h * (1 + w)": lambda w, h: h * (1.0 + w),
    },
    "linear": {
        "F.linear": lambda x, w, b: F.linear(x, w, b),
        "by keyword": lambda x, w, b: F.linear(x, weight=w, bias=b),
        "x @ w.T": lambda x, w, b: x @ w.T if b is None else x @ w.T + b,
    },
    "view": {
        "y.view(*, -1, D)": lambda y: y.view(*y.shape[:-1], -1, HEAD_DIM),
        "y.reshape": lambda y: y.reshape(y.shape[0], y.shape[1], -1, HEAD_DIM),
        "torch.reshape": lambda y: torch.reshape(y, (y.shape[0], -1, y.shape[2] // HEAD_DIM, HEAD_DIM)),
        "y.unflatten": lambda y: y.unflatten(-1, (-1, HEAD_DIM)),
    },
    "turn": {
        "y.transpose(1, 2)": lambda y: y.transpose(1, 2),
        "y.transpose(-2, 1)": lambda y: y.transpose(-2, 1),
        "y.permute": lambda y: y.permute(0, 2, 1, 3),
        "torch.swapaxes": lambda y: torch.swapaxes(y, 2, 1),
        "y.movedim": lambda y: y.movedim(1, 2),
    },
    "halves": {
        "slices": _slices,
        "chunk": lambda x: x.chunk(2, dim=-1),
        "torch.chunk": lambda x: torch.chunk(x, 2, -1),
        "split": lambda x: x.split(HEAD_DIM // 2, dim=-1),
        "narrow": lambda x: (x.narrow(-1, 0, HEAD_DIM // 2), x.narrow(-1, HEAD_DIM // 2, HEAD_DIM // 2)),
        "negative slices": lambda x: (x[..., : -HEAD_DIM // 2], x[..., -HEAD_DIM // 2 :]),
    },
    "rotate": {
        "cat((-b, a))": lambda a, b: torch.cat((-b, a), dim=-1),
        "cat([b.neg(), a])": lambda a, b: torch.cat([b.neg(), a], -1),
        "concat": lambda a, b: torch.concat((torch.neg(b), a), dim=-1),
        "cat((b * -1, a))": lambda a, b: torch.cat((b * -1, a), -1),
    },
    "rope": {
        "x * cos + r * sin": lambda x, r, cos, sin: x * cos + r * sin,
        "cos * x + sin * r": lambda x, r, cos, sin: cos * x + sin * r,
        "torch.add": lambda x, r, cos, sin: torch.add(x.mul(cos), torch.mul(r, sin)),
        "r * sin + x * cos": lambda x, r, cos, sin: r * sin + x * cos,
    },
    "attend": {
        "gqa": lambda q, k, v, mask: _sdpa(q, k, v, mask, enable_gqa=True),
        "repeat_kv": lambda q, k, v, mask: _sdpa(
            q, _repeat(k, q.shape[1] // k.shape[1]), _repeat(v, q.shape[1] // v.shape[1]), mask
        ),
        "scale=": lambda q, k, v, mask: _sdpa(q, k, v, mask, scale=0.3, enable_gqa=True),
        "repeat_interleave": lambda q, k, v, mask: _sdpa(
            q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)), mask
        ),
    },
    "act": {
        "F.silu": lambda g: F.silu(g),
        "F.silu(inplace=True)": lambda g: F.silu(g, inplace=True),
        "nn.SiLU": lambda g: nn.SiLU()(g),
        "tanh-GELU": lambda g: F.gelu(g, approximate="tanh"),
        "g * g.sigmoid()": lambda g: g * g.sigmoid(),
    },
    "gate": {
        "act * up": lambda act, up: act * up,
        "up * act": lambda act, up: up * act,
        "act.mul(up)": lambda act, up: act.mul(up),
        "torch.mul": lambda act, up: torch.mul(up, act),
        "act.mul_(up)": lambda act, up: act.mul_(up),
    },
    "add": {
        "x + y": lambda x, y: x + y,
        "y + x": lambda x, y: y + x,
        "x.add(y)": lambda x, y: x.add(y),
        "torch.add": lambda x, y: torch.add(y, x, alpha=1),
        "y.add_(x)": lambda x, y: y.add_(x),
    },
    "keep": {
        "last rows": lambda h: h[:, slice(-2, None), :],
        "all": lambda h: h,
        "last rows of every": lambda h: h[..., -1:, :],
    },
}
"""Ways to write each step. The first is Qwen3's."""

OTHERS: dict[str, dict[str, Spelling]] = {
    "widen": {"not": lambda x, wide: x},
    "square": {"h.pow(4)": lambda h: h.pow(4), "h * h.abs()": lambda h: h * h.abs(), "h.abs()": lambda h: h.abs()},
    "mean": {
        "another dimension": lambda s: s.mean(1, keepdim=True),
        "two dimensions": lambda s: s.mean((-2, -1), keepdim=True),
        "everything": lambda s: s.mean(),
        "sum": lambda s: s.sum(-1, keepdim=True),
    },
    "shift": {
        "none": lambda m, eps: m,
        "tensor": lambda m, eps: m + m.new_full((), eps),
        "alpha=2": lambda m, eps: torch.add(m, eps, alpha=2),
        "m - eps": lambda m, eps: m - -eps,
    },
    "rsqrt": {"v ** -0.25": lambda v: v**-0.25, "sqrt": lambda v: v.sqrt()},
    "scale": {
        "centred": lambda h, r, x: (h - h.mean(-1, keepdim=True)) * r,
        "h / r": lambda h, r, x: h / r,
        "x * r": lambda h, r, x: x * r,
        "r only": lambda h, r, x: r.expand_as(h),
    },
    "narrow": {"not": lambda h, x: h},
    "weigh": {
        "w + h": lambda w, h: w + h,
        "not": lambda w, h: h,
        "w[:1] * h": lambda w, h: w[:1] * h,
        "sorted": lambda w, h: w.sort()[0] * h,
    },
    "linear": {
        "of twice x": lambda x, w, b: F.linear(2 * x, w, b),
        "flipped": lambda x, w, b: F.linear(x, w.flip(0), b),
    },
    "view": {
        "heads inside": lambda y: y.view(y.shape[0], y.shape[1], HEAD_DIM, -1).transpose(2, 3),
        "heads before positions": lambda y: y.view(y.shape[0], -1, y.shape[1], HEAD_DIM).transpose(1, 2),
    },
    "turn": {"a view": lambda y: y.reshape(y.shape[0], y.shape[2], y.shape[1], y.shape[3])},
    "halves": {
        "exchanged": lambda x: _slices(x)[::-1],
        "interleaved": lambda x: (x[..., ::2], x[..., 1::2]),
        "of the exponential": lambda x: _slices(x.exp()),
        "one of another": lambda x: (_slices(x)[0], _slices(x.cos())[1]),
    },
    "rotate": {
        "cat((b, -a))": lambda a, b: torch.cat((b, -a), -1),
        "cat((b, a))": lambda a, b: torch.cat((b, a), -1),
        "cat((-a, b))": lambda a, b: torch.cat((-a, b), -1),
        "stacked": lambda a, b: torch.stack((-b, a), -1).flatten(-2),
    },
    "rope": {
        "minus": lambda x, r, cos, sin: x * cos - r * sin,
        "exchanged tables": lambda x, r, cos, sin: x * sin + r * cos,
        "alpha=2": lambda x, r, cos, sin: torch.add(x * cos, r * sin, alpha=2),
        "only turned": lambda x, r, cos, sin: r * sin,
        "r * cos + r * sin": lambda x, r, cos, sin: r * cos + r * sin,
    },
    "attend": {
        "tiled": lambda q, k, v, mask: _sdpa(q, *(x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v)), mask),
        "exchanged": lambda q, k, v, mask: _sdpa(q, v, k, mask, enable_gqa=True),
        "key as value": lambda q, k, v, mask: _sdpa(q, k, k, mask, enable_gqa=True),
        "causal": lambda q, k, v, mask: _sdpa(q, k, v, None, is_causal=True, enable_gqa=True),
        "no mask": lambda q, k, v, mask: _sdpa(q, k, v, None, enable_gqa=True),
    },
    "act": {"F.gelu": lambda g: F.gelu(g), "relu": lambda g: F.relu(g), "silu(2 g)": lambda g: F.silu(2 * g)},
    "gate": {"act + up": lambda act, up: act + up, "act * act": lambda act, up: act * act},
    "add": {
        "x - y": lambda x, y: x - y,
        "alpha=2": lambda x, y: torch.add(x, y, alpha=2),
        "y + y": lambda x, y: y + y,
        "x[:1] + y": lambda x, y: x[:1] + y,
    },
    "keep": {"first rows": lambda h: h[:, :1, :], "every second": lambda h: h[:, ::2, :], "one": lambda h: h[:, -1, :]},
}
"""What is no spelling of the step, although it has the same form."""


def write(x: Tensor | None) -> None:
    """Write `x` in place, whatever it is. (There may be no mask.)"""
    if x is None:
        return
    if x.dtype == torch.bool:
        x.logical_not_().logical_or_(torch.ones_like(x).tril(3))
    elif x.is_floating_point():
        x.mul_(-2)
    else:
        x.sub_(1)


def _keep(s: Any, x: Tensor) -> None:
    s.extras.append(x)


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "returned": lambda s, x: _keep(s, x),
    "a view returned": lambda s, x: _keep(s, x[..., :1]),
    "summed": lambda s, x: _keep(s, x.sum()),
    "added later": lambda s, x: s.late.append(x),
    "written": lambda s, x: write(x),
    "a slice written": lambda s, x: write(x[..., 1:3]),
    "a view written": lambda s, x: write(x.select(0, 0)),
    "an item set": lambda s, x: x.__setitem__((Ellipsis, 0), 0.5),
    "written later": lambda s, x: s.at_end.append(x),
    "copied and the copy written": lambda s, x: write(x.clone()),
}
"""What else is done with a value; it goes on as it is."""

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat and back": lambda x: x.reshape(-1).view(x.shape),
    "view_as itself": lambda x: x.view_as(x),
    "unsqueezed and squeezed": lambda x: x.unsqueeze(0).squeeze(0),
    "transposed twice": lambda x: x.transpose(0, -1).transpose(-1, 0),
    "halves joined": lambda x: torch.cat(x.chunk(2, -1), -1),
    "contiguous": lambda x: x.contiguous(),
    "detached": lambda x: x.detach(),
    "cloned": lambda x: x.clone(),
    "to its own dtype": lambda x: x.to(x.dtype),
    "to f64 and back": lambda x: x.double().to(x.dtype),
    "times two": lambda x: x * 2,
    "plus zero": lambda x: x + 0,
    "rolled": lambda x: x.roll(1, -1),
    "doubled in place": lambda x: x.mul_(2),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}
"""What goes on in place of a value."""


@dataclass(frozen=True)
class Plan:
    """One block. The defaults are Qwen3's layer."""

    parts: tuple[str, ...] = ("attention", "mlp", "head")
    spelling: dict[str, str] = field(default_factory=dict)
    """The name of each step's spelling, in `SPELLINGS` or `OTHERS`; the first of `SPELLINGS` where none is given."""
    deeds: tuple[tuple[str, str], ...] = ()
    """(place, what is done with the value there): a key of `USES` or `CHANGES`, or "write <tensor>"."""
    norms: dict[str, int] = field(default_factory=dict)
    """How many times each norm is applied, where not once."""
    residuals: dict[str, str] = field(default_factory=dict)
    """What is added after attention and mlp, where not their input: "none", "twice", "norm", "other"."""
    ties: tuple[tuple[str, str], ...] = ()
    """Pairs of weights that are one, if they have one shape."""
    biases: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    """Linear weights that are stored column by column."""
    f32_norms: bool = False
    """Whether norm weights stay f32 in a narrower model."""
    order: str = "qkv"
    heads: tuple[int, int, int] = (6, 2, 2)
    head_norm: str = "before"
    """"before" or "after" the transpose."""
    cache: str = "static"
    """"static", "none", "late" (written after it is read), "one" (keys and values are one tensor)."""
    mask: str = "bool"
    """"bool", "float" or "none"."""
    table: tuple[int, ...] = (1,)
    """The shape of cos and sin before their positions: (1,), (batch,), (1, 1), ..."""
    layout: str = "plain"
    """How x lies in memory: "plain", "transposed", "strided"."""
    dtype: torch.dtype = torch.float32
    batch: int = 2
    seq: int = 1
    dynamic: bool = False
