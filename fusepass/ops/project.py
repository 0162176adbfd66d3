"""Linear layers of one activation, by strategy: the part that the ops with weights have in common."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusepass.ops.library import Strategy, strategy


def as_rows(x: Tensor) -> Tensor:
    """x[..., K] as [M, K] with stride 1 in the last dimension: a view where the strides allow, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def linear_f32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias with nothing rounded below f32: the references' "high" precision."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _all_or_none(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Kernels take a bias for every weight or for none; a missing one among present ones becomes zeros."""
    if all(bias is None for bias in biases):
        return biases
    return [w.new_zeros(w.shape[0]) if b is None else b for b, w in zip(biases, weights)]


def _how(x: Tensor) -> Strategy:
    """How to run the rows of x. Where they have no features, only biases are left, and no kernel walks along K."""
    return strategy(x.shape[0]) if x.shape[1] else "library"


def project(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    residual: Tensor | None,
    high: bool,
    early: bool,
) -> None:
    """outs[i] = norm(x) @ weights[i].T + biases[i] (+ residual), for one weight or three.

    x: [M, K] from `as_rows`; weights[i]: [N_i, K]; outs[i]: [M, N_i] contiguous, written whole; residual: [M, N_0].
    """
    from fusepass.kernels import gemv, skinny
    from fusepass.kernels.rms_norm import rms_norm

    how = _how(x)
    if how == "library":
        if norm_weight is not None:
            x = rms_norm(x, norm_weight, eps, high)
        for weight, bias, out in zip(weights, biases, outs):
            if out.dtype != x.dtype:
                out.copy_(F.linear(x, weight, bias))
            elif bias is None:
                torch.mm(x, weight.T, out=out)
            else:
                torch.addmm(bias, x, weight.T, out=out)
        if residual is not None:
            outs[0].add_(residual)
    else:
        launch = skinny.linears if how == "skinny" else gemv.linears
        launch(x, norm_weight, eps, weights, _all_or_none(biases, weights), outs, residual, high, early)


def gate_up(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    high: bool,
    early: bool,
) -> Tensor:
    """activation(norm(x) @ gate.T + gate_bias) * (norm(x) @ up.T + up_bias): [M, intermediate], contiguous."""
    from fusepass.kernels import gemv, skinny
    from fusepass.kernels.gated_mul import gated_mul
    from fusepass.kernels.rms_norm import rms_norm

    how = _how(x)
    if how == "library":
        if norm_weight is not None:
            x = rms_norm(x, norm_weight, eps, high)
        gated = F.linear(x, gate, gate_bias)
        gated_mul(gated, F.linear(x, up, up_bias), gated, activation, high)
        return gated
    out = x.new_empty(x.shape[0], gate.shape[0])
    gate_bias, up_bias = _all_or_none((gate_bias, up_bias), (gate, up))
    launch = skinny.gated if how == "skinny" else gemv.gated
    launch(x, norm_weight, eps, gate, up, gate_bias, up_bias, out, activation, high, early)
    return out
