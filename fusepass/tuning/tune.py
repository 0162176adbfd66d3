"""Measure launch configs of the row-vector and skinny kernels on this GPU and keep the best.

    python -m fusepass.tuning.tune --model Qwen3-0.6B      # adds to this user's table

First each kernel's candidates are ranked in a chain of launches over distinct weights in one CUDA graph, because that
is how a model runs it: the weights come from memory, and each kernel's start overlaps the end of the one before. Then
the best of each are tried in a whole decode step, one kernel after another: what a config leaves free on a
multiprocessor decides how early the next kernel loads its weights. Qwen3-0.6B's step on an H200: 551 us with the first
of each ranking, 526 refined.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fusepass import tuning
from fusepass.kernels import KernelUnavailable
from fusepass.kernels.launch import recording
from fusepass.tuning import Config
from fusepass.tuning.problem import Problem, candidates, chain, problems
from fusepass.tuning.step import Model, Work, decode_step

Configs = Mapping[str, Config]
Timer = Callable[[Work], float]
"""Microseconds of one call of the work; may raise KernelUnavailable."""

BEST = 30
"""Candidates of each kernel that are tried in the step. For Qwen3-0.6B and 8 rows, a search with random restarts ended
at 870 us among 10, at 840 among 30: what fits beside the next kernel's early programs is rarely the fastest alone."""
GAIN = 0.998
"""Of the time before: a config that does not get below it is taken to be no better."""
PASSES = 4
"""Most times that the descent goes through all kernels."""


class Step(NamedTuple):
    """A decode step of a model for some sequences, and the kernels that are tuned for it, by key."""

    model: Model
    rows: int
    kernels: dict[str, Problem]


def plan(models: Iterable[Model], rows: Iterable[int]) -> list[Step]:
    """The steps of each model with each number of rows. A kernel that several share belongs to the first of them, so
    that none is left with what was better for another. Raises ValueError as `problems` does."""
    steps: list[Step] = []
    known: set[str] = set()
    for model, m in itertools.product(models, rows):
        kernels = {p.key(): p for p in problems(model, m) if p.key() not in known}
        known |= kernels.keys()
        if kernels:
            steps.append(Step(model, m, kernels))
    return steps


def compile_all(work: Iterable[tuple[Problem, Config]]) -> None:
    """Compile candidates, so that Triton's cache on disk has them. Launches nothing and takes no memory of the GPU."""
    for problem, config in work:
        with tuning.override({problem.key(): config}), recording():
            chain(problem, 1, "meta")()


def compile_ahead(steps: Sequence[Step], processes: int) -> None:
    """Compile every candidate of the steps, in several processes."""
    work = [(p, config) for step in steps for p in step.kernels.values() for config in candidates(p)]
    print(f"compiling {len(work)} candidates", flush=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_all, [work[i::processes] for i in range(processes)], chunksize=1)


def microseconds(work: Work, rounds: int = 5) -> float:
    """Time on the GPU of one call of `work`, in a CUDA graph: the median over `rounds` of ten replays."""
    work()  # compiles and loads what a capture could not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 100)
    return statistics.median(times[1:])


def trial(work: Work, configs: Configs, time: Timer) -> float:
    """The time of `work` with these configs; infinite if the GPU has not what they take."""
    with tuning.override(configs):
        try:
            return time(work)
        except KernelUnavailable:
            return math.inf


def rank(problem: Problem, time: Timer, device: str = "cuda") -> list[Config]:
    """The best configs of a kernel in a chain of its own, fastest first. Prints three."""
    copies = max(4, min(64, (600 << 20) // problem.nbytes))
    work, key = chain(problem, copies, device), problem.key()
    timed = [(trial(work, {key: config}, time) / copies, config) for config in candidates(problem)]
    timed = sorted((pair for pair in timed if pair[0] < math.inf), key=lambda pair: pair[0])[:BEST]
    for us, config in timed[:3]:
        print(f"{key:48} {us:7.2f} us {problem.nbytes / us / 1e6:5.2f} TB/s  {config}", flush=True)
    return [config for _, config in timed]


def descend(choices: Mapping[str, Sequence[Config]], cost: Callable[[Configs], float]) -> dict[str, Config]:
    """The configs to set, by key, for a lower cost than that of setting none; {} if none were found. Prints both.

    Coordinate descent: from what is in force or from all first choices, whichever costs less, each key's choices are
    tried while the others stay, until nothing changes. What they must beat is measured again for each key, and in the
    end: clocks drift.
    """
    first = {key: configs[0] for key, configs in choices.items()}
    chosen: dict[str, Config] = min(({}, first), key=cost)
    for _ in range(PASSES):
        before = chosen
        for key, configs in choices.items():
            least = cost(chosen)
            for config in configs:
                changed = {**chosen, key: config}
                if changed != chosen and (us := cost(changed)) < GAIN * least:
                    least, chosen = us, changed
                    print(f"  {us:8.1f} us  {key}  {config}", flush=True)
        if chosen == before:
            break
    old, new = cost({}), cost(chosen)
    print(f"a step: {old:.1f} -> {min(old, new):.1f} us", flush=True)
    return chosen if new < old else {}


def tune(step: Step, time: Timer, device: str = "cuda") -> dict[str, Config]:
    """The configs, by key, that make the step faster than those in force."""
    ranked = {key: rank(problem, time, device) for key, problem in step.kernels.items()}
    work = decode_step(step.model, step.rows, device)
    choices = {key: configs for key, configs in ranked.items() if configs}
    return descend(choices, lambda configs: trial(work, configs, time))


def add(configs: Configs, path: Path) -> None:
    """Put configs into the table at `path`, beside what it has for other keys. Raises OSError where it cannot be
    written, ValueError where there is something else."""
    table = tuning.read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({**table, **configs}, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def tune_all(steps: Iterable[Step], path: Path, time: Timer = microseconds, device: str = "cuda") -> None:
    """Tune step after step, each with the configs found so far; the table at `path` has them as soon as they are."""
    found: dict[str, Config] = {}
    for step in steps:
        with tuning.override(found):
            found |= tune(step, time, device)
        add(found, path)
        print(f"wrote {path}", flush=True)


def main() -> None:
    from transformers import AutoConfig

    from fusepass.bench.models import DIMENSIONS, qwen3_config

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = f"{', '.join(DIMENSIONS)}, hub names, folders or config.json files"
    parser.add_argument("--model", nargs="+", required=True, help=names)
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="sequences in a step: 1, 2, 8, 16, 32, 64")
    parser.add_argument("--processes", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, help="table to add to; default: this user's table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    configs = [qwen3_config(name) if name in DIMENSIONS else AutoConfig.from_pretrained(name) for name in args.model]
    path = args.out or tuning.user_table()
    try:
        steps = plan(map(Model.of, configs), args.rows)
        add({}, path)  # before anything is measured, it is known that the table can be read and written
    except (ValueError, OSError) as fault:
        parser.error(str(fault))
    compile_ahead(steps, args.processes)
    tune_all(steps, path)


if __name__ == "__main__":
    main()
