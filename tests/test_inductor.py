"""What we ask of Inductor, and what our pass does to the graph that it is about to lower."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.scheduler import ForeachKernelSchedulerNode as Combination
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fusepass.inductor import compile_with_inductor, fuse_outer_products, wide_combo_kernels

aten = torch.ops.aten


def products(graph: Graph) -> int:
    return sum(len(graph.find_nodes(op="call_function", target=op)) for op in (aten.bmm.default, aten.mm.default))


@pytest.mark.parametrize("sizes", [(1, 64, 1), (3, 7, 5), (64, 1), (7, 5)])
def test_an_outer_product_becomes_elementwise_with_the_same_bits(sizes: tuple[int, ...]) -> None:
    *batch, m, n = sizes
    a, b = torch.randn(*batch, m, 1), torch.randn(*batch, 1, n)
    run = make_fx(torch.matmul, tracing_mode="fake")(a, b)
    assert products(run.graph) == 1
    fuse_outer_products(run.graph)
    run.recompile()
    assert products(run.graph) == 0
    assert torch.equal(run(a, b), torch.matmul(a, b))


def symbolic(function: Callable[..., Tensor], *args: Tensor) -> Graph:
    return make_fx(function, tracing_mode="symbolic")(*args).graph


def test_products_that_sum_and_those_that_may_stay() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    for graph in (make_fx(torch.bmm, tracing_mode="fake")(a, b).graph, symbolic(torch.bmm, a, b)):
        fuse_outer_products(graph)
        assert products(graph) == 1


class Node:
    def __init__(self, device: str) -> None:
        self.device = device

    def get_device(self) -> str:
        return self.device


class Scheduler:
    def __init__(self, levels: list[list[Node]]) -> None:
        self.levels = levels

    def _topological_sort_nodes(self) -> list[list[Node]]:
        return self.levels


def test_nodes_of_one_level_and_device_are_combined_and_afterwards_inductors_grouping_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = [[Node("cuda:0") for _ in range(5)] + [Node("cuda:1"), Node("cpu")], [Node("cuda:1"), Node("cuda:1")]]

    def pairs(scheduler: Scheduler) -> list[list[Node]]:
        first, second = scheduler.levels
        return [first[:2], first[2:4], first[4:5], first[5:6], second]

    monkeypatch.setattr(Combination, "group_algorithm_for_combo_kernels", pairs)
    scheduler: Any = Scheduler(levels)
    with wide_combo_kernels():
        first, second = levels
        assert Combination.group_nodes_for_combo_kernels(scheduler) == [first[:5], first[5:6], second]
    assert len(Combination.group_nodes_for_combo_kernels(scheduler)) == 5


@pytest.mark.parametrize(
    ("mode", "options", "fused", "asserts"),
    [
        (None, {}, True, False),
        ("max-autotune-no-cudagraphs", {}, True, False),
        (None, {"size_asserts": True}, True, True),
        (None, {}, False, None),
        ("reduce-overhead", {}, True, None),
        (None, {"triton.cudagraphs": True}, True, None),
    ],
)
def test_sizes_are_asserted_as_inductor_does_but_where_every_step_would_pay_for_it(
    mode: str | None, options: dict[str, Any], fused: bool, asserts: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def wrapper(mode: Any, options: Any, dynamic: Any) -> Any:
        given.append(options)
        return lambda gm, inputs: gm

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", wrapper)
    gm = make_fx(torch.neg, tracing_mode="fake")(torch.ones(2))
    compile_with_inductor(gm, [], mode, options, fused)
    assert given[0].get("size_asserts") is asserts
