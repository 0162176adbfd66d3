"""Linear layers in a graph: what the fusions that have some share."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from fusepass.fusion import Refused
from fusepass.graph import argument, is_op, value


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias, one node."""

    x: Node
    weight: Node
    bias: Node | None
    out: Node

    @property
    def parameters(self) -> tuple[Node, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def find_linear(out: Any) -> Linear | None:
    """The linear layer that `out` is the result of."""
    if not is_op(out, "linear"):
        return None
    x, weight, bias = (argument(out, i, name) for i, name in enumerate(("input", "weight", "bias")))
    if not isinstance(value(x), Tensor) or not isinstance(value(weight), Tensor):
        return None
    return Linear(x, weight, bias, out)


def check_linear(linear: Linear) -> None:
    """Raise `Refused` unless weight and bias have the shapes of a plain linear layer."""
    weight = value(linear.weight)
    if weight.dim() != 2:
        features = value(linear.x).shape[-1]
        raise Refused("weight-layout", f"'{linear.weight.name}' is {tuple(weight.shape)}; expected [any, {features}]")
    if linear.bias is not None and value(linear.bias).shape != weight.shape[:1]:
        raise Refused(
            "shape", f"bias '{linear.bias.name}' is {tuple(value(linear.bias).shape)}; expected [{weight.shape[0]}]"
        )
