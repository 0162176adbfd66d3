"""What every match must satisfy before it may be rewritten. A structural match is not validity."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node

from fusepass.fusion import Match, Refused
from fusepass.graph import argument, called, module_path, mutated, reads_only_shape, storages, value

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_RESHAPES = {
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_",
    "unsqueeze_",
}  # fmt: skip
"""In-place ops that change what the very tensor is: its fake tensor says what it is in the end."""


@dataclass(frozen=True)
class Mode:
    """What is in force at a node besides the operators: the blocks (`with`) that it lies in."""

    grad: bool
    entered: tuple[Node, ...] = ()
    """The nodes that have entered autocast, inference mode or a level of forward-mode derivatives."""

    def after(self, node: Node) -> "Mode":
        """What is in force from `node` on."""
        name = called(node)
        if name == "_set_grad_enabled":
            return Mode(bool(node.args[0]), self.entered)
        if name.startswith("_enter_") and (name != "_enter_autocast" or argument(node, 2, "enabled", default=True)):
            return Mode(self.grad, (*self.entered, node))
        if name.startswith("_exit_"):
            # A block says which node has entered it (disabled autocast: none of these), but for a level of derivatives.
            left = node.all_input_nodes or self.entered[-1:]
            return Mode(self.grad, tuple(enter for enter in self.entered if enter not in left))
        return self


@dataclass
class Surroundings:
    """What a graph does besides computing: writes in place, and modes that it switches."""

    mutations: list[tuple[Node, set[object]]] = field(default_factory=list)
    """Mutating nodes in order, with the storages they write."""
    switches: list[tuple[Node, Mode]] = field(default_factory=list)
    """The graph's first node and those that switch a mode, in order, and what is in force from there on."""
    reshaped: dict[int, Node] = field(default_factory=dict)
    """By the identity of a fake tensor, the last node that changes its shape in place."""
    callers: tuple["Surroundings", ...] = ()
    """Those of the graphs that this one may be called from, in any mode of theirs."""

    @classmethod
    def of(cls, graph: Graph) -> "Surroundings":
        found = cls()
        mode = Mode(torch.is_grad_enabled())
        for node in graph.nodes:
            if written := mutated(node):
                found.mutations.append((node, set().union(*map(storages, written))))
                if called(node) in _RESHAPES:
                    found.reshaped |= {id(value(target)): node for target in written}
            before, mode = mode, mode.after(node)
            if mode != before or not found.switches:
                found.switches.append((node, mode))
        return found

    def mode(self, node: Node) -> Mode:
        """What is in force behind `node`."""
        return next(mode for switch, mode in reversed(self.switches) if not node < switch)

    def modes_of_callers(self) -> list[Mode]:
        """What may be in force where this graph is called."""
        return [mode for caller in self.callers for _, mode in caller.switches]


def _inside(mode: Mode, block: str) -> Node | None:
    """The node that entered such a block, if one is in force."""
    return next((node for node in mode.entered if called(node) == f"_enter_{block}"), None)


def insertion_point(match: Match, arguments: list[Node], around: Surroundings) -> Node:
    """The node to put the op after: its last argument, but not before the region begins (what the op reads may be
    written in place before that), nor in a block that the region is not in."""
    end = max(match.interior)
    point = max([*arguments, min(match.interior)])
    while point < end and around.mode(point) != around.mode(end):
        point = point.next
    return point


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
                wrapped = isinstance(part, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(part)
                kind = "wrapper of functorch (vmap, grad, jvp)" if wrapped else type(part).__name__
                raise Refused("tensor-subclass", f"'{node.name}' is a {kind}, not a plain tensor", node)

    # A graph that is called with gradients and without was traced in one of the two.
    traced_in_one = len({mode.grad for mode in around.modes_of_callers()}) > 1
    for node in (*match.outputs, *(match.tensors if traced_in_one else ())):
        if value(node).requires_grad:
            raise Refused("grad", f"'{node.name}' needs a gradient; run the model under torch.no_grad()", node)

    device = value(match.activation).device
    if device.type not in ("cuda", "cpu"):
        raise Refused("device", f"'{match.activation.name}' is on {device}; expected a CUDA device")

    modes = {around.mode(node) for node in match.interior}
    for mode in modes:
        if enter := _inside(mode, "autocast"):
            raise Refused("autocast", "the region lies inside torch.autocast", enter)
        if enter := _inside(mode, "dual_level"):
            raise Refused("grad", "the region lies inside a level of forward-mode derivatives", enter)
    called_in_autocast = any(_inside(mode, "autocast") for mode in around.modes_of_callers())
    if called_in_autocast or torch.is_autocast_enabled(device.type):
        raise Refused("autocast", "the model is called inside torch.autocast", None)

    _check_dtype_and_device(match)  # after autocast, which is why dtypes differ where it is in force
    if len(modes) > 1:
        raise Refused("mode", "grad or inference mode is switched in the middle of the region")

    for node in (*match.interior, *arguments):  # all tensors that the region reads are arguments
        reshape = around.reshaped.get(id(value(node)))
        if reshape is not None and min(match.interior) < reshape:
            raise Refused("mutation", f"'{reshape.name}' changes the shape of '{node.name}' in place", reshape)

    for node in arguments:
        if node in match.interior:
            raise Refused("extra-user", f"'{node.name}' is made inside the region and is one of its inputs, too", node)
    for node in match.interior:
        if node not in match.outputs and (users := outside_users(match, node)):
            where = module_path(users[0]) or "the top level"
            raise Refused("extra-user", f"'{node.name}' has another user: '{users[0].name}' in {where}", users[0])

    start, point = min(match.interior), insertion_point(match, arguments, around)
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
        if any(a != b and n != 1 for a, b, n in zip(result.stride(), want.stride(), want.shape)):
            raise Refused("strides", f"'{node.name}' has strides {want.stride()}, the op gives {result.stride()}", node)
