from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.gate import CASES, F32_CASES, FORM_CASES, HIGH_CASES, Case, assert_as_exact_as_eager, assert_keeps_f32
from tests.ops.sites import OPS, SITES, Tensors, sample

SITE = SITES["norm_gated_mlp"]
LINEARS = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(SITE, case)


@pytest.mark.parametrize("case", HIGH_CASES, ids=str)
def test_high_keeps_f32(case: Case) -> None:
    assert_keeps_f32(SITE, case)


@pytest.mark.parametrize("case", [*F32_CASES, *HIGH_CASES], ids=str)
def test_gelu_is_as_exact_as_eager(case: Case) -> None:
    """In f32 too, where a wrong digit of its constants shows."""
    assert_as_exact_as_eager(SITE, replace(case, config={"hidden_act": "gelu_pytorch_tanh"}))


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
@pytest.mark.parametrize("biased", [LINEARS, LINEARS[:1], LINEARS[1:2], LINEARS[2:]], ids="+".join)
def test_with_biases_as_exact_as_eager(case: Case, biased: tuple[str, ...]) -> None:
    """Llama's MLP may have a bias in every linear; here also in one alone."""

    def keep(layer: nn.Module) -> None:
        for name in LINEARS:
            if name not in biased:
                getattr(layer.mlp, name).bias = None

    assert_as_exact_as_eager(SITE, replace(case, family="llama", config={"mlp_bias": True}), change=keep)


@pytest.mark.parametrize("case", F32_CASES, ids=str)
@pytest.mark.parametrize("without", ["norm_weight", "residual", "both"])
def test_without_norm_or_residual_as_exact_as_eager(case: Case, without: str) -> None:
    """In f32: without its norm the MLP multiplies outliers with each other, too large for f16."""
    absent = {"norm_weight", "residual"} if without == "both" else {without}

    def eager(layer: nn.Module, x: Tensor) -> Tensors:
        y = layer.mlp(x if "norm_weight" in absent else layer.post_attention_layernorm(x))
        return (y if "residual" in absent else x + y,)

    def arguments(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
        named = SITE.named(layer, (x,)) | dict.fromkeys(absent)
        return tuple(named.values())[:-1]  # the last is `high`

    assert_as_exact_as_eager(replace(SITE, eager=eager, arguments=arguments), case)


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_the_norm_adds_eps(case: Case) -> None:
    assert_as_exact_as_eager(SITE, replace(case, config={"rms_norm_eps": 300.0}))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("high", [False, True], ids=["match", "high"])
def test_an_activation_far_from_zero_is_finite(activation: str, high: bool) -> None:
    """exp overflows there, and must do so towards the activation's limit."""
    arguments = sample("norm_gated_mlp", 1, 2, optional=False)
    for x in (-1000.0, 1000.0):
        changed = {
            "x": torch.full_like(arguments["x"], x),
            "gate": torch.eye(*arguments["gate"].shape).to(arguments["x"]),
        }
        changed |= {"up": arguments["up"] / 1000, "activation": activation, "high": high}
        got, want = (
            run(*(arguments | changed).values())
            for run in (OPS["norm_gated_mlp"].overload, OPS["norm_gated_mlp"].reference)
        )
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
