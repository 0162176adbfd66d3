"""What the kernels become on GPUs that no test machine has: `compile_kernels.py` compiles, this reads the result."""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KIB = 1024
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
"""Most shared memory that a block may have, by target. NVIDIA: the technical specifications by compute capability in
https://docs.nvidia.com/cuda/cuda-c-programming-guide/; AMD: the local data share of a compute unit."""
TARGETS = [pytest.param(target, marks=[pytest.mark.slow] * (target == "sm_80")) for target in SHARED_LIMIT]
"""To compile for a target takes a minute."""
NOISE_BYTES = 16
"""Local memory that is no spill: as Triton calls it (--regAllocOptLevel=2), ptxas puts up to four values of a thread
there while registers are left (seen at 56 of 255). A kernel that needs more registers than there are takes more."""

Kernel = dict[str, Any]


@functools.cache
def compile_for(target: str) -> list[Kernel]:
    """What every kernel takes. In a process of its own: this one may have Triton's interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", target]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def kernels(target: str) -> list[Kernel]:
    return compile_for(target)


def assert_each(kernels: list[Kernel], holds: Callable[[Kernel], bool]) -> None:
    """Fail with the kernels for which it does not hold, one a line."""
    others = [str(kernel) for kernel in kernels if not holds(kernel)]
    assert not others, "\n".join(others)


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_registers(kernels: list[Kernel]) -> None:
    assert_each(kernels, lambda kernel: kernel["local_bytes"] <= NOISE_BYTES)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_fits_in_shared_memory(kernels: list[Kernel], target: str) -> None:
    assert_each(kernels, lambda kernel: kernel["shared_bytes"] <= SHARED_LIMIT[target])


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_products_that_eager_stores_are_rounded_before_they_are_added(kernels: list[Kernel]) -> None:
    """A compiler that contracts `round(a * b) + c` to one instruction rounds once. (On sm_80 every product in bf16 is
    such an instruction, with a sum of -0.)"""
    assert_each([k for k in kernels if "HIGH=True" not in k["kernel"]], lambda kernel: kernel["narrow_fmas"] == 0)


@pytest.mark.parametrize("target", TARGETS[:3])
def test_weights_are_read_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    reading = [kernel for kernel in kernels if "weight_load_bits" in kernel]
    assert reading
    assert_each(reading, lambda kernel: kernel["weight_load_bits"] >= 128)


@pytest.mark.parametrize("target", TARGETS[:3])
def test_weights_are_prefetched_before_the_wait_or_not_at_all(kernels: list[Kernel], target: str) -> None:
    """Behind the wait, or where nothing waits, the loads come at once."""
    early = [kernel["prefetched_early"] for kernel in kernels if "prefetched_early" in kernel]
    assert all(early)
    assert bool(early) == (target != "sm_80")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_weights_for_tensor_cores_are_asked_for_before_the_wait(kernels: list[Kernel]) -> None:
    """Of two tiles ahead, as many as they have: 16 bytes a thread, of each pair of rows for each chunk of a warp."""
    found = [kernel for kernel in kernels if "_mma_kernel" in kernel["kernel"]]
    assert {kernel["kernel"].partition("_")[0] for kernel in found} == {"linear", "gated"}
    for kernel in found:
        settings = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", kernel["kernel"])}
        pairs = settings["BLOCK_N"] if "gated" in kernel["kernel"] else settings["BLOCK_N"] // 2
        assert kernel["early_weight_loads"] == settings["AHEAD"] * settings["CHUNKS"] * pairs, kernel
        assert kernel["weight_loads"] >= kernel["early_weight_loads"]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_weights_ahead_of_a_pipeline_are_asked_for_before_the_wait(kernels: list[Kernel]) -> None:
    ahead = [kernel for kernel in kernels if "AHEAD=1, HELD=0" in kernel["kernel"] and "EARLY=True" in kernel["kernel"]]
    assert {kernel["kernel"].partition("(")[0] for kernel in ahead} == {"linear_skinny_kernel", "gated_skinny_kernel"}
    assert_each(ahead, lambda kernel: kernel["early_loads"] >= 1 + ("gated" in kernel["kernel"]))


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_only_a_primed_pipeline_asks_for_its_first_blocks_before_the_wait(kernels: list[Kernel]) -> None:
    """Two blocks of 32 KB, of which each of 128 threads copies 16 bytes at a time."""
    found = [kernel for kernel in kernels if "PRIMED=" in kernel["kernel"] and "EARLY=True" in kernel["kernel"]]
    primed = [kernel for kernel in found if "PRIMED=True" in kernel["kernel"]]
    assert primed
    assert_each(primed, lambda kernel: kernel["early_copies"] >= 32)
    assert_each([kernel for kernel in found if kernel not in primed], lambda kernel: kernel["early_copies"] == 0)
