"""`fusepass::linear_residual`: a linear layer and the residual add after it."""

import torch.nn.functional as F
from torch import Tensor

from fusepass.ops.library import define, expect, expect_activation, expect_parameter
from fusepass.ops.project import as_rows, linear_f32, project

OP = "linear_residual"


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, high: bool, early: bool = False
) -> Tensor:
    """residual + x @ weight.T + bias.

    x: [..., K]; weight: [N, K]; bias: [N] or None; residual: [..., N]. The product is rounded to x's dtype before
    the add, unless `high`. `early`: see `fusepass.ops.library.define`.
    """
    if high:
        return (residual.float() + linear_f32(x, weight, bias)).to(x.dtype).contiguous()
    return (residual + F.linear(x, weight, bias)).contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, high: bool, early: bool = False) -> None:
    expect_activation(OP, "x", x)
    expect_parameter(OP, "weight", weight, x, -1, x.shape[-1])
    expect_parameter(OP, "bias", bias, x, weight.shape[0])
    shape = (*x.shape[:-1], weight.shape[0])
    same = residual.shape == shape and residual.dtype == x.dtype and residual.device == x.device
    expect(same, OP, "residual", residual, f"{x.dtype} of shape {shape} on {x.device}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, high: bool, early: bool = False) -> Tensor:
    return x.new_empty(residual.shape)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, high: bool, early: bool = False
) -> Tensor:
    out = x.new_empty(residual.shape)
    if out.numel():
        project(as_rows(x), None, 0.0, [weight], [bias], [as_rows(out)], as_rows(residual), high, early)
    return out


linear_residual = define(
    "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, bool high, bool early=False) -> Tensor",
    fake=_fake,
    reference=reference,
    launch=_launch,
    check=_check,
)
