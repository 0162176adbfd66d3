"""An RMSNorm and the one linear layer that reads it: the head of a causal LM.

The source it accepts (transformers, `Qwen3ForCausalLM.forward` behind the end of `Qwen3Model.forward`):

    hidden_states = self.norm(hidden_states)
    slice_indices = slice(-logits_to_keep, None)                    # an int; in a dynamic graph it may be a symbol
    logits = self.lm_head(hidden_states[:, slice_indices, :])       # the slice is optional

A norm works on each row alone: it commutes with a slice that keeps whole rows.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusepass import ops
from fusepass.fusion import Fusion, Match
from fusepass.graph import argument, is_op, value
from fusepass.linear import Linear, check_linear, find_linear
from fusepass.patterns.rms_norm import RMSNorm, check_rms_norm, find_rms_norm


def last_rows_of(node: Node) -> tuple[Node, Any] | None:
    """(x, start) if `node` is x[..., start:, :]; `start` is an int or the node of a symbolic one."""
    if not is_op(node, "getitem"):
        return None
    x, index = argument(node, 0), argument(node, 1)
    if not isinstance(value(x), Tensor) or value(x).dim() < 2:
        return None
    parts = list(index) if isinstance(index, tuple) else [index]
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[at : at + 1] = [slice(None)] * (value(x).dim() - len(parts) + (at < len(parts)))
    if not all(isinstance(part, slice) and part.stop is None and part.step in (None, 1) for part in parts):
        return None
    *leading, rows, features = parts
    return (x, rows.start or 0) if all(part.start in (None, 0) for part in (*leading, features)) else None


@dataclass(frozen=True)
class NormLinearMatch(Match):
    norm: RMSNorm
    linear: Linear
    start: Any


class NormLinearFusion(Fusion[NormLinearMatch]):
    name = "norm_linear"
    summary = "RMSNorm and the one linear layer that reads it, of the last positions alone (the last norm and lm_head)"
    order = 50

    def match(self, node: Node) -> NormLinearMatch | None:
        linear = find_linear(node)
        if linear is None:
            return None
        normed, start = last_rows_of(linear.x) or (linear.x, 0)
        norm, chain = find_rms_norm(normed), dict.fromkeys((normed, linear.x, node))
        if norm is None or any([*result.users] != [reader] for result, reader in pairwise(chain)):
            return None
        return NormLinearMatch(
            anchor=node,
            activation=norm.x,
            parameters=(norm.weight, *linear.parameters),
            others=(),
            interior=tuple(dict.fromkeys((*norm.nodes, *chain))),
            outputs=(node,),
            norm=norm,
            linear=linear,
            start=start,
        )

    def check(self, match: NormLinearMatch) -> None:
        check_rms_norm(match.norm)
        check_linear(match.linear)

    def rewrite(self, match: NormLinearMatch, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        norm, linear = match.norm, match.linear
        return ops.norm_linear.norm_linear.overload, (
            norm.x,
            norm.weight,
            norm.eps,
            linear.weight,
            linear.bias,
            match.start,
            high,
        )
