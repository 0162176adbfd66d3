"""Ops called past the dispatcher: when a line of Inductor's code does, and when it calls the op as any other."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fusepass import inductor
from fusepass.ops import OPS, force_strategy, library
from fusepass.ops.direct import direct
from fusepass.ops.library import forget_launches, kind_of
from tests.decoding import decode, decoder, draw_tokens, fill
from tests.models import static_cache


class Toy:
    """Stands for a registered op of (x, scale), and notes what reached it and what its recipe took."""

    def __init__(self) -> None:
        self.recipes: dict[Any, Any] = {}
        self.records = self.aligned = True
        self.called: list[str] = []

    def overload(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.called.append("op")
        self.recipes[kind_of((x, scale))] = self.recipe if self.records else None
        return x * scale

    def recipe(self, x: Tensor, scale: float) -> Tensor | None:
        self.called.append("recipe" if self.aligned else "unaligned")
        return x * scale if self.aligned else None


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy()
    monkeypatch.setitem(OPS, "toy", made)  # type: ignore[arg-type]
    return made


def test_from_its_second_call_on_a_line_launches_what_the_op_would(toy: Toy) -> None:
    line, other = direct("toy"), direct("toy")
    for value in (2.0, 3.0, 4.0):
        assert torch.equal(line(torch.full((3,), value), 0.5), torch.full((3,), value / 2))
    assert toy.called == ["op", "recipe", "recipe"]
    other(torch.ones(3, 4), 0.5)  # another line, another kind
    assert toy.called[3:] == ["op"]


def test_forgetting_launches_forgets_those_of_lines(toy: Toy) -> None:
    line = direct("toy")
    line(torch.ones(3), 0.5)
    forget_launches()
    line(torch.ones(3), 0.5)
    line(torch.ones(3), 0.5)
    assert toy.called == ["op", "op", "recipe"]


def test_what_a_recipe_does_not_take_goes_to_the_op(toy: Toy) -> None:
    line = direct("toy")
    line(torch.ones(3), 0.5)
    toy.aligned = False
    assert torch.equal(line(torch.ones(3), 0.5), torch.full((3,), 0.5))
    assert toy.called == ["op", "unaligned", "op"]


def test_an_op_that_does_more_than_launch_kernels_is_called_as_it_is_and_not_asked_again(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.records, line = False, direct("toy")
    line(torch.ones(3), 0.5)
    monkeypatch.setattr("fusepass.ops.direct.kind_of", lambda args: pytest.fail("asked again"))
    line(torch.ones(3), 0.5)
    assert toy.called == ["op", "op"]


def test_a_strategy_that_another_thread_forces_meanwhile_is_not_kept(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    line, overload = direct("toy"), toy.overload

    def forcing(*args: Any) -> Tensor:
        monkeypatch.setattr(library, "_forced", "library")
        return overload(*args)

    with monkeypatch.context() as patch:
        patch.setattr(toy, "overload", forcing)
        line(torch.ones(3), 0.5)
    monkeypatch.setattr(library, "_forced", None)
    line(torch.ones(3), 0.5)
    assert toy.called == ["op", "op"]


def test_a_line_that_is_gone_leaves_nothing(toy: Toy) -> None:
    line = direct("toy")
    line(torch.ones(3), 0.5)
    kinds = set(toy.recipes)
    del line
    gc.collect()
    assert len(kinds) == 2
    assert set(toy.recipes) == {kind_of((torch.ones(3), 0.5))}


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "observer",
    [Mode, torch.profiler.profile, forward_ad.dual_level, lambda: force_strategy("library")],
    ids=["dispatch mode", "profiler", "derivative", "forced strategy"],
)
def test_who_observes_or_changes_ops_gets_to_see_them(observer: Callable[[], Any], toy: Toy) -> None:
    line = direct("toy")
    for _ in range(2):
        with observer():
            line(torch.ones(3), 0.5)
    assert toy.called == ["op", "op"]
    for _ in range(2):
        line(torch.ones(3), 0.5)
    assert toy.called == ["op", "op", "op", "recipe"], "what was recorded for an observer is not taken for the line's"
    with observer():
        line(torch.ones(3), 0.5)
    assert toy.called[4:] == ["op"]


OP = torch.ops.fusepass.linear_residual


def twice(x: Tensor, weight: Tensor) -> Tensor:
    return OP(OP(x + 1, weight, None, x, False), weight, None, x, False, True)  # type: ignore[no-any-return]


def by_name(x: Tensor, weight: Tensor) -> Tensor:
    return OP(x + 1, weight, None, residual=x, high=True, early=True)  # type: ignore[no-any-return]


def compiled(function: Callable[..., Tensor] = twice, dynamic: bool = False, **options: Any) -> str:
    """The code that Inductor wrote for it, compiled as the remainder is."""
    x, weight = torch.randn(3, 32), torch.randn(32, 32) / 6
    options["fx_graph_cache"] = False  # its keys do not know `_DIRECT`

    def backend(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        return inductor.compile_with_inductor(gm, inputs, None, options, fused=True)

    run = torch.compile(function, backend=backend, dynamic=dynamic)
    got, (code,) = run_and_get_code(run, x, weight)
    torch.testing.assert_close(got, function(x, weight))
    return str(code)


CALL = "torch.ops.fusepass.linear_residual.default("


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines as for a GPU."""
    monkeypatch.setattr(inductor, "_DIRECT", "cpu")


@pytest.mark.parametrize("options", [{}, {"custom_should_partition_ops": ["fusepass::linear_residual"]}], ids=str)
def test_inductor_writes_lines_for_a_gpu(options: dict[str, Any], on_cpu: None) -> None:
    code = compiled(**options)
    assert code.count("= direct('linear_residual')") == 2
    assert code.count("fusepass_linear_residual_") == 4, "a name that no kernel of a user has"
    assert CALL not in code
    assert "early=" not in code, "a recipe takes arguments by position"


def test_arguments_that_are_not_defaults_reach_the_op_by_name_too(on_cpu: None) -> None:
    assert "True, True)" in compiled(by_name)


def test_inductor_writes_calls_of_the_op_where_sizes_are_symbols(on_cpu: None) -> None:
    code = compiled(dynamic=True)
    assert code.count(CALL) == 2
    assert "direct(" not in code


def test_inductor_writes_calls_of_the_op_for_a_cpu() -> None:
    assert compiled().count(CALL) == 2


def test_code_that_is_not_python_calls_the_op(on_cpu: None) -> None:
    code = compiled(cpp_wrapper=True)
    assert "direct(" not in code
    assert "fusepass::linear_residual" in code


def test_who_looks_at_intermediate_values_gets_those_of_ops(on_cpu: None) -> None:
    assert compiled(generate_intermediate_hooks=True).count(CALL) == 2


def lines_with_a_recipe() -> int:
    return sum(type(key) is object and recipe is not None for op in OPS.values() for key, recipe in op.recipes.items())


@pytest.mark.gpu
@pytest.mark.parametrize("device", [0, 1])
def test_on_a_gpu_lines_give_the_bits_of_the_ops(device: int) -> None:
    if device >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    model = decoder().to(f"cuda:{device}")
    cache = static_cache(model, 1, 256)
    run = torch.compile(model, backend="fusepass")
    tokens = draw_tokens(1, 6).to(model.device)

    def logits() -> Tensor:
        torch.manual_seed(5)
        fill([cache], 100)
        return decode(run, cache, tokens)

    with torch.no_grad():
        first = logits()
        assert lines_with_a_recipe() == 7
        by_lines = logits()
        with torch.profiler.profile() as profile:
            by_ops = logits()
    seen = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fusepass::")}
    assert sum(seen.values()) == 7 * tokens.shape[1]
    assert torch.cuda.current_device() == 0
    assert torch.equal(by_lines, first)
    assert torch.equal(by_ops, first)
