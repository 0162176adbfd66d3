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

from fusepass.kernels.launch import cdiv, making, past_jit, recording

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


Recipe = Callable[..., Any]
"""An op's launches for one kind of arguments: takes the op's arguments by position and returns what the op does. None,
and nothing launched, if an address is not aligned as kernels assume, or if somebody (a profiler) wants to see Triton's
launches. It allocates on the current device."""


@dataclass(frozen=True)
class _Launch:
    """One kernel. `values`: those of its parameters; a pointer is a base address, by its number, and an offset."""

    compiled: Any
    grid: tuple[int, int, int]
    values: list[Any]


@dataclass(frozen=True)
class _Pointer:
    base: int
    offset: int


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(launch: Callable[..., Any], args: tuple[Any, ...]) -> Recipe | None:
    """The recipe of `launch(*args)`; None if it computes anything outside our kernels. Launches nothing. Raises
    `KernelUnavailable` for a kernel that can not be made."""
    if not past_jit():
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
    single = isinstance(out, Tensor)
    results = [out] if single else list(out)
    tensors = [i for i, arg in enumerate(stand_ins) if isinstance(arg, Tensor)]
    # Base addresses are those of the tensor arguments, of the results, and of one workspace for all that lives only
    # during the call.
    bases = {_storage(stand_ins[i]): (n, 0) for n, i in enumerate(tensors)}
    for result in results:
        dense = result.numel() * result.element_size() == result.untyped_storage().nbytes()
        if _storage(result) in bases or not dense:
            return None
        bases[_storage(result)] = len(bases), 0
    workspace = 0
    launches = []
    for compiled, grid, arguments, constexprs in noted:
        values = [*arguments, *constexprs]
        for place, tensor in enumerate(values):
            if not isinstance(tensor, Tensor):
                continue
            if _storage(tensor) not in bases:
                bases[_storage(tensor)] = len(tensors) + len(results), workspace
                workspace += max(1, cdiv(tensor.untyped_storage().nbytes(), _ALIGNMENT)) * _ALIGNMENT
            base, offset = bases[_storage(tensor)]
            offset += int(tensor.storage_offset()) * tensor.element_size()
            if offset % 16:
                return None
            values[place] = _Pointer(base, offset)
        with making(compiled.name):
            compiled._init_handles()  # loads it; `run` would, but raises only once: then it is a function that raises
        x, y, z = (*grid, 1, 1)[:3]
        launches.append(_Launch(compiled, (x, y, z), values))
    allocated = [(tuple(result.shape), result.stride(), result.dtype) for result in results]
    if workspace:
        allocated.append(((workspace,), (1,), torch.uint8))
    empty = _empty_strided_cuda if args[0].is_cuda else _empty_strided_cpu
    returned = "t0" if single else f"({', '.join(f't{i}' for i in range(len(results)))},)"
    return _written(len(args), tensors, empty, allocated, launches, returned)


def _written(
    arity: int,
    tensors: list[int],
    empty: Callable[..., Tensor],
    allocated: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]],
    launches: list[_Launch],
    returned: str,
) -> Recipe:
    """The recipe as Python without loops: loops over arguments, launches and pointers take the host 0.19 ms more of the
    2.24 ms for a step of Qwen3-0.6B (without CUDA graphs, on the host of an H200)."""
    stream_of = triton.runtime.driver.active.get_current_stream
    known: dict[str, Any] = {"runtime": triton.knobs.runtime, "stream_of": stream_of, "empty": empty}

    def name(value: Any) -> str:
        if isinstance(value, _Pointer):
            return f"p{value.base} + {value.offset}" if value.offset else f"p{value.base}"
        known[f"k{len(known)}"] = value
        return f"k{len(known) - 1}"

    pointers = " | ".join(f"p{base}" for base in range(len(tensors)))
    lines = [
        f"def recipe({', '.join(f'a{i}' for i in range(arity))}):",
        "if runtime.launch_enter_hook.calls: return None",
        *(f"p{base} = a{i}.data_ptr()" for base, i in enumerate(tensors)),
        f"if ({pointers}) % 16: return None",
    ]
    for i, layout in enumerate(allocated):
        lines += [f"t{i} = empty({', '.join(map(name, layout))})", f"p{len(tensors) + i} = t{i}.data_ptr()"]
    lines.append("stream = stream_of(a0.get_device())")
    for launch in launches:
        kernel = launch.compiled
        before = *launch.grid, "stream", name(kernel.function), name(kernel.packed_metadata), None, None, None
        lines.append(f"{name(kernel.run)}({', '.join(map(str, before))}, {', '.join(map(name, launch.values))})")
    kernels = ", ".join(launch.compiled.name for launch in launches)  # for tracebacks
    exec(compile("\n    ".join([*lines, f"return {returned}"]), f"<launches of {kernels}>", "exec"), known)
    return known["recipe"]
