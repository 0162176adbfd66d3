"""Ops called past the dispatcher, from the code that Inductor writes.

Anything may come through the dispatcher: it takes 2 to 5 us to bring an op its (up to 23) arguments, and telling their
kind, by which a recipe is found, takes 1 to 5 more. Inductor's code has sizes, strides and dtypes written into it, so
that one line of it always has arguments of one kind. A decode step of Qwen3-0.6B has 85 such lines.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fusepass.ops.library import OPS, forced, kind_of


def _observed() -> bool:
    """Whether somebody wants to see the op called (a dispatch mode, a profiler, a derivative), or to change it."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or forced()
    )


def direct(name: str) -> Callable[..., Any]:
    """`torch.ops.fusepass.<name>` for one line of code that calls it on one GPU, which is the current device, with
    tensors of the same sizes, strides and dtypes and with the same other arguments, all by position, in every call.
    Nothing checks that: as Inductor's own kernels, a line believes what fake tensors promised."""
    op = OPS[name]
    line = object()

    def call(*args: Any) -> Any:
        if _observed():
            return op.overload(*args)
        recipe = op.recipes.get(line, ...)
        if recipe is not None and recipe is not ... and (result := recipe(*args)) is not None:
            return result
        result = op.overload(*args)
        if recipe is ... and not forced():
            op.recipes[line] = op.recipes.get(kind_of(args))
        return result

    weakref.finalize(call, op.recipes.pop, line, None)
    return call
