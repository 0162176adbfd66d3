"""What torch.compile and the graph around an op rely on, whatever the op computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusepass.ops import OPS, force_strategy
from fusepass.ops.library import Strategy
from tests.ops.gate import poisoned
from tests.ops.sites import QWEN3, SMALL, Sizes, Tensors, as_tuple, sample

SIZES = [pytest.param(SMALL, id="small"), pytest.param(QWEN3, id="real", marks=pytest.mark.gpu)]
STEPS: list[tuple[int, int, Strategy]] = [(2, 2, "rows"), (2, 7, "skinny"), (2, 5, "library")]
ACTIVATIONS = ("x", "residual", "cos", "sin")

every_op = pytest.mark.parametrize("name", OPS)
with_and_without_options = pytest.mark.parametrize("optional", [True, False], ids=["all", "required"])
every_strategy = pytest.mark.parametrize(("batch", "seq", "strategy"), STEPS, ids=[step[2] for step in STEPS])
small_and_real = pytest.mark.parametrize("sizes", SIZES)


def launch(name: str, arguments: dict[str, Any], strategy: Strategy = "rows") -> Tensors:
    with force_strategy(strategy), poisoned():
        return as_tuple(OPS[name].overload(*arguments.values()))


def reference(name: str, arguments: dict[str, Any]) -> Tensors:
    return as_tuple(OPS[name].reference(*arguments.values()))


def fake(name: str, arguments: dict[str, Any]) -> Tensors:
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments.values()]
        return as_tuple(OPS[name].overload(*values))


def symbolic(name: str, arguments: dict[str, Any]) -> Tensors:
    """The fake outputs when every size is a symbol."""
    names = [n for n, a in arguments.items() if isinstance(a, Tensor)]
    graph = make_fx(
        lambda *tensors: as_tuple(OPS[name].overload(*(arguments | dict(zip(names, tensors))).values())),
        tracing_mode="symbolic",
    )(*(arguments[n] for n in names))
    (output,) = graph.graph.find_nodes(op="output")
    return tuple(node.meta["val"] for node in output.args[0])


def layout(t: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, device, and the strides that matter."""
    shape = tuple(int(size) for size in t.shape)
    return shape, t.dtype, t.device.type, [int(stride) for stride, size in zip(t.stride(), shape) if size > 1]


def same_bits(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(left.view(torch.uint8), right.view(torch.uint8)) for left, right in zip(
        (t.contiguous() for t in a), (t.contiguous() for t in b), strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.cat((t[..., :1], t, t[..., :2]), -1)[..., 1:-2],
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:, :1].expand_as(t),
}
"""The strides an activation may have. All but "expanded" keep the values."""


def laid_out(arguments: dict[str, Any], how: str, names: tuple[str, ...] = ("x", "residual")) -> dict[str, Any]:
    changed = {n: LAYOUTS[how](a) for n, a in arguments.items() if n in names and a is not None}
    return arguments | changed


@every_op
@with_and_without_options
@pytest.mark.parametrize("seq", [1, 9, 65])
def test_torch_accepts_the_op(name: str, optional: bool, seq: int) -> None:
    arguments = sample(name, 1, seq, optional=optional)
    torch.library.opcheck(OPS[name].overload, tuple(arguments.values()))


@every_op
@with_and_without_options
@pytest.mark.parametrize("how", ["contiguous", *LAYOUTS])
def test_fake_reference_and_launch_give_one_layout(name: str, optional: bool, how: str) -> None:
    arguments = sample(name, 2, 3, optional=optional)
    if how != "contiguous":
        arguments = laid_out(arguments, how)
    expected = [layout(t) for t in reference(name, arguments)]
    for function in (fake, symbolic, *(lambda *a, s=s: launch(*a, s) for s in ("rows", "skinny", "library"))):
        if function is not launch:
            assert [layout(t) for t in function(name, arguments)] == expected


@every_op
@every_strategy
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_no_rows_give_empty_outputs(name: str, batch: int, seq: int, strategy: Strategy, shape: tuple[int, int]) -> None:
    arguments = sample(name, *shape)
    expected = [layout(t) for t in reference(name, arguments)]
    assert [layout(t) for t in launch(name, arguments, strategy)] == expected
    assert [layout(t) for t in fake(name, arguments)] == expected
