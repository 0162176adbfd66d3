"""The parts of a decoder layer as Qwen3 spells them, in which a test spells one thing another way.

Every size differs from every other, so that a mix-up cannot pass.
"""

import copy
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fusepass.options import Options
from fusepass.report import GraphReport, Site
from tests.models import fused

BATCH, SEQ, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 3, 5, 20, 28, 6, 2, 8, 33

Spelling = Callable[..., Any]


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, SEQ, HIDDEN, dtype=dtype)


def tables(*shape: int) -> tuple[Tensor, Tensor]:
    """cos and sin, [1, 1, SEQ, HEAD_DIM] unless told otherwise."""
    shape = shape or (1, 1, SEQ, HEAD_DIM)
    return torch.randn(shape), torch.randn(shape)


class Norm(nn.Module):
    """Qwen3RMSNorm."""

    STEPS: ClassVar[dict[str, Spelling]] = {
        "widen": lambda x: x.to(torch.float32),
        "square": lambda h: h.pow(2),
        "mean": lambda s: s.mean(-1, keepdim=True),
        "shift": lambda m, eps: m + eps,
        "rsqrt": lambda v: torch.rsqrt(v),
        "scale": lambda h, r: h * r,
        "narrow": lambda h, x: h.to(x.dtype),
        "weigh": lambda w, h: w * h,
    }

    def __init__(self, size: int = HIDDEN, eps: Any = 1e-6, **spelling: Spelling) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size).uniform_(0.3, 3.0), requires_grad=False)
        self.eps = eps
        self.steps = {**self.STEPS, **spelling}

    def forward(self, x: Tensor) -> Tensor:
        step = self.steps
        h = step["widen"](x)
        variance = step["mean"](step["square"](h))
        h = step["scale"](h, step["rsqrt"](step["shift"](variance, self.eps)))
        return step["weigh"](self.weight, step["narrow"](h, x))


class MLP(nn.Module):
    """Qwen3MLP with the norm before it and the residual add after it."""

    STEPS: ClassVar[dict[str, Spelling]] = {
        "act": lambda gate: F.silu(gate),
        "mul": lambda act, up: act * up,
        "add": lambda x, y: x + y,
    }

    def __init__(self, *, norm: bool = True, biases: str = "", **spelling: Spelling) -> None:
        """`biases`: which of g(ate), u(p) and d(own) have one."""
        super().__init__()
        self.norm = Norm() if norm else nn.Identity()
        self.gate = nn.Linear(HIDDEN, INTERMEDIATE, bias="g" in biases)
        self.up = nn.Linear(HIDDEN, INTERMEDIATE, bias="u" in biases)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias="d" in biases)
        self.steps = {**self.STEPS, **spelling}
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.down(self.steps["mul"](self.steps["act"](self.gate(h)), self.up(h)))
        return self.steps["add"](x, y)


def halves_of_slices(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def rope(x: Tensor, cos: Tensor, sin: Tensor, halves: Spelling = halves_of_slices) -> Tensor:
    """Rotary embedding in the half-split form, https://arxiv.org/abs/2104.09864."""
    low, high = halves(x)
    return (x * cos) + (torch.cat((-high, low), dim=-1) * sin)


class Attention(nn.Module):
    """Qwen3Attention as far as RoPE, with the norm before it."""

    STEPS: ClassVar[dict[str, Spelling]] = {
        "view": lambda y, h: y.view(*h.shape[:-1], -1, HEAD_DIM),
        "turn": lambda y: y.transpose(1, 2),
        "rope": rope,
    }

    def __init__(
        self,
        *,
        norm: bool = True,
        head_norm: str | None = "before",
        biases: str = "",
        heads: tuple[int, int, int] = (HEADS, KV_HEADS, KV_HEADS),
        order: str = "qkv",
        **spelling: Spelling,
    ) -> None:
        """`head_norm`: whether q and k are normed before or after the transpose, or None; `biases`: which of q, k and v
        have one; `order`: in which they are computed."""
        super().__init__()
        self.norm = Norm() if norm else nn.Identity()
        self.linears = nn.ModuleDict(
            {name: nn.Linear(HIDDEN, n * HEAD_DIM, bias=name in biases) for name, n in zip("qkv", heads)}
        )
        self.norms = nn.ModuleDict({name: Norm(HEAD_DIM) for name in "qk"})
        self.head_norm, self.order = head_norm, order
        self.steps = {**self.STEPS, **spelling}
        self.requires_grad_(False)

    def heads(self, name: str, h: Tensor) -> Tensor:
        y = self.steps["view"](self.linears[name](h), h)
        if name != "v" and self.head_norm == "before":
            y = self.norms[name](y)
        y = self.steps["turn"](y)
        return self.norms[name](y) if name != "v" and self.head_norm == "after" else y

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x)
        y = {name: self.heads(name, h) for name in self.order}
        return self.steps["rope"](y["q"], cos, sin), self.steps["rope"](y["k"], cos, sin), y["v"]


class Residual(nn.Module):
    """A linear layer and the residual add after it; `between` runs between the two."""

    def __init__(self, between: Spelling | None = None, add: Spelling = lambda r, y: r + y, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=bias).requires_grad_(False)
        self.between, self.add = between, add

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        y = self.linear(x)
        if self.between is not None:
            self.between(self, x, r)
        return self.add(r, y)


class Head(nn.Module):
    """The end of Qwen3ForCausalLM: the last norm, the rows that `keep` leaves of its result, lm_head."""

    def __init__(self, keep: Spelling = lambda h: h[:, slice(-2, None), :], bias: bool = False) -> None:
        super().__init__()
        self.norm, self.lm_head = Norm(), nn.Linear(HIDDEN, VOCAB, bias=bias)
        self.keep = keep
        self.requires_grad_(False)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.lm_head(self.keep(self.norm(x), *args))


def run(
    module: Callable[..., Any], *inputs: Any, dynamic: bool = False, options: Options | None = None
) -> tuple[GraphReport, GraphModule]:
    """Fuse the one graph of `module`, and check that it computes and writes what eager does: the result, and every
    input and parameter afterwards."""
    twin, copies = copy.deepcopy((module, inputs))
    with torch.no_grad():
        want = twin(*copies)
        got, reports, graphs = fused(module, *inputs, dynamic=dynamic, options=options)
    # A SymFloat given to an op makes Dynamo start again: the last graph is the one that runs.
    assert dynamic or len(graphs) == 1
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(inputs, copies)
    if isinstance(module, nn.Module):
        torch.testing.assert_close(module.state_dict(), twin.state_dict())
    # What a match reads is known: sites without are near misses, which have tests of their own.
    reports[-1].sites = [site for site in reports[-1].sites if site.inputs]
    return reports[-1], graphs[-1]


def all_fused(report: GraphReport) -> dict[str, int]:
    """How often each fusion applied, where none was refused."""
    assert [site for site in report.sites if not site.fused] == []
    return dict(report.counts())


def refusal(report: GraphReport, fusion: str, code: str, words: str) -> Site:
    """The site of `fusion`, which applied nowhere, for this reason: `words` is a pattern."""
    assert fusion not in report.counts()
    site = next(site for site in report.sites if site.fusion == fusion)
    assert site.code == code
    assert site.reason is not None
    assert re.search(words, site.reason), site.reason
    return site
