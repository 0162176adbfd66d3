"""RMSNorm by rows: one program a row, statistics in f32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusepass.kernels.common import before_activations, begin, inverse_rms, normalise
from fusepass.kernels.launch import block_k, pdl_options, run


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps,
    size1, size2,  # row r is x[r // (size1 * size2), r // size2 % size1, r % size2]
    stride0, stride1, stride2,  # of x and of out
    K: tl.constexpr, BLOCK_K: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[r, :] = RMSNorm(x[r, :]) * weight over the last dimension (stride 1) of a tensor with three leading ones."""
    begin(PDL, EARLY)
    before_activations(EARLY)
    row = tl.program_id(0).to(tl.int64)
    offset = row // size2 // size1 * stride0 + row // size2 % size1 * stride1 + row % size2 * stride2
    x_ptr += offset
    out_ptr += offset
    rstd = inverse_rms(x_ptr, K, eps, BLOCK_K)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, k < K, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + k, k < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + k, normalise(x, weight, rstd, dtype, HIGH).to(dtype), k < K)


def rms_norm(x: Tensor, weight: Tensor, eps: float, high: bool, early: bool = False) -> Tensor:
    """RMSNorm over the last dimension of x, in x's memory layout. x: [..., K], any strides; weight: [K]."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    if x.dim() > 4 or x.stride(-1) != 1 or out.stride() != x.stride():
        # The kernel takes three leading dimensions and a dense last one. Models have no other form.
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        return out.copy_(rms_norm(flat, weight, eps, high, early).view(x.shape))
    sizes = (1,) * (4 - x.dim()) + tuple(x.shape)
    strides = ((0,) * (4 - x.dim()) + x.stride())[:3]
    block = block_k(sizes[3], 16384)
    run(
        rms_norm_kernel, (sizes[0] * sizes[1] * sizes[2],),
        x, weight, out, eps, sizes[1], sizes[2], *strides,
        K=sizes[3], BLOCK_K=block, HIGH=high, num_warps=max(1, min(16, block // 512)),
        **pdl_options(early),
    )  # fmt: skip
    return out
