"""activation(gate) * up, elementwise: what stands between two library GEMMs when there are many rows."""

import triton
import triton.language as tl
from torch import Tensor

from fusepass.kernels.common import before_activations, begin, gated
from fusepass.kernels.launch import cdiv, interpreted, pdl_options, run


@triton.jit
def gated_mul_kernel(
    gate_ptr, up_ptr, out_ptr, size,
    ACTIVATION: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[i] = activation(gate[i]) * up[i] over contiguous tensors; `out_ptr` may be `gate_ptr`."""
    begin(PDL, EARLY)
    before_activations(EARLY)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, i < size, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, i < size, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + i, gated(gate, up, dtype, ACTIVATION, HIGH).to(dtype), i < size)


def gated_mul(gate: Tensor, up: Tensor, out: Tensor, activation: str, high: bool, early: bool = False) -> None:
    """out = activation(gate) * up; three contiguous tensors of one shape, `out` may be `gate`."""
    block = 65536 if interpreted() else 1024
    run(
        gated_mul_kernel,
        (cdiv(out.numel(), block),),
        gate,
        up,
        out,
        out.numel(),
        ACTIVATION=activation,
        HIGH=high,
        BLOCK=block,
        num_warps=4,
        **pdl_options(early),
    )
