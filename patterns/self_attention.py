"""A join: `norm_qkv_rope`, the writes to a static cache and `attention` become one op.

The source it accepts, the first and the last line being ops by now (transformers, `StaticLayer.update`):

    query, key, value = norm_qkv_rope(hidden_states, ...)
    self.keys.index_copy_(2, cache_position, key)
    self.values.index_copy_(2, cache_position, value)
    attn_output = attention(query, self.keys, self.values, mask, scale)
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusepass import ops
from fusepass.fusion import Fusion, Match, Refused
from fusepass.graph import argument, mutated, reads_only_shape, storages, value

_PARAMETERS = (1, 3, 4, 5, 6, 7, 8, 9, 11)
"""Which arguments of `norm_qkv_rope` are weights: three norms, three linears."""


def _result_of(node: Any, index: int) -> Node | None:
    """The `norm_qkv_rope` whose result `index` is `node`."""
    if node.target is not operator.getitem or node.args[1] != index:
        return None
    call = node.args[0]
    assert isinstance(call, Node)
    return call if call.target is ops.norm_qkv_rope.norm_qkv_rope.overload else None


def _write(cache: Any, projection: Node, index: int, before: Node) -> Node | None:
    """The `cache.index_copy_(2, position, <result index of projection>)` that `before` reads."""
    if cache.target == "index_copy_":
        cache = cache.args[0]
    for node in cache.users:
        writes = node.target == "index_copy_" and node.args[0] is cache and node < before
        dim, source = argument(node, 1, "dim"), argument(node, 3, "source")
        if writes and dim in (2, -2) and _result_of(source, index) is projection:
            return node
    return None


@dataclass(frozen=True)
class SelfAttentionMatch(Match):
    projection: Node
    attention: Node
    position: Node
    k_cache: Node
    v_cache: Node


class SelfAttentionJoin(Fusion[SelfAttentionMatch]):
    name = "self_attention"
    summary = "a join: norm_qkv_rope, the write to a static cache and attention"
    order = 35
    joins = True

    def match(self, node: Node) -> SelfAttentionMatch | None:
        if node.target is not ops.attention.attention.overload:
            return None
        query, keys, values = node.args[:3]
        projection = _result_of(query, 0)
        if projection is None:
            return None
        k_write, v_write = (_write(cache, projection, i, node) for i, cache in ((1, keys), (2, values)))
        if k_write is None or v_write is None:
            return None
        position = argument(k_write, 2, "index")
        if argument(v_write, 2, "index") is not position:
            return None
        k_cache, v_cache = k_write.args[0], v_write.args[0]
        assert isinstance(k_cache, Node)
        assert isinstance(v_cache, Node)
        arguments = projection.args
        return SelfAttentionMatch(
            anchor=node,
            activation=arguments[0],  # type: ignore[arg-type]
            parameters=tuple(arguments[i] for i in _PARAMETERS if isinstance(arguments[i], Node)),  # type: ignore[misc]
            others=(arguments[13], arguments[14], k_cache, v_cache),  # type: ignore[arg-type]
            interior=(projection, *projection.users, k_write, v_write, node),
            outputs=(node,),
            writes=(k_cache, v_cache),
            joined=(projection, node),
            read_early=tuple(n for n in (k_cache, v_cache, node.args[3]) if isinstance(n, Node)),
            projection=projection,
            attention=node,
            position=position,
            k_cache=k_cache,
            v_cache=v_cache,
        )

    def check(self, match: SelfAttentionMatch) -> None:
        k, v = value(match.k_cache), value(match.v_cache)
        if k.untyped_storage()._cdata == v.untyped_storage()._cdata:
            raise Refused("mutation", "the caches of keys and values share memory", match.v_cache)
        written = storages(match.k_cache) | storages(match.v_cache)
        # One kernel reads and writes, in no order that other tensors could rely on.
        others = [node for node in (match.position, match.attention.args[3]) if isinstance(node, Node)]
        for node in (*match.tensors, *others):
            if node not in match.writes and storages(node) & written:
                raise Refused("mutation", f"'{node.name}' shares memory with the cache that is written", node)
        # All writes happen where the op is put, which is somewhere between the region's first node and its last.
        read = set().union(*map(storages, others))
        node = min(match.interior)
        while node is not match.anchor:
            if node not in match.interior and not reads_only_shape(node):
                if any(written & storages(source) for source in node.all_input_nodes):
                    raise Refused("mutation", f"'{node.name}' uses the cache while it is written", node)
                if any(read & storages(target) for target in mutated(node)):
                    raise Refused("mutation", f"'{node.name}' writes in place what the region reads", node)
            node = node.next

    def rewrite(self, match: SelfAttentionMatch, high: bool) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        mask, scale = match.attention.args[3:5]
        return ops.self_attention.self_attention.overload, (
            *match.projection.args[:16],
            match.k_cache,
            match.v_cache,
            match.position,
            mask,
            scale,
            high,
        )
