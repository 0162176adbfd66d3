"""What our pass does to the graph that Inductor is about to lower."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fusepass.inductor import fuse_outer_products

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
