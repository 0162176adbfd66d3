"""What every match must satisfy before it may be rewritten. A structural match is not validity."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node

from fusepass.fusion import Match, Refused
from fusepass.graph import module_path, mutated, reads_only_shape, storages, value

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Surroundings:
    """What a graph does besides computing: writes in place, and autocast regions."""

    mutations: list[tuple[Node, set[object]]] = field(default_factory=list)
    """Mutating nodes in order, with the storages they write."""
    autocast: list[tuple[Node, Node | None]] = field(default_factory=list)
    """Enter and exit of each enabled autocast region."""
    inside_autocast: bool = False
    """Whether the whole graph may run inside an autocast region of the graph it is called from."""

    @classmethod
    def of(cls, graph: Graph) -> "Surroundings":
        found = cls()
        open_regions: dict[Node, int] = {}
        for node in graph.nodes:
            if written := mutated(node):
                found.mutations.append((node, set().union(*map(storages, written))))
            name = getattr(node.target, "__name__", "")
            if name == "_enter_autocast" and (node.args[2] if len(node.args) > 2 else node.kwargs.get("enabled", True)):
                open_regions[node] = len(found.autocast)
                found.autocast.append((node, None))
            elif name == "_exit_autocast" and node.args[0] in open_regions:
                found.autocast[open_regions[node.args[0]]] = (node.args[0], node)
        return found


def insertion_point(match: Match, arguments: list[Node]) -> Node:
    """The node to put the op after: its last argument, but not before the region begins (what the op reads may be
    written in place before that)."""
    return max([*arguments, min(match.interior)])


def outside_users(match: Match, node: Node) -> list[Node]:
    """Users of an interior value that are not part of the region and look at more than its shape."""
    inside = set(match.interior)
    shape = value(match.activation).shape
    return [
        user
        for user in node.users
        if user not in inside and not (reads_only_shape(user) and getattr(value(node), "shape", None) == shape)
    ]


def check(match: Match, around: Surroundings, arguments: list[Node]) -> None:
    """Raise `Refused` unless the region can be replaced by one op that reads `arguments`."""
    for node in (*match.tensors, *match.interior):
        parts = value(node) if isinstance(value(node), list | tuple) else (value(node),)  # `chunk` makes several
        for part in parts:
            if type(part) is not FakeTensor:
                kind = type(part).__name__
                raise Refused("tensor-subclass", f"'{node.name}' is a {kind}, not a plain tensor", node)

    for node in match.outputs:
        if value(node).requires_grad:
            raise Refused("grad", f"'{node.name}' needs a gradient; run the model under torch.no_grad()", node)

    device = value(match.activation).device
    if device.type not in ("cuda", "cpu"):
        raise Refused("device", f"'{match.activation.name}' is on {device}; expected a CUDA device")

    for enter, leave in around.autocast:
        if any(enter < node and (leave is None or node < leave) for node in match.interior):
            raise Refused("autocast", "the region lies inside torch.autocast", enter)
    if around.inside_autocast or torch.is_autocast_enabled(device.type):
        raise Refused("autocast", "the model is called inside torch.autocast", None)

    _check_dtype_and_device(match)  # after autocast, which is why dtypes differ where it is in force

    for node in arguments:
        if node in match.interior:
            raise Refused("extra-user", f"'{node.name}' is made inside the region and is one of its inputs, too", node)
    for node in match.interior:
        if node not in match.outputs and (users := outside_users(match, node)):
            where = module_path(users[0]) or "the top level"
            raise Refused("extra-user", f"'{node.name}' has another user: '{users[0].name}' in {where}", users[0])

    start, point = min(match.interior), insertion_point(match, arguments)
    for output in match.outputs:
        for user in output.users:
            if not point < user and user not in match.interior:
                raise Refused("order", f"'{user.name}' uses '{output.name}' before '{point.name}' exists", user)

    end = max(point, max(match.interior))
    touched = set().union(*(storages(node) for node in (*match.tensors, *match.interior)))
    own = set().union(*map(storages, match.interior)) - set().union(*map(storages, match.tensors))
    own |= set().union(*map(storages, match.writes))
    for node, written in around.mutations:
        # What writes in place inside the region may write the region's own values, and what the op writes too.
        if (written - own) if node in match.interior else (start < node < end and written & touched):
            raise Refused("mutation", f"'{node.name}' writes in place what the region reads", node)


def _check_dtype_and_device(match: Match) -> None:
    x = value(match.activation)
    if x.dtype not in DTYPES:
        raise Refused("dtype", f"'{match.activation.name}' is {x.dtype}; expected bfloat16, float16 or float32")
    for node in (*match.tensors, *match.outputs):
        if value(node).device != x.device:
            raise Refused("device", f"'{node.name}' is on {value(node).device}, the activation on {x.device}", node)
        if value(node).dtype != x.dtype:
            raise Refused("dtype", f"'{node.name}' is {value(node).dtype}, the activation {x.dtype}", node)
    for node in match.parameters:
        if not value(node).is_contiguous():
            raise Refused("weight-layout", f"'{node.name}' has strides {value(node).stride()}: not contiguous", node)


def check_layout(match: Match, results: tuple[Tensor, ...]) -> None:
    """Raise `Refused` unless the op's results have the shapes and strides of the values they replace."""
    for node, result in zip(match.outputs, results, strict=True):
        want = value(node)
        if result.shape != want.shape or result.dtype != want.dtype:
            raise Refused(
                "shape", f"'{node.name}' is {want.dtype} {tuple(want.shape)}, the op gives {result.shape}", node
            )
        # The stride of a dimension of size 1 has no meaning.
        if any(a != b for a, b, n in zip(result.stride(), want.stride(), want.shape) if n != 1):
            raise Refused("strides", f"'{node.name}' has strides {want.stride()}, the op gives {result.stride()}", node)
