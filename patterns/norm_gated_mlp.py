"""RMSNorm, gate and up, activation times, down, and the residual add.

The source it accepts (transformers, `Qwen3MLP.forward` inside `Qwen3DecoderLayer.forward`):

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)                            # optional
    hidden_states = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))        # SiLU or tanh-GELU
    hidden_states = residual + hidden_states                                                # optional
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusepass import ops
from fusepass.fusion import Fusion, Match, Refused
from fusepass.graph import argument, described, is_op, operands, reads_only_shape
from fusepass.linear import Linear, check_linear, find_linear
from fusepass.patterns.linear_residual import find_residual
from fusepass.patterns.rms_norm import RMSNorm, check_rms_norm, find_rms_norm


def activation_of(node: Any) -> tuple[Any, str] | None:
    """(x, name of the activation) if `node` is an activation that the op knows."""
    if is_op(node, "silu"):
        return argument(node, 0, "input"), "silu"
    if is_op(node, "gelu") and argument(node, 1, "approximate") == "tanh":
        return argument(node, 0, "input"), "gelu_tanh"
    return None


def find_input_norm(x: Node, linears: tuple[Linear, ...]) -> RMSNorm | None:
    """The RMSNorm that ends at `x`, if nobody but `linears` reads its result: else it must stay a tensor of its own,
    and the region begins behind it."""
    readers = {linear.out for linear in linears}
    if any(user not in readers and not reads_only_shape(user) for user in x.users):
        return None
    return find_rms_norm(x)


@dataclass(frozen=True)
class NormGatedMLPMatch(Match):
    norm: RMSNorm | None
    gate: Linear
    up: Linear
    down: Linear
    activation_name: str
    residual: Node | None


class NormGatedMLPFusion(Fusion[NormGatedMLPMatch]):
    name = "norm_gated_mlp"
    summary = "RMSNorm, gate and up, SiLU (or tanh-GELU) times, down, residual"
    order = 10

    def match(self, node: Node) -> NormGatedMLPMatch | None:
        down = find_linear(node)
        if down is None:
            return None
        for activated, other in operands(down.x, "mul"):
            before, name = activation_of(activated) or (None, "")
            gate, up = find_linear(before), find_linear(other)
            if gate is None or up is None or gate.x is not up.x:
                continue
            norm = find_input_norm(gate.x, (gate, up))
            residual = find_residual(node)
            out = node if residual is None else next(iter(node.users))
            interior = (*(norm.nodes if norm else ()), gate.out, activated, up.out, down.x)
            return NormGatedMLPMatch(
                anchor=down.x,
                activation=norm.x if norm else gate.x,
                parameters=((norm.weight,) if norm else ()) + gate.parameters + up.parameters + down.parameters,
                others=() if residual is None else (residual,),
                interior=tuple(dict.fromkeys((*interior, node, out))),
                outputs=(out,),
                norm=norm,
                gate=gate,
                up=up,
                down=down,
                activation_name=name,
                residual=residual,
            )
        return None

    def near_miss(self, node: Node) -> Refused | None:
        for activated, other in operands(node, "mul"):
            if not is_op(activated, "silu") and not is_op(activated, "gelu"):
                continue
            before, reader = argument(activated, 0, "input"), next(iter(node.users), node)
            gate, up, down = map(find_linear, (before, other, reader))
            if not (gate or up):
                return None
            if activation_of(activated) is None:
                return Refused("structure", f"expected SiLU or tanh-GELU, got {described(activated)}", activated)
            for name, linear, got in (("gate", gate, before), ("up", up, other), ("down", down, reader)):
                if linear is None:
                    return Refused("structure", f"expected the linear layer '{name}', got {described(got)}", got)
            if gate and up and gate.x is not up.x:
                return Refused("structure", f"gate reads {described(gate.x)}, up reads {described(up.x)}", up.out)
        return None

    def check(self, match: NormGatedMLPMatch) -> None:
        if match.norm:
            check_rms_norm(match.norm)
        for linear in (match.gate, match.up, match.down):
            check_linear(linear)

    def rewrite(self, match: NormGatedMLPMatch, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        norm, gate, up, down = match.norm, match.gate, match.up, match.down
        return ops.norm_gated_mlp.norm_gated_mlp.overload, (
            match.activation,
            norm and norm.weight,
            norm.eps if norm else 0.0,
            gate.weight,
            up.weight,
            down.weight,
            gate.bias,
            up.bias,
            down.bias,
            match.residual,
            match.activation_name,
            high,
        )
