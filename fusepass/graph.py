"""Reading Dynamo's torch IR: small, tolerant predicates, and nothing that changes a graph.

A node is recognised by what it computes, whichever way the user spelled it: `x.square()`, `x.pow(2)`, `x ** 2`;
method, function or operator; either operand order. What a tensor is (shape, dtype, strides, storage) is read from
`node.meta["example_value"]`, the fake tensor that Dynamo computed, never guessed from the arguments.
"""

import operator
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

# What counts as which op. Strings are Tensor methods.
SPELLINGS: dict[str, frozenset[Any]] = {
    "add": frozenset({operator.add, torch.add, "add"}),
    "cat": frozenset({torch.cat, torch.concat, torch.concatenate}),
    "cast": frozenset({"to", "float", "half", "bfloat16", "type", "type_as"}),
    "chunk": frozenset({torch.chunk, "chunk"}),
    "gelu": frozenset({F.gelu, torch._C._nn.gelu}),
    "getitem": frozenset({operator.getitem}),
    "linear": frozenset({F.linear, torch._C._nn.linear}),
    "mean": frozenset({torch.mean, "mean"}),
    "mul": frozenset({operator.mul, torch.mul, torch.multiply, "mul", "multiply"}),
    "narrow": frozenset({torch.narrow, "narrow"}),
    "neg": frozenset({operator.neg, torch.neg, torch.negative, "neg", "negative"}),
    "permute": frozenset({torch.permute, "permute"}),
    "pow": frozenset({operator.pow, torch.pow, "pow"}),
    "rsqrt": frozenset({torch.rsqrt, "rsqrt"}),
    "shape": frozenset({"size", "dim", "ndimension", torch.numel, "numel", getattr}),
    "silu": frozenset({F.silu, torch._C._nn.silu_}),
    "split": frozenset({torch.split, "split"}),
    "square": frozenset({torch.square, "square"}),
    "transpose": frozenset({torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"}),
    "view": frozenset({"view", "reshape", "unflatten", torch.reshape, torch.unflatten}),
}

# Ops whose result may share memory with their first argument without writing it.
_VIEWS = (
    SPELLINGS["cast"] | SPELLINGS["chunk"] | SPELLINGS["getitem"] | SPELLINGS["narrow"] | SPELLINGS["permute"]
    | SPELLINGS["split"] | SPELLINGS["transpose"] | SPELLINGS["view"]
    | {"as_strided", "contiguous", "cpu", "cuda", "detach", "diagonal", "double", "expand", "expand_as", "flatten"}
    | {"mT", "moveaxis", "movedim", "requires_grad_", "select", "squeeze", "swapdims", "t", "unbind", "unfold"}
    | {"unsqueeze", "view_as", torch.flatten, torch.movedim, torch.select, torch.squeeze, torch.t, torch.unbind}
    | {torch.unsqueeze, F.dropout, getattr}
)  # fmt: skip


def is_op(node: Any, name: str) -> bool:
    """Whether `node` is a call that `SPELLINGS[name]` lists, and makes a value of its own (no `out=`)."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return False
    return node.target in SPELLINGS[name] and node.kwargs.get("out") is None


def argument(node: Node, index: int, *names: str, default: Any = None) -> Any:
    """An argument by position or by any of its keywords."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def called(node: Any) -> str:
    """The name of what `node` calls: a function, a method, an operator of aten. "" if it calls nothing."""
    if not isinstance(node, Node) or not node.op.startswith("call_"):
        return ""
    target: Any = getattr(node.target, "overloadpacket", node.target)
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def value(node: Any) -> Any:
    """The fake tensor (or symbolic number) that Dynamo computed for `node`; None if there is none."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def operands(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Both orders of a commutative call's two operands; nothing if `node` is another op."""
    if is_op(node, name):
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        if name != "add" or argument(node, 2, "alpha", default=1) == 1:
            yield a, b
            yield b, a


def square_of(node: Any) -> Node | None:
    """x, if `node` is x squared in any spelling."""
    if is_op(node, "square"):
        return argument(node, 0, "input")
    if is_op(node, "pow") and argument(node, 1, "exponent", "other") == 2:
        return argument(node, 0, "input", "self")
    if is_op(node, "mul") and argument(node, 0, "input") is argument(node, 1, "other"):
        return argument(node, 0, "input")
    return None


def rsqrt_of(node: Any) -> Node | None:
    """x, if `node` is x to the power of -1/2 in any spelling."""
    if is_op(node, "rsqrt"):
        return argument(node, 0, "input")
    if is_op(node, "pow") and argument(node, 1, "exponent", "other") == -0.5:
        return argument(node, 0, "input", "self")
    return None


def mean_of_last(node: Any) -> Node | None:
    """x, if `node` is x.mean(-1, keepdim=True)."""
    if not is_op(node, "mean") or argument(node, 2, "keepdim") is not True or argument(node, 3, "dtype") is not None:
        return None
    x = argument(node, 0, "input")
    dim = argument(node, 1, "dim")
    dims = tuple(dim) if isinstance(dim, list | tuple) else (dim,)
    return x if isinstance(value(x), Tensor) and dims in ((-1,), (value(x).dim() - 1,)) else None


def is_opaque_rms_norm(node: Node) -> bool:
    """Whether `node` is an RMSNorm in one operator, by its name: F.rms_norm, a custom op, a kernel of the hub."""
    name = str(node.target)
    return node.op.startswith("call_") and bool(re.search("rms_?norm", name, re.I)) and not name.startswith("fusepass.")


def is_cast(node: Any) -> bool:
    """Whether `node` only changes the dtype of a tensor (or nothing: `x.to(x.dtype)`)."""
    if not is_op(node, "cast") or not isinstance(value(node), Tensor) or not isinstance(value(node.args[0]), Tensor):
        return False
    return value(node).device == value(node.args[0]).device and "memory_format" not in node.kwargs


def is_transpose(node: Any, first: int, second: int) -> bool:
    """Whether `node` swaps dimensions `first` and `second` and no others."""
    if not isinstance(value(node), Tensor):
        return False
    ndim = value(node).dim()
    if is_op(node, "transpose"):
        dims = {argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")}
        return {dim % ndim for dim in dims if isinstance(dim, int)} == {first, second}
    if is_op(node, "permute"):
        dims = argument(node, 1, "dims")
        order = dims if isinstance(dims, list | tuple) else node.args[1:]
        wanted = list(range(ndim))
        wanted[first], wanted[second] = second, first
        return [dim % ndim for dim in order if isinstance(dim, int)] == wanted
    return False


def half_of(node: Any) -> tuple[Node, int] | None:
    """(x, 0) if `node` is the first half of x's last dimension, (x, 1) if it is the second; None otherwise."""
    if is_op(node, "narrow"):
        x, dim, start, length = (argument(node, i, name) for i, name in enumerate(("input", "dim", "start", "length")))
        size = _last_size(x)
        if size is None or dim not in (-1, value(x).dim() - 1) or 2 * length != size:
            return None
        return (x, 0) if start == 0 else (x, 1) if start == length else None
    if not is_op(node, "getitem"):
        return None
    source, index = node.args
    if is_op(source, "chunk") or is_op(source, "split"):
        x, parts, dim = argument(source, 0, "input", "tensor"), source.args[1:2], argument(source, 2, "dim", default=0)
        part = parts[0] if parts else source.kwargs.get("chunks", source.kwargs.get("split_size"))
        size = _last_size(x)
        if size is None or dim not in (-1, value(x).dim() - 1) or index not in (0, 1):
            return None
        halves = part == 2 if is_op(source, "chunk") else part in (size // 2, [size // 2] * 2, (size // 2,) * 2)
        return (x, index) if halves and size % 2 == 0 else None
    size = _last_size(source)
    if size is None or size % 2 or not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return None
    whole = all(part is Ellipsis or part == slice(None) for part in index[:-1])
    if not whole or (Ellipsis not in index and len(index) != value(source).dim()):
        return None
    start, stop, step = index[-1].start, index[-1].stop, index[-1].step
    if step not in (None, 1):
        return None
    if start in (None, 0) and stop in (size // 2, -(size // 2)):
        return source, 0
    return (source, 1) if start in (size // 2, -(size // 2)) and stop in (None, size) else None


def _last_size(x: Any) -> int | None:
    tensor = value(x)
    return tensor.shape[-1] if isinstance(tensor, Tensor) and isinstance(tensor.shape[-1], int) else None


def reads_only_shape(user: Node) -> bool:
    """Whether `user` looks at its tensor's sizes and not at its contents (`x.size()`, `x.shape`, `x.dim()`)."""
    if not is_op(user, "shape"):
        return False
    return user.target is not getattr or user.args[1] in ("shape", "ndim", "dtype", "device")


def is_view(node: Node) -> bool:
    """Whether `node` computes no tensor: a view, a cast to the dtype it has, a size."""
    found, source = value(node), value(argument(node, 0, "input", "self", "tensor"))
    if not isinstance(found, Tensor | tuple | list):
        return True
    converts = isinstance(found, Tensor) and isinstance(source, Tensor) and found.dtype != source.dtype
    return node.target in _VIEWS and not converts


def mutated(node: Node) -> list[Node]:
    """The tensors that `node` writes in place. A higher-order op and a user's own function may write any of theirs."""
    if node.op not in ("call_function", "call_method"):
        return []
    target = node.target
    written: list[Any] = [node.kwargs.get("out")]
    first = argument(node, 0, "input", "self")
    if isinstance(target, str):
        if (target.endswith("_") and not target.endswith("__")) or target in _IN_PLACE_METHODS:
            written.append(first)
    elif isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        written += _written_by_schema(node)
    elif isinstance(target, torch._ops.HigherOrderOperator) or _updates_statistics(node) or _is_opaque(target):
        written += node.all_input_nodes
    elif target in _EMBEDDINGS:
        written += [argument(node, 1, "weight")] if argument(node, 3, "max_norm") is not None else []
    elif target is operator.setitem or target in _IN_PLACE_OPERATORS:
        written.append(first)
    elif getattr(target, "__module__", "") != "_operator":  # `operator.and_` writes nothing
        name = getattr(target, "__name__", "")
        # `torch._fused_sgd_` writes more than its first argument.
        written += node.all_input_nodes if name.endswith("_") and not name.endswith("__") else []
    # `F.relu(x, True)`: what returns its very argument (not a view of it) and is no conversion has written it.
    inplace = node.kwargs.get("inplace") is True or (target is F.dropout and argument(node, 3, "inplace") is True)
    if inplace or (target not in _VIEWS and first is not None and value(node) is value(first) is not None):
        written.append(first)
    flat = (item for w in written for item in (w if isinstance(w, list | tuple) else [w]))
    return list(dict.fromkeys(item for item in flat if isinstance(item, Node)))


_IN_PLACE_OPERATORS = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow}
    | {operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift}
)
_IN_PLACE_METHODS = frozenset(f"__{op.__name__}__" for op in _IN_PLACE_OPERATORS) | {"__setitem__"}
_EMBEDDINGS = frozenset({F.embedding, F.embedding_bag})
_BATCH_NORMS = frozenset({F.batch_norm, torch.batch_norm})
_INSTANCE_NORMS = frozenset({F.instance_norm, torch.instance_norm})


def _is_opaque(target: Any) -> bool:
    """Whether `target` is a user's own function (`torch._dynamo.allow_in_graph`), of which nothing is known."""
    return isinstance(target, FunctionType) and str(target.__module__).split(".")[0] not in ("torch", "operator")


def _updates_statistics(node: Node) -> bool:
    if node.target in _BATCH_NORMS:
        return argument(node, 5, "training", default=False) is not False
    return node.target in _INSTANCE_NORMS and argument(node, 5, "use_input_stats", default=True) is not False


def _written_by_schema(node: Node) -> list[Any]:
    """The arguments that the schema of an operator (of any overload, where none is chosen yet) says it writes."""
    target: Any = node.target
    overloads = [target] if isinstance(target, torch._ops.OpOverload) else map(target.__getattr__, target.overloads())
    return [
        argument(node, i, arg.name)
        for overload in overloads
        for i, arg in enumerate(overload._schema.arguments)
        if arg.alias_info is not None and arg.alias_info.is_write
    ]


def _memory(node: Any) -> set[int]:
    """The fake storages behind the value of `node`."""
    found = value(node)
    items = found if isinstance(found, list | tuple) else (found,)
    return {item.untyped_storage()._cdata for item in items if type(item) is torch._subclasses.FakeTensor}


def storages(node: Node) -> set[Any]:
    """Identities of the memory behind `node`: its fake storage, and the node that its chain of views starts at."""
    root = node
    while root.op in ("call_function", "call_method") and root.target in _VIEWS:
        source = argument(root, 0, "input", "self", "tensor")
        if not isinstance(source, Node):
            break
        root = source
    return {root} | _memory(node) | _memory(root)


def described(node: Any) -> str:
    """`node` for a reason: its name, what it is and where."""
    if not isinstance(node, Node):
        return repr(node)
    if node.op in ("placeholder", "get_attr"):
        return f"'{node.name}', an input of the graph"
    kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"'{node.name}' ({kind}) in {module_path(node) or 'the top level'}"


def module_path(node: Node) -> str:
    """Where in the user's model `node` comes from, e.g. "model.layers.3.self_attn"; "" at the top."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for old, new in (("L['self']", ""), ("['", "."), ("']", ""), ("[", "."), ("]", ""), ("_modules.", "")):
        path = path.replace(old, new)
    return path.strip(".")


def source_line(node: Node) -> str:
    """The user's line that made `node`: "file.py:42, in forward: code"; "" if Dynamo recorded none."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    frames = [(i, frame) for i, line in enumerate(lines) if (frame := _FRAME.fullmatch(line))]
    if not frames or frames[-1][0] + 1 >= len(lines):
        return ""
    i, frame = frames[-1]
    file, line, function = frame.groups()
    return f"{file}:{line}, in {function}: {lines[i + 1]}"


_FRAME = re.compile(r'File "(.*)", line (\d+), in (.*)')
"""The line of a stack trace above a line of source."""
