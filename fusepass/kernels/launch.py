"""What every launcher needs to know about the machine."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import triton
from torch import Tensor
from triton.runtime import JITFunction

from fusepass.kernels import KernelUnavailable


@functools.cache
def is_hip() -> bool:
    """Whether the GPU is AMD's: 64 KB of shared memory where NVIDIA has 99 to 227."""
    return bool(triton.runtime.driver.active.get_current_target().backend == "hip")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, where a program costs 2-4 ms: then few, large programs are best."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def pdl() -> bool:
    """Whether kernels use programmatic dependent launch (NVIDIA, Hopper and later): a kernel may then begin while the
    one before it still runs; `common.begin` says where it waits."""
    if interpreted():
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 90


@functools.cache
def pdl_options(early: bool) -> dict[str, bool]:
    """Launch options of a kernel with the constexprs PDL and EARLY (see `common.begin`). Other back ends do not know
    `launch_pdl`."""
    return {"PDL": True, "EARLY": early, "launch_pdl": True} if pdl() else {"PDL": False, "EARLY": False}


@functools.cache
def past_jit() -> bool:
    """Whether Triton's launcher may be called past `JITFunction.run`: on NVIDIA GPUs."""
    return not interpreted() and not is_hip()


@contextlib.contextmanager
def making(name: str) -> Iterator[None]:
    """What Triton raises while it compiles or loads a kernel becomes `KernelUnavailable`: its own errors, ptxas's, a
    pass's RuntimeError, a cache directory's OSError. What the driver reports (no memory, a fault of an earlier kernel)
    does not: that is no matter of this kernel, and may be over at the next call."""
    try:
        yield
    except Exception as fault:
        if str(fault).startswith("Triton Error ["):
            raise
        raise KernelUnavailable(f"{name}: {fault}") from fault


_local = threading.local()


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]]]:
    """In this thread, `run` compiles and launches nothing: it appends compiled kernel, grid, arguments, constexprs."""
    noted: list[tuple[Any, tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]] = []
    _local.noted = noted
    try:
        yield noted
    finally:
        _local.noted = None


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST_COMPILED = 4096


def run(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, with less time on the host from the second launch of a kind on.

    A launch of the same kind has the same scalars, dtypes and constants, and pointers that are 16-byte aligned: then
    Triton would find the same compiled kernel, after 20 us or more of binding some thirty arguments. `args` are all the
    parameters that are no constexpr, in order. (What a decode step launches is not even bound again: `kernels.replay`.)
    Raises `KernelUnavailable`, and has launched nothing, where the kernel can not be made.
    """
    if (noted := getattr(_local, "noted", None)) is not None:
        with making(kernel.__name__):
            compiled = kernel.run(*args, grid=grid, warmup=True, **constants)
        noted.append((compiled, grid, args, tuple(constants[name] for name in kernel.arg_names[len(args) :])))
        return
    if interpreted():
        kernel[grid](*args, **constants)
        return
    if not past_jit() or triton.knobs.runtime.launch_enter_hook.calls:
        with making(kernel.__name__):
            kernel[grid](*args, **constants)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    pointers = 0
    values: list[Any] = []
    key: list[Any] = [kernel, device, len(grid), *constants.values()]
    for arg in args:
        if isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            pointers |= pointer
            values.append(pointer)
            key.append(arg.dtype)
        else:
            values.append(arg)
            key.append(arg)
    found = None if pointers % 16 else _compiled.get(tuple(key))
    if found is None:
        with making(kernel.__name__):
            compiled = kernel[grid](*args, **constants)
        if compiled is not None and not pointers % 16:
            if len(_compiled) >= _MOST_COMPILED:  # every prompt length is a kind of its own
                _compiled.clear()
            _compiled[tuple(key)] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, constexprs = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *constexprs
    )  # fmt: skip


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` is callable from kernels too, and takes 4 us.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def block_k(k: int, most: int) -> int:
    """Power-of-two tile along K: the whole of K if it fits in `most`, else `most`."""
    return min(next_power_of_2(k), most)


def interpreter_block_n(n: int) -> int:
    """A tile along N that makes a launch about four programs in the interpreter."""
    return min(256, max(16, next_power_of_2(n) // 4))
