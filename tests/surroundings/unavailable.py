"""What an op does where Triton, compiling for an H200 that need not be present, can not make its kernel.

    python -m tests.surroundings.unavailable '{"BLOCK_N": 3, "BLOCK_K": 64, "num_warps": 1}'

calls `linear_residual` twice with this launch config, as on a GPU, and prints {"op": why its reference stood in} and
how many of the two results were right. TRITON_INTERPRET must not be set.
"""

import json
import sys
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from fusepass import tuning
from fusepass.ops import OPS, library
from tests.kernels.compile_kernels import compile_only


def main() -> None:
    op, n, k = OPS["linear_residual"], 40, 64
    config = {tuning.key("linears", 1, n, k, torch.float32): json.loads(sys.argv[1])}
    args = torch.randn(1, k), torch.randn(n, k), None, torch.randn(1, n), False
    call = library._cuda(op.name, op.check, op.launch, op.reference, {})
    here = mock.patch.object(torch.cuda, "current_device", return_value=None)  # the index of a CPU tensor's device
    with compile_only(GPUTarget("cuda", 90, 32)), tuning.override(config), here:
        results = [call(*args) for _ in range(2)]
    print(json.dumps([library.STOOD_IN, sum(torch.equal(result, op.reference(*args)) for result in results)]))


if __name__ == "__main__":
    main()
