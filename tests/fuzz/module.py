"""The module that a `Plan` describes, and what it is called with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.blocks import (
    CHANGES,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    LENGTH,
    OTHERS,
    SPELLINGS,
    START,
    USES,
    VOCAB,
    Plan,
    write,
)


class State:
    """What one call of a block is given, keeps and hands on beside its result."""

    def __init__(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, mask: Tensor | None) -> None:
        self.x, self.cos, self.sin, self.position, self.mask = x, cos, sin, position, mask
        self.residual = x
        self.extras: list[Tensor] = []
        self.late: list[Tensor] = []
        self.at_end: list[Tensor] = []


class Block(nn.Module):
    """Norm, q/k/v, RoPE, a cache, attention, o_proj; norm and gated MLP; norm and lm_head: as `plan` says."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        q, k, v = (heads * HEAD_DIM for heads in plan.heads)
        sizes = {
            "q": (HIDDEN, q),
            "k": (HIDDEN, k),
            "v": (HIDDEN, v),
            "o": (q, HIDDEN),
            "gate": (HIDDEN, INTERMEDIATE),
            "up": (HIDDEN, INTERMEDIATE),
            "down": (INTERMEDIATE, HIDDEN),
            "lm_head": (HIDDEN, VOCAB),
        }
        norms = {"input": HIDDEN, "q_norm": HEAD_DIM, "k_norm": HEAD_DIM, "post": HIDDEN, "last": HIDDEN}
        weights = {name: torch.randn(out, size) / size**0.5 for name, (size, out) in sizes.items()}
        weights |= {name: torch.empty(size).uniform_(0.3, 3.0) for name, size in norms.items()}
        weights |= {f"{name}_bias": torch.randn(sizes[name][1]) for name in plan.biases}
        shape = (plan.batch, plan.heads[1], LENGTH, HEAD_DIM)
        weights |= {"k_cache": torch.randn(shape), "v_cache": torch.randn(*shape[:1], plan.heads[2], *shape[2:])}
        self.weights = nn.ParameterDict(weights).requires_grad_(False).to(plan.dtype)
        for one, other in plan.ties:
            if self.weights[one].shape == self.weights[other].shape:
                self.weights[other] = self.weights[one]
        for name in plan.transposed:
            flipped = self.weights[name].t().contiguous().t()
            self.weights[name] = nn.Parameter(flipped, requires_grad=False)
        if plan.f32_norms:
            for name in norms:
                self.weights[name].data = self.weights[name].float()
        self.wide = torch.float32
        self.steps = {name: self._spelled(name) for name in SPELLINGS}
        self.deeds: dict[str, list[str]] = {}
        for place, deed in plan.deeds:
            self.deeds.setdefault(place, []).append(deed)

    def _spelled(self, step: str) -> Callable[..., Any]:
        ways = SPELLINGS[step]
        name = self.plan.spelling.get(step, next(iter(ways)))
        return ways[name] if name in ways else OTHERS[step][name]

    def exact(self) -> "Block":
        """This block in f64, which `self` must no longer be used after: it changes in place."""
        self.wide = torch.float64
        return self.double()

    def at(self, s: State, place: str, x: Tensor) -> Tensor:
        """`x` after everything that the plan does at `place`."""
        for deed in self.deeds.get(place, ()):
            if deed in CHANGES:
                x = CHANGES[deed](x)
            elif deed in USES:
                USES[deed](s, x)
            else:
                target = deed.removeprefix("write ")
                write(self.weights[target] if target in self.weights else getattr(s, target))
        return x

    def norm(self, s: State, name: str, x: Tensor) -> Tensor:
        step, weight = self.steps, self.weights[name]
        for _ in range(self.plan.norms.get(name, 1)):
            h = self.at(s, f"{name} widen", step["widen"](x, self.wide))
            square = self.at(s, f"{name} square", step["square"](h))
            mean = self.at(s, f"{name} mean", step["mean"](square))
            total = self.at(s, f"{name} shift", step["shift"](mean, 1e-6))
            rstd = self.at(s, f"{name} rsqrt", step["rsqrt"](total))
            h = self.at(s, f"{name} scale", step["scale"](h, rstd, x))
            h = self.at(s, f"{name} narrow", step["narrow"](h, x))
            x = self.at(s, f"{name} weigh", step["weigh"](weight, h))
        return x

    def linear(self, s: State, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[name], self.weights[f"{name}_bias"] if name in self.plan.biases else None
        x = x if x.dtype == weight.dtype else x.to(weight.dtype)  # some norms leave f32
        return self.at(s, name, self.steps["linear"](x, weight, bias))

    def heads(self, s: State, name: str, h: Tensor) -> Tensor:
        y = self.at(s, f"{name} view", self.steps["view"](self.linear(s, name, h)))
        if name != "v" and self.plan.head_norm == "before":
            y = self.norm(s, f"{name}_norm", y)
        y = self.at(s, f"{name} turn", self.steps["turn"](y))
        return self.norm(s, f"{name}_norm", y) if name != "v" and self.plan.head_norm == "after" else y

    def rope(self, s: State, name: str, x: Tensor) -> Tensor:
        first, second = self.steps["halves"](x)
        turned = self.at(s, f"{name} rotate", self.steps["rotate"](first, second))
        return self.at(s, f"{name} rope", self.steps["rope"](x, turned, s.cos, s.sin))

    def add(self, s: State, name: str, y: Tensor, normed: Tensor) -> Tensor:
        what = self.plan.residuals.get(name, "x")
        if what == "none":
            return y
        residual = {"norm": normed, "other": s.residual.cos()}.get(what, s.residual)
        y = self.at(s, f"{name} add", self.steps["add"](residual, y))
        return self.steps["add"](residual, y) if what == "twice" else y

    def attention(self, s: State, x: Tensor) -> Tensor:
        h = self.norm(s, "input", x)
        y = {name: self.heads(s, name, h) for name in self.plan.order}
        q, k = (self.rope(s, name, y[name]) for name in "qk")
        keys, values = self.weights["k_cache"], self.weights["v_cache"]
        q, k, v = (x if x.dtype == keys.dtype else x.to(keys.dtype) for x in (q, k, y["v"]))
        if self.plan.cache == "one":
            values = keys
        if self.plan.cache in ("static", "one"):
            keys.index_copy_(2, s.position, k)
            values.index_copy_(2, s.position, v)
        if self.plan.cache == "none":
            keys, values, mask = k, v, None
        else:
            mask = s.mask
        attended = self.at(s, "attend", self.steps["attend"](q, keys, values, mask))
        if self.plan.cache == "late":
            keys.index_copy_(2, s.position, k)
            values.index_copy_(2, s.position, v)
        merged = attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return self.add(s, "o", self.linear(s, "o", merged), h)

    def mlp(self, s: State, x: Tensor) -> Tensor:
        h = self.norm(s, "post", x)
        act = self.at(s, "act", self.steps["act"](self.linear(s, "gate", h)))
        product = self.at(s, "product", self.steps["gate"](act, self.linear(s, "up", h)))
        return self.add(s, "down", self.linear(s, "down", product), h)

    def head(self, s: State, x: Tensor) -> Tensor:
        kept = self.at(s, "keep", self.steps["keep"](self.norm(s, "last", x)))
        return self.linear(s, "lm_head", kept)

    def forward(self, *inputs: Any) -> tuple[Tensor, list[Tensor]]:
        s = State(*inputs)
        x = self.at(s, "x", s.x)
        for part in self.plan.parts:
            s.residual = x
            x = self.at(s, part, getattr(self, part)(s, x))
        for late in s.at_end:
            write(late)
        return x, s.extras + [late + 1 for late in s.late]


def inputs(plan: Plan, seq: int) -> tuple[Any, ...]:
    """x [batch, seq, HIDDEN], cos and sin [*table, seq, HEAD_DIM], positions, mask: drawn afresh."""
    if plan.layout == "transposed":
        x = torch.randn(seq, plan.batch, HIDDEN).transpose(0, 1)
    elif plan.layout == "strided":
        x = torch.randn(plan.batch, 2 * seq, HIDDEN)[:, ::2]
    else:
        x = torch.randn(plan.batch, seq, HIDDEN)
    x = x.to(plan.dtype)
    if len(plan.table) == 1:  # as a model has them
        cos, sin = (torch.randn(*plan.table, seq, HEAD_DIM, dtype=plan.dtype).unsqueeze(1) for _ in range(2))
    else:
        cos, sin = (torch.randn(*plan.table, seq, HEAD_DIM, dtype=plan.dtype) for _ in range(2))
    position = torch.arange(START, START + seq)
    visible = torch.arange(LENGTH) <= position[:, None]
    mask: Tensor | None = visible.expand(plan.batch, 1, -1, -1).clone()
    if plan.mask == "float":
        mask = torch.zeros(mask.shape, dtype=plan.dtype).masked_fill(~mask, -torch.inf)
    return x, cos, sin, position, None if plan.mask == "none" else mask


PLACES = (
    "x", "attention", "mlp", "head", "q", "k", "v", "o", "gate", "up", "down", "lm_head", "q view", "k view", "v view",
    "q turn", "k turn", "v turn", "q rotate", "k rotate", "q rope", "k rope", "attend", "o add", "down add", "act",
    "product", "keep",
    *(f"{norm} {step}" for norm in ("input", "q_norm", "k_norm", "post", "last")
      for step in ("widen", "square", "mean", "shift", "rsqrt", "scale", "narrow", "weigh")),
)  # fmt: skip
"""Where a deed can be done: with the value that has just been computed."""

TARGETS = (
    "x", "residual", "cos", "sin", "position", "mask", "k_cache", "v_cache", "q", "k", "v", "o", "gate", "up", "down",
    "lm_head", "input", "q_norm", "k_norm", "post", "last",
)  # fmt: skip
"""What a deed can write: inputs, caches and weights."""
