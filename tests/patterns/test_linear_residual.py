"""Which linear layers with an add after them are one `linear_residual`, and which are not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.patterns.toys import BATCH, HIDDEN, SEQ, Residual, Spelling, all_fused, hidden, refusal, run

SPELLINGS: dict[str, Spelling] = {
    "r + y": lambda r, y: r + y,
    "y + r": lambda r, y: y + r,
    "add()": lambda r, y: r.add(y),
    "add() on the product": lambda r, y: y.add(r),
    "torch.add": lambda r, y: torch.add(r, y),
    "by keyword": lambda r, y: torch.add(r, other=y),
    "alpha=1": lambda r, y: torch.add(r, y, alpha=1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_the_add_is_fused(name: str, bias: bool) -> None:
    report, gm = run(Residual(add=SPELLINGS[name], bias=bias), hidden(), hidden())
    assert all_fused(report) == {"linear_residual": 1}
    assert "linear(" not in gm.code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtypes_of_models_are_fused(dtype: torch.dtype) -> None:
    report, _ = run(Residual(bias=True).to(dtype), hidden(dtype), hidden(dtype))
    assert all_fused(report) == {"linear_residual": 1}


@pytest.mark.parametrize("shape", [(HIDDEN,), (7, HIDDEN), (2, 1, 3, HIDDEN)], ids=str)
def test_an_activation_of_any_rank_is_fused(shape: tuple[int, ...]) -> None:
    report, _ = run(Residual(), torch.randn(shape), torch.randn(shape))
    assert all_fused(report) == {"linear_residual": 1}


def test_a_residual_that_is_computed_last_is_fused() -> None:
    report, _ = run(Residual(add=lambda r, y: r.sin() + y), hidden(), hidden())
    assert all_fused(report) == {"linear_residual": 1}


def test_a_chain_of_residuals_is_a_chain_of_ops() -> None:
    first, second = Residual(), Residual()
    report, _ = run(lambda x, r: second(x, first(x, r)), hidden(), hidden())
    assert all_fused(report) == {"linear_residual": 2}


def test_of_two_linears_added_together_the_later_takes_the_add() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            early = self.early(x)
            return self.late(x) + early

    report, gm = run(Net(), hidden())
    assert all_fused(report) == {"linear_residual": 1}
    (call,) = (node for node in gm.graph.nodes if "linear_residual" in str(node.target))
    assert "late" in str(call.args[1])
    assert call.args[3].name == "early"


def test_two_sites_may_share_a_weight() -> None:
    layer = Residual()
    report, _ = run(lambda x, r: layer(x, layer(x, r)), hidden(), hidden())
    assert all_fused(report) == {"linear_residual": 2}


OTHERS: dict[str, tuple[Any, ...]] = {
    "scaled": (lambda r, y: torch.add(r, y, alpha=2), hidden()),
    "scaled by the method": (lambda r, y: r.add(y, alpha=0.5), hidden()),
    "a second bias": (lambda r, y: r + y, torch.randn(HIDDEN)),
    "a broadcast residual": (lambda r, y: r + y, torch.randn(1, SEQ, HIDDEN)),
    "a residual that broadcasts the product": (lambda r, y: r + y, torch.randn(2, BATCH, SEQ, HIDDEN)),
    "a number": (lambda r, y: y + 1.0, hidden()),
    "itself": (lambda r, y: y + y, hidden()),
    "a difference": (lambda r, y: r - y, hidden()),
    "in place": (lambda r, y: r.add_(y), hidden()),
    "in place, by the operator": (lambda r, y: y.__iadd__(r), hidden()),
    "a product with another user": (lambda r, y: (r + y, y), hidden()),
    "a product that is also reshaped": (lambda r, y: r + y + y.view(-1).view(r.shape), hidden()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_a_residual_is_no_site(name: str) -> None:
    add, r = OTHERS[name]
    assert run(Residual(add=add), hidden(), r)[0].sites == []


def linear(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return r + nn.functional.linear(x, weight, bias)


SQUARE = torch.randn(HIDDEN, HIDDEN)
BF16 = torch.bfloat16
REFUSED: dict[str, tuple[tuple[Tensor, ...], str, str]] = {
    "transposed weight": ((hidden(), hidden(), SQUARE.t()), "weight-layout", "strides.*not contiguous"),
    "sliced weight": ((hidden(), hidden(), torch.randn(HIDDEN, 2 * HIDDEN)[:, ::2]), "weight-layout", "not contiguous"),
    "weight of one dimension": (
        (hidden(), torch.randn(BATCH, SEQ), SQUARE[0].clone()),
        "weight-layout",
        rf"\({HIDDEN},\); expected \[any, {HIDDEN}\]",
    ),
    "bias that broadcasts": (
        (hidden(), hidden(), SQUARE, torch.randn(1)),
        "shape",
        rf"bias.*\(1,\); expected \[{HIDDEN}\]",
    ),
    "f32 residual": ((hidden(BF16), hidden(), SQUARE.to(BF16)), "dtype", "float32, the activation.*bfloat16"),
    "f64": (
        (hidden(torch.float64), hidden(torch.float64), SQUARE.double()),
        "dtype",
        "float64; expected bfloat16, float16 or float32",
    ),
    "transposed residual": (
        (hidden(), torch.randn(SEQ, BATCH, HIDDEN).transpose(0, 1), SQUARE),
        "strides",
        rf"strides \({HIDDEN}, {BATCH * HIDDEN}, 1\), the op gives \({SEQ * HIDDEN}, {HIDDEN}, 1\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_does_not_compute_is_refused(name: str) -> None:
    inputs, code, words = REFUSED[name]
    refusal(run(linear, *inputs)[0], "linear_residual", code, words)


def test_an_add_into_a_given_tensor_is_not_fused() -> None:
    layer = Residual(add=lambda r, y: torch.add(r, y, out=torch.empty_like(r)))
    assert run(layer, hidden(), hidden())[0].counts() == {}
