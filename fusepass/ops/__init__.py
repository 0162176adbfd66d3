"""The operators that fusions put into graphs: `torch.ops.fusepass.<fusion name>`.

Importing this package registers them. It needs no GPU and no Triton; kernels are imported when an op first launches.
"""

from fusepass.ops import (
    attention,
    linear_residual,
    norm_gated_mlp,
    norm_linear,
    norm_qkv_rope,
    rms_norm,
    self_attention,
)
from fusepass.ops.library import OPS, Op, force_strategy

__all__ = [
    "OPS",
    "Op",
    "attention",
    "force_strategy",
    "linear_residual",
    "norm_gated_mlp",
    "norm_linear",
    "norm_qkv_rope",
    "rms_norm",
    "self_attention",
]
