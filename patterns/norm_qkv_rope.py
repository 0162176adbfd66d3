"""RMSNorm, q/k/v linears, the norm of each q and k head, and RoPE.

The source it accepts (transformers, `Qwen3Attention.forward`; Llama's has no q_norm and k_norm):

    hidden_states = self.input_layernorm(hidden_states)       # optional: a graph break can cut it off
    query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    q_embed = (q * cos) + (rotate_half(q) * sin)              # cos, sin: how they are built is not looked at
    k_embed = (k * cos) + (rotate_half(k) * sin)

The head norms may also stand after the transpose, where they compute the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.fx import Node

from fusepass import ops
from fusepass.fusion import Fusion, Match, Refused
from fusepass.graph import argument, described, half_of, is_op, is_transpose, operands, value
from fusepass.linear import Linear, check_linear, find_linear
from fusepass.ops.library import broadcasts
from fusepass.patterns.norm_gated_mlp import find_input_norm
from fusepass.patterns.rms_norm import RMSNorm, check_rms_norm, find_rms_norm


@dataclass(frozen=True)
class Rope:
    """x * cos + rotate_half(x) * sin; `nodes` are all but cos and sin."""

    x: Node
    cos: Node
    sin: Node
    out: Node
    nodes: tuple[Node, ...]


def find_rope(out: Any) -> Rope | None:
    """The rotary embedding, in the half-split form over the whole head, that ends at `out`."""
    for straight, turned in operands(out, "add"):
        for rotated, sin in operands(turned, "mul"):
            if not is_op(rotated, "cat") or argument(rotated, 1, "dim", "axis") not in (-1, value(rotated).dim() - 1):
                continue
            parts = argument(rotated, 0, "tensors")
            if len(parts) != 2 or not is_op(parts[0], "neg"):
                continue
            negated = argument(parts[0], 0, "input")
            high, low = half_of(negated), half_of(parts[1])
            if high is None or low is None or (high[1], low[1]) != (1, 0) or high[0] is not low[0]:
                continue
            x = low[0]
            for factor, cos in operands(straight, "mul"):
                if factor is x and isinstance(cos, Node) and isinstance(sin, Node):
                    # `chunk` and `split` have a node of their own between x and its halves.
                    sources = (argument(half, 0, "input") for half in (negated, parts[1]))
                    nodes = (x, *sources, negated, parts[1], parts[0], rotated, straight, turned, out)
                    return Rope(x, cos, sin, out, tuple(dict.fromkeys(nodes)))
    return None


@dataclass(frozen=True)
class Heads:
    """A linear layer seen as heads, [B, H, S, D], with the norm of each head if there is one."""

    linear: Linear
    norm: RMSNorm | None
    view: Node
    nodes: tuple[Node, ...]


def find_heads(node: Node) -> Heads | None:
    """`linear -> view [B, S, H, D] -> transpose(1, 2)` that ends at `node`, a norm before or after the transpose."""
    norm = find_rms_norm(node)
    transposed = norm.x if norm else node
    if not is_transpose(transposed, 1, 2):
        return None
    before = argument(transposed, 0, "input")
    if norm is None:
        norm = find_rms_norm(before)
        before = norm.x if norm else before
    if not is_op(before, "view"):
        return None
    linear = find_linear(argument(before, 0, "input"))
    if linear is None or value(before).dim() != 4:
        return None
    # A view keeps the order of elements: [B, S, N] to [B, S, H, D] is determined by the shapes alone.
    if value(before).shape[:2] != value(linear.out).shape[:2]:
        return None
    return Heads(linear, norm, before, (linear.out, before, *(norm.nodes if norm else ()), transposed))


def _descendants(node: Node) -> Iterator[Node]:
    """Nodes reachable from `node`, nearest first."""
    seen = dict.fromkeys(node.users)
    for found in (seen_list := list(seen)):
        yield found
        fresh = [user for user in found.users if user not in seen]
        seen.update(dict.fromkeys(fresh))
        seen_list.extend(fresh)


def _near(linear: Linear) -> Iterator[Node]:
    """The nodes that a rotated branch is looked for in: it has 17, and a model thousands behind each linear layer."""
    return islice(_descendants(linear.out), 40)


def _rotated(linear: Linear) -> tuple[Heads, Rope] | None:
    """The rotated branch that begins at `linear`."""
    for node in _near(linear):
        if (rope := find_rope(node)) and (heads := find_heads(rope.x)) and heads.linear.out is linear.out:
            return heads, rope
    return None


def _plain(linear: Linear) -> Heads | None:
    """The unrotated branch (values) that begins at `linear`."""
    for view in linear.out.users:
        for node in view.users:
            heads = find_heads(node)
            if heads and heads.norm is None:
                return heads
    return None


def _seen_as_heads(linear: Linear) -> bool:
    """Whether the next few nodes make heads of `linear`, with no other linear layer (LoRA's second) on the way."""
    for node in islice(_descendants(linear.out), 4):
        if is_op(node, "view") and getattr(value(node), "ndim", 0) == 4:
            return True
        if is_op(node, "linear"):
            return False
    return False


def _miss(linear: Linear) -> Refused | None:
    """Why the branch that begins at `linear` is not seen as heads and rotated; None if nothing looks wrong."""
    reader = next(iter(linear.out.users), linear.out)
    if not is_op(reader, "view"):
        return Refused("structure", f"expected '{linear.out.name}' viewed as heads, got {described(reader)}", reader)
    parts = [user for user in reader.users if is_op(user, "chunk") or is_op(user, "split")]
    if parts:
        reason = f"gated query: {described(parts[0])} takes each head of '{linear.out.name}' apart"
        return Refused("structure", reason, parts[0])
    size = value(reader).shape[-1]
    if not isinstance(size, int):  # what is half of it is not known
        return Refused("shape", f"expected a number for the size of a head, got the symbol {size}", reader)
    for node in _near(linear):
        rope = find_rope(node)
        if rope and value(rope.x).shape[-1] != size:
            return Refused("rotary", f"partial rotary: {value(rope.x).shape[-1]} of {size}", node)
        if rope and find_heads(rope.x) is None:
            got = argument(rope.x, 0, "input") if is_transpose(rope.x, 1, 2) else rope.x
            reason = f"expected the heads of a linear layer, or their RMSNorm, to be rotated, got {described(got)}"
            return Refused("structure", reason, got)
        index = node.args[1] if is_op(node, "getitem") else None
        last = index[-1] if isinstance(index, tuple) else None
        if isinstance(last, slice) and last.step not in (None, 1):
            reason = (
                f"interleaved rotary: expected the two halves of one tensor, got every second value: {described(node)}"
            )
            return Refused("rotary", reason, node)
    return None


@dataclass(frozen=True)
class NormQKVRopeMatch(Match):
    norm: RMSNorm | None
    q: Heads
    k: Heads
    v: Heads
    q_rope: Rope
    k_rope: Rope


class NormQKVRopeFusion(Fusion[NormQKVRopeMatch]):
    name = "norm_qkv_rope"
    summary = "RMSNorm, q/k/v linears, q and k norm, RoPE"
    order = 20

    def match(self, node: Node) -> NormQKVRopeMatch | None:
        first = find_linear(node)
        if first is None or (here := _rotated(first)) is None:
            return None
        siblings = [linear for user in first.x.users if user is not node and (linear := find_linear(user))]
        rotated = [branch for linear in siblings if (branch := _rotated(linear)) is not None]
        turned = {heads.linear.out for heads, _ in rotated}
        plain = [v for linear in siblings if linear.out not in turned and (v := _plain(linear)) is not None]
        if len(rotated) != 1 or len(plain) != 1:
            return None
        # q has at least as many heads as k. With equal numbers the two names could be exchanged: the op does the same
        # to both, and each result replaces the node it was matched for.
        (k, k_rope), (q, q_rope) = sorted((here, rotated[0]), key=lambda branch: value(branch[0].view).shape[2])
        v = plain[0]
        norm = find_input_norm(first.x, (q.linear, k.linear, v.linear))
        norms = [n for n in (norm, q.norm, k.norm) if n]
        interior = (*(norm.nodes if norm else ()), *q.nodes, *k.nodes, *v.nodes, *q_rope.nodes, *k_rope.nodes)
        return NormQKVRopeMatch(
            anchor=q.view,
            activation=norm.x if norm else first.x,
            parameters=tuple(n.weight for n in norms) + tuple(p for h in (q, k, v) for p in h.linear.parameters),
            others=tuple(dict.fromkeys((q_rope.cos, q_rope.sin, k_rope.cos, k_rope.sin))),
            interior=tuple(dict.fromkeys(interior)),
            outputs=(q_rope.out, k_rope.out, v.nodes[-1]),
            norm=norm,
            q=q,
            k=k,
            v=v,
            q_rope=q_rope,
            k_rope=k_rope,
        )

    def near_miss(self, node: Node) -> Refused | None:
        first = find_linear(node)
        if first is None:
            return None
        readers = [linear for user in first.x.users if (linear := find_linear(user))]
        heads = [linear for linear in readers if _seen_as_heads(linear)]
        if len(heads) < 3 or heads[0].out is not node:
            return None
        extra = [linear for linear in readers if linear not in heads]
        if extra:
            reason = f"'{first.x.name}' has another user: {described(extra[0].out)}"
            return Refused("extra-user", reason, extra[0].out)
        straight = [linear for linear in heads if _rotated(linear) is None]
        misses: dict[str, Refused] = {}  # one a code: q and k mostly miss in the same way
        for linear in straight:
            if (miss := _miss(linear)) is not None:
                misses.setdefault(miss.code, miss)
        if misses:
            first_miss = next(iter(misses.values()))
            reasons = "; ".join(miss.reason for miss in misses.values())
            return Refused(first_miss.code, reasons, first_miss.node)
        turned = len(heads) - len(straight)
        found = f"got {turned} and {len(straight)}" if turned else "found no rotary embedding"
        return Refused("structure", f"expected two rotated branches and one that is not, {found}", node)

    def check(self, match: NormQKVRopeMatch) -> None:
        for norm in (match.norm, match.q.norm, match.k.norm):
            if norm:
                check_rms_norm(norm)
        for heads in (match.q, match.k, match.v):
            check_linear(heads.linear)
        q, k, v = (value(heads.view).shape for heads in (match.q, match.k, match.v))
        if not q[3] == k[3] == v[3]:
            raise Refused("shape", f"the head dimensions of q, k and v differ: {q[3]}, {k[3]}, {v[3]}")
        if k[2] != v[2]:
            raise Refused("shape", f"k has {k[2]} heads and v has {v[2]}")
        if (match.q_rope.cos, match.q_rope.sin) != (match.k_rope.cos, match.k_rope.sin):
            raise Refused("shape", "q and k are rotated by different tables", match.k_rope.out)
        batch, seq = q[0], q[1]
        for node in (match.q_rope.cos, match.q_rope.sin):
            shape = value(node).shape
            fits = len(shape) == 4 and shape[1] == 1 and shape[3] == q[3]
            if not (fits and broadcasts(shape[0], batch) and broadcasts(shape[2], seq)):
                raise Refused(
                    "shape", f"'{node.name}' is {tuple(shape)}; expected [1 or {batch}, 1, {seq}, {q[3]}]", node
                )

    def rewrite(self, match: NormQKVRopeMatch, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        q, k, v, norm = match.q, match.k, match.v, match.norm
        return ops.norm_qkv_rope.norm_qkv_rope.overload, (
            match.activation,
            norm and norm.weight,
            norm.eps if norm else 0.0,
            q.linear.weight,
            k.linear.weight,
            v.linear.weight,
            q.linear.bias,
            k.linear.bias,
            v.linear.bias,
            q.norm and q.norm.weight,
            q.norm.eps if q.norm else 0.0,
            k.norm and k.norm.weight,
            k.norm.eps if k.norm else 0.0,
            match.q_rope.cos,
            match.q_rope.sin,
            value(q.view).shape[3],
            high,
        )
