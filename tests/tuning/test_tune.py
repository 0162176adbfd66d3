"""Ranking, descent and the table that is written, with clocks that the tests make up."""

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusepass import tuning
from fusepass.kernels import KernelUnavailable
from fusepass.tuning import Config
from fusepass.tuning import tune as tuner
from fusepass.tuning.problem import candidates, problems
from fusepass.tuning.step import Model, Work, decode_step
from fusepass.tuning.tune import BEST, Configs, descend, microseconds, plan, rank, trial, tune, tune_all
from tests.tuning.conftest import Launch

MODEL = Model(1024, 3072, 2, 16, 8, 128, 5000)


class FakeGpu:
    """Measures work on the meta device. A launch takes as long as `cost` says of it and of the one before it; a block
    of 8 rows of weights needs more than there is."""

    def __init__(self, launched: list[Launch], cost: Callable[[Launch, Launch], float]) -> None:
        self.launched, self.cost = launched, cost

    def __call__(self, work: Work) -> float:
        self.launched.clear()
        work()
        if any(launch.constants.get("BLOCK_N") == 8 for launch in self.launched):
            raise KernelUnavailable("out of resource: shared memory")
        return sum(map(self.cost, self.launched, self.launched[-1:] + self.launched[:-1]))


def tile_cost(config: Config) -> float:
    """The least for 2 rows of 1024."""
    if "CHUNKS" in config:
        return 100.0
    return 10 + abs(config["BLOCK_N"] - 2) + abs(math.log2(config["BLOCK_K"]) - 10) + config["num_warps"] / 100


def crowded(launch: Launch, before: Launch) -> float:
    """Behind another kernel that has as many warps, a kernel takes longer."""
    if "BLOCK_N" not in launch.constants:
        return 1.0
    same = launch.constants["num_warps"] == before.constants["num_warps"] and launch != before
    return tile_cost(launch.constants) + 3 * same


def test_the_ranking_is_by_time_and_leaves_out_what_the_gpu_has_not_the_resources_for(launched: list[Launch]) -> None:
    problem = problems(MODEL, 1)[3]
    ranked = rank(problem, FakeGpu(launched, crowded), "meta")
    fitting = [config for config in candidates(problem) if config["BLOCK_N"] != 8]
    assert len(fitting) < len(list(candidates(problem)))
    assert ranked == sorted(fitting, key=tile_cost)[:BEST]


def test_the_step_is_tuned_as_a_whole(launched: list[Launch]) -> None:
    """The best of each kernel alone have as many warps as one another; in a step none should have what the last had."""
    gpu, (step,) = FakeGpu(launched, crowded), plan([MODEL], [1])
    alone = {key: rank(problem, gpu, "meta")[0] for key, problem in step.kernels.items()}
    found = tune(step, gpu, "meta")
    assert found.keys() <= step.kernels.keys()
    work = decode_step(MODEL, 1, "meta")
    today, first, now = (trial(work, configs, gpu) for configs in ({}, alone, found))
    assert now < min(today, first)
    tiled = [pair for pair in itertools.pairwise(launched) if "BLOCK_N" in pair[1].constants]
    assert all(before.constants["num_warps"] != launch.constants["num_warps"] for before, launch in tiled)


def test_a_kernel_that_no_candidate_fits_keeps_what_it_has(launched: list[Launch]) -> None:
    (step,) = plan([MODEL], [1])
    down = step.kernels[problems(MODEL, 1)[3].key()]

    def gpu(work: Work) -> float:
        launched.clear()
        work()
        if any(launch.constants.get("K") == down.k and "BLOCK_N" in launch.constants for launch in launched):
            raise KernelUnavailable("out of resource: shared memory")
        return 1.0

    assert rank(down, gpu, "meta") == []
    assert tune(step, gpu, "meta") == {}


def choices(*keys: str) -> dict[str, list[Config]]:
    return {key: [{"BLOCK_N": n} for n in range(6)] for key in keys}


def state(configs: Configs, *keys: str) -> tuple[int, ...]:
    """Which choice is set for each key; without an override, the last."""
    return tuple(configs.get(key, {"BLOCK_N": 5})["BLOCK_N"] for key in keys)


def test_the_descent_finds_the_best_of_kernels_that_interact() -> None:
    """Each is best with one more than the next: what one pass finds is not the best yet."""

    def cost(configs: Configs) -> float:
        a, b, c = state(configs, "a", "b", "c")
        return 100 + (a - b - 1) ** 2 + 2 * (b - c - 1) ** 2 + 9 * (c - 2) ** 2

    assert descend(choices("a", "b", "c"), cost) == {"a": {"BLOCK_N": 4}, "b": {"BLOCK_N": 3}, "c": {"BLOCK_N": 2}}


def test_the_descent_begins_with_the_first_choices_where_they_are_better() -> None:
    def cost(configs: Configs) -> float:
        """A valley along a = b: no step of one kernel alone goes along it."""
        a, b = state(configs, "a", "b")
        return 100 + 10 * abs(a - b) + a

    assert descend(choices("a", "b"), cost) == {"a": {"BLOCK_N": 0}, "b": {"BLOCK_N": 0}}


def test_the_descent_begins_with_what_is_in_force_where_that_is_better() -> None:
    """From the first choices, no step of one kernel alone leads back to it."""

    def cost(configs: Configs) -> float:
        a, b, c = state(configs, "a", "b", "c")
        return 110 + 10 * abs(a - b) - a + abs(c - 3)

    assert descend(choices("a", "b", "c"), cost) == {"c": {"BLOCK_N": 3}}


@pytest.mark.parametrize("seed", range(30))
def test_the_descent_never_leaves_the_step_slower(seed: int) -> None:
    """Whatever the times, some of them infinite."""
    draw, times = random.Random(seed), dict[str, float]()

    def cost(configs: Configs) -> float:
        return times.setdefault(str(sorted(configs.items())), draw.choice([math.inf, draw.uniform(90, 110)]))

    before = cost({})
    assert cost(descend(choices("a", "b", "c"), cost)) <= before


@pytest.mark.parametrize("call", range(18))
def test_one_time_that_is_too_good_to_be_true_changes_nothing(call: int) -> None:
    """What it was measured of is not kept, and what is better is still found."""
    calls = itertools.count()

    def cost(configs: Configs) -> float:
        a, b = state(configs, "a", "b")
        return 50.0 if next(calls) == call else 100.0 + abs(a - 3) + abs(b - 1)

    assert descend(choices("a", "b"), cost) == {"a": {"BLOCK_N": 3}, "b": {"BLOCK_N": 1}}


def test_what_is_slower_in_the_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no pass was left to correct it."""
    monkeypatch.setattr(tuner, "PASSES", 1)
    calls = itertools.count()

    def cost(configs: Configs) -> float:
        return 50.0 if next(calls) == 5 else 100.0 + len(configs)

    assert descend(choices("a"), cost) == {}


def test_nothing_is_changed_for_a_gain_within_the_noise() -> None:
    def cost(configs: Configs) -> float:
        return 100 - 0.05 * sum(choice in (1, 2) for choice in state(configs, "a", "b"))

    assert descend(choices("a", "b"), cost) == {}


def test_a_kernel_that_steps_share_is_tuned_in_the_first() -> None:
    other = MODEL._replace(intermediate=1000)
    steps = plan([MODEL, MODEL._replace(layers=9), other], [1, 5, 8])
    assert [(step.model, step.rows) for step in steps] == [(MODEL, 1), (MODEL, 5), (other, 1), (other, 5)]
    keys = [[problem.key() for problem in problems(step.model, step.rows)] for step in steps]
    assert [list(step.kernels) for step in steps] == [keys[0], keys[1], keys[2][2:4], keys[3][2:4]]


def test_the_users_table_gets_what_is_found_and_keeps_the_rest(
    tmp_path: Path, launched: list[Launch], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "gpu.json"
    gpu = FakeGpu(launched, crowded)
    tune_all(plan([MODEL], [1]), path, gpu, "meta")
    first = json.loads(path.read_text())
    assert first
    assert first.keys() <= {p.key() for p in problems(MODEL, 1)}
    assert f"wrote {path}" in capsys.readouterr().out

    kept = {"linears m9 n9 k9 bfloat16": {"BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 1}}
    changed = {key: {"BLOCK_N": 1, "BLOCK_K": 256, "num_warps": 4} for key in first}
    path.write_text(json.dumps(kept | changed))
    tune_all(plan([MODEL], [1]), path, gpu, "meta")
    assert json.loads(path.read_text()) == kept | first
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


def test_each_step_is_written_and_in_force_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is stopped has not been for nothing, and kernels that steps share are those of a model."""
    path, seen = tmp_path / "gpu.json", []

    def note(step: tuner.Step, *_: object) -> dict[str, Config]:
        table = json.loads(path.read_text()) if path.is_file() else {}
        seen.append((len(table), tuning.lookup("linears", 1, 1024, 2048, torch.bfloat16)))
        return {key: {"BLOCK_N": len(seen), "BLOCK_K": 64, "SLICES": 1, "num_warps": 1} for key in step.kernels}

    monkeypatch.setattr(tuner, "tune", note)
    monkeypatch.setattr(tuning, "table", dict)
    tune_all(plan([MODEL], [1, 2]), path, device="meta")
    assert seen == [(0, None), (5, {"BLOCK_N": 1, "BLOCK_K": 64, "SLICES": 1, "num_warps": 1})]
    assert len(json.loads(path.read_text())) == 10
    assert tuning.lookup("linears", 1, 1024, 2048, torch.bfloat16) is None


@pytest.mark.gpu
def test_the_clock_counts_microseconds() -> None:
    x = torch.zeros(1 << 26, device="cuda")
    once = microseconds(lambda: x.add_(1))
    assert 1.8 * once < microseconds(lambda: (x.add_(1), x.add_(1))) < 2.2 * once
    assert 20 < once < 20_000, "0.5 GB"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_a_small_model_is_tuned_on_this_gpu(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "candidates", lambda problem: list(candidates(problem))[:4])
    path, (step,) = tmp_path / "gpu.json", plan([MODEL], [rows])
    tune_all([step], path)
    found = json.loads(path.read_text())
    assert found.keys() <= step.kernels.keys()
    assert trial(decode_step(MODEL, rows), found, microseconds) < math.inf
