"""Compile candidates, and the step that they are refined in, for a GPU that need not be present; print JSON.

    python -m tests.tuning.compile_candidates sm_90

Of each kernel the candidate that takes most: with the most weights ahead, or the largest pipeline; of one row's, also
the largest on tensor cores. As for `tests.kernels.compile_kernels`, TRITON_INTERPRET must not be set.
"""

import json
import re
import sys

from triton.backends.compiler import GPUTarget

from fusepass import tuning
from fusepass.bench.models import qwen3_config
from fusepass.tuning import Config
from fusepass.tuning.problem import candidates, problems
from fusepass.tuning.step import Model, decode_step
from fusepass.tuning.tune import compile_all
from tests.kernels.compile_kernels import compile_only, resources

MODEL = Model.of(qwen3_config("Qwen3-4B"))._replace(layers=2)


def block_k(config: Config) -> int:
    return config["CHUNKS"] * config["num_warps"] * 128 if "CHUNKS" in config else config["BLOCK_K"]


def size(config: Config) -> tuple[int, int]:
    tile = config["BLOCK_N"] * block_k(config) * config.get("SLICES", 1)
    return tile * config["AHEAD"] // config["num_warps"], tile * config.get("num_stages", 1)


def main() -> None:
    """An entry for 1 row, one for 1 row on tensor cores and one for 8 rows. "ahead": what each candidate became, its
    steps along K, how many loads of weights its code has, what it takes; "step": name and hash of what a step with
    these candidates launches."""
    target = GPUTarget("cuda", int(sys.argv[1].removeprefix("sm_")), 32)
    result = []
    for rows, mma in ((1, False), (1, True), (8, False)):
        configs, ahead = {}, []
        for problem in problems(MODEL, rows):
            configs[problem.key()] = config = max((c for c in candidates(problem) if ("CHUNKS" in c) == mma), key=size)
            with compile_only(target) as kernels:
                compile_all([(problem, config)])
            for kernel in kernels:
                found = {
                    "hash": kernel.hash,
                    "config": config,
                    "steps": -(-problem.k // block_k(config)),
                    "block_k": block_k(config),
                    "matrices": problem.matrices,
                    "weight_loads": len(re.findall(r"ld\.global\S*evict_first", kernel.asm["ptx"])),
                }
                ahead.append(found | resources(kernel))
        with compile_only(target) as launched, tuning.override(configs):
            decode_step(MODEL, rows, "meta")()
        result.append({"ahead": ahead, "step": [(kernel.name, kernel.hash) for kernel in launched]})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
