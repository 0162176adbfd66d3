"""Attention of a few queries, whose K and V heads need not be repeated in memory first.

The source it accepts (transformers, `sdpa_attention_forward`):

    key = repeat_kv(key, groups)      # key[:, :, None].expand(...).reshape(...), or none where the heads are equal
    value = repeat_kv(value, groups)  # in number, or none and `enable_gqa=True` below
    attn_output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, is_causal=False)

A prompt (statically too many queries for the kernel) is no site: SDPA is the best there is for it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fusepass import ops
from fusepass.fusion import Fusion, Match, Refused
from fusepass.graph import argument, is_op, mutated, storages, value

_KEYWORDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
_DEFAULTS = (None, None, None, None, 0.0, False, None)


def _adds_dimension(node: Any) -> Node | None:
    """x, if `node` is x [B, H, T, D] seen as [B, H, 1, T, D]."""
    if node.target in ("unsqueeze", torch.unsqueeze):
        return argument(node, 0, "input") if argument(node, 1, "dim") in (2, -3) else None
    if is_op(node, "getitem") and isinstance(node.args[1], tuple):
        index = list(node.args[1])
        if index[:3] == [slice(None), slice(None), None] and all(part == slice(None) for part in index[3:]):
            return node.args[0]
    return None


def find_repeat(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """x and the nodes that repeat each of its heads to make `node` (`repeat_kv`); `node` and none if there are none."""
    if not is_op(node, "view"):
        return node, ()
    expanded = argument(node, 0, "input")
    if expanded.target != "expand":
        return node, ()
    x = _adds_dimension(expanded.args[0])
    if x is None or value(x).dim() != 4:
        return node, ()
    batch, heads, length, size = value(x).shape
    # A view keeps the order of elements: the shapes say that the copies of a head become its neighbours, and the
    # number of elements that nothing else was expanded.
    if value(node).shape != (batch, heads * value(expanded).shape[2], length, size):
        return node, ()
    return x, (expanded.args[0], expanded, node)


@dataclass(frozen=True)
class AttentionMatch(Match):
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: Any


class AttentionFusion(Fusion[AttentionMatch]):
    name = "attention"
    summary = "repeat_kv and scaled_dot_product_attention of a decoding step"
    order = 30

    def match(self, node: Node) -> AttentionMatch | None:
        if node.target is not F.scaled_dot_product_attention:
            return None
        found = (argument(node, i, name, default=_DEFAULTS[i]) for i, name in enumerate(_KEYWORDS))
        q, key, val, mask, dropout, causal, scale = found
        if not all(isinstance(value(x), Tensor) and value(x).dim() == 4 for x in (q, key, val)):
            return None
        if dropout != 0 or causal is not False:
            return None
        (k, k_nodes), (v, v_nodes) = find_repeat(key), find_repeat(val)
        sizes = value(q).shape[1], value(k).shape[1], value(q).shape[3]
        # Under dynamic=True a cache has as many heads as some symbol says, which Dynamo has long specialised. Where it
        # has not, to ask for the number would: with a graph for each, or an error where the user marked it dynamic.
        if not all(map(is_concrete_int, sizes)):
            return None
        heads, kv_heads, size = map(int, sizes)
        tokens = value(q).shape[2]
        if kv_heads == 0 or heads % kv_heads:
            return None
        if isinstance(tokens, int) and tokens * (heads // kv_heads) > ops.attention.ROWS_LIMIT:
            return None
        return AttentionMatch(
            anchor=node,
            activation=q,
            parameters=(),
            others=(k, v),
            interior=(*dict.fromkeys((*k_nodes, *v_nodes)), node),
            outputs=(node,),
            q=q,
            k=k,
            v=v,
            mask=mask,
            scale=1 / math.sqrt(size) if scale is None else scale,
        )

    def near_miss(self, node: Node) -> Refused | None:
        if node.target is not F.scaled_dot_product_attention:
            return None
        q = value(argument(node, 0, "query"))
        # A prompt is no site by design, however it is masked.
        if not isinstance(q, Tensor) or q.dim() != 4 or q.shape[2] != 1:
            return None
        dropout, causal = argument(node, 4, "dropout_p", default=0.0), argument(node, 5, "is_causal", default=False)
        if dropout != 0:
            return Refused("structure", f"expected no dropout, got dropout_p={dropout}", node)
        if causal is not False:
            return Refused("structure", f"expected is_causal=False for one query, got {causal}", node)
        return None

    def check(self, match: AttentionMatch) -> None:
        q, k, v = (value(x).shape for x in (match.q, match.k, match.v))
        if k != v or k[0] != q[0]:
            raise Refused("shape", f"q is {tuple(q)}, k {tuple(k)}, v {tuple(v)}; expected one batch, one head size")
        if match.mask is not None:
            self._check_mask(match, match.mask)

    def _check_mask(self, match: AttentionMatch, mask: Node) -> None:
        """What `fusepass.validity` checks for tensors of the activation's dtype: a mask is often bool."""
        x, fake = value(match.q), value(mask)
        if type(fake) is not FakeTensor:
            raise Refused("tensor-subclass", f"'{mask.name}' is a {type(fake).__name__}, not a plain tensor", mask)
        if fake.device != x.device:
            raise Refused("device", f"'{mask.name}' is on {fake.device}, the activation on {x.device}", mask)
        if fake.dtype not in (torch.bool, x.dtype):
            raise Refused("dtype", f"'{mask.name}' is {fake.dtype}; expected torch.bool or {x.dtype}", mask)
        if fake.dim() != 4:
            raise Refused("shape", f"'{mask.name}' is {tuple(fake.shape)}; expected four dimensions", mask)
        # The op may come before nodes that stand between the first of the region and its last.
        node, read = min(match.interior), storages(mask)
        while node is not match.anchor:
            if any(read & storages(written) for written in mutated(node)):
                raise Refused("mutation", f"'{node.name}' writes in place what the region reads", node)
            node = node.next

    def rewrite(self, match: AttentionMatch, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        return ops.attention.attention.overload, (match.q, match.k, match.v, match.mask, match.scale)
