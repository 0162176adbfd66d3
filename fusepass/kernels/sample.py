"""A sampled token of each row of logits: temperature, top-k, top-p, min-p, and the draw.

Top-k of a whole vocabulary needs no sort of it. The k-th largest of the maxima of many chunks is a lower bound of the
k-th largest number: what reaches it is little more than k numbers, which one program sorts. For 151,936 tokens and
k = 20, `torch.topk` alone takes 52 us on an H200, with the processors of transformers behind it 130.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusepass.kernels.common import begin
from fusepass.kernels.launch import cdiv, next_power_of_2, pdl_options, run

MOST_K = 128
"""The largest top-k that these kernels take."""
ROOM = 512
"""Numbers that reach the bound and are looked at."""
_CHUNKS_PER_K = 5
"""Chunks for each of the k: few, since every program of a row sorts their maxima, but with 2 k of them the k-th largest
of the maxima would be far below the k-th largest number."""
_MOST_CHUNKS = 1024
_TILE = 2048
"""Numbers that a program looks through, and the largest chunk."""


@triton.jit
def _load(logits_ptr, row, V, inverse_temperature, TILE: tl.constexpr):
    """Numbers of a program's tile of a row, in f32, and where in the row they are."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row.to(tl.int64) * V + at, at < V, other=float("-inf"))
    return x.to(tl.float32) * inverse_temperature + 0.0, at  # -0.0 + 0.0 is 0.0, which ties with it


@triton.jit
def maxima_kernel(
    logits_ptr, maxima_ptr, count_ptr, V, chunks, inverse_temperature,
    CHUNK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """maxima[row, chunk]: the largest of CHUNK logits; nan if one of them is. Sets count[row] to 0."""
    begin(PDL, EARLY)
    row = tl.program_id(1)
    x, _ = _load(logits_ptr, row, V, inverse_temperature, TILE)
    x = tl.reshape(x, (TILE // CHUNK, CHUNK))
    largest = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(x, 1))
    chunk = tl.program_id(0) * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
    tl.store(maxima_ptr + row * chunks + chunk, largest, chunk < chunks)
    if tl.program_id(0) == 0:
        tl.store(count_ptr + row, 0)


@triton.jit
def collect_kernel(
    logits_ptr, maxima_ptr, values_ptr, indices_ptr, count_ptr, V, chunks, inverse_temperature, k,
    CHUNKS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """values and indices [row, ROOM]: the logits that reach the k-th of the maxima, in any order; count: how many."""
    begin(PDL, EARLY)
    row = tl.program_id(1)
    chunk = tl.arange(0, CHUNKS)
    maxima = tl.sort(tl.load(maxima_ptr + row * chunks + chunk, chunk < chunks, other=float("-inf")), descending=True)
    bound = tl.sum(tl.where(chunk == k - 1, maxima, 0.0))
    x, at = _load(logits_ptr, row, V, inverse_temperature, TILE)
    reached = ((x >= bound) & (x > float("-inf"))).to(tl.int32)
    found = tl.sum(reached)
    if found > 0:
        place = tl.atomic_add(count_ptr + row, found) + tl.cumsum(reached, 0) - 1
        keep = (reached > 0) & (place < ROOM)
        tl.store(values_ptr + row * ROOM + place, x, keep)
        tl.store(indices_ptr + row * ROOM + place, at, keep)


@triton.jit
def _draw(
    values_ptr, indices_ptr, noise_ptr, count, V, k, one_less_top_p, top_p_keeps, min_p,
    ROOM: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """The token among the first ROOM that were collected, and the probability of the likeliest."""
    i = tl.arange(0, ROOM)
    value = tl.load(values_ptr + i, i < count, other=float("-inf"))
    index = tl.load(indices_ptr + i, i < count, other=0)
    # As integers, floats are in order once the lower bits of the negative ones are flipped. Of equal numbers the last
    # of the row comes first, as behind a stable sort that ascends: top-p drops the others before.
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    order = tl.sort((order << 32) | index.to(tl.int64), descending=True)
    index = (order & 0x7FFFFFFF).to(tl.int32)
    bits = (order >> 32).to(tl.int32)
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)

    # What is absent is -inf, behind all others: with fewer than k numbers the k-th is -inf and all are kept.
    keep = (i < count) & (value >= tl.sum(tl.where(i == k - 1, value, 0.0)))
    weight = tl.where(keep, tl.exp(value - tl.max(value)), 0.0)
    if TOP_P:
        rest = tl.cumsum(weight / tl.sum(weight), 0, reverse=True)
        weight = tl.where((rest <= one_less_top_p) & (i >= top_p_keeps), 0.0, weight)
    if MIN_P:
        weight = tl.where(weight < min_p * tl.max(weight), 0.0, weight)
    probability = weight / tl.sum(weight)
    noise = tl.load(noise_ptr + index, weight > 0.0, other=1.0)
    score = tl.where(weight > 0.0, probability / noise, -1.0)
    chosen = tl.min(tl.where(score == tl.max(score), index, V))
    return chosen, tl.sum(tl.where(i == 0, probability, 0.0))


@triton.jit
def draw_kernel(
    maxima_ptr, values_ptr, indices_ptr, count_ptr, noise_ptr, chosen_ptr, alarm_ptr, V, chunks, k,
    one_less_top_p, top_p_keeps, min_p,
    CHUNKS: tl.constexpr, FEW: tl.constexpr, ROOM: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The token of one row. alarm: nan where there is no distribution, infinite where more than ROOM were collected."""
    begin(PDL, EARLY)
    row = tl.program_id(0)
    values_ptr += row * ROOM
    indices_ptr += row * ROOM
    noise_ptr += row.to(tl.int64) * V
    chunk = tl.arange(0, CHUNKS)
    maxima = tl.load(maxima_ptr + row * chunks + chunk, chunk < chunks, other=0.0)
    count = tl.load(count_ptr + row)
    if count <= FEW:  # as a rule: sorting all that there is room for takes 10 us longer
        chosen, alarm = _draw(
            values_ptr, indices_ptr, noise_ptr, count, V, k, one_less_top_p, top_p_keeps, min_p, FEW, TOP_P, MIN_P
        )
    else:
        chosen, alarm = _draw(
            values_ptr, indices_ptr, noise_ptr, count, V, k, one_less_top_p, top_p_keeps, min_p, ROOM, TOP_P, MIN_P
        )
    tl.store(chosen_ptr + row, tl.where(chosen < V, chosen, 0).to(tl.int64))  # nan equals nothing
    alarm = tl.where(count > ROOM, float("inf"), alarm)
    tl.store(alarm_ptr + row, tl.where(tl.max((maxima != maxima).to(tl.int32)) > 0, float("nan"), alarm))


def _chunk(vocabulary: int, top_k: int) -> int:
    return max(256, min(_TILE, next_power_of_2(vocabulary // (_CHUNKS_PER_K * top_k) + 1) // 2))


def fits(batch: int, vocabulary: int, top_k: int) -> bool:
    """Whether these kernels take logits of this shape: top-k is small, there are many more chunks, and a grid's second
    dimension has room for the rows."""
    chunks = cdiv(vocabulary, _chunk(vocabulary, top_k))
    return batch < 1 << 16 and top_k <= MOST_K and 2 * top_k <= chunks <= _MOST_CHUNKS


def sample(
    logits: Tensor,
    noise: Tensor,
    temperature: float,
    top_k: int,
    top_p: tuple[float, int] | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor]:
    """The tokens, [B] int64, that maximise probability / noise among those that top-k, then top-p, then min-p leave of
    logits / temperature; and alarms, [B] f32: nan where some logit is nan or all are -inf, infinite where more than
    `ROOM` tokens reach the k-th largest of the chunks' maxima, so that the token may be wrong.

    logits: [B, V] contiguous; noise: [B, V] f32, exponentially distributed (`torch.multinomial` draws so); top_p: the
    threshold, and how many tokens stay whatever it is. `fits(B, V, top_k)` holds.
    """
    batch, vocabulary = logits.shape
    chunk = _chunk(vocabulary, top_k)
    chunks, tiles = cdiv(vocabulary, chunk), cdiv(vocabulary, _TILE)
    maxima, values, alarm = noise.new_empty(batch, chunks), noise.new_empty(batch, ROOM), noise.new_empty(batch)
    indices = torch.empty(batch, ROOM, dtype=torch.int32, device=logits.device)
    count, chosen = indices.new_empty(batch), torch.empty(batch, dtype=torch.int64, device=logits.device)
    # On a GPU, PyTorch divides by a number so.
    inverse = float(1 / torch.tensor(temperature, dtype=torch.float32, device="cpu"))
    options = pdl_options(False)
    run(
        maxima_kernel, (tiles, batch),
        logits, maxima, count, vocabulary, chunks, inverse, CHUNK=chunk, TILE=_TILE, **options,
    )  # fmt: skip
    pad = max(16, next_power_of_2(chunks))
    run(
        collect_kernel, (tiles, batch),
        logits, maxima, values, indices, count, vocabulary, chunks, inverse, top_k,
        CHUNKS=pad, ROOM=ROOM, TILE=_TILE, **options,
    )  # fmt: skip
    p, p_keeps = top_p or (1.0, 0)
    run(
        draw_kernel, (batch,),
        maxima, values, indices, count, noise, chosen, alarm, vocabulary, chunks, top_k,
        1 - p, p_keeps, min_p or 0.0,
        CHUNKS=pad, FEW=next_power_of_2(max(2 * top_k, 16)), ROOM=ROOM,
        TOP_P=top_p is not None, MIN_P=min_p is not None, **options,
    )  # fmt: skip
    return chosen, alarm
