"""Put the fusions' ops into a graph: the one place that changes one.

All work is done on copies of the graphs, which replace the originals only when every one of them is finished and
checked: a fault on the way leaves the user's graph as it was.

Dead code is never eliminated here. The static cache's `index_copy_` and `cumulative_length.add_` are call_method
nodes without users, which fx takes for pure: `eliminate_dead_code` would delete the KV cache.
"""

import copy
import dataclasses
import logging
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fusepass import validity
from fusepass.fusion import Fusion, Match, Refused, fusions
from fusepass.graph import is_view, module_path, mutated, reads_only_shape, source_line, storages, value
from fusepass.options import Options
from fusepass.report import GraphReport, Input, Site, Work

log = logging.getLogger(__name__)


def fuse(gm: GraphModule, options: Options, compile_id: str = "", keep_code: bool = False) -> GraphReport:
    """Rewrite `gm` and the graph modules inside it (activation checkpointing wraps layers in them) in place.

    `keep_code`: print both graphs into the report."""
    report = GraphReport(compile_id, before=_code(gm) if keep_code else None)
    modules = [module for module in gm.modules() if isinstance(module, GraphModule)]
    copies = [_copy(module.graph) for module in modules]
    report.work_before = _work(copies)
    surroundings = [validity.Surroundings.of(graph) for graph in copies]
    for module, graph, around in zip(modules, copies, surroundings):
        around.callers = () if module is gm else tuple(surroundings)
        # What is a placeholder of an inner graph may be computed in the outer one.
        report.sites.extend(_fuse_graph(graph, options, around, inputs_are_settled=module is gm))
    for module, graph in zip(modules, copies):
        module.graph = graph
        module.recompile()
    report.work_after = _work(copies)
    report.after = _code(gm) if keep_code else None
    return report


def _code(gm: GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _work(graphs: list[Graph]) -> Work:
    operators = reads = 0
    for graph in graphs:
        for node in graph.nodes:
            if node.op not in ("call_function", "call_method") or is_view(node):
                continue
            operators += 1
            reads += sum(isinstance(value(read), Tensor) and not _is_parameter(read) for read in node.all_input_nodes)
    # The placeholders of an inner graph are the outer graph's nodes again.
    weights = {value(node) for node in graphs[0].nodes if _is_parameter(node)}
    return Work(operators, reads, sum(weight.nbytes for weight in weights))


def _is_parameter(node: Node) -> bool:
    return node.op == "placeholder" and isinstance(value(node), torch.nn.Parameter)


def _copy(graph: Graph) -> Graph:
    """A copy with the private attributes that AOTAutograd reads from Dynamo's placeholders (it finds the static inputs
    of CUDA graphs through `_dynamo_source`)."""
    new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        if hasattr(old_node, "_dynamo_source"):
            new_node._dynamo_source = old_node._dynamo_source
    return new


def _fuse_graph(graph: Graph, options: Options, around: validity.Surroundings, inputs_are_settled: bool) -> list[Site]:
    writes = _writes(graph)
    sites: list[Site] = []
    calls: dict[Node, tuple[Match, list[int]]] = {}  # the ops put in, and the sites that each runs
    refused: set[Node] = set()
    replaced: set[str] = set()
    for fusion in fusions():
        if not options.enabled(fusion):
            continue
        seen: set[Node] = set()
        for node in list(graph.nodes):
            if node in seen or (match := fusion.match(node)) is None:
                continue
            site = _site(fusion, match)
            seen |= set(match.interior)
            names = {inner.name for inner in match.interior}
            try:
                call = _apply(graph, fusion, match, around, options.precision == "high")
            except Refused as refusal:
                if fusion.joins:
                    log.debug("%s at %s not joined: %s", fusion.name, site.path, refusal.reason)
                    continue
                source = source_line(refusal.node) if refusal.node else site.source
                sites.append(dataclasses.replace(site, source=source, code=refusal.code, reason=refusal.reason))
                refused |= set(match.interior)
            else:
                replaced |= names
                if fusion.joins:
                    calls[call] = match, [i for op in match.joined for i in calls.pop(op)[1]]
                    for i in calls[call][1]:
                        sites[i] = dataclasses.replace(sites[i], op=fusion.name, call=call.name)
                    continue
                calls[call] = match, [len(sites)]
                sites.append(dataclasses.replace(site, op=fusion.name, call=call.name))
            log.debug("%s", sites[-1])
        sites.extend(_near_misses(graph, fusion, refused))  # before a shorter fusion takes a part of them
    if inputs_are_settled:
        _allow_early_reads(graph, {call: match for call, (match, _) in calls.items()}, around)
    graph.lint()
    ours = {call.name for call in calls}
    if [name for name in _writes(graph) if name not in ours] != [name for name in writes if name not in replaced]:
        raise AssertionError("rewriting changed the nodes that write in place, or their order")
    return sites


def _site(fusion: Fusion[Any], match: Match) -> Site:
    inputs = tuple(
        Input(
            node.meta.get("stands_for", node.name),
            tuple(size if isinstance(size, int) else str(size) for size in value(node).shape),
            str(value(node).dtype).removeprefix("torch."),
            node in match.parameters,
        )
        for node in dict.fromkeys(match.tensors)
    )
    names = tuple(node.name for node in sorted(match.interior))
    return Site(fusion.name, module_path(match.anchor), source_line(match.anchor), nodes=names, inputs=inputs)


def _near_misses(graph: Graph, fusion: Fusion[Any], refused: set[Node]) -> Iterator[Site]:
    for node in graph.nodes:
        if node not in refused and (miss := fusion.near_miss(node)) is not None:
            at = miss.node or node
            site = Site(fusion.name, module_path(node), source_line(at), miss.code, miss.reason, nodes=(at.name,))
            log.debug("%s", site)
            yield site


def _writes(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if mutated(node)]


def _apply(graph: Graph, fusion: Fusion[Any], match: Match, around: validity.Surroundings, high: bool) -> Node:
    """Check `match` and replace it by its op. Returns the op's node; raises `Refused` with nothing changed."""
    overload, arguments = fusion.rewrite(match, high)
    nodes = [arg for arg in arguments if isinstance(arg, Node)]
    try:
        validity.check(match, around, nodes)
        fusion.check(match)
        results = _fake_results(overload, arguments)
        validity.check_layout(match, results)
    except GuardOnDataDependentSymNode as unknown:
        reason = f"whether the op fits hangs on a size that only the data decides: {unknown.cond}"
        raise Refused("shape", reason) from unknown

    point = validity.insertion_point(match, nodes, around)
    while point.next.op == "placeholder":
        point = point.next
    with graph.inserting_after(point):
        call = _new_node(graph, overload, arguments, match.outputs[0], results)
    if len(match.outputs) == 1:
        replacements = [call]
    else:
        replacements, point = [], call
        for i, output in enumerate(match.outputs):
            with graph.inserting_after(point):
                point = _new_node(graph, operator.getitem, (call, i), output, results[i])
            replacements.append(point)
    for output, replacement in zip(match.outputs, replacements):
        replacement.meta["stands_for"] = output.meta.get("stands_for", output.name)
        output.replace_all_uses_with(replacement)
    _erase(graph, match)
    return call


def _fake_results(overload: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    def fake(arg: Any, kind: Any) -> Any:
        arg = value(arg) if isinstance(arg, Node) else arg
        # A symbolic eps, maybe an integer, says nothing about shapes, and reading it would guard on it.
        return 1.0 if isinstance(kind, torch.FloatType) and isinstance(arg, torch.SymFloat | torch.SymInt) else arg

    values = [fake(arg, parameter.type) for arg, parameter in zip(arguments, overload._schema.arguments)]
    # The mode of the graph's own values: Dynamo has made a fresh one for the backend's use already.
    mode = next(item.fake_mode for item in values if isinstance(item, FakeTensor))
    try:
        with mode, torch.no_grad():
            results = overload(*values)
    except ValueError as impossible:  # the op's own check, which names the argument
        raise Refused("shape", str(impossible)) from impossible
    return results if isinstance(results, tuple) else (results,)


def _new_node(graph: Graph, target: Any, args: tuple[Any, ...], like: Node, results: Any) -> Node:
    """A call node with the metadata of the node it replaces."""
    node = graph.call_function(target, args)
    node.meta = {
        key: item for key, item in like.meta.items() if key in ("nn_module_stack", "source_fn_stack", "stack_trace")
    }
    node.meta["example_value"] = results[0] if isinstance(results, tuple) and len(results) == 1 else results
    return node


def _erase(graph: Graph, match: Match) -> None:
    """Erase the region, and let what read only the shape of its values read the activation's."""
    for node in sorted(match.interior, reverse=True):
        for user in list(node.users):
            if reads_only_shape(user):
                user.replace_input_with(node, match.activation)
        graph.erase_node(node)


def _allow_early_reads(graph: Graph, calls: dict[Node, Match], around: validity.Surroundings) -> None:
    """Let ops read weights before the kernels that precede them have finished, where nothing can be writing those.

    Not the first op of the graph, nor one that does not follow another in the flow of data: the kernel before it may be
    the user's own update of the weights. Not an op whose weights the graph computes or writes. What else an op reads
    early (a mask) may be computed in the graph if an op that waits first, and that it follows, reads it too.
    """
    settled: dict[Node, frozenset[Node]] = {}  # what was complete when some op before this node began
    for node in graph.nodes:
        before = [settled[source] for source in node.all_input_nodes]
        known = frozenset().union(*before) if any(before) else frozenset()
        if node in calls:
            match = calls[node]
            takes_early = any(arg.name == "early" for arg in node.target._schema.arguments)
            fixed = all(_is_input(read) or read in known for read in match.read_early)
            fixed = fixed and all(map(_is_input, match.parameters))
            if takes_early and known and fixed and not _written_by_others(match, around):
                node.update_kwarg("early", True)
            else:
                known = known | {*node.all_input_nodes}
        settled[node] = known


def _is_input(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _written_by_others(match: Match, around: validity.Surroundings) -> bool:
    read = set().union(*map(storages, (*match.parameters, *match.read_early)))
    return any(writes & read for node, writes in around.mutations if node not in match.interior)
