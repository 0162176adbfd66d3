"""Which norms and the linear layer behind them are one `norm_linear`, through which slices, and which are not."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fusepass.options import Options
from fusepass.rewrite import fuse
from tests.patterns.toys import BATCH, HIDDEN, SEQ, VOCAB, Head, Norm, Spelling, all_fused, hidden, refusal, run

KEPT: dict[str, tuple[Spelling, int]] = {
    "logits_to_keep=2": (lambda h: h[:, slice(-2, None), :], -2),
    "logits_to_keep=1": (lambda h: h[:, slice(-1, None), :], -1),
    "logits_to_keep=0": (lambda h: h[:, slice(0, None), :], 0),
    "no slice": (lambda h: h, 0),
    "from the front": (lambda h: h[:, 3:, :], 3),
    "two indices": (lambda h: h[:, -2:], -2),
    "an ellipsis before": (lambda h: h[..., -2:, :], -2),
    "an ellipsis between": (lambda h: h[:, -2:, ...], -2),
    "an ellipsis for nothing": (lambda h: h[:, ..., -2:, :], -2),
    "only an ellipsis": (lambda h: h[...], 0),
    "every start": (lambda h: h[0:, -2:, 0:], -2),
    "every step": (lambda h: h[::1, -2::1, ::1], -2),
    "no start": (lambda h: h[:, :, :], 0),
    "more than there are": (lambda h: h[:, -9:, :], -9),
    "none": (lambda h: h[:, SEQ:, :], SEQ),
}


def call_in(gm: GraphModule) -> Node:
    (call,) = (node for node in gm.graph.nodes if "norm_linear" in str(node.target))
    return call


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_every_spelling_of_the_slice_is_fused(name: str, bias: bool) -> None:
    keep, start = KEPT[name]
    report, gm = run(Head(keep, bias), hidden())
    assert all_fused(report) == {"norm_linear": 1}
    assert call_in(gm).args[5] == start
    assert not any(word in gm.code for word in ("linear(", "rsqrt"))
    assert not any(node.target is operator.getitem for node in gm.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtypes_of_models_are_fused(dtype: torch.dtype) -> None:
    assert all_fused(run(Head().to(dtype), hidden(dtype))[0]) == {"norm_linear": 1}


@pytest.mark.parametrize(
    ("shape", "keep"),
    [
        ((7, HIDDEN), lambda h: h),
        ((7, HIDDEN), lambda h: h[-2:]),
        ((2, 1, 3, HIDDEN), lambda h: h),
        ((2, 1, 3, HIDDEN), lambda h: h[:, :, -2:]),
    ],
    ids=["2-d", "2-d sliced", "4-d", "4-d sliced"],
)
def test_an_activation_of_any_rank_is_fused(shape: tuple[int, ...], keep: Spelling) -> None:
    assert all_fused(run(Head(keep), torch.randn(shape))[0]) == {"norm_linear": 1}


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_number_of_rows_that_the_caller_gives_is_fused(dynamic: bool) -> None:
    report, gm = run(Head(lambda h, n: h[:, slice(-n, None), :]), hidden(), 2, dynamic=dynamic)
    assert all_fused(report) == {"norm_linear": 1}
    start = call_in(gm).args[5]
    assert isinstance(start, Node) if dynamic else start == -2


@torch.no_grad()
def test_one_graph_serves_every_number_of_rows() -> None:
    graphs = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(str(torch._guards.CompileContext.current_compile_id()))
        fuse(gm, Options())
        return gm.forward

    head = Head(lambda h, n: h[:, slice(-n, None), :])
    compiled = torch.compile(head, backend=backend, dynamic=True)
    for batch, length, kept in ((3, 5, 2), (2, 7, 6), (4, 9, 4), (9, 4, 3)):
        x = torch.randn(batch, length, HIDDEN)
        torch.testing.assert_close(compiled(x, kept), head(x, kept))
    assert len(set(graphs)) == 1


def test_a_weight_that_is_the_embeddings_too_is_fused() -> None:
    class Net(Head):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(F.embedding(tokens, self.lm_head.weight))

    assert all_fused(run(Net(), torch.randint(VOCAB, (BATCH, SEQ)))[0]) == {"norm_linear": 1}


def test_what_follows_the_logits_stays_behind_the_op() -> None:
    head = Head()
    report, gm = run(lambda x: 30 * torch.tanh(head(x) / 30).float(), hidden())
    assert all_fused(report) == {"norm_linear": 1}
    assert "tanh" in gm.code


def test_the_sum_of_two_heads_is_a_residual_of_one_and_a_norm_with_the_other() -> None:
    first, second = Head(), Head()
    report, _ = run(lambda x: first(x) + second(x), hidden())
    assert all_fused(report) == {"linear_residual": 1, "norm_linear": 1, "rms_norm": 1}


OTHERS: dict[str, tuple[Spelling, int]] = {
    "the first rows": (lambda h: h[:, :2, :], HIDDEN),
    "without the last row": (lambda h: h[:, -3:-1, :], HIDDEN),
    "every second row": (lambda h: h[:, ::2, :], HIDDEN),
    "one position": (lambda h: h[:, -1, :], HIDDEN),
    "another dimension": (lambda h: h[1:, :, :], HIDDEN),
    "two dimensions": (lambda h: h[1:, -2:, :], HIDDEN),
    "some sequences' last rows": (lambda h: h[:, -2:][1:], HIDDEN),
    "some features": (lambda h: h[:, -2:, 4:], HIDDEN - 4),
    "the last features": (lambda h: h[..., 4:], HIDDEN - 4),
    "a new dimension": (lambda h: h[:, None, -2:, :], HIDDEN),
    "a list of rows": (lambda h: h[:, [1, 3], :], HIDDEN),
    "scaled": (lambda h: h[:, -2:, :] * 0.5, HIDDEN),
    "squared by an op that is given all dimensions": (lambda h: torch.einsum(h, (...,), h, (...,)), HIDDEN),
    "in another layout": (lambda h: h[:, -2:, :].transpose(0, 1), HIDDEN),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_a_slice_of_last_rows_leaves_the_norm_alone(name: str) -> None:
    keep, features = OTHERS[name]
    head = Head(keep)
    head.lm_head = nn.Linear(features, VOCAB, bias=False).requires_grad_(False)
    assert all_fused(run(head, hidden())[0]) == {"rms_norm": 1}


def test_some_features_of_a_single_row_leave_the_norm_alone() -> None:
    head = Head(lambda h: h[4:])
    head.lm_head = nn.Linear(HIDDEN - 4, VOCAB, bias=False).requires_grad_(False)
    assert all_fused(run(head, torch.randn(HIDDEN))[0]) == {"rms_norm": 1}


def test_one_of_several_parts_leaves_the_norm_alone() -> None:
    report, _ = run(Head(lambda h: h.split([2, SEQ - 2], 1)[0]), hidden())
    assert all_fused(report) == {"rms_norm": 1}


def test_rows_by_a_tensor_of_indices_leave_the_norm_alone() -> None:
    """`logits_to_keep` may be one."""
    report, _ = run(Head(lambda h, rows: h[:, rows, :]), hidden(), torch.tensor([1, 3]))
    assert all_fused(report) == {"rms_norm": 1}


def test_a_norm_that_somebody_else_reads_stays_one() -> None:
    """With `output_hidden_states` the model returns it."""

    class Net(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(x)
            return self.lm_head(self.keep(h)), h

    assert all_fused(run(Net(), hidden())[0]) == {"rms_norm": 1}


def test_rows_that_somebody_else_reads_stay_rows() -> None:
    class Net(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            kept = self.keep(self.norm(x))
            return self.lm_head(kept), kept

    assert all_fused(run(Net(), hidden())[0]) == {"rms_norm": 1}


@pytest.mark.parametrize("keep", [lambda h: h, lambda h: h[:, -2:]], ids=["norm", "rows"])
def test_two_linears_of_one_norm_leave_it_alone(keep: Spelling) -> None:
    class Net(Head):
        def forward(self, x: Tensor) -> Tensor:
            kept = self.keep(self.norm(x))
            return self.lm_head(kept) * torch.sigmoid(self.lm_head(kept))

    assert all_fused(run(Net(keep), hidden())[0]) == {"rms_norm": 1}


def test_an_input_written_before_the_linear_is_refused() -> None:
    """The op would read it there."""

    class Net(Head):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            h = self.norm(x)
            x.mul_(2)
            return F.linear(self.keep(h), weight.cos())

    report, _ = run(Net(), hidden(), torch.randn(VOCAB, HIDDEN))
    refusal(report, "norm_linear", "mutation", "'mul_' writes in place what the region reads")
    assert report.counts() == {"rms_norm": 1}


def linear(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return F.linear((norm * h.to(x.dtype))[..., -2:, :], weight, bias)


SQUARE, NORM = torch.randn(HIDDEN, HIDDEN), torch.rand(HIDDEN) + 0.3
F64 = torch.float64
REFUSED: dict[str, tuple[tuple[Tensor, ...], str, str]] = {
    "transposed weight": ((hidden(), NORM, SQUARE.t()), "weight-layout", "strides.*not contiguous"),
    "weight of one dimension": (
        (hidden(), NORM, SQUARE[0].clone()),
        "weight-layout",
        rf"\({HIDDEN},\); expected \[any, {HIDDEN}\]",
    ),
    "bias that broadcasts": (
        (hidden(), NORM, SQUARE, torch.randn(1)),
        "shape",
        rf"^bias '.*' is \(1,\); expected \[{HIDDEN}\]",
    ),
    "norm weight that broadcasts": ((hidden(), NORM[:1], SQUARE), "shape", rf"norm weight.*row of {HIDDEN}"),
    "f64": ((hidden(F64), NORM.to(F64), SQUARE.to(F64)), "dtype", "float64; expected bfloat16, float16 or float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_does_not_compute_is_refused(name: str) -> None:
    inputs, code, words = REFUSED[name]
    refusal(run(linear, *inputs)[0], "norm_linear", code, words)


def test_a_single_row_without_dimensions_is_refused() -> None:
    report, _ = run(Head(lambda h: h), torch.randn(HIDDEN))
    refusal(report, "norm_linear", "shape", "argument 'x' is .*; expected at least two dimensions")
    assert report.counts() == {"rms_norm": 1}


def test_a_norm_that_the_op_does_not_compute_is_refused() -> None:
    head = Head()
    head.norm = Norm(widen=lambda x: x)
    report, _ = run(head.bfloat16(), hidden(torch.bfloat16))
    refusal(report, "norm_linear", "dtype", "statistics are torch.bfloat16")
