"""Grouped-query attention of few queries over a long cache: K and V are read once, and only where the mask shows them.

The query heads that share a K/V head are the columns of a tensor-core tile, since 8 are enough for these, where rows
are 16 and more. The cache is split among programs, whose partial results a second kernel combines
(https://pytorch.org/blog/flash-decoding/): measured on an H200, a combine by the last program of the first kernel costs
2.6 us more than a kernel of its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusepass.kernels.attention_mask import VERY_LOW, any_visible, mask_bias, visible_blocks
from fusepass.kernels.attention_plan import FEW, block_d, plan, this_gpu
from fusepass.kernels.common import before_activations, begin, load_halves, norm_rope
from fusepass.kernels.launch import cdiv, next_power_of_2, pdl_options, run

MOST_QUERIES = 16
"""Columns of the widest tile."""
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_block(
    k_ptr, v_ptr, k_stride_t, v_stride_t, start, end,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The two halves of the keys [BLOCK, BLOCK_H], and the values [BLOCK_D, BLOCK], of the BLOCK positions from
    `start`, zeros from `end` on. (Values that `tl.trans` turns do not go through Triton's pipeline.)"""
    t = start + tl.arange(0, BLOCK)
    inside = t < end
    t = t.to(tl.int64)
    h = tl.arange(0, BLOCK_H)[None, :]
    d = tl.arange(0, BLOCK_D)[:, None]
    k_lo = tl.load(k_ptr + t[:, None] * k_stride_t + h, inside[:, None] & (h < HALF), other=0.0)
    k_hi = tl.load(k_ptr + t[:, None] * k_stride_t + HALF + h, inside[:, None] & (HALF + h < D), other=0.0)
    v = tl.load(v_ptr + t[None, :] * v_stride_t + d, inside[None, :] & (d < D), other=0.0)
    return k_lo, k_hi, v


@triton.jit
def _attend(
    highest, total, acc, q_lo, q_hi, k_lo, k_hi, v, scale, start, end, but,
    mask_ptr, mask_offsets, mask_rows, mask_stride_t, BLOCK: tl.constexpr,
):  # fmt: skip
    """The running max and sum of weights [queries], and weighted sum of values [BLOCK_D, queries], after one more
    block, cut off at `end` and without the position `but`."""
    t = start + tl.arange(0, BLOCK)
    score = tl.dot(k_lo, tl.trans(q_lo), input_precision="ieee")
    score = tl.dot(k_hi, tl.trans(q_hi), score, input_precision="ieee") * scale
    inside = (t < end)[:, None]
    if but is not None:
        inside = inside & (t != but)[:, None]
    if mask_ptr is None or but is not None:  # a key that is left out may be anything, NaN too
        score = tl.where(inside, score, float("-inf"))
    if mask_ptr is not None:
        offsets = mask_offsets[None, :] + t.to(tl.int64)[:, None] * mask_stride_t
        score += mask_bias(mask_ptr, offsets, mask_rows[None, :] & inside)
    higher = tl.maximum(highest, tl.max(score, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
    # log2(e) multiplies the difference: the score itself, -3.4e38 from a mask, would overflow.
    weight = tl.exp2((score - base[None, :]) * _LOG2_E)
    shrink = tl.exp2((highest - base) * _LOG2_E)
    total = total * shrink + tl.sum(weight, 0)
    acc = tl.dot(v, weight.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _new_token(
    q_lo, q_hi, scale, k_ptr, v_ptr, k_stride_t, v_stride_t, length, split, splits,
    position_ptr, new_k_ptr, new_v_ptr, new_offset, q_norm_ptr, q_norm_lo, q_norm_hi, q_eps,
    k_norm_ptr, k_norm_lo, k_norm_hi, k_eps, cos_ptr, cos_offset, cos_stride_d, sin_ptr, sin_offset, sin_stride_d,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
    HIGH: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate the queries and the new key, and write this and the new value to the cache, if their
    position is this split's. Returns the halves of the queries [queries, BLOCK_H] and of the key [1, BLOCK_H], the
    value [BLOCK_D, 1], the position, whether it is this split's, and the scale."""
    new_k_ptr += new_offset
    new_v_ptr += new_offset
    cos_ptr += cos_offset
    sin_ptr += sin_offset
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    # Every program loads and rotates the new key: one trip to L2 for all that is needed, where waiting for the
    # position first would make it two (0.6 us a layer).
    place = tl.load(position_ptr)
    k_lo, k_hi = load_halves(new_k_ptr, 1, HALF, BLOCK_H)
    v = tl.load(new_v_ptr + d, d < D, other=0.0).to(dtype)
    cos_lo, cos_hi = load_halves(cos_ptr, cos_stride_d, HALF, BLOCK_H)
    sin_lo, sin_hi = load_halves(sin_ptr, sin_stride_d, HALF, BLOCK_H)
    q_lo, q_hi = norm_rope(q_lo.to(tl.float32), q_hi.to(tl.float32), q_norm_ptr, q_norm_lo, q_norm_hi, q_eps,
                           cos_lo, cos_hi, sin_lo, sin_hi, D, dtype, HIGH)  # fmt: skip
    k_lo, k_hi = norm_rope(k_lo, k_hi, k_norm_ptr, k_norm_lo, k_norm_hi, k_eps,
                           cos_lo, cos_hi, sin_lo, sin_hi, D, dtype, HIGH)  # fmt: skip
    position = place.to(tl.int32)
    # Behind a full cache there is no place: no split has it, and nothing may pass for the result. (Eager's index_copy_
    # raises, but the host may learn of it much later; NaN is seen in the logits at once.)
    inside = (place >= 0) & (place < length)
    scale = tl.where(inside, scale, float("nan"))
    mine = inside & (position // BLOCK % splits == split)
    if mine:
        tl.store(k_ptr + place * k_stride_t + h, k_lo, h < HALF)
        tl.store(k_ptr + place * k_stride_t + HALF + h, k_hi, h < HALF)
        tl.store(v_ptr + place * v_stride_t + d, v, d < D)
    return q_lo, q_hi, k_lo, k_hi, v, position, mine, scale


@triton.jit(do_not_specialize=["length", "splits"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, partial_ptr, stats_ptr, scale, length, splits,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    mask_stride_b, mask_stride_h, mask_stride_s, mask_stride_t, out_stride_b, out_stride_h, out_stride_s,
    position_ptr, new_k_ptr, new_v_ptr, q_norm_ptr, k_norm_ptr, q_eps, k_eps,
    cos_ptr, sin_ptr, cos_stride_b, cos_stride_d, sin_stride_b, sin_stride_d,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, MASK_ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
    SCAN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, PRIMED: tl.constexpr, HIGH: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention of the ROWS = S * GROUP queries of one K/V head over blocks split, split + splits, ... of the cache.

    Splits are interleaved, so that a cache filled up to anywhere, or a sliding window, keeps all of them busy. Without
    `partial_ptr` there is one split, which writes the result; else the sum of its values weighted by exp(score - max),
    and in `stats` [2, batch * KV_HEADS * ROWS, splits] the max and the sum of the weights.

    With `position_ptr` (one token) q is as projected, and so are `new_k` and `new_v` [B, KV_HEADS * D], of the token at
    this position of the cache: q and new_k are normalised (where there is a weight) and rotated here, and the split
    that has the position writes new_k and new_v to the cache. EARLY: the mask and the cache but for this position were
    there before any kernel that may still run, and are read before the wait.
    """
    begin(PDL, EARLY)
    group = tl.program_id(0)
    split = tl.program_id(1)
    batch = (group // KV_HEADS).to(tl.int64)
    kv_head = (group % KV_HEADS).to(tl.int64)
    row = tl.arange(0, TILE)
    head = kv_head * GROUP + row % GROUP
    token = row // GROUP
    d = tl.arange(0, BLOCK_D)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    count = tl.cdiv(tl.cdiv(length, BLOCK) - split, splits)
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    v_ptr += batch * v_stride_b + kv_head * v_stride_h

    # Which blocks to walk: known on the device alone, since the fill of a static cache shows in the mask only.
    first, last, end = 0, count - 1, length
    mask_offsets, mask_rows = row, row >= 0
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride_b
        first, last, end = count, -1, 0
        for i in range(MASK_ROWS):
            row_ptr = mask_ptr + (kv_head * GROUP + i % GROUP) * mask_stride_h + i // GROUP * mask_stride_s
            row_first, row_last, row_end = visible_blocks(
                row_ptr, mask_stride_t, length, split, splits, count, VERY_LOW, BLOCK, SCAN
            )
            if mask_ptr.dtype.element_ty != tl.int1:
                # Low finite values count for nothing beside a higher one; among themselves they decide.
                others = row_last
                if row_last < 0:
                    others = any_visible(row_ptr, mask_stride_t, length, BLOCK * SCAN) - 1
                if others < 0:
                    row_first, row_last, row_end = visible_blocks(
                        row_ptr, mask_stride_t, length, split, splits, count, float("-inf"), BLOCK, SCAN
                    )
            first = tl.minimum(first, row_first)
            last = tl.maximum(last, row_last)
            end = tl.maximum(end, row_end)
        # One row, if all rows have the same mask: it is broadcast over the tile.
        i = tl.arange(0, TILE if MASK_ROWS > 1 else 1)
        mask_offsets = (kv_head * GROUP + i % GROUP) * mask_stride_h + i // GROUP * mask_stride_s
        mask_rows = i < MASK_ROWS
    ahead_end = last + 1 if AHEAD else first
    if AHEAD:
        if STAGES > 0:
            ahead_end = tl.where(last - first < FEW, last + 1, first)
        stop = tl.where(first < ahead_end, length, 0)  # behind it nothing is read
        start = (split + first * splits) * BLOCK
        k_lo, k_hi, v = _load_block(k_ptr, v_ptr, k_stride_t, v_stride_t, start, stop, D, HALF, BLOCK_D, BLOCK_H, BLOCK)
    q_norm_lo, q_norm_hi = load_halves(q_norm_ptr, 1, HALF, BLOCK_H)
    k_norm_lo, k_norm_hi = load_halves(k_norm_ptr, 1, HALF, BLOCK_H)
    if not PRIMED:
        before_activations(EARLY)

    q_ptr += (batch * q_stride_b + head * q_stride_h + token * q_stride_s)[:, None]
    if position_ptr is not None:
        given = (
            k_ptr, v_ptr, k_stride_t, v_stride_t, length, split, splits,
            position_ptr, new_k_ptr, new_v_ptr, (batch * KV_HEADS + kv_head) * D,
            q_norm_ptr, q_norm_lo, q_norm_hi, q_eps, k_norm_ptr, k_norm_lo, k_norm_hi, k_eps,
            cos_ptr, batch * cos_stride_b, cos_stride_d, sin_ptr, batch * sin_stride_b, sin_stride_d,
        )  # fmt: skip
    position = -1
    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([BLOCK_D, TILE], tl.float32)
    if PRIMED:
        # Triton asks for a pipeline's first blocks before its loop, and so before the wait in its first turn. The new
        # token's slot is read too early, then: it is attended to apart.
        q_lo = tl.zeros([TILE, BLOCK_H], k_ptr.dtype.element_ty)
        q_hi = q_lo
        for n in tl.range(first, tl.maximum(first, last) + 1, num_stages=STAGES):
            start = (split + n * splits) * BLOCK
            k_lo, k_hi, v = _load_block(
                k_ptr, v_ptr, k_stride_t, v_stride_t, start, end, D, HALF, BLOCK_D, BLOCK_H, BLOCK
            )
            if n == first:
                before_activations(EARLY)
                q_lo = tl.load(q_ptr + h, (row < ROWS)[:, None] & (h < HALF), other=0.0)
                q_hi = tl.load(q_ptr + HALF + h, (row < ROWS)[:, None] & (HALF + h < D), other=0.0)
                if position_ptr is not None:
                    q_lo, q_hi, new_k_lo, new_k_hi, new_v, position, mine, scale = _new_token(
                        q_lo, q_hi, scale, *given, D, HALF, BLOCK_D, BLOCK_H, BLOCK, HIGH
                    )
                    products = q_lo.to(tl.float32) * new_k_lo.to(tl.float32)
                    score = tl.sum(products + q_hi.to(tl.float32) * new_k_hi.to(tl.float32), 1) * scale
                    if mask_ptr is not None:
                        masked = mine
                        if MASK_ROWS == 1 and mask_ptr.dtype.element_ty == tl.int1:
                            # The last position seen is seen: no load then that waits for the position.
                            masked = mine & (position != end - 1)
                        offsets = mask_offsets + position.to(tl.int64) * mask_stride_t
                        bias = mask_bias(mask_ptr, offsets, mask_rows & masked)
                        score += tl.where(masked, bias, 0.0)
                    highest = tl.where(mine, score, highest)
                    total = tl.where(highest == float("-inf"), 0.0, 1.0)
                    acc += tl.where(mine, new_v, 0.0)
            if position_ptr is not None:
                v = tl.where((start + tl.arange(0, BLOCK) != position)[None, :], v, 0.0)  # for 0 * NaN is NaN
            highest, total, acc = _attend(
                highest, total, acc, q_lo, q_hi, k_lo, k_hi, v, scale, start, end,
                position if position_ptr is not None else None,
                mask_ptr, mask_offsets, mask_rows, mask_stride_t, BLOCK,
            )  # fmt: skip
    else:
        q_lo = tl.load(q_ptr + h, (row < ROWS)[:, None] & (h < HALF), other=0.0)
        q_hi = tl.load(q_ptr + HALF + h, (row < ROWS)[:, None] & (HALF + h < D), other=0.0)
        if position_ptr is not None:
            q_lo, q_hi, new_k_lo, new_k_hi, new_v, position, mine, scale = _new_token(
                q_lo, q_hi, scale, *given, D, HALF, BLOCK_D, BLOCK_H, BLOCK, HIGH
            )
        if AHEAD:
            for n in tl.range(first, ahead_end, num_stages=1):
                start = (split + n * splits) * BLOCK
                stop = tl.where(n + 1 < ahead_end, length, 0)
                next_k_lo, next_k_hi, next_v = _load_block(
                    k_ptr, v_ptr, k_stride_t, v_stride_t, start + splits * BLOCK, stop, D, HALF, BLOCK_D, BLOCK_H, BLOCK
                )
                if position_ptr is not None:
                    here = start + tl.arange(0, BLOCK) == position
                    k_lo = tl.where(here[:, None], new_k_lo, k_lo)
                    k_hi = tl.where(here[:, None], new_k_hi, k_hi)
                    v = tl.where(here[None, :], new_v, v)
                highest, total, acc = _attend(
                    highest, total, acc, q_lo, q_hi, k_lo, k_hi, v, scale, start, length, None,
                    mask_ptr, mask_offsets, mask_rows, mask_stride_t, BLOCK,
                )  # fmt: skip
                k_lo, k_hi, v = next_k_lo, next_k_hi, next_v
        if STAGES > 0:
            tl.debug_barrier()  # behind it all threads see the new key and value in the cache
            for n in tl.range(ahead_end, last + 1, num_stages=STAGES):
                start = (split + n * splits) * BLOCK
                k_lo, k_hi, v = _load_block(
                    k_ptr, v_ptr, k_stride_t, v_stride_t, start, length, D, HALF, BLOCK_D, BLOCK_H, BLOCK
                )
                highest, total, acc = _attend(
                    highest, total, acc, q_lo, q_hi, k_lo, k_hi, v, scale, start, length, None,
                    mask_ptr, mask_offsets, mask_rows, mask_stride_t, BLOCK,
                )  # fmt: skip

    if partial_ptr is None:
        # Where nothing is visible SDPA gives zeros.
        acc = acc / tl.where(total == 0.0, 1.0, total)[None, :]
        out_offsets = batch * out_stride_b + head * out_stride_h + token * out_stride_s
        stored = (row < ROWS)[None, :] & (d < D)
        tl.store(out_ptr + out_offsets[None, :] + d, acc.to(out_ptr.dtype.element_ty), stored)
    else:
        slot = (group.to(tl.int64) * ROWS + row) * splits + split
        all_slots = tl.num_programs(0).to(tl.int64) * ROWS * splits
        tl.store(stats_ptr + slot, highest, row < ROWS)
        tl.store(stats_ptr + all_slots + slot, total, row < ROWS)
        # Zeros from a split that saw nothing: the combine asks for all sums at once, without a look at `stats` before.
        acc = tl.where((total > 0.0)[None, :], acc, 0.0)
        tl.store(partial_ptr + slot[None, :] * D + d, acc, (row < ROWS)[None, :] & (d < D))


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial_ptr, stats_ptr, out_ptr, splits, out_stride_b, out_stride_h, out_stride_s,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[row] = the partial sums of all splits of one query in their order, over the sum of all weights. A program
    has PART numbers of a row."""
    begin(PDL, EARLY)
    before_activations(EARLY)
    row = tl.program_id(0).to(tl.int64)
    all_slots = tl.num_programs(0).to(tl.int64) * splits
    d = tl.program_id(1) * PART + tl.arange(0, PART)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([PART], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        slot = row * splits + split
        split_highest = tl.load(stats_ptr + slot, split < splits, other=float("-inf"))
        split_total = tl.load(stats_ptr + all_slots + slot, split < splits, other=0.0)
        read = (split < splits)[:, None] & (d < D)[None, :]
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


@dataclass(frozen=True)
class NewToken:
    """The one token whose attention it is, as projected: `attention` normalises and rotates it and writes it to the
    cache. k, v: [B, 1, Hkv * D] contiguous, in the cache's dtype or f32 ("high"); norm weights: [D] or None; cos, sin:
    [1 or B, 1, 1, D]; position: int64 [1]."""

    k: Tensor
    v: Tensor
    q_norm_weight: Tensor | None
    q_eps: float
    k_norm_weight: Tensor | None
    k_eps: float
    cos: Tensor
    sin: Tensor
    position: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    new: NewToken | None = None,
    high: bool = False,
    early: bool = False,
) -> None:
    """Write softmax(scale * q k^T + mask) v to `out`.

    q, out: [B, Hq, S, D], S * Hq / Hkv at most `MOST_QUERIES`; k, v: [B, Hkv, T, D]; all of stride 1 in D; mask: bool
    (True: visible) or additive, broadcastable to [B, Hq, S, T], or None. With `new` S is 1, q is as projected, and k
    and v are written at its position, if they have it.
    """
    batch, q_heads, seq, size = q.shape
    kv_heads, length = k.shape[1:3]
    group = q_heads // kv_heads
    rows = seq * group
    half = cdiv(size, 2)
    width = block_d(size)
    gpu = this_gpu()
    tile = gpu.columns if rows <= gpu.columns else MOST_QUERIES
    cut = plan(batch * kv_heads, size, length, k.element_size(), gpu)
    block, splits = cut.block, cut.splits
    # The mask of a split is looked through 2048 positions at a time.
    blocks = cdiv(cdiv(length, block), splits)
    scan = min(next_power_of_2(blocks), 2048 // block)
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
    token: tuple[Any, ...] = (None, None, None, None, None, 0.0, 0.0, None, None, 0, 0, 0, 0)
    if new is not None:
        cos, sin = (t.expand(batch, 1, 1, size) for t in (new.cos, new.sin))
        token = (
            new.position, new.k, new.v, new.q_norm_weight, new.k_norm_weight, new.q_eps, new.k_eps,
            cos, sin, cos.stride(0), cos.stride(3), sin.stride(0), sin.stride(3),
        )  # fmt: skip
    sizes = {"KV_HEADS": kv_heads, "GROUP": group, "ROWS": rows, "D": size}
    run(
        attention_kernel, (batch * kv_heads, splits),
        q, k, v, mask, out, partial, stats, scale, length, splits,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides, *out.stride()[:3], *token,
        **sizes, BLOCK_D=width, TILE=tile, MASK_ROWS=mask_rows, HALF=half, BLOCK_H=max(16, next_power_of_2(half)),
        BLOCK=block, SCAN=scan, AHEAD=cut.ahead, STAGES=cut.stages, PRIMED=cut.primed, HIGH=high, num_warps=4,
        enable_fp_fusion=high, **pdl_options(early),
    )  # fmt: skip
    if splits > 1:
        queries = batch * kv_heads * rows
        # Halves of heads while every program has a multiprocessor: a step of Qwen3-0.6B takes 499 -> 494 us, with two
        # sequences 613 -> 601. With eight, two programs a multiprocessor, 793 -> 825.
        part = width // 2 if 4 * queries <= gpu.programs else width
        run(
            combine_kernel, (queries, cdiv(size, part)),
            partial, stats, out, splits, *out.stride()[:3],
            **sizes, PART=part, CHUNK=min(next_power_of_2(splits), 4096 // part), num_warps=1,
            **pdl_options(early),
        )  # fmt: skip
