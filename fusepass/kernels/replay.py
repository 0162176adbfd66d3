"""Launches of an op, recorded for each kind of arguments and replayed: what makes an op cheap on the host.

What an op launches depends on the shapes, strides and dtypes of its tensors and on its other arguments, and on nothing
else. Running it again for every call (choosing a strategy, looking up configs, making views, binding some thirty
arguments a kernel) costs 15 to 55 us of Python. Instead its first call of a kind runs on meta tensors, where each
kernel is compiled and noted down with the tensors that its pointers lie in; all calls fill in the addresses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from fusepass.kernels.launch import direct, making, recording

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip
_ALIGNMENT = 256
"""Of what shares the workspace; the caching allocator aligns to 512."""


class _Computes(Exception):
    """The op does more than launch our kernels: a library GEMM, a copy."""


class _OnlyViews(TorchDispatchMode):
    """Raises `_Computes` for an operator that neither allocates nor makes a view."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not view and func not in _ALLOCATIONS:
            raise _Computes(str(func))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Launch:
    """One kernel. `pointers`: for each tensor among its values, the place, which base address, and the offset."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    values: list[Any]
    pointers: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Recipe:
    """An op's launches for one kind of arguments. Base addresses are those of the tensor arguments, of the results,
    and of one workspace for all that lives only during the call."""

    tensors: list[int]
    results: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    single: bool
    workspace: int
    launches: list[_Launch]
    empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
    """Allocates on the current device: a third of the time that `torch.empty_strided` takes for 85 ops."""

    def __call__(self, args: tuple[Any, ...]) -> Any:
        """Launch for these arguments. None, and nothing launched, if an address is not aligned as kernels assume, or if
        somebody (a profiler) wants to see Triton's launches."""
        if triton.knobs.runtime.launch_enter_hook.calls:
            return None
        bases = [args[i].data_ptr() for i in self.tensors]
        unaligned = 0
        for base in bases:
            unaligned |= base
        if unaligned % 16:
            return None
        results = [self.empty(*layout) for layout in self.results]
        for result in results:
            bases.append(result.data_ptr())
        if self.workspace:
            workspace = self.empty((self.workspace,), (1,), torch.uint8)
            bases.append(workspace.data_ptr())
        stream = triton.runtime.driver.active.get_current_stream(args[0].get_device())
        for launch in self.launches:
            values = launch.values.copy()
            for place, base, offset in launch.pointers:
                values[place] = bases[base] + offset
            launch.run(*launch.grid, stream, launch.function, launch.metadata, None, None, None, *values)
        return results[0] if self.single else tuple(results)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(launch: Callable[..., Any], args: tuple[Any, ...]) -> Recipe | None:
    """The recipe of `launch(*args)`; None if it computes anything outside our kernels. Launches nothing. Raises
    `KernelUnavailable` for a kernel that can not be made."""
    if not direct():
        return None
    stand_ins = [
        torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta") if isinstance(arg, Tensor) else arg
        for arg in args
    ]
    try:
        with recording() as noted, _OnlyViews():
            out = launch(*stand_ins)
    except _Computes:
        return None
    results = [out] if isinstance(out, Tensor) else list(out)
    tensors = [i for i, arg in enumerate(stand_ins) if isinstance(arg, Tensor)]
    bases = {_storage(stand_ins[i]): (n, 0) for n, i in enumerate(tensors)}
    for result in results:
        dense = result.numel() * result.element_size() == result.untyped_storage().nbytes()
        if _storage(result) in bases or not dense:
            return None
        bases[_storage(result)] = len(bases), 0
    workspace = 0
    launches = []
    for compiled, grid, values, constexprs in noted:
        pointers = []
        for place, tensor in enumerate(values):
            if not isinstance(tensor, Tensor):
                continue
            if _storage(tensor) not in bases:
                bases[_storage(tensor)] = len(tensors) + len(results), workspace
                workspace += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
            base, offset = bases[_storage(tensor)]
            pointers.append((place, base, offset + int(tensor.storage_offset()) * tensor.element_size()))
        if any(offset % 16 for _, _, offset in pointers):
            return None
        with making(compiled.name):
            compiled._init_handles()  # loads it; `run` would, but raises only once: then it is a function that raises
        run = compiled.run
        x, y, z = (*grid, 1, 1)[:3]
        launches.append(_Launch(run, (x, y, z), compiled.function, compiled.packed_metadata,
                                [*values, *constexprs], pointers))  # fmt: skip
    layouts = [(tuple(r.shape), r.stride(), r.dtype) for r in results]
    empty = _empty_strided_cuda if args[0].is_cuda else _empty_strided_cpu
    return Recipe(tensors, layouts, isinstance(out, Tensor), workspace, launches, empty)
