"""Grouped-query attention of few queries over a long cache: K and V are read once, and only where the mask shows them.

The query heads that share a K/V head are the rows of one tensor-core tile. The cache is split among programs, whose
partial results a second kernel combines (https://pytorch.org/blog/flash-decoding/): measured on an H200, a combine by
the last program of the first kernel costs 2.6 us more than a kernel of its own.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusepass.kernels.common import begin
from fusepass.kernels.launch import cdiv, interpreted, next_power_of_2, pdl_options, run

TILE_ROWS = 16
"""Rows of the tile: the fewest that `tl.dot` takes."""
_LOG2_E = tl.constexpr(math.log2(math.e))
_VERY_LOW = tl.constexpr(-1e30)
"""An additive mask hides with -inf or with the lowest finite value of some dtype."""


@triton.jit
def _bias(mask_ptr, offsets, inside):
    """What the mask adds to the scores, in f32: -inf where it hides and where there is nothing."""
    if mask_ptr.dtype.element_ty == tl.int1:
        return tl.where(tl.load(mask_ptr + offsets, inside, other=0) != 0, 0.0, float("-inf"))
    else:
        return tl.load(mask_ptr + offsets, inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _visible_blocks(
    mask_ptr, stride, length, split, splits, count, lowest, BLOCK: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """First and last of a split's `count` blocks with a position whose bias is above `lowest`; (count, -1) if none."""
    first, last = count, -1
    for start in range(0, count, SCAN):
        n = start + tl.arange(0, SCAN)
        position = ((split + n * splits) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        bias = _bias(mask_ptr, position.to(tl.int64) * stride, position < length)
        seen = tl.max((bias > lowest).to(tl.int32), 1) > 0
        first = tl.minimum(first, tl.min(tl.where(seen, n, count)))
        last = tl.maximum(last, tl.max(tl.where(seen, n, -1)))
    return first, last


@triton.jit
def _any_visible(mask_ptr, stride, length, WIDTH: tl.constexpr):
    """Whether the row of the mask shows any position. Usually the first load tells."""
    start, found = 0, 0
    while (start < length) & (found == 0):
        position = start + tl.arange(0, WIDTH)
        bias = _bias(mask_ptr, position.to(tl.int64) * stride, position < length)
        found = tl.max((bias > _VERY_LOW).to(tl.int32))
        start += WIDTH
    return found


@triton.jit(do_not_specialize=["length", "splits"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, partial_ptr, stats_ptr, scale, length, splits,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    mask_stride_b, mask_stride_h, mask_stride_s, mask_stride_t, out_stride_b, out_stride_h, out_stride_s,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, MASK_ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of the ROWS = S * GROUP queries of one K/V head over blocks split, split + splits, ... of the cache.

    Splits are interleaved, so that a cache filled up to anywhere, or a sliding window, keeps all of them busy. Without
    `partial_ptr` there is one split, which writes the result; else the sum of its values weighted by exp(score - max),
    and in `stats` [2, batch * KV_HEADS * ROWS, splits] the max and the sum of the weights.
    """
    begin(PDL, False)
    group = tl.program_id(0)
    split = tl.program_id(1)
    batch = (group // KV_HEADS).to(tl.int64)
    kv_head = (group % KV_HEADS).to(tl.int64)
    row = tl.arange(0, TILE)
    head = kv_head * GROUP + row % GROUP
    token = row // GROUP
    d = tl.arange(0, BLOCK_D)
    valid = (row < ROWS)[:, None] & (d < D)[None, :]
    count = tl.cdiv(tl.cdiv(length, BLOCK) - split, splits)

    # Which blocks to walk: known on the device alone, since the fill of a static cache shows in the mask only.
    first, last = 0, count - 1
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride_b
        first, last = count, -1
        for i in range(MASK_ROWS):
            row_ptr = mask_ptr + (kv_head * GROUP + i % GROUP) * mask_stride_h + i // GROUP * mask_stride_s
            row_first, row_last = _visible_blocks(
                row_ptr, mask_stride_t, length, split, splits, count, _VERY_LOW, BLOCK, SCAN
            )
            if mask_ptr.dtype.element_ty != tl.int1:
                # Low finite values count for nothing beside a higher one; among themselves they decide.
                others = row_last
                if row_last < 0:
                    others = _any_visible(row_ptr, mask_stride_t, length, BLOCK * SCAN) - 1
                if others < 0:
                    row_first, row_last = _visible_blocks(
                        row_ptr, mask_stride_t, length, split, splits, count, float("-inf"), BLOCK, SCAN
                    )
            first = tl.minimum(first, row_first)
            last = tl.maximum(last, row_last)
        # One row, if all rows have the same mask: it is broadcast over the tile.
        i = tl.arange(0, TILE if MASK_ROWS > 1 else 1)
        mask_offsets = (kv_head * GROUP + i % GROUP) * mask_stride_h + i // GROUP * mask_stride_s
        mask_rows = i < MASK_ROWS

    q_offsets = batch * q_stride_b + head * q_stride_h + token * q_stride_s
    q = tl.load(q_ptr + q_offsets[:, None] + d[None, :], valid, other=0.0)
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    v_ptr += batch * v_stride_b + kv_head * v_stride_h
    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_D], tl.float32)
    for n in range(first, last + 1):
        t = (split + n * splits) * BLOCK + tl.arange(0, BLOCK)
        inside = t < length
        t = t.to(tl.int64)
        loaded = inside[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + t[:, None] * k_stride_t + d[None, :], loaded, other=0.0)
        v = tl.load(v_ptr + t[:, None] * v_stride_t + d[None, :], loaded, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if mask_ptr is not None:
            read = mask_rows[:, None] & inside[None, :]
            score += _bias(mask_ptr, mask_offsets[:, None] + t[None, :] * mask_stride_t, read)
        else:
            score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
        # log2(e) multiplies the difference: the score itself, -3.4e38 from a mask, would overflow.
        weight = tl.exp2((score - base[:, None]) * _LOG2_E)
        shrink = tl.exp2((highest - base) * _LOG2_E)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = higher

    if partial_ptr is None:
        # Where nothing is visible SDPA gives zeros.
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_offsets = batch * out_stride_b + head * out_stride_h + token * out_stride_s
        tl.store(out_ptr + out_offsets[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), valid)
    else:
        slot = (group.to(tl.int64) * ROWS + row) * splits + split
        all_slots = tl.num_programs(0).to(tl.int64) * ROWS * splits
        tl.store(stats_ptr + slot, highest, row < ROWS)
        tl.store(stats_ptr + all_slots + slot, total, row < ROWS)
        # The combine reads the sums of splits that saw something.
        tl.store(partial_ptr + slot[:, None] * D + d[None, :], acc, valid & (total > 0.0)[:, None])


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial_ptr, stats_ptr, out_ptr, splits, out_stride_b, out_stride_h, out_stride_s,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = the partial sums of all splits of one query in their order, over the sum of all weights."""
    begin(PDL, False)
    row = tl.program_id(0).to(tl.int64)
    all_slots = tl.num_programs(0).to(tl.int64) * splits
    d = tl.arange(0, BLOCK_D)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        slot = row * splits + split
        split_highest = tl.load(stats_ptr + slot, split < splits, other=float("-inf"))
        split_total = tl.load(stats_ptr + all_slots + slot, split < splits, other=0.0)
        read = (split_total > 0.0)[:, None] & (d < D)[None, :]
        partial = tl.load(partial_ptr + slot[:, None] * D + d[None, :], read, other=0.0)
        higher = tl.maximum(highest, tl.max(split_highest))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        factor = tl.exp2((split_highest - base) * _LOG2_E)
        shrink = tl.exp2((highest - base) * _LOG2_E)
        total = total * shrink + tl.sum(split_total * factor)
        acc = acc * shrink + tl.sum(partial * factor[:, None], 0)
        highest = higher
    acc = acc / tl.where(total == 0.0, 1.0, total)
    group = row // ROWS
    head = group % KV_HEADS * GROUP + row % ROWS % GROUP
    out_ptr += group // KV_HEADS * out_stride_b + head * out_stride_h + row % ROWS // GROUP * out_stride_s
    tl.store(out_ptr + d, acc.to(out_ptr.dtype.element_ty), d < D)


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs to aim at: two for each multiprocessor."""
    if interpreted():
        return 8
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return 2 * count


@functools.lru_cache(4096)
def _plan(groups: int, size: int, length: int, element_size: int, device: torch.device) -> tuple[int, int, int, int]:
    """Padded head size, positions of a block, splits, and blocks of a split whose mask is looked through at a time."""
    block_d = max(16, next_power_of_2(size))
    # 8 KB of K: 32 positions of a bf16 head of 128. Qwen3-0.6B at context 512 on an H200: 4.9 us for both kernels with
    # 32 splits of 32, 4 warps and a combine of one warp; 6.5 us with 16 of 64, 8 warps and 4.
    block = max(16, min(64, 8192 // (block_d * element_size)))
    blocks = cdiv(length, block)
    splits = min(blocks, max(1, _programs(device) // groups))
    # The mask of a split is looked through 2048 positions at a time.
    return block_d, block, splits, min(next_power_of_2(cdiv(blocks, splits)), 2048 // block)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> None:
    """Write softmax(scale * q k^T + mask) v to `out`.

    q, out: [B, Hq, S, D], S * Hq / Hkv at most `TILE_ROWS`; k, v: [B, Hkv, T, D]; all of stride 1 in D; mask: bool
    (True: visible) or additive, broadcastable to [B, Hq, S, T], or None.
    """
    batch, q_heads, seq, size = q.shape
    kv_heads, length = k.shape[1:3]
    group = q_heads // kv_heads
    rows = seq * group
    block_d, block, splits, scan = _plan(batch * kv_heads, size, length, q.element_size(), q.device)
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    mask_rows = 1
    if mask is not None:
        expanded = mask.expand(batch, q_heads, seq, length)
        mask_strides = expanded.stride()
        shared = (group == 1 or mask.shape[1] == 1) and (seq == 1 or mask.shape[2] == 1)
        mask_rows = 1 if shared else rows
    partial = stats = None
    if splits > 1:
        partial = torch.empty(batch * kv_heads * rows, splits, size, dtype=torch.float32, device=q.device)
        stats = torch.empty(2, batch * kv_heads * rows, splits, dtype=torch.float32, device=q.device)
    sizes = {"KV_HEADS": kv_heads, "GROUP": group, "ROWS": rows, "D": size, "BLOCK_D": block_d}
    run(
        attention_kernel, (batch * kv_heads, splits),
        q, k, v, mask, out, partial, stats, scale, length, splits,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides, *out.stride()[:3],
        **sizes, TILE=TILE_ROWS, MASK_ROWS=mask_rows, BLOCK=block, SCAN=scan,
        num_warps=4, **pdl_options(),
    )  # fmt: skip
    if splits > 1:
        run(
            combine_kernel, (batch * kv_heads * rows,),
            partial, stats, out, splits, *out.stride()[:3],
            **sizes, CHUNK=min(next_power_of_2(splits), 4096 // block_d), num_warps=1, **pdl_options(),
        )  # fmt: skip
