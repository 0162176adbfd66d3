"""A linear layer and the residual add after it: `hidden_states = residual + self.o_proj(attn_output)`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusepass import ops
from fusepass.fusion import Fusion, Match
from fusepass.graph import operands, value
from fusepass.linear import Linear, check_linear, find_linear


def find_residual(out: Node) -> Node | None:
    """The tensor of the same shape that `out`'s one user adds to it; None if there is no such add."""
    for add in out.users:
        for _, other in operands(add, "add"):
            same = isinstance(value(other), Tensor) and value(other).shape == value(out).shape
            if same and other is not out and len(out.users) == 1:
                return other
    return None


@dataclass(frozen=True)
class LinearResidualMatch(Match):
    linear: Linear
    residual: Node


class LinearResidualFusion(Fusion[LinearResidualMatch]):
    name = "linear_residual"
    summary = "a linear layer and the residual add after it (attention's o_proj)"
    order = 40

    def match(self, node: Node) -> LinearResidualMatch | None:
        # Of two linears added together, the later one takes the add.
        candidates = [linear for a, _ in operands(node, "add") if (linear := find_linear(a))]
        for linear in sorted(candidates, key=lambda found: found.out, reverse=True):
            if (residual := find_residual(linear.out)) is not None:
                return LinearResidualMatch(
                    anchor=linear.out,
                    activation=linear.x,
                    parameters=linear.parameters,
                    others=(residual,),
                    interior=(linear.out, node),
                    outputs=(node,),
                    linear=linear,
                    residual=residual,
                )
        return None

    def check(self, match: LinearResidualMatch) -> None:
        check_linear(match.linear)

    def rewrite(self, match: LinearResidualMatch, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        linear = match.linear
        return ops.linear_residual.linear_residual.overload, (
            linear.x,
            linear.weight,
            linear.bias,
            match.residual,
            high,
        )
