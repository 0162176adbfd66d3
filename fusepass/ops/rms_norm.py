"""`fusepass::rms_norm`: RMSNorm over the last dimension, as Hugging Face models spell it."""

import torch
from torch import Tensor

from fusepass.ops.library import define, expect_activation, expect_parameter


def reference(x: Tensor, weight: Tensor, eps: float, high: bool) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), https://arxiv.org/abs/1910.07467.

    x: [..., K]; weight: [K]. Statistics in f32; the normalised value is rounded to x's dtype before the weight
    multiplies it, unless `high`.
    """
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * h).to(x.dtype) if high else weight * h.to(x.dtype)


def _check(x: Tensor, weight: Tensor, eps: float, high: bool) -> None:
    expect_activation("rms_norm", "x", x)
    expect_parameter("rms_norm", "weight", weight, x, x.shape[-1])


def _fake(x: Tensor, weight: Tensor, eps: float, high: bool) -> Tensor:
    return torch.empty_like(x)


def _launch(x: Tensor, weight: Tensor, eps: float, high: bool) -> Tensor:
    from fusepass.kernels.rms_norm import rms_norm

    return rms_norm(x, weight, eps, high)


rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, bool high) -> Tensor",
    fake=_fake,
    reference=reference,
    launch=_launch,
    check=_check,
)
