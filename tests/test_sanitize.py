"""Compute-sanitizer finds nothing in the kernels: no access out of bounds, no hazard, no read of what nobody wrote."""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime import JITFunction

from fusepass import kernels
from tests import sanitize

ROOT = Path(__file__).parent.parent
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin")
TOOLS = ("memcheck", "racecheck", "initcheck")


@pytest.fixture(scope="module")
def output() -> dict[str, str]:
    """By tool, what the program prints under it. The tools run at the same time: each keeps one core busy."""
    if SANITIZER is None:
        pytest.skip("compute-sanitizer is not on the PATH, nor in /usr/local/cuda/bin")
    options = ["--target-processes", "application-only", "--print-limit", "10000"]
    processes = {
        tool: subprocess.Popen(
            [SANITIZER, "--tool", tool, *options, sys.executable, "-m", "tests.sanitize"],
            cwd=ROOT,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in TOOLS
    }
    try:
        printed = {tool: process.communicate(timeout=600)[0] for tool, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()  # on hosts of several GPUs it may hang in the driver's start, and for good
    if any("Device not supported" in text for text in printed.values()):
        pytest.skip("compute-sanitizer does not support this device, or not in this virtual machine")
    for text in printed.values():
        assert re.search("^finished$", text, re.MULTILINE), text[-3000:]
    return printed


def at_fault(text: str) -> set[str]:
    """The kernels that a report names."""
    return set(re.findall(r"^=+ +at (\w+)", text, re.MULTILINE))


def our_kernels() -> set[str]:
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    return {name for module in modules for name, item in vars(module).items() if isinstance(item, JITFunction)}


def test_the_program_that_is_sanitized_runs() -> None:
    sanitize.main()


@pytest.mark.gpu
def test_no_kernel_reads_or_writes_out_of_bounds(output: dict[str, str]) -> None:
    assert at_fault(output["memcheck"]) == {"faulty_write_kernel"}


@pytest.mark.gpu
def test_no_kernel_reads_memory_that_nobody_wrote(output: dict[str, str]) -> None:
    """None of ours: what libraries do is not judged."""
    assert at_fault(output["initcheck"]) & (our_kernels() | {"faulty_read_kernel"}) == {"faulty_read_kernel"}


@pytest.mark.gpu
def test_no_kernel_has_hazards_in_shared_memory(output: dict[str, str]) -> None:
    """None of ours: cuDNN's attention, which runs the prefill, has some that the tool reports."""
    assert "RACECHECK SUMMARY" in output["racecheck"]
    assert not set(re.findall(r"access at (\w+)", output["racecheck"])) & our_kernels()
