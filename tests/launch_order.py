"""Ops in one CUDA graph, each of whose inputs arrives by another kernel: does every op wait for what it reads?

    python -m tests.launch_order

prints whether any replay of many was wrong. What comes before an op may be anyone's kernel. The worst is one that lets
the next begin at once, as programmatic dependent launch allows, and writes late.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

from fusepass.ops import OPS
from tests.ops.sites import DEVICE, SMALL, Sizes, Tensors, as_tuple, sample

GPU = DEVICE == "cuda"
PDL = GPU and torch.cuda.get_device_capability() >= (9, 0)
"""Whether there is programmatic dependent launch. Triton's interpreter has none, and no clock."""
REPLAYS = 200
LATE = 50_000
"""Nanoseconds: several times what an op of these sizes takes."""
BLOCK = 16384
"""Bytes that a program copies: so few programs that those of the next kernel find room beside them."""


@triton.jit
def copy_kernel(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets, offsets < size), offsets < size)


@triton.jit
def late_copy_kernel(source_ptr, target_ptr, size, nanoseconds, BLOCK: tl.constexpr):
    """Let the next kernel begin, wait, and only then write."""
    gdc_launch_dependents()
    start = globaltimer()
    while globaltimer() - start < nanoseconds:
        pass
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets, offsets < size), offsets < size)


def copy_by(kernel: Any, source: Tensor, target: Tensor, *more: int) -> Tensor:
    """`target`, in which `kernel` puts the bytes of `source`. Both are contiguous."""
    source_bytes, target_bytes = (x.view(-1).view(torch.uint8) for x in (source, target))
    size = source_bytes.numel()
    kernel[(triton.cdiv(size, BLOCK),)](source_bytes, target_bytes, size, *more, BLOCK=BLOCK)
    return target


def poison(x: Tensor) -> Tensor:
    """`x` without its contents."""
    return x.fill_(torch.nan if x.is_floating_point() else 0)


def room_for(x: Tensor) -> Tensor:
    return poison(torch.empty(x.shape, dtype=x.dtype, device=x.device))


@functools.cache
def identity(size: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(size, dtype=dtype, device=DEVICE)


def directly(x: Tensor) -> Tensor:
    """From the op before."""
    return x


def settled(x: Tensor) -> Tensor:
    """When nothing runs any more."""
    if GPU:
        torch.cuda.synchronize()
    return x


def after_a_sleep(x: Tensor) -> Tensor:
    out = room_for(x)
    if GPU:
        torch.cuda._sleep(2 * LATE)
    return out.copy_(x)


def ahead_of_a_memset(x: Tensor) -> Tensor:
    out = room_for(x).copy_(x)
    room_for(x).zero_()
    return out


def by_a_library_gemm(x: Tensor) -> Tensor:
    out = room_for(x)
    torch.mm(x.reshape(-1, x.shape[-1]), identity(x.shape[-1], x.dtype), out=out.view(-1, x.shape[-1]))
    return out


def by_a_plain_kernel(x: Tensor) -> Tensor:
    """One that knows nothing of programmatic dependent launch, as those of Inductor."""
    return copy_by(copy_kernel, x.contiguous(), room_for(x))


def by_a_late_kernel(x: Tensor) -> Tensor:
    return copy_by(late_copy_kernel, x.contiguous(), room_for(x), LATE)


HandOver = Callable[[Tensor], Tensor]
STEPS: list[tuple[str, HandOver]] = [
    ("x", hand_over) for hand_over in (directly, after_a_sleep, ahead_of_a_memset, by_a_library_gemm, by_a_plain_kernel)
]
STEPS += [(name, by_a_late_kernel) for name in ("x", "residual", "position", "cos", "sin")] if PDL else []
"""One layer each: how the argument of this name reaches those of its ops that have one."""
UPDATED = ("q", "mask", "k_cache", "v_cache")
"""Arguments of the first op that ops behind it may read early. One of them is written just before it."""
LENGTH, POSITION = 300, 200


class Layers:
    """Layers in which each op reads what the one before has written, and ops beside them."""

    def __init__(self, sizes: Sizes, batch: int, updated: str) -> None:
        dtype = torch.bfloat16 if GPU else torch.float32

        def drawn(name: str) -> dict[str, Any]:
            arguments = sample(name, batch, 1, sizes=sizes)
            return {n: a.to(dtype).contiguous() if isinstance(a, Tensor) else a for n, a in arguments.items()}

        names = ("norm_qkv_rope", "linear_residual", "norm_gated_mlp", "norm_linear", "rms_norm")
        self.arguments = {name: drawn(name) for name in names}
        self.arguments["norm_linear"]["start"] = 0
        qkv = self.arguments["norm_qkv_rope"]
        size = qkv["head_dim"]
        k, v = torch.randn(2, batch, qkv["k"].shape[0] // size, LENGTH, size, dtype=dtype, device=DEVICE)
        slot = torch.arange(LENGTH, device=DEVICE)
        mask = ((slot <= POSITION) & (slot >= 10)).expand(batch, 1, 1, -1).contiguous()
        position = torch.tensor([POSITION], device=DEVICE)
        attention = {"mask": mask, "scale": size**-0.5}
        self.arguments["attention"] = {"k": k, "v": v, **attention}
        self.arguments["self_attention"] = {**qkv, "k_cache": k, "v_cache": v, "position": position, **attention}
        self.target = self.arguments["self_attention"][updated]
        self.source = self.target.clone()

    def update(self) -> None:
        """Begin to write what is being updated."""
        poison(self.target)
        if PDL:
            copy_by(late_copy_kernel, self.source, self.target, LATE)
        else:
            self.target.copy_(self.source)

    def __call__(self, steps: list[tuple[str, HandOver]], *, update: bool, early: bool = False) -> Tensors:
        """Everything that the ops return. `early`: whether the first one, too, may read its weights, the mask and the
        cache early, which `fusepass.rewrite` never lets it."""
        outputs: list[Tensor] = []

        def run(step: tuple[str, HandOver], op: str, **inputs: Any) -> Tensor:
            arguments, (name, hand_over) = {**self.arguments[op], **inputs}, step
            if name in arguments:
                arguments[name] = hand_over(arguments[name])
            if update and not outputs:
                self.update()
            if any(argument.name == "early" for argument in OPS[op].overload._schema.arguments):
                arguments["early"] = early or bool(outputs)
            outputs.extend(as_tuple(OPS[op].overload(**arguments)))
            return outputs[-1]

        x = self.arguments["norm_qkv_rope"]["x"]
        for step in steps:
            attended = run(step, "self_attention", x=x)
            x = run(step, "linear_residual", x=attended.transpose(1, 2).flatten(2), residual=x)
            x = run(step, "norm_gated_mlp", x=x, residual=x)
            for op in ("norm_linear", "rms_norm", "norm_qkv_rope"):
                run(step, op, x=x)
            run(step, "attention", q=outputs[-3])  # of norm_qkv_rope's three results, the queries
        return tuple(outputs)


def results(layers: Layers, early: bool) -> Iterator[Tensors]:
    """What the layers give time after time, each time into poisoned memory."""

    def run() -> Tensors:
        return layers(STEPS, update=True, early=early)

    if not GPU:
        yield run()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # the first call compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = run()
    for _ in range(REPLAYS):
        for output in outputs:
            poison(output)
        graph.replay()
        yield outputs


@torch.no_grad()
def faults(sizes: Sizes, batch: int, updated: str, early: bool = False) -> Iterator[bool]:
    """For each of many results, whether it differs from what the ops give when each runs alone."""
    layers = Layers(sizes, batch, updated)
    want = layers([(name, settled) for name, _ in STEPS], update=False)
    for got in results(layers, early):
        yield not all(map(torch.equal, got, want))


if __name__ == "__main__":
    print(any(faults(SMALL, 1, "q")))
