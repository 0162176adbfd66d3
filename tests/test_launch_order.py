"""No op reads what the kernel before it has not yet written, whatever kernel that is; and the test would notice."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_order import PDL, UPDATED, faults
from tests.ops.sites import QWEN3, SMALL, Sizes

ROOT = Path(__file__).parent.parent
on_hopper = pytest.mark.skipif(not PDL, reason="kernels only overlap on Hopper and later")
ON_GPU = [(SMALL, 1, updated) for updated in UPDATED[1:]] + [(SMALL, 7, "k_cache")]
ON_GPU += [(QWEN3, 1, "q"), (QWEN3, 1, "mask"), (QWEN3, 7, "q")]
CASES = [(SMALL, 1, "q"), *(pytest.param(*case, marks=pytest.mark.gpu) for case in ON_GPU)]
"""Sizes, rows, and what is updated. Small kernels overlap most: several of them find room on a GPU at a time. On a CPU,
where none do, one case shows that the layers are right."""


@pytest.mark.parametrize(("sizes", "batch", "updated"), CASES, ids=str)
def test_every_op_waits_for_its_inputs_whatever_kernel_writes_them(sizes: Sizes, batch: int, updated: str) -> None:
    assert not any(faults(sizes, batch, updated))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("updated", UPDATED)
def test_an_early_read_of_what_is_being_updated_is_caught(updated: str) -> None:
    assert any(faults(SMALL, 1, updated, early=True))


@pytest.mark.gpu
@on_hopper
def test_kernels_that_do_not_wait_are_caught(tmp_path: Path) -> None:
    for name in ("fusepass", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name)  # follows the link to patterns/
    waits = 0
    for file in (tmp_path / "fusepass" / "kernels").glob("*.py"):
        source, count = re.subn(r"\bgdc_wait\(\)", "pass", file.read_text())
        file.write_text(source)
        waits += count
    assert waits
    command = [sys.executable, "-m", "tests.launch_order"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
