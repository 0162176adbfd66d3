"""How nodes are read: the spellings that count as one op, and the near misses that do not."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from fusepass import graph
from tests.models import capture

SIZE = 8


def result(function: Callable[..., Any], *inputs: Tensor) -> Node:
    """The node that `function` returns."""
    (gm,) = capture(function, *(inputs or (torch.randn(2, 3, 5, SIZE),)))
    return gm.graph.output_node().args[0][0]


# --- arithmetic ---


@pytest.mark.parametrize("square", [lambda x: x**3, lambda x: x.pow(0.5), lambda x: 2**x, lambda x: x * x.abs()])
def test_what_is_not_a_square(square: Callable[[Tensor], Tensor]) -> None:
    assert graph.square_of(result(square)) is None


@pytest.mark.parametrize("root", [lambda x: x**0.5, lambda x: x.pow(-1), lambda x: x.sqrt(), lambda x: (-0.5) ** x])
def test_what_is_not_a_reciprocal_root(root: Callable[[Tensor], Tensor]) -> None:
    assert graph.rsqrt_of(result(root)) is None


def test_a_power_whose_exponent_is_a_tensor_is_nothing() -> None:
    node = result(lambda x, y: x**y, torch.rand(2), torch.full((2,), 2.0))
    assert graph.square_of(node) is None
    assert graph.rsqrt_of(node) is None


@pytest.mark.parametrize(
    ("add", "pairs"),
    [
        (lambda x, y: x + y, 2),
        (lambda x, y: torch.add(x, y, alpha=1), 2),
        (lambda x, y: torch.add(x, y, alpha=2), 0),
        (lambda x, y: x.add(y, alpha=-1), 0),
        (lambda x, y: x - y, 0),
        (lambda x, y: x.add_(y), 0),
    ],
)
def test_a_sum_has_its_operands_in_both_orders_and_a_scaled_one_none(add: Callable[..., Tensor], pairs: int) -> None:
    found = list(graph.operands(result(add, torch.rand(2), torch.rand(2)), "add"))
    assert len(found) == pairs
    assert found == [pair[::-1] for pair in reversed(found)]


@pytest.mark.parametrize("node", [None, 1.0, "x"])
def test_what_is_not_a_node_is_no_op(node: Any) -> None:
    assert not graph.is_op(node, "mul")
    assert list(graph.operands(node, "mul")) == []
    assert graph.value(node) is None
    found = graph.square_of(node), graph.rsqrt_of(node), graph.mean_of_last(node), graph.half_of(node)
    assert found == (None,) * 4


# --- casts ---


@pytest.mark.parametrize(
    ("cast", "only"),
    [
        (lambda x: x.to(torch.bfloat16), True),
        (lambda x: x.half(), True),
        (lambda x: x.type(torch.float64), True),
        (lambda x: x.to("cpu", torch.float64), True),
        (lambda x: x.to("meta"), False),
        (lambda x: x.to(torch.float64, memory_format=torch.channels_last), False),
        (lambda x: x.clone(), False),
    ],
)
def test_a_cast_changes_the_dtype_and_nothing_else(cast: Callable[[Tensor], Tensor], only: bool) -> None:
    assert graph.is_cast(result(cast)) is only


# --- shapes ---

SWAPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "from the end": (lambda x: x.transpose(-2, 1), True),
    "permute": (lambda x: x.permute(0, -2, 1, 3), True),
    "permute by keyword": (lambda x: x.permute(dims=[0, 2, 1, 3]), True),
    "torch.permute by keyword": (lambda x: torch.permute(x, dims=(0, 2, 1, 3)), True),
    "swapaxes by keyword": (lambda x: x.swapaxes(axis0=1, axis1=2), True),
    "other dimensions": (lambda x: x.transpose(2, 3), False),
    "no permutation": (lambda x: x.permute(0, 1, 2, 3), False),
    "a rotation": (lambda x: x.permute(0, 2, 3, 1), False),
    "a view": (lambda x: x.view(2, 5, 3, SIZE), False),
}


@pytest.mark.parametrize("name", SWAPS)
def test_a_transpose_swaps_exactly_two_dimensions(name: str) -> None:
    swap, expected = SWAPS[name]
    assert graph.is_transpose(result(swap), 1, 2) is expected


NO_HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "a third": lambda x: x[..., :3],
    "the middle": lambda x: x[..., 2:6],
    "all": lambda x: x[..., :],
    "every second": lambda x: x[..., ::2],
    "another dimension": lambda x: x[:, :, :2],
    "the last but one": lambda x: x[:, :, 1:, : SIZE // 2],
    "a new dimension": lambda x: x[..., None, : SIZE // 2],
    "one element": lambda x: x[..., 4],
    "of four": lambda x: x.chunk(4, -1)[0],
    "chunks of another dimension": lambda x: x.chunk(2, 0)[0],
    "chunks without a dimension": lambda x: x.chunk(2)[0],
    "unequal parts": lambda x: x.split([3, 5], -1)[0],
    "parts of two": lambda x: x.split(2, -1)[1],
    "narrow of the middle": lambda x: x.narrow(-1, 2, 4),
    "narrow of another dimension": lambda x: x.narrow(0, 0, 1),
}


@pytest.mark.parametrize("name", NO_HALVES)
def test_what_is_not_half_of_the_last_dimension(name: str) -> None:
    assert graph.half_of(result(NO_HALVES[name])) is None


def test_an_odd_dimension_has_no_halves() -> None:
    for half in (lambda x: x[..., :3], lambda x: x.chunk(2, -1)[0], lambda x: x.split(3, -1)[0]):
        assert graph.half_of(result(half, torch.rand(2, 7))) is None


@pytest.mark.parametrize("which", [0, 1])
def test_the_halves_are_told_apart(which: int) -> None:
    def halves(x: Tensor) -> list[Tensor]:
        return [x[..., 4:] if which else x[..., :4], x.chunk(2, -1)[which], x.split(4, -1)[which]]

    for i in range(3):
        node = result(lambda x, i=i: halves(x)[i])
        half = graph.half_of(node)
        assert half is not None
        assert (half[0].op, half[1]) == ("placeholder", which)


@pytest.mark.parametrize(
    ("user", "shape_only"),
    [
        (("call_method", "size"), True),
        (("call_method", "dim"), True),
        (("call_function", torch.numel), True),
        (("call_method", "sum"), False),
        (("call_method", "stride"), False),
        (("call_function", operator.getitem), False),
    ],
)
def test_who_reads_only_the_shape(user: tuple[str, Any], shape_only: bool) -> None:
    nodes = Graph()
    assert graph.reads_only_shape(nodes.create_node(*user, (nodes.placeholder("x"),))) is shape_only


# --- writes and memory ---

PURE: dict[str, Callable[[Tensor], Any]] = {
    "operator": lambda x: x + 1,
    "method by its name": lambda x: x.__add__(1),
    "and": lambda x: (x > 0) & (x < 1),
    "invert": lambda x: ~(x > 0),
    "inplace=False": lambda x: F.relu(x, inplace=False),
    "inplace by position": lambda x: F.relu(x, False),
    "dropout": lambda x: F.dropout(x, 0.5, True, False),
    "aten": lambda x: torch.ops.aten.add(x, 1),
    "aten overload": lambda x: torch.ops.aten.add.Scalar(x, 1),
    "fused op": lambda x: torch.ops.fusepass.rms_norm(x, x.new_ones(SIZE), 1e-6, False),
}


@pytest.mark.parametrize("name", PURE)
def test_what_computes_a_new_value_writes_nothing(name: str) -> None:
    (gm,) = capture(PURE[name], torch.randn(2, 3, 5, SIZE))
    assert [node for node in gm.graph.nodes if graph.mutated(node)] == []


def test_a_higher_order_op_may_write_all_it_is_given() -> None:
    def net(x: Tensor, y: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda a, b: a + b, x, y, use_reentrant=False)

    (gm,) = capture(net, torch.rand(2), torch.rand(2))
    (node,) = (node for node in gm.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator))
    assert {one.name for one in graph.mutated(node) if one.op == "placeholder"} == {"l_x_", "l_y_"}


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(-1),
    "reshape": lambda x: torch.reshape(x, (-1,)),
    "reshape by keyword": lambda x: torch.reshape(input=x, shape=(-1,)),
    "transpose": lambda x: x.transpose(0, 1),
    "item": lambda x: x[0],
    "select": lambda x: x.select(0, 1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "expand": lambda x: x[:1].expand(4, -1, -1, -1),
    "split": lambda x: x.split(1)[0],
    "unbind": lambda x: x.unbind(0)[0],
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(torch.float32),
    "narrow": lambda x: torch.narrow(x, 0, 0, 1),
    "chunk": lambda x: x.chunk(2)[1],
    "tensor_split": lambda x: x.tensor_split(2)[1],
    "ravel": lambda x: x.ravel(),
    "flatten": lambda x: torch.flatten(x, 1),
    "movedim": lambda x: torch.movedim(x, 0, -1),
    "permute": lambda x: torch.permute(x, (3, 2, 1, 0)),
    "adjoint": lambda x: x.adjoint(),
    "mT": lambda x: x[0].mT,
    "T": lambda x: x[0, 0].T,
    "diagonal": lambda x: torch.diagonal(x),
    "broadcast": lambda x: torch.broadcast_to(x, (2, *x.shape)),
    "reshape_as": lambda x: x.reshape_as(x),
    "view_as": lambda x: x.view_as(x),
    "view of another dtype": lambda x: x.view(torch.int32),
    "expanded by a function": lambda x: torch.broadcast_tensors(x, x.new_ones(2, 2, 3, 5, SIZE))[0],
    "unfold": lambda x: x.unfold(0, 2, 1),
    "data": lambda x: x.data.view(-1),
    "dropout without training": lambda x: F.dropout(x, 0.5, training=False),
    "chain": lambda x: x.view(-1)[3:].detach().unflatten(0, (-1, 1)).squeeze(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_shares_the_memory_of_its_tensor_and_writes_none_of_it(name: str) -> None:
    node = result(VIEWS[name])
    x = next(iter(node.graph.nodes))
    assert graph.storages(node) & graph.storages(x)
    assert [node for node in node.graph.nodes if graph.mutated(node)] == []


@pytest.mark.parametrize("copy", [lambda x: x.clone(), lambda x: x + 0, lambda x: torch.zeros_like(x)])
def test_a_copy_has_memory_of_its_own(copy: Callable[[Tensor], Tensor]) -> None:
    node = result(copy)
    x = next(iter(node.graph.nodes))
    assert not graph.storages(node) & graph.storages(x)


# --- where a node comes from ---


def test_the_path_of_a_node_is_the_users_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"act": nn.Sequential(nn.SiLU(), nn.ReLU())}) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block["act"](x)
            return x + 1

    (gm,) = capture(Net(), torch.rand(2))
    paths = [graph.module_path(node) for node in gm.graph.nodes if node.op == "call_function"]
    assert paths == [f"blocks.{i}.act.{j}" for i in range(2) for j in range(2)] + [""]


def test_the_source_of_a_node_is_the_users_line() -> None:
    def twice(x: Tensor) -> Tensor:
        return x * 2  # the line

    source = graph.source_line(result(lambda x: twice(x)))
    line = twice.__code__.co_firstlineno + 1
    assert source == f"{__file__}:{line}, in twice: return x * 2  # the line"


def test_a_source_line_that_begins_as_a_line_of_a_stack_trace_is_the_source() -> None:
    def net(x: Tensor) -> Tensor:
        File = x * 2
        return File

    assert graph.source_line(result(net)).endswith(", in net: File = x * 2")


@pytest.mark.parametrize("trace", ["File ", "File a, b", 'File "a.py", line 3, in f', 'File "a.py", line x, in f\n  y'])
def test_a_history_that_can_not_be_read_gives_no_source(trace: str) -> None:
    node = Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    assert graph.source_line(node) == ""


def test_a_node_without_a_history_has_no_path_and_no_source() -> None:
    node = Graph().placeholder("x")
    assert (graph.module_path(node), graph.source_line(node)) == ("", "")
