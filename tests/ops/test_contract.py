"""What torch.compile and the graph around an op rely on, whatever the op computes."""

import math
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
from tests.ops.gate import poisoned, rms_error
from tests.ops.sites import QWEN3, SMALL, Sizes, Tensors, as_tuple, sample

STEPS: list[tuple[int, int, Strategy]] = [(2, 2, "rows"), (2, 5, "skinny"), (2, 3, "library")]
"""Few enough tokens for the attention kernel, which takes 16 queries a K/V head: beyond that SDPA runs."""

every_op = pytest.mark.parametrize("name", OPS)
with_and_without_options = pytest.mark.parametrize("optional", [True, False], ids=["all", "required"])
every_strategy = pytest.mark.parametrize(("batch", "seq", "strategy"), STEPS, ids=[step[2] for step in STEPS])
small_and_real = pytest.mark.parametrize(
    "sizes", [pytest.param(SMALL, id="small"), pytest.param(QWEN3, id="real", marks=pytest.mark.gpu)]
)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.cat((t[..., :1], t, t[..., :2]), -1)[..., 1:-2],
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:, :1].expand_as(t),
}
"""The strides that an activation may have."""
ACTIVATIONS = {"attention": ("q", "k", "v")}
"""By op, the arguments of any strides, where not x and residual; `test_norm_qkv_rope` has those of cos and sin."""


def laid_out(name: str, arguments: dict[str, Any], how: str) -> dict[str, Any]:
    """The arguments with other strides in the activations ("expanded" means other values too)."""
    names = [n for n in ACTIVATIONS.get(name, ("x", "residual")) if arguments.get(n) is not None]
    return arguments | {n: LAYOUTS[how](arguments[n]) for n in names}


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def launch(name: str, arguments: dict[str, Any], strategy: Strategy) -> Tensors:
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

    def run(*values: Tensor) -> Tensors:
        return as_tuple(OPS[name].overload(*(arguments | dict(zip(tensors(arguments), values))).values()))

    graph = make_fx(run, tracing_mode="symbolic")(*tensors(arguments).values())
    (output,) = graph.graph.find_nodes(op="output")
    return tuple(node.meta["val"] for node in output.args[0])


def layout(t: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, device, and the strides that mean something."""
    shape = tuple(int(size) for size in t.shape)
    strides = [int(stride) for stride, size in zip(t.stride(), shape) if size > 1 and 0 not in shape]
    return shape, t.dtype, t.device.type, strides


def written(name: str) -> set[str]:
    """The arguments that the op writes in place."""
    arguments = OPS[name].overload._schema.arguments
    return {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@contextmanager
def fenced(fence: float = 7.0, width: int = 1024) -> Iterator[list[Tensor]]:
    """Ops allocate NaN between two fences; yields the allocations, fences included."""
    whole: list[Tensor] = []

    def allocate(like: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        size = math.prod(shape)
        memory = torch.full((size + 2 * width,), fence, dtype=dtype or like.dtype, device=like.device)
        memory[width : width + size] = math.nan
        whole.append(memory)
        return memory.as_strided(shape, stride, width)

    def new_empty(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        if options:  # Triton's interpreter asks for host memory
            return original_new_empty(self, *shape, **options)
        meta = original_empty(*shape, device="meta")
        return allocate(self, meta.shape, meta.stride(), None)

    def empty_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return allocate(like, like.shape, original_empty_like(like).stride(), dtype)

    def empty(*shape: Any, **options: Any) -> Tensor:
        dtype, device = options.get("dtype"), options.get("device")
        return new_empty(torch.zeros(0, dtype=dtype, device=device), *shape)

    original_new_empty, original_empty, original_empty_like = Tensor.new_empty, torch.empty, torch.empty_like
    with (
        mock.patch.object(Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield whole
    for memory in whole:
        assert (memory[:width] == fence).all(), "written before the start"
        assert (memory[-width:] == fence).all(), "written past the end"


@every_op
@with_and_without_options
@pytest.mark.parametrize("seq", [1, 9])
def test_torch_accepts_the_op(name: str, optional: bool, seq: int) -> None:
    torch.library.opcheck(OPS[name].overload, tuple(sample(name, 1, seq, optional=optional).values()))


@every_op
@with_and_without_options
@pytest.mark.parametrize("how", [None, *LAYOUTS])
def test_fake_reference_and_launch_give_one_layout(name: str, optional: bool, how: str | None) -> None:
    arguments = sample(name, 2, 3, optional=optional)
    if how is not None:
        arguments = laid_out(name, arguments, how)
    want = [layout(t) for t in reference(name, arguments)]
    assert [layout(t) for t in fake(name, arguments)] == want
    assert [layout(t) for t in symbolic(name, arguments)] == want
    assert [layout(t) for t in launch(name, arguments, "skinny")] == want


@every_op
@pytest.mark.parametrize("strategy", ["rows", "skinny", "library"])
@pytest.mark.parametrize(("batch", "seq"), [(0, 3), (2, 0)])
def test_no_rows_give_empty_outputs(name: str, strategy: Strategy, batch: int, seq: int) -> None:
    arguments = sample(name, batch, seq)
    outputs = launch(name, arguments, strategy)
    assert all(t.numel() == 0 for t in outputs)
    assert [layout(t) for t in reference(name, arguments)] == [layout(t) for t in outputs]
    assert [layout(t) for t in fake(name, arguments)] == [layout(t) for t in outputs]


@pytest.mark.parametrize("name", [name for name in OPS if name != "attention"])
@every_strategy
@with_and_without_options
def test_rows_without_features_give_what_is_added_to_their_products(
    name: str, batch: int, seq: int, strategy: Strategy, optional: bool
) -> None:
    reads_features = ("x", "norm_weight", "weight", "q", "k", "v", "gate", "up")
    arguments = sample(name, batch, seq, optional=optional)
    arguments |= {n: a[..., :0].contiguous() for n, a in tensors(arguments).items() if n in reads_features}
    arguments |= {n: a.float() for n, a in tensors(arguments).items() if a.is_floating_point()}  # f16 may be 4 % off
    outputs = launch(name, arguments, strategy)
    assert any(t.numel() for t in outputs) == (name != "rms_norm")
    torch.testing.assert_close(outputs, reference(name, arguments), rtol=1e-4, atol=1e-4)


@every_op
@every_strategy
@with_and_without_options
def test_outputs_share_no_memory(name: str, batch: int, seq: int, strategy: Strategy, optional: bool) -> None:
    arguments = sample(name, batch, seq, optional=optional)
    held = [*tensors(arguments).values(), *launch(name, arguments, strategy)]
    assert len({t.untyped_storage().data_ptr() for t in held}) == len({id(t) for t in held})


@small_and_real
@every_op
@every_strategy
@pytest.mark.parametrize("high", [False, True], ids=["match", "high"])
def test_an_op_writes_all_of_its_outputs_and_nothing_else(
    name: str, batch: int, seq: int, strategy: Strategy, high: bool, sizes: Sizes
) -> None:
    arguments = sample(name, batch, seq, sizes=sizes, high=high)
    before = {n: t.clone() for n, t in tensors(arguments).items() if n not in written(name)}
    with fenced() as memory, force_strategy(strategy):
        outputs = as_tuple(OPS[name].overload(*arguments.values()))
    assert {t.untyped_storage().data_ptr() for t in outputs} <= {t.untyped_storage().data_ptr() for t in memory}
    assert all(t.isfinite().all() for t in outputs)
    assert [n for n, t in before.items() if not torch.equal(bits(t), bits(arguments[n]))] == []


@small_and_real
@every_op
@every_strategy
def test_two_runs_give_the_same_bits(name: str, batch: int, seq: int, strategy: Strategy, sizes: Sizes) -> None:
    arguments = sample(name, batch, seq, sizes=sizes)
    first, second = (launch(name, arguments, strategy) for _ in range(2))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second))


@small_and_real
@every_op
@every_strategy
@pytest.mark.parametrize("how", LAYOUTS)
def test_activations_may_have_any_strides(
    name: str, batch: int, seq: int, strategy: Strategy, how: str, sizes: Sizes
) -> None:
    arguments = laid_out(name, sample(name, batch, seq, sizes=sizes), how)
    dense = {n: a.contiguous() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    for got, want in zip(launch(name, arguments, strategy), reference(name, dense), strict=True):
        assert rms_error(got, want.double()) < 5e-3


@every_op
def test_one_compiled_graph_serves_every_number_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")  # it is the fake implementation that could pin a size
    counter = CompileCounter()
    compiled = torch.compile(OPS[name].overload, backend=counter, fullgraph=True, dynamic=True)
    for seq in (4, 11, 70):
        arguments = sample(name, 3, seq)
        got = as_tuple(compiled(*arguments.values()))
        assert [layout(t) for t in got] == [layout(t) for t in reference(name, arguments)]
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_weights_read_before_the_previous_kernel_ends_change_no_bits(batch: int) -> None:
    """Layers in which every kernel reads what the one before it wrote: `early` moves only the weights' loads."""

    def layers(early: bool) -> Tensor:
        x = start
        for _ in range(16):
            q, _, _ = OPS["norm_qkv_rope"].overload(*(qkv | {"x": x}).values(), early)
            attended = q.transpose(1, 2).reshape(batch, 1, -1)
            x = OPS["linear_residual"].overload(*(projection | {"x": attended, "residual": x}).values(), early)
            x = OPS["norm_gated_mlp"].overload(*(mlp | {"x": x, "residual": x}).values(), early)
        return x

    qkv, projection, mlp = (
        {n: a.bfloat16() if isinstance(a, Tensor) else a for n, a in sample(name, batch, 1, sizes=QWEN3).items()}
        for name in ("norm_qkv_rope", "linear_residual", "norm_gated_mlp")
    )
    start = qkv["x"]
    want = layers(early=False)
    assert want.isfinite().all()
    assert all(torch.equal(bits(layers(early=True)), bits(want)) for _ in range(20))
