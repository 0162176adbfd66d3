"""Impossible input is refused by name, and a gradient is never lost in silence."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusepass.ops import OPS
from tests.ops.sites import as_tuple, sample

ROWS = 1, 3
Fault = Callable[[Tensor], Tensor]

SHAPE: dict[str, Fault] = {
    "longer": lambda t: t.new_zeros(*t.shape[:-1], t.shape[-1] + 1),
    "one more dimension": lambda t: t.unsqueeze(0),
}
KIND: dict[str, Fault] = {
    "other dtype": lambda t: t.float(),
    "integers": lambda t: t.int(),
    "other device": lambda t: torch.empty_like(t, device="cpu" if t.device.type != "cpu" else "meta"),
}
BATCH: dict[str, Fault] = {"of another batch": lambda t: t.repeat(5, *[1] * (t.dim() - 1))}
TABLE: dict[str, Fault] = {
    "per head": lambda t: t.expand(-1, 2, -1, -1),
    "of other tokens": lambda t: t.repeat(1, 1, 2, 1),
}
PARAMETER = SHAPE | KIND | {"not contiguous": lambda t: torch.stack((t, t), -1)[..., 0]}
MATRIX = PARAMETER | {"fewer rows": lambda t: t[:-1].contiguous()}
CACHE = SHAPE | KIND | BATCH | {"heads that do not divide": lambda t: t[:, :1].repeat(1, 4, 1, 1)}

INPUT: dict[str, Fault] = {"integers": lambda t: t.int(), "f64": lambda t: t.double()}
FAULTS: dict[tuple[str, str], dict[str, Fault]] = {
    ("rms_norm", "x"): INPUT | {"no dimension": lambda t: t[0, 0, 0]},
    ("linear_residual", "x"): INPUT | {"no dimension": lambda t: t[0, 0, 0]},
    ("linear_residual", "residual"): SHAPE | KIND | BATCH | {"fewer tokens": lambda t: t[:, :-1]},
    ("norm_linear", "x"): INPUT | {"one dimension": lambda t: t[0, 0]},
    ("norm_gated_mlp", "x"): INPUT | {"no dimension": lambda t: t[0, 0, 0]},
    ("norm_gated_mlp", "residual"): SHAPE | KIND | BATCH | {"fewer tokens": lambda t: t[:, :-1]},
    ("norm_gated_mlp", "up"): MATRIX,
    ("norm_qkv_rope", "x"): INPUT | {"four dimensions": lambda t: t.unsqueeze(0), "two dimensions": lambda t: t[0]},
    ("norm_qkv_rope", "q"): MATRIX,
    ("norm_qkv_rope", "k"): MATRIX,
    ("norm_qkv_rope", "v"): MATRIX,
    ("norm_qkv_rope", "cos"): SHAPE | KIND | BATCH | TABLE,
    ("norm_qkv_rope", "sin"): SHAPE | KIND | BATCH | TABLE,
    ("attention", "q"): INPUT | {"three dimensions": lambda t: t[0]},
    ("attention", "k"): CACHE,
    ("attention", "v"): CACHE | {"another length": lambda t: t[:, :, :-1]},
    ("attention", "mask"): SHAPE | KIND | BATCH | TABLE,
    ("self_attention", "k_cache"): CACHE,
    ("self_attention", "v_cache"): CACHE | {"another length": lambda t: t[:, :, :-1]},
    ("self_attention", "position"): KIND
    | {"of other tokens": lambda t: t[:-1], "one more dimension": lambda t: t[None]},
}
"""What can be wrong with an argument: with one not named here, what can be wrong with any parameter."""
FAULTS |= {
    ("self_attention", name): FAULTS[op, name]
    for op, names in (("norm_qkv_rope", ("x", "q", "k", "v", "cos", "sin")), ("attention", ("mask",)))
    for name in names
}


def impossible() -> Iterator[Any]:
    for op in OPS:
        for name in _tensors(sample(op, *ROWS)):
            faults = FAULTS.get((op, name), PARAMETER)
            yield from (pytest.param(op, name, fault, id=f"{op}-{name}-{what}") for what, fault in faults.items())


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("op", "name", "fault"), impossible())
def test_an_impossible_argument_is_named(
    op: str, name: str, fault: Fault, fake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    arguments = sample(op, *ROWS)
    if fake:
        arguments |= {n: t.to("meta") for n, t in _tensors(arguments).items()}
    OPS[op].overload(*arguments.values())  # that the same call was right before changes nothing
    wrong = fault(arguments[name])
    said = f"fusepass::{op}: argument '{name}' is {wrong.dtype} of shape {tuple(wrong.shape)}"
    with pytest.raises(ValueError, match=rf"^{re.escape(said)} .*; expected \S+"):
        OPS[op].overload(*(arguments | {name: wrong}).values())


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [("norm_qkv_rope", "head_dim", value) for value in (0, -16, 15)] + [("norm_gated_mlp", "activation", "relu")],
)
def test_an_impossible_setting_is_named(op: str, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"fusepass::{op}: {name} .*{value}.*; expected \S+"):
        OPS[op].overload(*(sample(op, *ROWS) | {name: value}).values())


def test_a_head_dim_that_does_not_divide_the_weights_is_named() -> None:
    with pytest.raises(ValueError, match=r"argument 'q' .* a multiple of head_dim \(10\) rows"):
        OPS["norm_qkv_rope"].overload(*(sample("norm_qkv_rope", *ROWS) | {"head_dim": 10}).values())


@pytest.mark.parametrize(("names", "dim"), [(("v",), 0), (("k_cache", "v_cache"), 1)])
def test_heads_unlike_those_of_the_keys_are_named(names: tuple[str, ...], dim: int) -> None:
    """As many as of the queries: what fits the weights alone, or the caches alone."""
    arguments = sample("self_attention", *ROWS, optional=False)
    for name in names:
        arguments[name] = arguments[name].repeat_interleave(3, dim)
    with pytest.raises(ValueError, match=f"fusepass::self_attention: argument '{names[0]}'"):
        OPS["self_attention"].overload(*arguments.values())


def each_tensor() -> Iterator[Any]:
    for op in OPS:
        floats = (name for name, t in _tensors(sample(op, *ROWS)).items() if t.is_floating_point())
        yield from (pytest.param(op, name, id=f"{op}-{name}") for name in floats)


@pytest.mark.parametrize(("op", "name"), each_tensor())
def test_an_argument_that_needs_grad_is_refused_outside_no_grad(op: str, name: str) -> None:
    arguments = sample(op, *ROWS)
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"fusepass::{op} has no backward.*torch\.no_grad\(\)"):
        OPS[op].overload(*arguments.values())
    with torch.no_grad():
        assert not any(t.requires_grad for t in as_tuple(OPS[op].overload(*arguments.values())))


@pytest.mark.parametrize("op", OPS)
def test_a_function_transform_that_needs_grad_is_refused(op: str) -> None:
    first, *others = sample(op, *ROWS).values()
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        torch.func.grad(lambda x: as_tuple(OPS[op].overload(x, *others))[0].sum())(first)


@pytest.mark.parametrize("op", OPS)
def test_a_forward_mode_tangent_is_not_lost(op: str) -> None:
    first, *others = sample(op, *ROWS).values()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises((RuntimeError, NotImplementedError), match=op):
            OPS[op].overload(dual, *others)


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_refused_when_nothing_needs_grad(op: str) -> None:
    with torch.enable_grad():
        as_tuple(OPS[op].overload(*sample(op, *ROWS).values()))
    with torch.inference_mode():
        as_tuple(OPS[op].overload(*sample(op, *ROWS).values()))
