"""The numeric gate for whole models: against an f64 reference, at most 1.1 x the error of eager in the same dtype."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

FACTOR = 1.1


class ExactRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input: Hugging Face's computes in f32 whatever it is given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def reference(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that computes in f64. Its rotary tables are f32, as they are in every dtype."""
    exact = copy.deepcopy(model).double()
    for name, module in list(exact.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            exact.set_submodule(name, ExactRMSNorm(module))
    return exact


def rms(error: Tensor) -> float:
    """Root mean square of a difference."""
    return error.double().pow(2).mean().sqrt().item()


def assert_gate(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """`ours` is as close to `exact` as `eager` is, within the factor."""
    assert torch.isfinite(ours).all()
    error, allowed = rms(ours - exact), FACTOR * rms(eager - exact)
    assert error <= allowed, f"error {error:.3g}, eager's is {allowed / FACTOR:.3g}: {FACTOR * error / allowed:.3f} x"
