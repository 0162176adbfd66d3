"""What the backend would do with a model, found without running it."""

import contextlib
import copy
import copyreg
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from fusepass.backend import rewritten
from fusepass.graph import value
from fusepass.options import Options
from fusepass.report import GraphReport, Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool = False,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(model, backend="fusepass", options=options, dynamic=dynamic)(*args, **kwargs)` fuses and
    refuses on a CUDA device, in the grad mode and under the autocast that are in force here.

    No kernel runs and no memory is taken: the model is traced on a copy of its structure whose tensors are fake. So
    tensors may be on any device, "meta" for a model without weights, and neither they, caches among the arguments,
    `fusepass.reports()` nor what Dynamo has compiled change.

    Raises ValueError or TypeError for options that do not exist, TypeError for what cannot be copied, and what the
    model itself raises for these arguments.
    """
    parsed = Options.parse(options, None)
    model = getattr(model, "_orig_mod", model)  # what `torch.compile(module)` returns
    fakes = _CpuFakes(allow_non_fake_inputs=True)
    twin, args, kwargs = _twin(fakes, (model, args, kwargs))
    reports: dict[str, GraphReport] = {}  # Dynamo may hand over one graph twice: the last one counts

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compile_id = str(torch._guards.CompileContext.current_compile_id())
        reports.pop(compile_id, None)
        reports[compile_id] = rewritten(gm, parsed, compile_id, keep_code=True)
        results = [value(node) for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
        return lambda *_: [fakes.concrete(result) for result in results]

    def entry(self: Any, args: Any, kwargs: Any) -> Any:  # `self`: module paths begin at a frame's self
        return self(*args, **kwargs)

    # A code object of its own, and so a recompile limit of its own.
    entry = types.FunctionType(entry.__code__.replace(), globals())
    stopped = None
    with _autocast(), _dynamo_untouched():
        try:
            torch.compile(entry, backend=backend, dynamic=dynamic)(twin, args, kwargs)
        except torch._subclasses.fake_tensor.DataDependentOutputException as unknown:
            stopped = f"what comes next depends on the values of a tensor ({unknown.func})"
    for number, report in enumerate(reports.values()):
        report.compile_id = str(number)
    return Report(list(reports.values()), stopped)


class _CpuFakes(FakeTensorMode):
    """Fakes of real and of meta tensors that say they are on a CPU: transformers creates tensors on the devices of
    others, and Dynamo cannot run those that come out on "meta" together with fake ones."""

    def from_tensor(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_traceable_wrapper_subclass(tensor):
            return transform_subclass(tensor, lambda _, inner: self.from_tensor(inner))
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor):
            raise TypeError(f"fusepass.explain cannot make a fake {type(tensor).__name__}: torch cannot take it apart")
        return self.concrete(tensor)

    def concrete(self, item: Any) -> Any:
        """A fake of this mode like the tensor `item`, symbolic sizes by their hints; a symbolic number's hint."""
        if not isinstance(item, Tensor):
            return _hint(item)
        shape, strides = map(_hint, item.shape), map(_hint, item.stride())
        with torch._C.DisableTorchFunctionSubclass(), self:
            return torch.empty_strided(
                [*shape], [*strides], dtype=item.dtype, device="cpu", requires_grad=item.requires_grad
            )


def _hint(item: Any) -> Any:
    return item.node.hint if isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool) else item


def _twin(fakes: _CpuFakes, objects: Any) -> Any:
    """A copy of `objects` in which every tensor is a fake one; ties and aliases of modules are kept."""
    devices = copyreg.dispatch_table.get(torch.device)
    copyreg.dispatch_table[torch.device] = lambda device: (torch.device, ("cpu",))
    try:
        with FakeCopyMode(fakes):
            twin = copy.deepcopy(objects)
    except (TypeError, RuntimeError) as fault:
        raise TypeError(f"fusepass.explain copies the model's structure, and cannot: {fault}") from fault
    finally:
        del copyreg.dispatch_table[torch.device]
        if devices is not None:
            copyreg.dispatch_table[torch.device] = devices
    for module in twin[0].modules() if isinstance(twin[0], torch.nn.Module) else ():
        # `model.forward = torch.compile(model.forward)`: a function is copied as it is, and this one holds the model.
        original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
        if isinstance(original, types.MethodType):
            module.forward = types.MethodType(original.__func__, module)
    return twin


def _autocast() -> contextlib.AbstractContextManager[Any]:
    """The autocast that is in force for the model's device, for the fakes on their CPU."""
    kind = next((kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)), None)
    if kind is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.get_autocast_dtype(kind))


@contextlib.contextmanager
def _dynamo_untouched() -> Iterator[None]:
    """Whatever Dynamo compiles inside leaves nothing behind on the code objects of others.

    Behind a graph break Dynamo compiles functions of the model, and keeps the results on their code objects, where all
    compilations count together against `recompile_limit`. There is no way to remove some: where all are ours the code
    is reset, else ours are emptied and belong to nobody, which keeps them from counting.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo.convert_frame import register_bytecode_hook
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    compiled: list[tuple[types.CodeType, types.CodeType]] = []
    hook = register_bytecode_hook(lambda code, new: compiled.append((code, new)))
    limits = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31, "automatic_dynamic_shapes": False}
    try:
        with torch._dynamo.config.patch(limits), torch.compiler.set_stance("default"):
            yield
    finally:
        hook.remove()
        made = {id(new) for _, new in compiled}
        for code in {id(code): code for code, _ in compiled}.values():  # equal code objects are not the same
            entries = _debug_get_cache_entry_list(code)
            ours = [entry for entry in entries if id(entry.code) in made]
            if len(ours) == len(entries):
                reset_code(code)
                continue
            for entry in ours:
                nobody = DeletedGuardManagerWrapper("it was compiled for fusepass.explain")
                nobody.id_matched_objs = {"": ref(_CpuFakes)}
                entry.guard_manager.extra_state.invalidate(entry, nobody)  # type: ignore[union-attr]
