"""`fusepass::norm_linear`: RMSNorm and one linear layer, of the last rows alone where only those are kept (lm_head)."""

import torch.nn.functional as F
from torch import Tensor

from fusepass.ops import rms_norm
from fusepass.ops.library import define, expect, expect_activation, expect_parameter
from fusepass.ops.project import as_rows, linear_f32, project

OP = "norm_linear"


def reference(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    high: bool,
    early: bool = False,
) -> Tensor:
    """norm(x)[..., start:, :] @ weight.T + bias.

    x: [..., S, K]; norm_weight: [K]; weight: [N, K]; bias: [N] or None; returns [..., rows kept, N]. `start` is what it
    is in Python: rows from the end where negative, 0 for all. The norm is of each row alone, so that only the rows kept
    are normed. Rounds to x's dtype where eager would; "high" rounds the norm once, and the product at the end.
    `early`: see `fusepass.ops.library.define`.
    """
    h = rms_norm.reference(x[..., start:, :], norm_weight, eps, high)
    return linear_f32(h, weight, bias).to(x.dtype) if high else F.linear(h, weight, bias)


def _check(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    high: bool,
    early: bool = False,
) -> None:
    expect_activation(OP, "x", x)
    expect(x.dim() > 1, OP, "x", x, "at least two dimensions")
    expect_parameter(OP, "norm_weight", norm_weight, x, x.shape[-1])
    expect_parameter(OP, "weight", weight, x, -1, x.shape[-1])
    expect_parameter(OP, "bias", bias, x, weight.shape[0])


def _fake(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, start: int, *_: object
) -> Tensor:
    return x.new_empty(*x[..., start:, :].shape[:-1], weight.shape[0])


def _launch(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    high: bool,
    early: bool = False,
) -> Tensor:
    kept = x[..., start:, :]
    out = x.new_empty(*kept.shape[:-1], weight.shape[0])
    if out.numel():
        project(as_rows(kept), norm_weight, eps, [weight], [bias], [as_rows(out)], None, high, early)
    return out


norm_linear = define(
    "norm_linear(Tensor x, Tensor norm_weight, float eps, Tensor weight, Tensor? bias, SymInt start, bool high, "
    "bool early=False) -> Tensor",
    fake=_fake,
    reference=reference,
    launch=_launch,
    check=_check,
)
