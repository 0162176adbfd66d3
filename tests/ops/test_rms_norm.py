from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.gate import CASES, FORM_CASES, HIGH_CASES, Case, assert_as_exact_as_eager, assert_keeps_f32, rms_error
from tests.ops.sites import DEVICE, OPS, SITES, Tensors, activations

SITE = SITES["rms_norm"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(SITE, case)


@pytest.mark.parametrize("case", HIGH_CASES, ids=str)
def test_high_keeps_f32(case: Case) -> None:
    assert_keeps_f32(SITE, case)


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_the_norm_of_heads_is_as_exact_as_eager(case: Case) -> None:
    """[batch, heads, seq, head_dim], a transposed view of what k_proj returns; weights up to 96.5."""

    def heads(layer: nn.Module, batch: int, seq: int) -> Tensors:
        return (activations(layer, batch, seq, case.sizes.kv_heads, case.sizes.head_dim).transpose(1, 2),)

    def norm(layer: nn.Module, x: Tensor) -> Tensors:
        return (layer.self_attn.k_norm(x),)

    def arguments(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
        return x, layer.self_attn.k_norm.weight, layer.self_attn.k_norm.variance_epsilon

    assert_as_exact_as_eager(replace(SITE, inputs=heads, eager=norm, arguments=arguments), case)


@pytest.mark.parametrize("shape", [(23,), (3, 23), (2, 3, 23), (2, 1, 3, 23), (2, 1, 3, 2, 23), (3, 1), (1, 20000)])
@pytest.mark.parametrize("reverse", [False, True], ids=["contiguous", "permuted"])
def test_any_number_of_dimensions(shape: tuple[int, ...], reverse: bool) -> None:
    """The leading dimensions in memory in either order; and a row too long for one block."""
    x = torch.randn(shape, device=DEVICE, dtype=torch.float16)
    if reverse:
        order = [*range(x.dim() - 1)][::-1]
        x = x.permute(*order, -1).contiguous().permute(*order, -1)
    weight = torch.rand(shape[-1], device=DEVICE, dtype=torch.float16) + 0.5
    got, want = (function(x, weight, 1e-6, False) for function in (OPS["rms_norm"].overload, OPS["rms_norm"].reference))
    assert got.stride() == want.stride()
    assert rms_error(got, want.double()) < 1e-3


def test_a_row_of_zeros_stays_zero() -> None:
    """What eps is for."""
    x, weight = torch.zeros(2, 23, device=DEVICE), torch.ones(23, device=DEVICE)
    assert (OPS["rms_norm"].overload(x, weight, 1e-6, False) == 0).all()
