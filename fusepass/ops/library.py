"""How an op is registered, and how it chooses a strategy.

An op is opaque to Inductor (`Library.define` + `impl`): Inductor inlines a user's Triton kernel but drops launch
options such as `launch_pdl`, and an opaque op can choose by the number of rows in each call, so that dynamic shapes
do not recompile. `Library.impl` costs about 6 us a call where `torch.library.custom_op` costs 12.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusepass.kernels import KernelUnavailable

log = logging.getLogger(__name__)

Strategy = Literal["rows", "skinny", "library"]

LIBRARY = torch.library.Library("fusepass", "DEF")

ROWS_LIMIT = 4
"""Most rows that the row-vector (GEMV) kernels take: each row is an accumulator tile in registers."""
ROWS_BEST = 2
"""Most rows for which they are the fastest. On an H200, 4 rows of Qwen3-8B's MLP take 127 us with them and 87 with the
skinny kernels, 2 rows 82 and 87 (benchmarks/strategies.py)."""
SKINNY_LIMIT = 64
"""Most rows that the skinny tensor-core kernels take: above it a library GEMM is faster."""

_forced: Strategy | None = None


@dataclass(frozen=True)
class Op:
    """A registered operator, and the functions it was defined by: see `define`."""

    name: str
    overload: torch._ops.OpOverload
    reference: Callable[..., Any]
    """The same function in plain torch, on any device."""
    launch: Callable[..., Any]
    """The kernels, without a check of the arguments."""
    check: Callable[..., None]
    recipes: dict[Any, Any]
    """Its launches on a GPU (`fusepass.kernels.replay`; None: it does more than launch kernels), by `kind_of` arguments
    and by the lines of code (`fusepass.ops.direct`) that call it."""


OPS: dict[str, Op] = {}


def forced() -> bool:
    """Whether `force_strategy` is on."""
    return _forced is not None


def strategy(rows: int) -> Strategy:
    """How to run `rows` activation rows against weights: GEMV, skinny tensor-core kernel or library GEMM."""
    if _forced is not None:
        return _forced
    return "rows" if rows <= ROWS_BEST else "skinny" if rows <= SKINNY_LIMIT else "library"


@contextlib.contextmanager
def force_strategy(name: Strategy) -> Iterator[None]:
    """Make every op in the process use one strategy (tests and benchmarks). "rows" takes at most `ROWS_LIMIT` rows,
    "skinny" at most `SKINNY_LIMIT`."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def expect(condition: bool, op: str, argument: str, value: Tensor, expected: str) -> None:
    """Raise a ValueError that names the argument, what it is and what was expected, unless `condition`."""
    if not condition:
        raise ValueError(
            f"fusepass::{op}: argument '{argument}' is {value.dtype} of shape {tuple(value.shape)} "
            f"and strides {value.stride()} on {value.device}; expected {expected}"
        )


def broadcasts(size: int | torch.SymInt, wanted: int | torch.SymInt) -> bool:
    """Whether a dimension of `size` is known to broadcast to `wanted`. To ask a symbolic size for more would guard on
    it, or raise where only the data will tell."""
    return any(statically_known_true(size == known) for known in (1, wanted))


def expect_activation(op: str, argument: str, x: Tensor, ndim: int | None = None) -> None:
    """An activation is a floating-point tensor with at least one dimension, of any strides."""
    expect(x.dtype in (torch.bfloat16, torch.float16, torch.float32), op, argument, x, "bfloat16, float16 or float32")
    if ndim is None:
        expect(x.dim() > 0, op, argument, x, "at least one dimension")
    else:
        expect(x.dim() == ndim, op, argument, x, f"{ndim} dimensions")


def expect_parameter(op: str, argument: str, weight: Tensor | None, x: Tensor, *shape: int) -> None:
    """A parameter is contiguous, of the given shape (-1: any size), with the dtype and device of the activation `x`."""
    if weight is not None:
        same = len(shape) == weight.dim() and all(want in (-1, got) for want, got in zip(shape, weight.shape))
        same = same and weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous()
        wanted = f"[{', '.join('any' if size == -1 else str(size) for size in shape)}]"
        expect(same, op, argument, weight, f"a contiguous {x.dtype} tensor of shape {wanted} on {x.device}")


def _cpu(check: Callable[..., None], reference: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        check(*args)
        # Triton's interpreter computes bf16 on the raw 16 bits (Triton 3.7): bf16 on a CPU is always the reference.
        if os.environ.get("FUSEPASS_CPU") == "interpret" and args[0].dtype != torch.bfloat16:
            return launch(*args)
        return reference(*args)

    return run


_MOST_KINDS = 4096
"""Kinds of arguments that an op keeps recipes for: every prompt length is a kind of its own."""


def forget_launches() -> None:
    """Choose strategies and configs anew for every kind of arguments (after a change of the tuning tables)."""
    for op in OPS.values():
        op.recipes.clear()


def kind_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What decides how an op runs: equal kinds pass the same checks and launch the same kernels."""
    kind: list[Any] = [_forced]
    for arg in args:
        if isinstance(arg, Tensor):
            kind += (arg.shape, arg.dtype, arg.get_device(), arg.is_contiguous() or arg.stride())
        else:
            kind.append(arg)
    return tuple(kind)


STOOD_IN: dict[str, str] = {}
"""The ops whose reference ran because a kernel is not available, and why it is not."""


def _stand_in(name: str, fault: KernelUnavailable) -> None:
    if name not in STOOD_IN:
        STOOD_IN[name] = str(fault)
        log.warning("fusepass::%s runs in plain torch, which is slower: no kernel %s", name, fault)


def _cuda(
    name: str,
    check: Callable[..., None],
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    recipes: dict[Any, Any],
) -> Callable[..., Any]:
    def here(args: tuple[Any, ...]) -> Any:
        kind = kind_of(args)
        recipe = recipes.get(kind, ...)
        try:
            if recipe is ...:
                from fusepass.kernels.replay import record

                check(*args)
                if len(recipes) >= _MOST_KINDS:
                    recipes.clear()
                recipe = recipes[kind] = record(launch, args)
            if recipe is not None and (result := recipe(*args)) is not None:
                return result
            return launch(*args)
        except KernelUnavailable as fault:
            # Kernels before it may have run. They wrote what the reference writes again: outputs, and cache slots.
            _stand_in(name, fault)
            recipes[kind] = reference
            return reference(*args)

    def run(*args: Any) -> Any:
        # Triton launches on the current device, whichever device its arguments are on.
        if args[0].device.index == torch.cuda.current_device():
            return here(args)
        with torch.cuda.device(args[0].device):
            return here(args)

    return run


def _autograd(name: str, overload: torch._ops.OpOverload, on_cuda: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise RuntimeError(f"fusepass::{name} has no backward: call it under torch.no_grad()")
        if forward_ad._current_level >= 0 and any(
            isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
        ):
            raise RuntimeError(f"fusepass::{name} has no forward-mode derivative")
        # With plain CUDA tensors and no mode active there is nothing to dispatch to but our kernel: this saves the
        # second trip through the dispatcher, which weights that could require a gradient would cost in every call.
        if args[0].is_cuda and type(args[0]) is Tensor and not torch._C._len_torch_dispatch_stack():
            return on_cuda(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return run


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    launch: Callable[..., Any],
    check: Callable[..., None],
) -> Op:
    """Register `fusepass::<name of schema>`.

    All four functions take the schema's arguments. `check` raises for impossible input and runs before each of the
    others; `fake` returns empty outputs with the shapes and strides that `reference` gives.

    An op whose schema has `bool early=False` may read its parameters before the kernels that precede it have finished,
    where that is set. `fusepass.rewrite` sets it for sites whose parameters nothing in the step writes.
    """
    name = schema.split("(")[0]

    def fake_checked(*args: Any) -> Any:
        check(*args)  # sizes may be symbolic here
        return fake(*args)

    recipes: dict[Any, Any] = {}
    on_cuda = _cuda(name, check, launch, reference, recipes)
    LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
    overload = getattr(torch.ops.fusepass, name).default
    torch.library.register_fake(f"fusepass::{name}", fake_checked, lib=LIBRARY)
    LIBRARY.impl(name, _cpu(check, reference, launch), "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    LIBRARY.impl(name, _autograd(name, overload, on_cuda), "Autograd")
    OPS[name] = Op(name, overload, reference, launch, check, recipes)
    return OPS[name]
