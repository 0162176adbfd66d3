"""Which projections with rotated queries and keys are one `norm_qkv_rope`, and which are not."""

from itertools import chain, combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepass.patterns.norm_qkv_rope import find_rope
from tests.models import fused
from tests.patterns.toys import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SEQ,
    Attention,
    Norm,
    Spelling,
    all_fused,
    halves_of_slices,
    hidden,
    refusal,
    rope,
    run,
    tables,
)
from tests.test_graph import result

ALL = {"norm_qkv_rope": 1}
HALF = HEAD_DIM // 2

HALVES: dict[str, Spelling] = {
    "slices": halves_of_slices,
    "slices of every dimension": lambda x: (x[:, :, :, :HALF], x[:, :, :, HALF:]),
    "slices from the end": lambda x: (x[..., :-HALF], x[..., -HALF:]),
    "slices with both ends": lambda x: (x[..., 0:HALF], x[..., HALF:HEAD_DIM]),
    "chunk()": lambda x: x.chunk(2, dim=-1),
    "torch.chunk": lambda x: torch.chunk(x, 2, -1),
    "chunk by keyword": lambda x: x.chunk(chunks=2, dim=3),
    "split()": lambda x: x.split(HALF, dim=-1),
    "split by keyword": lambda x: x.split(split_size=HALF, dim=-1),
    "split in a list": lambda x: x.split([HALF, HALF], dim=-1),
    "torch.split": lambda x: torch.split(x, HALF, -1),
    "narrow()": lambda x: (x.narrow(-1, 0, HALF), x.narrow(-1, HALF, HALF)),
    "torch.narrow": lambda x: (torch.narrow(x, 3, 0, HALF), torch.narrow(x, 3, start=HALF, length=HALF)),
    "narrow by keyword": lambda x: tuple(torch.narrow(input=x, dim=3, start=i, length=HALF) for i in (0, HALF)),
}


def turned(x: Tensor, dim: int = -1) -> Tensor:
    low, high = halves_of_slices(x)
    return torch.cat((-high, low), dim=dim)


def stacked(x: Tensor, cat: Spelling, neg: Spelling = lambda t: -t) -> Tensor:
    low, high = halves_of_slices(x)
    return cat([neg(high), low])


ROPES: dict[str, Spelling] = {
    "other orders": lambda x, cos, sin: cos * x + sin * turned(x),
    "methods": lambda x, cos, sin: x.mul(cos).add(turned(x).mul(sin)),
    "functions": lambda x, cos, sin: torch.add(torch.mul(x, cos), torch.multiply(turned(x), sin)),
    "cat over dimension 3": lambda x, cos, sin: x * cos + turned(x, 3) * sin,
    "cat of a list": lambda x, cos, sin: x * cos + stacked(x, lambda parts: torch.cat(parts, -1)) * sin,
    "concat": lambda x, cos, sin: x * cos + stacked(x, lambda parts: torch.concat(parts, dim=-1)) * sin,
    "concatenate": lambda x, cos, sin: x * cos + stacked(x, lambda parts: torch.concatenate(parts, axis=-1)) * sin,
    "torch.neg": lambda x, cos, sin: x * cos + stacked(x, lambda parts: torch.cat(parts, -1), torch.neg) * sin,
    "neg()": lambda x, cos, sin: x * cos + stacked(x, lambda parts: torch.cat(parts, -1), lambda t: t.neg()) * sin,
}

SPELLINGS: dict[tuple[str, str], Spelling] = {
    **{("rope", name): lambda x, cos, sin, halves=halves: rope(x, cos, sin, halves) for name, halves in HALVES.items()},
    **{("rope", name): spelling for name, spelling in ROPES.items()},
    ("view", "with -1 and a size"): lambda y, h: y.view(h.shape[0], h.shape[1], -1, HEAD_DIM),
    ("view", "one tuple"): lambda y, h: y.view((*h.shape[:-1], -1, HEAD_DIM)),
    ("view", "reshape()"): lambda y, h: y.reshape(*h.shape[:-1], -1, HEAD_DIM),
    ("view", "torch.reshape"): lambda y, h: torch.reshape(y, (*h.shape[:-1], -1, HEAD_DIM)),
    ("view", "by keyword"): lambda y, h: torch.reshape(input=y, shape=(*h.shape[:-1], -1, HEAD_DIM)),
    ("view", "unflatten()"): lambda y, h: y.unflatten(-1, (-1, HEAD_DIM)),
    ("view", "torch.unflatten"): lambda y, h: torch.unflatten(y, 2, (-1, HEAD_DIM)),
    ("turn", "dimensions from the end"): lambda y: y.transpose(-3, -2),
    ("turn", "torch.transpose"): lambda y: torch.transpose(y, 2, 1),
    ("turn", "swapaxes"): lambda y: y.swapaxes(1, 2),
    ("turn", "torch.swapdims"): lambda y: torch.swapdims(y, 1, 2),
    ("turn", "by keyword"): lambda y: y.transpose(dim0=1, dim1=2),
    ("turn", "permute()"): lambda y: y.permute(0, 2, 1, 3),
    ("turn", "permute of a tuple"): lambda y: y.permute((0, 2, 1, -1)),
    ("turn", "permute by keyword"): lambda y: y.permute(dims=(0, 2, 1, 3)),
    ("turn", "torch.permute"): lambda y: torch.permute(y, (0, 2, 1, 3)),
}


@pytest.mark.parametrize(("step", "name"), SPELLINGS)
def test_every_spelling_of_a_step_is_fused(step: str, name: str) -> None:
    report, gm = run(Attention(**{step: SPELLINGS[step, name]}), hidden(), *tables())
    assert all_fused(report) == ALL
    assert not any(word in gm.code for word in ("linear(", "rsqrt", "cat("))


@pytest.mark.parametrize("head_norm", ["before", "after", None])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_head_norms_before_or_after_the_transpose_or_none_are_fused(norm: bool, head_norm: str | None) -> None:
    report, gm = run(Attention(norm=norm, head_norm=head_norm), hidden(), *tables())
    assert all_fused(report) == ALL
    assert "rsqrt" not in gm.code


@pytest.mark.parametrize("biases", chain.from_iterable(combinations("qkv", n) for n in range(4)), ids="".join)
def test_every_combination_of_biases_is_fused(biases: tuple[str, ...]) -> None:
    assert all_fused(run(Attention(biases="".join(biases)), hidden(), *tables())[0]) == ALL


@pytest.mark.parametrize("heads", [HEADS, KV_HEADS], ids=["grouped", "equal"])
@pytest.mark.parametrize("order", permutations("qkv"), ids="".join)
def test_q_k_and_v_are_told_apart_in_whatever_order_they_are_computed(order: Any, heads: int) -> None:
    net = Attention(order=order, heads=(heads, KV_HEADS, KV_HEADS))
    assert all_fused(run(net, hidden(), *tables())[0]) == ALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtypes_of_models_are_fused(dtype: torch.dtype) -> None:
    cos, sin = (table.to(dtype) for table in tables())
    assert all_fused(run(Attention().to(dtype), hidden(dtype), cos, sin)[0]) == ALL


@pytest.mark.parametrize("shape", [(BATCH, 1, SEQ, HEAD_DIM), (1, 1, SEQ, HEAD_DIM), (1, 1, 1, HEAD_DIM)], ids=str)
def test_tables_that_broadcast_are_fused(shape: tuple[int, ...]) -> None:
    assert all_fused(run(Attention(), hidden(), *tables(*shape))[0]) == ALL


def test_tables_that_the_graph_builds_itself_are_arguments() -> None:
    class Net(Attention):
        def forward(self, x: Tensor, angles: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return super().forward(x, angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))

    report, gm = run(Net(), hidden(), torch.randn(BATCH, SEQ, HEAD_DIM), torch.zeros(()))
    assert all_fused(report) == ALL
    assert "unsqueeze" in gm.code


def test_one_weight_for_all_three_is_fused() -> None:
    net = Attention(heads=(KV_HEADS, KV_HEADS, KV_HEADS))
    net.linears["k"].weight = net.linears["v"].weight = net.linears["q"].weight
    assert all_fused(run(net, hidden(), *tables())[0]) == ALL


def test_a_graph_break_after_the_norm_leaves_a_norm_and_a_group_without_one() -> None:
    class Net(Attention):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.norm(x)
            torch._dynamo.graph_break()
            y = {name: self.heads(name, h) for name in self.order}
            return rope(y["q"], cos, sin), rope(y["k"], cos, sin), y["v"]

    net, inputs = Net(), (hidden(), *tables())
    with torch.no_grad():
        got, reports, _ = fused(net, *inputs)
        torch.testing.assert_close(got, net(*inputs))
    assert [all_fused(report) for report in reports] == [{"rms_norm": 1}, ALL]


def test_a_norm_that_somebody_else_reads_stays_one_and_the_group_begins_behind_it() -> None:
    class Net(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.lora = nn.Linear(HIDDEN, 3, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
            h = self.norm(x)
            y = {name: self.heads(name, h) for name in self.order}
            return rope(y["q"], cos, sin), rope(y["k"], cos, sin), y["v"], self.lora(h)

    assert all_fused(run(Net(), hidden(), *tables())[0]) == {"rms_norm": 1, **ALL}


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, rest = x[..., :HALF], x[..., HALF:]
    return torch.cat((rope(first, cos[..., :HALF], sin[..., :HALF]), rest), -1)


def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = halves_of_slices(x)
    return x * cos + torch.cat((high, -low), -1) * sin


OTHERS: dict[str, Spelling] = {
    "interleaved": interleaved,
    "partial": partial,
    "the other half negated": swapped,
    "halves not exchanged": lambda x, cos, sin: x * cos + torch.cat((-x[..., :HALF], x[..., HALF:]), -1) * sin,
    "unequal halves": lambda x, cos, sin: x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin,
    "every second": lambda x, cos, sin: x * cos + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * sin,
    "a difference": lambda x, cos, sin: x * cos - turned(x) * sin,
    "scaled": lambda x, cos, sin: torch.add(x * cos, turned(x) * sin, alpha=2),
    "of two values": lambda x, cos, sin: x * cos + turned(x.exp()) * sin,
    "cat over the positions": lambda x, cos, sin: (
        x * cos + torch.cat((-x[..., HALF:], x[..., :HALF]), 2).view(x.shape) * sin
    ),
    "none": lambda x, cos, sin: x * cos,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_a_half_split_rope_over_the_whole_head_is_no_site(name: str) -> None:
    report, _ = run(Attention(rope=OTHERS[name]), hidden(), *tables())
    assert all_fused(report) == {"rms_norm": 3}


NO_ROPE: dict[str, tuple[Spelling, tuple[int, ...], tuple[int, ...]]] = {
    "cat over the positions": (
        lambda x, cos, sin: x * cos + torch.cat((-x[..., 1:], x[..., :1]), 2) * sin,
        (2, 3, 1, 2),
        (2, 2),
    ),
    "one half": (lambda x, cos, sin: x * cos + torch.cat((-x[..., 1:],), -1) * sin, (2, 3, 5, 2), (5, 2)),
    "a half changed": (
        lambda x, cos, sin: x * cos + torch.cat((-x[..., 4:], x[..., :4].exp()), -1) * sin,
        (2, 3, 5, 8),
        (5, 8),
    ),
    "the negated half changed": (
        lambda x, cos, sin: x * cos + torch.cat((-x[..., 4:].exp(), x[..., :4]), -1) * sin,
        (2, 3, 5, 8),
        (5, 8),
    ),
    "halves of two tensors": (
        lambda x, cos, sin: x * cos + torch.cat((-x.exp()[..., 4:], x[..., :4]), -1) * sin,
        (2, 3, 5, 8),
        (5, 8),
    ),
    "a half not negated": (
        lambda x, cos, sin: x * cos + torch.cat((x[..., 4:].exp(), x[..., :4]), -1) * sin,
        (2, 3, 5, 8),
        (5, 8),
    ),
    "a number for cos": (lambda x, cos, sin: x * 0.5 + turned(x) * sin, (2, 3, 5, 8), (5, 8)),
    "a number for sin": (lambda x, cos, sin: x * cos + turned(x) * 0.5, (2, 3, 5, 8), (5, 8)),
}


@pytest.mark.parametrize("name", NO_ROPE)
def test_what_is_not_a_half_split_rope_is_not_found(name: str) -> None:
    function, shape, table = NO_ROPE[name]
    assert find_rope(result(function, torch.randn(shape), *torch.randn(2, *table))) is None


VIEWS: dict[str, Spelling] = {
    "heads before positions": lambda y, h: y.view(BATCH, -1, SEQ, HEAD_DIM).transpose(1, 2),
    "overlapping heads": lambda y, h: y.unfold(2, HEAD_DIM, HALF),
    "batch merged into positions": lambda y, h: y.view(1, BATCH * SEQ, -1, HEAD_DIM),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_moves_positions_is_no_site(name: str) -> None:
    report, _ = run(Attention(view=VIEWS[name]), hidden(), *tables(1, 1, 1, HEAD_DIM))
    assert all_fused(report) == {"rms_norm": 3}


def test_heads_of_two_dimensions_are_no_site() -> None:
    net = Attention(head_norm=None, view=lambda y, h: y.view(BATCH, SEQ, -1, 2, HALF))
    assert all_fused(run(net, hidden(), *tables(1, 1, SEQ, 1, HALF))[0]) == {"rms_norm": 1}


def test_heads_that_are_not_transposed_are_no_site() -> None:
    """One head and one position: the shapes do not tell."""
    net = Attention(heads=(1, 1, 1), turn=lambda y: y.clamp(-1, 1))
    assert all_fused(run(net, hidden()[:, :1], *tables(1, 1, 1, HEAD_DIM))[0]) == {"rms_norm": 3}


def test_values_that_weigh_a_norm_are_refused() -> None:
    """What ends in the norm is no value of the linear layer that is its weight."""

    class Net(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            h = self.norm(x)
            q, k = (rope(self.heads(name, h), cos, sin) for name in "qk")
            value = self.linears["v"](h).view(BATCH, KV_HEADS, KV_HEADS, HEAD_DIM)
            other = self.other(x).view(BATCH, KV_HEADS, KV_HEADS, HEAD_DIM).transpose(1, 2)
            weighed = value * (other * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + 1e-6))
            return q, k, value.transpose(1, 2), other, weighed

    report, _ = run(Net(), hidden()[:, :KV_HEADS], *tables(1, 1, KV_HEADS, HEAD_DIM))
    refusal(report, "norm_qkv_rope", "extra-user", "'value' has another user")


def test_a_query_without_a_key_or_a_value_is_no_site() -> None:
    class Net(Attention):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(x)
            return rope(self.heads("q", h), cos, sin), self.heads("v", h)

    assert all_fused(run(Net(), hidden(), *tables())[0]) == {"rms_norm": 2}


class Odd(Attention):
    """`change` gets what RoPE takes and gives, and what is returned is its result."""

    def __init__(self, change: Spelling, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.change = change

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        h = self.norm(x)
        y = {name: self.heads(name, h) for name in self.order}
        return self.change(y["q"], y["k"], y["v"], cos, sin)


def two_tables(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rope(q, cos, sin), rope(k, cos, sin + 1), v


def early_value(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Any:
    total = v.sum()
    late = sin + 1
    return rope(q, cos, late), rope(k, cos, late), v, total


def table_of_the_value(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Any:
    cos = v.cos()
    return rope(q, cos, sin), rope(k, cos, sin), v


def query_kept(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rope(q, cos, sin), rope(k, cos, sin), v, q.exp()


def probed_query(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Few nodes read the query before its rotation does, but 35 ways lead to five of them."""
    scaled = [q * i for i in range(7)]
    probes = [torch.stack(scaled, dim) for dim in range(5)]
    return rope(q, cos, sin), rope(k, cos, sin), v, probes


REFUSED: dict[str, tuple[Attention, tuple[int, ...], str, str]] = {
    "k and v with other numbers of heads": (Attention(heads=(6, 2, 3)), (), "shape", "k has 2 heads and v has 3"),
    "q and k with other tables": (Odd(two_tables), (), "shape", "rotated by different tables"),
    "a table for each head": (
        Attention(heads=(KV_HEADS, KV_HEADS, KV_HEADS)),
        (1, KV_HEADS, SEQ, HEAD_DIM),
        "shape",
        r"\(1, 2, 5, 8\); expected \[1 or 3, 1, 5, 8\]",
    ),
    "a number for each position": (Attention(), (1, 1, SEQ, 1), "shape", r"\(1, 1, 5, 1\); expected"),
    "a table of three dimensions": (Attention(), (1, 1, HEAD_DIM), "shape", r"\(1, 1, 8\); expected"),
    "a table without a batch": (Attention(), (SEQ, HEAD_DIM), "shape", r"\(5, 8\); expected"),
    "a value used before the table exists": (Odd(early_value), (), "order", "'total' uses '.*' before '.*' exists"),
    "a table made of the value": (Odd(table_of_the_value, heads=(3, 1, 1)), (), "order", "'cos' uses '.*' before"),
    "the turned half first": (
        Attention(rope=lambda x, cos, sin: turned(x) * sin + x * cos),
        (),
        "strides",
        r"\(240, 40, 8, 1\), the op gives \(240, 8, 48, 1\)",
    ),
    "a query used before its rotation": (Odd(query_kept), (), "extra-user", "has another user: 'exp'"),
    "a query used many times": (Odd(probed_query), (), "extra-user", "has another user: 'mul"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_does_not_compute_is_refused(name: str) -> None:
    net, shape, code, words = REFUSED[name]
    refusal(run(net, hidden(), *tables(*shape))[0], "norm_qkv_rope", code, words)


@pytest.mark.parametrize(
    ("x", "shape", "words"),
    [
        (hidden()[:1], (BATCH, 1, SEQ, HEAD_DIM), r"\(3, 1, 5, 8\); expected \[1 or 1, 1, 5, 8\]"),
        (hidden()[:, :1], (1, 1, SEQ, HEAD_DIM), r"\(1, 1, 5, 8\); expected \[1 or 3, 1, 1, 8\]"),
    ],
    ids=["batches", "positions"],
)
def test_a_table_of_more_than_there_are_is_refused(x: Tensor, shape: tuple[int, ...], words: str) -> None:
    refusal(run(Attention(), x, *tables(*shape))[0], "norm_qkv_rope", "shape", words)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_the_one_table_that_does_not_fit_is_named(name: str) -> None:
    cos, sin = tables()
    other = torch.randn(1, 1, SEQ, 1)
    report, _ = run(Attention(), hidden(), *((other, sin) if name == "cos" else (cos, other)))
    refusal(report, "norm_qkv_rope", "shape", rf"{name}_' is \(1, 1, 5, 1\); expected \[1 or 3, 1, 5, 8\]")


def test_an_activation_of_four_dimensions_is_refused() -> None:
    net = Attention(view=lambda y, h: y.view(BATCH, SEQ, -1, HEAD_DIM))
    report, _ = run(net, hidden().unsqueeze(2), *tables())
    refusal(report, "norm_qkv_rope", "shape", "argument 'x' is .*; expected 3 dimensions")


@pytest.mark.parametrize("name", "qkv")
def test_a_bias_that_broadcasts_is_refused(name: str) -> None:
    net = Attention(biases=name)
    net.linears[name].bias = nn.Parameter(torch.randn(1), requires_grad=False)
    refusal(run(net, hidden(), *tables())[0], "norm_qkv_rope", "shape", r"bias '.*' is \(1,\); expected")


def test_a_refused_region_is_one_site() -> None:
    report, _ = run(Odd(two_tables), hidden(), *tables())
    assert [site.fusion for site in report.sites if not site.fused] == ["norm_qkv_rope"]


def test_heads_of_different_sizes_are_refused() -> None:
    def view(y: Tensor, h: Tensor) -> Tensor:
        # Of all three only v has this width.
        return y.view(BATCH, SEQ, -1, HALF if y.shape[-1] == KV_HEADS * HEAD_DIM + HEAD_DIM else HEAD_DIM)

    report, _ = run(Attention(view=view, heads=(HEADS, KV_HEADS, 3)), hidden(), *tables())
    refusal(report, "norm_qkv_rope", "shape", "head dimensions of q, k and v differ: 8, 8, 4")


@pytest.mark.parametrize("name", "qkv")
def test_a_transposed_weight_is_refused(name: str) -> None:
    net = Attention()
    weight = net.linears[name].weight.detach()
    net.linears[name].weight = nn.Parameter(weight.t().contiguous().t(), requires_grad=False)
    report, _ = run(net, hidden(), *tables())
    refusal(report, "norm_qkv_rope", "weight-layout", "strides.*not contiguous")


@pytest.mark.parametrize("name", ["input", "q", "k"])
def test_a_norm_that_the_op_does_not_compute_is_refused(name: str) -> None:
    net = Attention()
    if name == "input":
        net.norm = Norm(widen=lambda x: x.to(torch.float64))
    else:
        net.norms[name] = Norm(HEAD_DIM, widen=lambda x: x.to(torch.float64))
    report, _ = run(net, hidden(), *tables())
    refusal(report, "norm_qkv_rope", "dtype", "statistics are torch.float64")


@pytest.mark.parametrize("name", ["input", "q", "k"])
def test_a_norm_weight_that_is_written_before_the_tables_exist_is_refused(name: str) -> None:
    """The op would read it there."""

    class Net(Attention):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            h = self.norm(x)
            q, k, v = (self.heads(branch, h) for branch in "qkv")
            (self.norm if name == "input" else self.norms[name]).weight.mul_(2)
            late = sin + 1
            return rope(q, cos, late), rope(k, cos, late), v

    report, _ = run(Net(), hidden(), *tables())
    refusal(report, "norm_qkv_rope", "mutation", "'mul_' writes in place what the region reads")
