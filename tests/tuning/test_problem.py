"""The kernels that are tuned, the keys of their configs, and the candidates."""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusepass import tuning
from fusepass.bench.models import DIMENSIONS, qwen3_config
from fusepass.tuning import Config
from fusepass.tuning.problem import candidates, chain, problems
from fusepass.tuning.step import Model, decode_step, layers_of_step
from tests.tuning.conftest import Launch

QWEN3 = {name: Model.of(qwen3_config(name)) for name in DIMENSIONS}
ROWS = (1, 2, 3, 8, 9, 17, 33, 64)


@pytest.fixture
def asked(launched: list[Launch], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that kernels look up; nothing is launched."""
    keys: list[str] = []
    lookup = tuning.lookup

    def spy(*args: Any) -> Config | None:
        keys.append(tuning.key(*args))
        return lookup(*args)

    monkeypatch.setattr(tuning, "lookup", spy)
    return keys


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", QWEN3)
def test_a_problem_has_the_key_that_its_kernel_looks_up(name: str, rows: int, asked: list[str]) -> None:
    """In a chain of its own, and in the ops of a step: q/k/v, o, gate and up, and down of each layer, then the head."""
    model = QWEN3[name]._replace(layers=3)
    keys = [problem.key() for problem in problems(model, rows)]
    for problem, key in zip(problems(model, rows), keys, strict=True):
        chain(problem, 2, "meta")()
        assert asked == [key, key]
        asked.clear()
    decode_step(model, rows, "meta")()
    assert asked == keys[:4] * layers_of_step(model) + keys[4:]


@pytest.mark.parametrize("rows", [0, 65])
def test_rows_that_have_no_launch_configs_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"^{rows} rows .* 1 to 64$"):
        problems(QWEN3["Qwen3-0.6B"], rows)


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_every_candidate_is_what_its_kernel_is_launched_with(rows: int, launched: list[Launch]) -> None:
    for problem in problems(QWEN3["Qwen3-4B"], rows):
        for config in candidates(problem):
            with tuning.override({problem.key(): config}):
                chain(problem, 1, "meta")()
            assert config.items() <= launched.pop().constants.items()


def test_an_override_goes_before_the_tables_and_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def configs(**blocks: int) -> dict[str, Config]:
        return {f"linears m1 {n} k8 bfloat16": {"BLOCK_N": block} for n, block in blocks.items()}

    def found() -> list[int | None]:
        configs = [tuning.lookup("linears", 1, n, 8, torch.bfloat16) for n in (1, 2, 3)]
        return [config and config["BLOCK_N"] for config in configs]

    monkeypatch.setattr(tuning, "table", lambda: configs(n1=1, n2=2))
    with tuning.override(configs(n2=20)):
        with contextlib.suppress(KeyError), tuning.override(configs(n1=100, n2=200, n3=300)):
            assert found() == [100, 200, 300]
            raise KeyError
        assert found() == [1, 20, None]
    assert found() == [1, 2, None]


def test_the_candidates_are_few_and_differ() -> None:
    for model, rows in itertools.product(QWEN3.values(), ROWS):
        for problem in problems(model, rows):
            configs = [tuple(sorted(config.items())) for config in candidates(problem)]
            assert 20 < len(set(configs)) == len(configs) < 400


def test_weights_are_loaded_one_tile_ahead_or_more_up_to_all_of_them() -> None:
    for model, rows in itertools.product(QWEN3.values(), (1, 2)):
        for problem in problems(model, rows):
            walks: dict[tuple[int, ...], list[int]] = {}
            for config in (c for c in candidates(problem) if "CHUNKS" not in c):
                walks.setdefault((config["BLOCK_N"], config["BLOCK_K"], config["num_warps"]), []).append(
                    config["AHEAD"]
                )
            for (n, k, warps), ahead in walks.items():
                steps = math.ceil(problem.k / k)
                loaded = n * k * problem.matrices / (32 * warps)
                assert ahead[0] == 1
                assert ahead == sorted(set(ahead))
                assert ahead[-1] == steps or loaded * steps > 256


def test_the_shipped_tables_could_have_been_found() -> None:
    tables = [json.loads(path.read_text()) for path in Path(tuning.__file__).parent.glob("*.json")]
    shipped = [item for table in tables for item in table.items()]
    known = {p.key(): p for model, rows in itertools.product(QWEN3.values(), ROWS) for p in problems(model, rows)}
    assert [key for key, config in shipped if key not in known or config not in candidates(known[key])] == []


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What `compile_candidates.py` prints. In a process of its own: this one may have Triton's interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.tuning.compile_candidates", "sm_90"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_largest_candidates_fit_and_are_unrolled_wholly(compiled: list[dict[str, Any]]) -> None:
    rows, mma, eight = ([kernel for kernel in entry["ahead"]] for entry in compiled)
    assert all(kernel["shared_bytes"] <= 227 << 10 and kernel["local_bytes"] == 0 for kernel in rows + mma + eight)
    for kernel in rows + mma:
        config = kernel["config"]
        steps, held = kernel["steps"], kernel["matrices"] * config["BLOCK_N"] * kernel["block_k"]
        loads = held // (32 * config["num_warps"]) // 8  # of 16 bytes
        assert kernel["weight_loads"] == steps * loads, "loads of its own for every step"
    assert len(rows) == len(mma) == 5
    # What is multiplied comes from registers: shared memory is for the sums of the warps, and of the squares.
    assert all(kernel["shared_bytes"] <= 1024 for kernel in mma)


def test_what_a_step_launches_is_compiled_ahead(compiled: list[dict[str, Any]]) -> None:
    """All but attention, and what comes before the first attention and reads nothing early."""
    for entry in compiled:
        ahead = {kernel["hash"] for kernel in entry["ahead"]}
        names = [name for name, _ in entry["step"]]
        later = entry["step"][names.index("attention_kernel") :]
        assert {name for name, code in later if code not in ahead} == {"attention_kernel", "combine_kernel"}
