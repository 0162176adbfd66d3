"""Recorded launches: what is noted, what is not recorded at all, and that a replay launches what the op would."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.kernels import launch, replay
from fusepass.ops import OPS
from fusepass.ops.library import forget_launches
from tests.ops.gate import poisoned

Call = tuple[tuple[int, int, int], list[Any]]


class Kernel:
    """Stands for a compiled Triton kernel (x, y, scale, BLOCK), and keeps the launches it got."""

    __name__ = "toy"
    arg_names = ("x_ptr", "y_ptr", "scale", "BLOCK")

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, BLOCK: int) -> Any:
        assert warmup, "recording launches nothing"

        def launched(x: int, y: int, z: int, *rest: Any) -> None:
            self.calls.append(((x, y, z), list(rest[6:])))

        loads = {"name": "toy", "_init_handles": lambda: None}
        return SimpleNamespace(run=launched, function=None, packed_metadata=None, **loads)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel that can be recorded on a machine without a GPU."""
    monkeypatch.setattr(replay, "past_jit", lambda: True)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 0))
    hooks = SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[])))
    monkeypatch.setattr(replay, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver), knobs=hooks))
    return Kernel()


def record(kernel: Kernel, function: Any, *args: Any) -> replay.Recipe | None:
    return replay.record(lambda *a: function(kernel, *a), args)


def twice(kernel: Kernel, x: Tensor, scale: float) -> Tensor:
    """Two launches: a view of the argument to a temporary, the temporary to the result."""
    between, out = torch.empty(x.shape, device=x.device), x.new_empty(3, 8).T
    launch.run(kernel, (2,), x.view(-1)[8:], between, scale, BLOCK=16)  # type: ignore[arg-type]
    launch.run(kernel, (1, 5), between[1:], out, None, BLOCK=32)  # type: ignore[arg-type]
    return out


def test_a_replay_fills_in_the_addresses_of_its_own_arguments(kernel: Kernel) -> None:
    recipe = record(kernel, twice, torch.zeros(6, 4), 0.5)
    assert recipe is not None
    assert not kernel.calls
    x = torch.zeros(6, 4)
    out = recipe(x, 0.5)
    (first_grid, first), (second_grid, second) = kernel.calls
    assert (first_grid, second_grid) == ((2, 1, 1), (1, 5, 1))
    assert first[0] == x.data_ptr() + 8 * 4
    assert second[0] == first[1] + 4 * 4, "a row into the temporary that the first launch writes"
    assert second[1] == out.data_ptr() not in (x.data_ptr(), first[1])
    assert (first[2:], second[2:]) == ([0.5, 16], [None, 32])
    assert (out.shape, out.stride(), out.dtype) == ((8, 3), (1, 8), x.dtype)


def test_a_tensor_given_twice_when_recorded_may_be_two_tensors_later(kernel: Kernel) -> None:
    def add(kernel: Kernel, x: Tensor, residual: Tensor) -> Tensor:
        out = x.new_empty(4)
        launch.run(kernel, (1,), residual, out, 1.0, BLOCK=1)  # type: ignore[arg-type]
        return out

    same = torch.zeros(4)
    recipe = record(kernel, add, same, same)
    assert recipe is not None
    x, residual = torch.zeros(4), torch.zeros(4)
    recipe(x, residual)
    assert kernel.calls[0][1][0] == residual.data_ptr() != x.data_ptr()


def test_an_empty_temporary_has_an_address_too(kernel: Kernel) -> None:
    def nothing(kernel: Kernel, x: Tensor) -> Tensor:
        out = x.new_empty(4)
        launch.run(kernel, (1,), x.new_empty(0), out, 1.0, BLOCK=1)  # type: ignore[arg-type]
        return out

    recipe = record(kernel, nothing, torch.zeros(4))
    assert recipe is not None
    assert recipe(torch.zeros(4)).shape == (4,)
    assert len(kernel.calls) == 1


def test_numbers_of_every_kind_reach_the_kernel_as_they_are(kernel: Kernel) -> None:
    numbers = [float("inf"), -0.0, True, 2**40, None, "rows"]

    def several(kernel: Kernel, x: Tensor) -> Tensor:
        out = x.new_empty(4)
        for number in numbers:
            launch.run(kernel, (1,), x, out, number, BLOCK=1)  # type: ignore[arg-type]
        return out

    recipe = record(kernel, several, torch.zeros(4))
    assert recipe is not None
    recipe(torch.zeros(4))
    assert [repr(values[2]) for _, values in kernel.calls] == [repr(number) for number in numbers]  # -0.0, and True


def test_what_computes_outside_our_kernels_is_not_recorded(kernel: Kernel) -> None:
    assert record(kernel, lambda _, x: x + 1, torch.zeros(4)) is None
    assert record(kernel, lambda _, x: x.new_zeros(4), torch.zeros(4)) is None
    assert record(kernel, lambda _, x: x.T.contiguous(), torch.zeros(4, 3)) is None
    assert record(kernel, lambda _, x: x, torch.zeros(4)) is None, "an argument is no result"


def test_an_unaligned_tensor_or_a_profiler_launches_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = record(kernel, twice, torch.zeros(6, 4), 0.5)
    assert recipe is not None
    assert recipe(torch.zeros(25)[1:].view(6, 4), 0.5) is None
    replay.triton.knobs.runtime.launch_enter_hook.calls.append(print)  # type: ignore[attr-defined]
    assert recipe(torch.zeros(6, 4), 0.5) is None
    assert not kernel.calls


@pytest.mark.gpu
def test_replayed_launches_give_what_the_op_gives() -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").bfloat16()

    op, weights = OPS["norm_gated_mlp"], (draw(192, 64), draw(192, 64), draw(64, 192))
    forget_launches()
    for x, residual in [(draw(1, 1, 64),) * 2, (draw(1, 1, 64), draw(1, 1, 64)), (draw(65)[1:].view(1, 1, 64),) * 2]:
        args = (x, draw(64), 1e-6, *weights, None, None, None, residual, "silu", False)
        with poisoned():
            got = op.overload(*args)
        torch.testing.assert_close(got, op.launch(*args), rtol=0, atol=0)
        torch.testing.assert_close(got, op.reference(*args), rtol=3e-2, atol=3e-2)
