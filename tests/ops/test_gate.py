"""The gate judges: it refuses what is wrong, and its reference is exact."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.gate import reference
from tests.ops.gate import Case, assert_as_exact_as_eager, poisoned
from tests.ops.sites import DEVICE, DTYPES, SITES, SMALL, Site, Tensors, as_tuple, decoder_layer, redraw

F16, F32 = DTYPES
Arguments = dict[str, object]


def _unwritten(outputs: Tensors) -> Tensors:
    fresh = torch.empty_like(outputs[-1])
    fresh[..., 1:] = outputs[-1][..., 1:]
    return *outputs[:-1], fresh


def _tf32(t: Tensor) -> Tensor:
    """The ten bits of mantissa that TF32 keeps, truncated."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


def _next_row(t: Tensor) -> Tensor:
    return torch.cat((t[:-1], t[-2:-1]))


def _without_smallest(t: Tensor) -> Tensor:
    lost = t.double().square().flatten(0, -2).mean(0).argmin()
    return t.index_fill(-1, lost, 0.0)


ARGUMENT_FAULTS: dict[str, tuple[str, torch.dtype, Callable[[Arguments], Arguments]]] = {
    "another eps": ("rms_norm", F32, lambda a: a | {"eps": 1e-2}),
    "a norm weight of one": ("rms_norm", F16, lambda a: a | {"weight": torch.ones_like(a["weight"])}),
    "no residual": ("linear_residual", F16, lambda a: a | {"residual": torch.zeros_like(a["residual"])}),
    "no bias": ("linear_residual", F16, lambda a: a | {"bias": None}),
    "one feature twice": ("linear_residual", F16, lambda a: a | {"weight": _next_row(a["weight"])}),
    "products in TF32": ("linear_residual", F32, lambda a: a | {"weight": _tf32(a["weight"])}),
    "another token's row": ("norm_linear", F16, lambda a: a | {"x": a["x"].roll(1, 1)}),
    "gate and up exchanged": ("norm_gated_mlp", F16, lambda a: a | {"gate": a["up"], "up": a["gate"]}),
    "another activation": ("norm_gated_mlp", F16, lambda a: a | {"activation": "gelu_tanh"}),
    "no norm": ("norm_gated_mlp", F16, lambda a: a | {"norm_weight": None}),
    "q normalised as k": ("norm_qkv_rope", F16, lambda a: a | {"q_norm_weight": a["k_norm_weight"]}),
    "k not normalised": ("norm_qkv_rope", F16, lambda a: a | {"k_norm_weight": None}),
    "k and v exchanged": ("norm_qkv_rope", F16, lambda a: a | {"k": a["v"], "v": a["k"]}),
    "rotated the other way": ("norm_qkv_rope", F16, lambda a: a | {"sin": -a["sin"]}),
    "another position": ("norm_qkv_rope", F16, lambda a: a | {"cos": a["cos"].roll(1, 2), "sin": a["sin"].roll(1, 2)}),
}
OUTPUT_FAULTS: dict[str, tuple[torch.dtype, Callable[[Tensors], Tensors]]] = {
    "a channel that was not written": (F16, _unwritten),
    "a bit of the mantissa": (F16, lambda outputs: tuple((t.view(torch.int16) & ~1).view(t.dtype) for t in outputs)),
    "bf16 inside": (F16, lambda outputs: tuple(t.bfloat16().to(t.dtype) for t in outputs)),
    "f16 inside": (F32, lambda outputs: tuple(t.half().float() for t in outputs)),
    "a tenth of a percent": (F16, lambda outputs: tuple(t.float().mul(1.001).to(t.dtype) for t in outputs)),
    "the smallest channel is zero": (F16, lambda outputs: tuple(_without_smallest(t) for t in outputs)),
}


def _judge(site: Site, dtype: torch.dtype, run: Callable[[nn.Module, Tensors], Tensors]) -> None:
    assert_as_exact_as_eager(site, Case(4, 8, None, dtype, config={"attention_bias": True}), run=run)


@pytest.mark.parametrize("fault", ARGUMENT_FAULTS)
def test_the_gate_refuses_a_wrong_formula(fault: str) -> None:
    name, dtype, change = ARGUMENT_FAULTS[fault]
    site = SITES[name]

    def run(layer: nn.Module, inputs: Tensors) -> Tensors:
        return as_tuple(site.op.reference(*change(site.named(layer, inputs)).values()))

    with pytest.raises(AssertionError, match=r"output \d: error"):
        _judge(site, dtype, run)


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("fault", OUTPUT_FAULTS)
def test_the_gate_refuses_wrong_rounding_and_missing_writes(name: str, fault: str) -> None:
    site = SITES[name]
    dtype, change = OUTPUT_FAULTS[fault]
    with pytest.raises(AssertionError, match=r"output \d"):
        _judge(site, dtype, lambda layer, inputs: change(site.eager(layer, *inputs)))


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_accepts_eager(name: str, dtype: torch.dtype) -> None:
    _judge(SITES[name], dtype, lambda layer, inputs: SITES[name].eager(layer, *inputs))


def test_the_reference_is_f64_through_the_norm() -> None:
    layer = decoder_layer(SMALL, F32)
    redraw(layer)
    norm = reference(layer).input_layernorm
    x = torch.randn(5, SMALL.hidden, dtype=torch.float64, device=DEVICE)
    row, weight = (t.cpu().numpy().astype(np.longdouble) for t in (x, norm.weight))
    want = weight * row / np.sqrt((row * row).mean(-1, keepdims=True) + 1e-6)
    assert np.abs(norm(x).cpu().numpy() / want - 1).max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fresh_memory_is_poisoned(dtype: torch.dtype) -> None:
    """By each function that the ops allocate with."""
    like = torch.zeros(3, 5, dtype=dtype, device=DEVICE)
    with poisoned():
        fresh = like.new_empty(2, 7), torch.empty_like(like), torch.empty_like(like, dtype=torch.float32)
    assert all(t.isnan().all() for t in fresh)
    assert not torch.are_deterministic_algorithms_enabled()
