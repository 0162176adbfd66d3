"""Hand the remainder to Inductor, with its modes, options and caches as they are."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from sympy import Expr
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import statically_known_true

_SLOT = "post_grad_custom_post_pass"
_DIRECT = "cuda"
"""The type of device on which ops are called past the dispatcher: where their launches are recorded."""


@functools.cache
def code_identity() -> bytes:
    """Hash of every source file of this package, tuned tables included."""
    root = Path(__file__).parent
    files = sorted(str(file) for pattern in ("*.py", "*.json") for file in root.glob(f"**/{pattern}"))
    # `**` does not follow a linked directory, and patterns/ is one in a checkout.
    files += sorted(str(file) for file in (root / "patterns").glob("*.py"))
    return get_hash_for_files(tuple(dict.fromkeys(files)))


def fuse_outer_products(graph: Graph) -> None:
    """Make [B, M, 1] @ [B, 1, N] an elementwise product, which Inductor fuses with what uses it. For the rotary table
    of a decode step torch 2.11 runs a fill and an SGEMM (4 us on an H200); torch 2.13 decomposes it so by itself."""
    for product in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
        for node in graph.find_nodes(op="call_function", target=product):
            if statically_known_true(node.args[0].meta["val"].shape[-1] == 1):
                node.target = torch.ops.aten.mul.Tensor


class InductorPass(CustomGraphPass):
    """Our pass over what Inductor is about to lower. Its uuid makes this package's code part of Inductor's cache keys:
    the graphs name our ops, and what an op's fake or kernels do is otherwise invisible to FxGraphCache. A user's own
    pass in the same slot runs as it would without us."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def __call__(self, graph: Graph) -> None:
        fuse_outer_products(graph)
        for one in self._passes():
            one(graph)

    def uuid(self) -> Any:
        inner = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self._passes()]
        # None tells Inductor not to cache: so it is without us for a pass that has no uuid.
        return None if None in inner else (code_identity(), *inner)

    def _passes(self) -> list[Any]:
        if self.inner is None:
            return []
        return list(self.inner) if isinstance(self.inner, list | tuple) else [self.inner]


@functools.cache
def register_lowerings() -> None:
    """Tell Inductor ahead that our ops are called as they are, and how. Where it finds that out by itself, torch 2.11
    formats the op's whole history into a log message that nobody reads: exponential time in the number of layers."""
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint

    from fusepass.ops import OPS

    for op in OPS.values():
        if op.overload not in lowerings:
            make_fallback(op.overload, tag_to_layout_constraint(torch.Tag.needs_exact_strides))
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op.overload}"] = CustomCodegen(python=write_call)


def write_call(node: Any, writeline: Callable[[Any], None]) -> None:
    """Write a call of one of our ops into Inductor's code: through `fusepass.ops.direct` where that is Python and the
    arguments are on a GPU and always of one kind, else as Inductor would."""
    from torch._inductor import config
    from torch._inductor.codegen import wrapper as codegen
    from torch._inductor.virtualized import V

    wrapper = V.graph.wrapper_code
    python = type(wrapper) in (codegen.PythonWrapperCodegen, codegen.SubgraphPythonWrapperCodegen)
    recorded = node.get_device().type == _DIRECT and torch.version.hip is None
    sizes = [size for tensor in node.inputs for size in (*tensor.get_size(), *tensor.get_stride())]
    symbols = any(isinstance(value, Expr) and value.free_symbols for value in (*sizes, *node.constant_args))
    if python and recorded and not symbols and not config.generate_intermediate_hooks:
        arguments = node.codegen_args()  # and fills in by name those that have defaults
        schema = node.op_overload._schema
        defaults = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
        if node.kwargs.items() <= defaults.items():
            name = schema.name.removeprefix("fusepass::")
            function = f"fusepass_{name}_{wrapper.next_kernel_suffix()}"
            wrapper.add_import_once("from fusepass.ops.direct import direct")
            wrapper.header.writeline(f"{function} = direct({name!r})")
            writeline(f"{node.get_name()} = {function}({', '.join(arguments)})")
            return
    writeline(codegen.ExternKernelAllocLine(wrapper, node))


@contextlib.contextmanager
def wide_combo_kernels() -> Iterator[None]:
    """All independent nodes in one combo kernel, for torch 2.11, which combines 8 and has no option for it."""
    from torch._inductor.scheduler import ForeachKernelSchedulerNode as Combination

    eights = Combination.group_algorithm_for_combo_kernels

    def joined(scheduler: Any) -> list[list[Any]]:
        """The groups of nodes that depend on none of each other, each whole."""
        levels = {node: i for i, level in enumerate(scheduler._topological_sort_nodes()) for node in level}
        groups = itertools.groupby(eights(scheduler), lambda group: (levels[group[0]], group[0].get_device()))
        return [list(itertools.chain.from_iterable(some)) for _, some in groups]

    Combination.set_group_algorithm_for_combo_kernels(joined)
    try:
        yield
    finally:
        Combination.set_group_algorithm_for_combo_kernels(eights)


def compile_with_inductor(
    gm: GraphModule, example_inputs: list[Any], mode: str | None, options: Mapping[str, Any], fused: bool
) -> Callable[..., Any]:
    """What `torch.compile(mode=mode, options=options)` does with a graph; `fused`: it holds our ops."""
    patches = dict(options)
    wide: Any = contextlib.nullcontext()
    if fused:
        from torch._inductor import config

        register_lowerings()
        # One kernel for independent small ones: a static cache bumps a length in every layer. Qwen3-0.6B's decode step
        # on an H200: 379 kernels and 0.977 ms without, 262 and 0.868 ms with.
        patches.setdefault("combo_kernels", True)
        if hasattr(config, "combo_kernel_max_num_nodes"):
            patches.setdefault("combo_kernel_max_num_nodes", 256)
        else:
            wide = wide_combo_kernels()
        # Without CUDA graphs, what the host does is what a step takes: of 3.85 ms, 0.27 for comparing the strides of
        # 480 tensors with those that Dynamo has compared already, or that the fake of an op of ours promises.
        if not uses_cuda_graphs(mode, options):
            patches.setdefault("size_asserts", False)
        patches[_SLOT] = InductorPass(patches.get(_SLOT, getattr(config, _SLOT)))
    wrapper = torch._TorchCompileInductorWrapper(mode, patches, None)
    with wide:
        return wrapper(gm, example_inputs)


def uses_cuda_graphs(mode: str | None, options: Mapping[str, Any]) -> bool:
    """Whether Inductor will try CUDA graphs in this mode."""
    from torch._inductor import config, list_mode_options

    of_mode = list_mode_options(mode) if mode else {}
    return bool({"triton.cudagraphs": config.triton.cudagraphs, **of_mode, **options}["triton.cudagraphs"])


def reset() -> None:
    """Called by `torch._dynamo.reset()`: drop the CUDA graphs that Inductor recorded for us."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
