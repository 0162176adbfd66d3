"""Measure launch configs of the row-vector and skinny kernels on this GPU and keep the best.

    python -m fusepass.tuning.tune --model Qwen/Qwen3-0.6B      # writes this user's table

Each candidate runs as a chain of launches over distinct weights in one CUDA graph, because that is how a model runs it:
the weights come from memory, and each kernel's start overlaps the end of the one before. Candidates are compiled ahead
in several processes.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from fusepass import tuning
from fusepass.ops.library import ROWS_LIMIT
from fusepass.tuning import Config


class Problem(NamedTuple):
    """One kernel at one size. kernel: "linears" (sizes: one or three N) or "gated" (sizes: one N)."""

    kernel: str
    m: int
    sizes: tuple[int, ...]
    k: int
    residual: bool
    norm: bool

    @property
    def skinny(self) -> bool:
        """Whether the tensor-core kernels run it: then `m` is the rows rounded up to a tile, 8, 16, 32 or 64."""
        return self.m > ROWS_LIMIT

    def key(self) -> str:
        kernel = f"skinny {self.kernel}" if self.skinny else self.kernel
        return tuning.key(kernel, self.m, sum(self.sizes), self.k, torch.bfloat16)


def problems(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int, m: int
) -> list[Problem]:
    """The four products of a decoder layer, and that of the language-model head."""
    q, kv = heads * head_dim, kv_heads * head_dim
    return [
        Problem("linears", m, (q, kv, kv), hidden, residual=False, norm=True),
        Problem("linears", m, (hidden,), q, residual=True, norm=False),
        Problem("gated", m, (intermediate,), hidden, residual=False, norm=True),
        Problem("linears", m, (hidden,), intermediate, residual=True, norm=False),
        Problem("linears", m, (vocabulary,), hidden, residual=False, norm=True),
    ]


def candidates(problem: Problem) -> Iterator[Config]:
    """Rows: blocks that give a thread 16 to 128 weights of each row to hold. Skinny: tiles that fit shared memory."""
    matrices = 2 if problem.kernel == "gated" else 1
    if problem.skinny:
        for n, slices, k, warps in itertools.product((16, 32, 64, 128), (1, 2, 4, 8, 16), (64, 128, 256, 512), (4, 8)):
            step = slices * k
            held = n * step * matrices / (32 * warps)
            if step >= 2 * problem.k or slices > 2 * warps or not 16 <= held <= 128 or n * problem.m > 8192 // matrices:
                continue
            for stages in (3, 4, 5) if step < problem.k else (1,):
                if (n * matrices + problem.m) * step * 2 * stages <= 200 << 10:
                    tile = {"BLOCK_M": problem.m, "BLOCK_N": n, "SLICES": slices, "BLOCK_K": k}
                    yield {**tile, "num_warps": warps, "num_stages": stages}
        return
    top = 1 << (problem.k - 1).bit_length()
    for n, k, warps in itertools.product((1, 2, 4, 8), (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
        held = n * k * matrices * problem.m / (32 * warps)
        if k <= top and 16 <= held <= 128:
            yield {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps}


def launches(problem: Problem, copies: int) -> list[Callable[[], None]]:
    """One launch for each of `copies` distinct sets of weights."""
    from fusepass.kernels import gemv, skinny

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02

    x, norm = new(problem.m, problem.k), new(problem.k) if problem.norm else None
    outs = [new(problem.m, n) for n in problem.sizes]
    residual = new(problem.m, problem.sizes[0]) if problem.residual else None
    none = [None] * len(problem.sizes)

    kernels = skinny if problem.skinny else gemv

    def one() -> Callable[[], None]:
        weights = [new(n, problem.k) for n in problem.sizes]
        if problem.kernel == "gated":
            up = new(problem.sizes[0], problem.k)
            return lambda: kernels.gated(x, norm, 1e-6, weights[0], up, None, None, outs[0], "silu", False, True)
        return lambda: kernels.linears(x, norm, 1e-6, weights, none, outs, residual, False, True)

    return [one() for _ in range(copies)]


def compile_all(work: list[tuple[Problem, Config]]) -> None:
    """Run each candidate once, so that Triton's cache on disk has it."""
    for problem, config in work:
        tuning.forced = config
        with contextlib.suppress(OutOfResources):
            launches(problem, 1)[0]()
    torch.cuda.synchronize()


def microseconds(chain: list[Callable[[], None]], config: Config, rounds: int = 5) -> float:
    """Time of one launch in a CUDA graph of the whole chain: the median over `rounds` of ten replays; infinite if the
    GPU has not what it takes."""
    tuning.forced = config
    try:
        for launch in chain[:2]:
            launch()
    except OutOfResources:
        return math.inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in chain:
            launch()
    times = []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 100 / len(chain))
    return statistics.median(times[1:])


def tune(todo: list[Problem], processes: int) -> dict[str, Config]:
    """The fastest config of each problem. Prints the three best."""
    work = [(problem, config) for problem in todo for config in candidates(problem)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_all, [work[i::processes] for i in range(processes)])
    best = {}
    for problem in todo:
        matrices = 2 if problem.kernel == "gated" else 1
        size = sum(problem.sizes) * problem.k * 2 * matrices
        chain = launches(problem, max(4, min(64, (600 << 20) // size)))
        timed = sorted(((microseconds(chain, c), tuple(c.items())) for c in candidates(problem)), key=lambda t: t[0])
        best[problem.key()] = dict(timed[0][1])
        for us, config in timed[:3]:
            print(f"{problem.key():48} {us:7.2f} us {size / us / 1e6:5.2f} TB/s  {dict(config)}", flush=True)
    tuning.forced = None
    return best


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", required=True, help="hub names, folders or config.json files")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="activation rows: 1 to 4, 8, 16, 32, 64")
    parser.add_argument("--processes", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, help="table to write; default: this user's table")
    args = parser.parse_args()
    todo: dict[str, Problem] = {}
    for name in args.model:
        c = AutoConfig.from_pretrained(name)
        sizes = (
            c.hidden_size,
            c.intermediate_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.vocab_size,
        )
        todo.update({p.key(): p for m in args.rows for p in problems(*sizes, m)})
    out = args.out or tuning.user_table()
    known = json.loads(out.read_text()) if out.is_file() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    known.update(tune(list(todo.values()), args.processes))
    out.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
