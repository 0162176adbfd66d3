"""The ops with weights, for one row by the kernels on tensor cores, which only measured launch configs ask for."""

from typing import Any

import pytest
import torch

from fusepass.kernels import gemv
from tests.ops.gate import Case, assert_as_exact_as_eager
from tests.ops.sites import SITES

CONFIG = {"BLOCK_N": 16, "CHUNKS": 2, "AHEAD": 1, "num_warps": 1}
KERNELS = {
    "linear_residual": {"linear_mma_kernel"},
    "norm_linear": {"linear_mma_kernel"},
    "norm_gated_mlp": {"gated_mma_kernel", "linear_mma_kernel"},
    "norm_qkv_rope": {"linear_mma_kernel"},
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, "rows", torch.float16, config={"attention_bias": True}),
        pytest.param(Case(1, 1, "rows", torch.bfloat16), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_as_exact_as_eager(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    run = gemv.run

    def spy(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.add(kernel.fn.__name__)
        run(kernel, *args, **constants)

    monkeypatch.setattr(gemv, "run", spy)
    monkeypatch.setattr(gemv, "_safe_config", lambda *_: CONFIG)
    assert_as_exact_as_eager(SITES[name], case)
    assert launched == KERNELS[name]
