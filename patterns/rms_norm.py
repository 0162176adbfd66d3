"""A lone RMSNorm: the final norm, or one whose neighbours did not match.

The source it accepts (transformers, `Qwen3RMSNorm.forward` and the 130 models that share it):

    hidden_states = hidden_states.to(torch.float32)                       # may be missing in an f32 model
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusepass import ops
from fusepass.fusion import Fusion, Match, Refused
from fusepass.graph import (
    argument,
    described,
    is_cast,
    is_op,
    is_opaque_rms_norm,
    mean_of_last,
    operands,
    rsqrt_of,
    square_of,
    value,
)


@dataclass(frozen=True)
class RMSNorm:
    """The nodes of one RMSNorm; `nodes` are all but `x`, `weight` and `eps`."""

    x: Node
    weight: Node
    eps: Any
    wide: Node
    """x in the dtype of the statistics."""
    scaled: Node
    """What the weight multiplies."""
    out: Node
    nodes: tuple[Node, ...]


def find_rms_norm(out: Any) -> RMSNorm | None:
    """The RMSNorm that ends at `out`, whatever its dtypes."""
    for scaled, weight in operands(out, "mul"):
        normalised = scaled.args[0] if is_cast(scaled) else scaled
        for wide, rstd in operands(normalised, "mul"):
            for mean, eps in operands(rsqrt_of(rstd), "add"):
                square, total = mean_of_last(mean), rsqrt_of(rstd)
                if square is None or square_of(square) is not wide or isinstance(value(eps), Tensor):
                    continue
                assert isinstance(wide, Node)
                x: Any = wide.args[0] if is_cast(wide) else wide
                nodes = dict.fromkeys((wide, square, mean, total, rstd, normalised, scaled, out))
                nodes.pop(x, None)
                if isinstance(weight, Node):
                    return RMSNorm(x, weight, eps, wide, scaled, out, tuple(nodes))
    return None


def _miss(rstd: Node) -> Refused | None:
    """Why the norm that 1/rms seems to belong to is not one, if `rstd` is the rsqrt of a mean of squares."""
    total = rsqrt_of(rstd)
    sides = [*operands(total, "add")] or [(total, None)]
    means = [(mean, eps) for mean, eps in sides if is_op(mean, "mean") and square_of(argument(mean, 0, "input"))]
    if not means:
        return None
    (mean, eps), *_ = means
    if eps is None or isinstance(value(eps), Tensor):
        return Refused(
            "structure", f"expected a number (epsilon) added to the mean, got {described(eps or rstd)}", total
        )
    if mean_of_last(mean) is None:
        return Refused("structure", "the mean of squares is not over the last dimension with keepdim=True", mean)
    wide, user = square_of(argument(mean, 0, "input")), next(iter(rstd.users), rstd)
    if not any(x is wide for x, other in operands(user, "mul") if other is rstd):
        return Refused("structure", f"expected {described(wide)} times '{rstd.name}', got {described(user)}", user)
    while len(user.users) == 1 and is_cast(next(iter(user.users))):
        user = next(iter(user.users))
    reader = next(iter(user.users), user)
    norms = [norm for found in user.users if (norm := find_rms_norm(found))]
    if norms:
        return _other_rounding(norms[0])
    return Refused("structure", f"expected '{user.name}' times the norm's weight, got {described(reader)}", reader)


def _other_rounding(norm: RMSNorm) -> Refused | None:
    """Why the op does not round as `norm` does: a zero-centred norm multiplies by 1 + weight before it rounds."""
    multiplied, x = value(norm.scaled).dtype, value(norm.x).dtype
    if multiplied == x:
        return None
    return Refused(
        "dtype", f"the weight multiplies {multiplied}, not the input's {x}: expected the cast first", norm.out
    )


def check_rms_norm(norm: RMSNorm) -> None:
    """Raise `Refused` unless the op computes `norm` with the graph's own roundings."""
    x, weight = value(norm.x), value(norm.weight)
    if weight.shape != x.shape[-1:]:
        raise Refused("shape", f"norm weight '{norm.weight.name}' is {tuple(weight.shape)} for a row of {x.shape[-1]}")
    if value(norm.wide).dtype != torch.float32:
        raise Refused("dtype", f"the norm's statistics are {value(norm.wide).dtype}; expected float32", norm.wide)
    if (other := _other_rounding(norm)) is not None:
        raise other


@dataclass(frozen=True)
class RMSNormMatch(Match):
    norm: RMSNorm


class RMSNormFusion(Fusion[RMSNormMatch]):
    name = "rms_norm"
    summary = "a lone RMSNorm in one kernel"
    order = 60

    def match(self, node: Node) -> RMSNormMatch | None:
        norm = find_rms_norm(node)
        if norm is None or _other_rounding(norm) is not None:
            return None
        return RMSNormMatch(
            anchor=node,
            activation=norm.x,
            parameters=(norm.weight,),
            others=(),
            interior=norm.nodes,
            outputs=(node,),
            norm=norm,
        )

    def near_miss(self, node: Node) -> Refused | None:
        if rsqrt_of(node) is not None:
            return _miss(node)
        if is_opaque_rms_norm(node):
            return Refused("opaque", f"{described(node)} is one operator, whose rounding is not known", node)
        return None

    def check(self, match: RMSNormMatch) -> None:
        check_rms_norm(match.norm)

    def rewrite(self, match: RMSNormMatch, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        return ops.rms_norm.rms_norm.overload, (match.norm.x, match.norm.weight, match.norm.eps, high)
