"""What there is to tune: the kernels of a model's step that have launch configs, and the configs that each may take."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusepass import tuning
from fusepass.kernels import gemv, skinny
from fusepass.kernels.launch import cdiv, next_power_of_2
from fusepass.ops.library import SKINNY_LIMIT, strategy
from fusepass.tuning import Config
from fusepass.tuning.step import EPS, Model, Work


class Problem(NamedTuple):
    """One kernel at one size. kernel: "linears" (sizes: one or three N) or "gated" (sizes: one N)."""

    kernel: str
    rows: int
    sizes: tuple[int, ...]
    k: int
    norm: bool = False
    residual: bool = False

    @property
    def skinny(self) -> bool:
        """Whether the ops run it with the tensor-core kernels."""
        return strategy(self.rows) == "skinny"

    @property
    def m(self) -> int:
        """Rows as tables count them: the skinny kernels', rounded up to a tile of 8, 16, 32 or 64."""
        return max(8, next_power_of_2(self.rows)) if self.skinny else self.rows

    @property
    def matrices(self) -> int:
        """Tiles of weights that a program holds."""
        return 2 if self.kernel == "gated" else 1

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return 2 * sum(self.sizes) * self.k * self.matrices

    def key(self) -> str:
        kernel = f"skinny {self.kernel}" if self.skinny else self.kernel
        return tuning.key(kernel, self.m, sum(self.sizes), self.k, torch.bfloat16)


def problems(model: Model, rows: int) -> list[Problem]:
    """The four products of a decoder layer, and that of the language-model head. Raises ValueError where `rows` rows
    have no kernels of ours."""
    if not 1 <= rows <= SKINNY_LIMIT:
        raise ValueError(f"{rows} rows have no launch configs: the kernels take 1 to {SKINNY_LIMIT}")
    hidden, inner = model.hidden, model.intermediate
    return [
        Problem("linears", rows, (model.q_size, model.kv_size, model.kv_size), hidden, norm=True),
        Problem("linears", rows, (hidden,), model.q_size, residual=True),
        Problem("gated", rows, (inner,), hidden, norm=True),
        Problem("linears", rows, (hidden,), inner, residual=True),
        Problem("linears", rows, (model.vocabulary,), hidden, norm=True),
    ]


def candidates(problem: Problem) -> Iterator[Config]:
    """The configs worth a measurement."""
    if problem.skinny:
        yield from _skinny(problem)
    else:
        yield from _rows(problem)
        if problem.rows == 1 and torch.version.hip is None:
            yield from _mma(problem)


def _rows(problem: Problem) -> Iterator[Config]:
    """Tiles of 8 to 128 products a thread, each row of activations counted, all warps side by side along K, in up to 20
    steps, with up to as many loaded ahead as leave a thread half of its registers."""
    for n, k, warps in itertools.product((1, 2, 4, 8), (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
        loaded = n * k * problem.matrices / (32 * warps)
        steps = cdiv(problem.k, k)
        if k > next_power_of_2(problem.k) or steps > 20 or k < 256 * warps or not 8 <= loaded <= 128 / problem.m:
            continue
        for ahead in sorted({min(steps, tiles) for tiles in (1, 2, 3, 4, 6, 20)}):
            if ahead == 1 or loaded * ahead <= 256:
                yield {"BLOCK_N": n, "BLOCK_K": k, "AHEAD": ahead, "num_warps": warps}


def _mma(problem: Problem) -> Iterator[Config]:
    """Tiles of 2 to 16 rows of weights, gate and up both counted, with 16 to 128 registers of a thread for those ahead
    and less than 100 for the activations (and the weight of the norm). Not fewer than 128 programs."""
    for n, chunks, warps in itertools.product((1, 2, 4, 8, 16), (2, 4), (1, 2, 4, 8)):
        rows, tile_k = n * problem.matrices, 128 * chunks * warps
        steps, loaded = cdiv(problem.k, tile_k), rows // 2 * chunks * 4
        held = steps * chunks * (4 if problem.norm else 2)
        if not 2 <= rows <= 16 or held >= 100 or steps * tile_k > 1.4 * problem.k or sum(problem.sizes) < 128 * n:
            continue
        for ahead in sorted({min(steps, tiles) for tiles in (1, 2, 3, 5, 8, 16)}):
            if 16 <= loaded * ahead <= 128:
                yield {"BLOCK_N": n, "CHUNKS": chunks, "AHEAD": ahead, "num_warps": warps}


def _skinny(problem: Problem) -> Iterator[Config]:
    """Tiles of 16 to 128 weights a thread: in pipelines that fit in 200 KB of shared memory, also behind 128 weights a
    thread loaded ahead, which fit there too; or, where registers hold all activations, without a pipeline, up to as
    many ahead as take half of them. Not fewer than 40 programs for an H200's 132 multiprocessors, and the smallest
    tiles only where larger ones would leave multiprocessors idle."""
    m, matrices = problem.m, problem.matrices
    for n, slices, k, warps in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8, 16), (64, 128, 256, 512), (4, 8)):
        step, threads = slices * k, 32 * warps
        loaded, programs = n * step * matrices / threads, cdiv(sum(problem.sizes), n)
        if step >= 2 * problem.k or slices > 2 * warps or not 16 <= loaded <= 128 or n * m > 8192 // matrices:
            continue
        if programs < 40 or (programs > 1200 and n < 64):
            continue
        tile = {"BLOCK_M": m, "BLOCK_N": n, "SLICES": slices, "BLOCK_K": k, "num_warps": warps}
        shared = (n * matrices + m) * step * 2
        steps = cdiv(problem.k, step)
        held = steps <= 8 and m * problem.k / threads <= 128
        if steps > 1:
            for stages in (3, 4, 5):
                if shared * stages <= 200 << 10:
                    yield {**tile, "AHEAD": 0, "num_stages": stages}
                    if stages == 4 and programs <= 132:  # all of which begin early: with more it was slower
                        yield {**tile, "AHEAD": 0, "num_stages": stages, "PREFETCH": 1}
        ahead = 128 // int(loaded)
        if not held and ahead <= steps - 2 and shared * (ahead + 2) <= 200 << 10:
            yield {**tile, "AHEAD": ahead, "num_stages": 3}
        if held and shared <= 200 << 10:
            for ahead in sorted({1, min(steps, 2), steps}):
                if ahead == 1 or loaded * ahead <= 192:
                    yield {**tile, "AHEAD": ahead, "num_stages": 1}


def chain(problem: Problem, copies: int, device: str = "cuda") -> Work:
    """A function that launches the kernel once for each of `copies` distinct sets of weights."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)

    rows, sizes, k = problem.rows, problem.sizes, problem.k
    kernels = skinny if problem.skinny else gemv
    x, norm = new(rows, k), new(k) if problem.norm else None
    outs, none = [new(rows, n) for n in sizes], [None] * len(sizes)
    residual = new(rows, sizes[0]) if problem.residual else None
    weights = [[new(n, k) for n in sizes * problem.matrices] for _ in range(copies)]

    def run() -> None:
        for some in weights:
            if problem.kernel == "gated":
                kernels.gated(x, norm, EPS, *some, None, None, outs[0], "silu", False, True)
            else:
                kernels.linears(x, norm, EPS, some, none, outs, residual, False, True)

    return run
