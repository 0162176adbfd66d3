"""`fusepass::norm_gated_mlp`: RMSNorm, gate and up, activation times, down and the residual add."""

import torch.nn.functional as F
from torch import Tensor

from fusepass.ops import rms_norm
from fusepass.ops.library import define, expect, expect_activation, expect_parameter
from fusepass.ops.project import as_rows, gate_up, linear_f32, project

OP = "norm_gated_mlp"
ACTIVATIONS = ("silu", "gelu_tanh")


def reference(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    high: bool,
    early: bool = False,
) -> Tensor:
    """residual + down(activation(gate(norm(x))) * up(norm(x))), https://arxiv.org/abs/2002.05202.

    x: [..., K]; norm_weight: [K]; gate, up: [I, K]; down: [N, I]; residual: [..., N]. The norm, every bias and the
    residual may be None. `activation`: "silu" or "gelu_tanh". Rounds to x's dtype where eager would, unless `high`,
    which keeps f32 except for the value that `down` reads. `early`: see `fusepass.ops.library.define`.
    """
    h = x if norm_weight is None else rms_norm.reference(x, norm_weight, eps, high)
    act = F.silu if activation == "silu" else lambda v: F.gelu(v, approximate="tanh")
    if high:
        h = (act(linear_f32(h, gate, gate_bias)) * linear_f32(h, up, up_bias)).to(x.dtype)
        y = linear_f32(h, down, down_bias)
        return (y if residual is None else residual.float() + y).to(x.dtype).contiguous()
    y = F.linear(act(F.linear(h, gate, gate_bias)) * F.linear(h, up, up_bias), down, down_bias)
    return y if residual is None else (residual + y).contiguous()


def _check(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    high: bool,
    early: bool = False,
) -> None:
    expect_activation(OP, "x", x)
    expect_parameter(OP, "norm_weight", norm_weight, x, x.shape[-1])
    expect_parameter(OP, "gate", gate, x, -1, x.shape[-1])
    expect_parameter(OP, "up", up, x, gate.shape[0], x.shape[-1])
    expect_parameter(OP, "down", down, x, -1, gate.shape[0])
    expect_parameter(OP, "gate_bias", gate_bias, x, gate.shape[0])
    expect_parameter(OP, "up_bias", up_bias, x, gate.shape[0])
    expect_parameter(OP, "down_bias", down_bias, x, down.shape[0])
    if residual is not None:
        shape = (*x.shape[:-1], down.shape[0])
        same = residual.shape == shape and residual.dtype == x.dtype and residual.device == x.device
        expect(same, OP, "residual", residual, f"{x.dtype} of shape {shape} on {x.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"fusepass::{OP}: activation '{activation}' is unknown; expected one of {ACTIVATIONS}")


def _fake(
    x: Tensor, norm_weight: Tensor | None, eps: float, gate: Tensor, up: Tensor, down: Tensor, *_: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], down.shape[0])


def _launch(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    high: bool,
    early: bool = False,
) -> Tensor:
    out = x.new_empty(*x.shape[:-1], down.shape[0])
    if out.numel():
        h = gate_up(as_rows(x), norm_weight, eps, gate, up, gate_bias, up_bias, activation, high, early)
        add = None if residual is None else as_rows(residual)
        # The kernel before this one is ours and has waited: the weights may always be read early here.
        project(h, None, 0.0, [down], [down_bias], [as_rows(out)], add, high, True)
    return out


norm_gated_mlp = define(
    "norm_gated_mlp(Tensor x, Tensor? norm_weight, float eps, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias, "
    "Tensor? up_bias, Tensor? down_bias, Tensor? residual, str activation, bool high, bool early=False) -> Tensor",
    fake=_fake,
    reference=reference,
    launch=_launch,
    check=_check,
)
