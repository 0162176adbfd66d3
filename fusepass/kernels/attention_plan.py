"""How attention over a cache is cut into programs and blocks."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusepass.kernels.launch import cdiv, interpreted, is_hip, next_power_of_2

FEW = tl.constexpr(8)
"""Blocks of a split up to which it pays to ask for the first before the wait."""


class Gpu(NamedTuple):
    """What a plan depends on."""

    programs: int
    """How many to aim at: two for each multiprocessor."""
    shared: int
    """Bytes of shared memory that a program may take."""
    columns: int = 8
    """Of the smallest tile."""


@functools.cache
def _gpu(device: int) -> Gpu:
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return Gpu(2 * properties["multiprocessor_count"], properties["max_shared_mem"])


def this_gpu() -> Gpu:
    if interpreted():
        return Gpu(8, 96 << 10)
    gpu = _gpu(torch.cuda.current_device()) if torch.cuda.is_available() else Gpu(264, 227 << 10)
    return gpu._replace(shared=48 << 10, columns=16) if is_hip() else gpu


class Plan(NamedTuple):
    """How a launch is cut."""

    block: int
    """Positions of a block."""
    splits: int
    ahead: bool
    """Whether `FEW` visible blocks or less are each loaded into registers while the one before is attended to, and the
    first one before the kernel waits."""
    stages: int
    """Of the pipeline through shared memory that takes all others; 0 where there are none."""
    primed: bool = False
    """Whether the pipeline asks for its first blocks before the kernel waits."""


@functools.lru_cache(4096)
def plan(groups: int, size: int, length: int, element_size: int, gpu: Gpu) -> Plan:
    """For `groups` K/V heads in all sequences together, of `size` elements, and a cache of `length` positions."""
    # Blocks of 8 KB of K, 32 positions of a bf16 head of 128, fit registers twice: the best for few groups.
    row = block_d(size) * element_size
    block = max(16, min(64, 8192 // row))
    blocks = cdiv(length, block)
    # A power of two, as the tile of the combine has: 33 splits take 0.8 us more than 32.
    most = 1 << (max(1, gpu.programs // groups).bit_length() - 1)
    splits = min(blocks, most)
    few_groups = most >= 16
    if blocks <= (FEW.value if few_groups else 4) * splits:
        return Plan(block, splits, ahead=True, stages=0)
    if few_groups:
        return Plan(block, splits, ahead=True, stages=3)
    # Few splits of many blocks: larger ones, but as soon as one split has one block more, all wait for it. Blocks of
    # 128 were faster where none has, and slower elsewhere: see docs/performance.md.
    block *= 2
    splits = min(cdiv(length, block), most)
    # A step of Qwen3-0.6B with 8 rows (4 blocks a split) takes 821 us instead of 877 so, at 537 positions, with 16 rows
    # 1518 instead of 1557. But a block costs more: with 32 rows (16 blocks a split) it takes 1428 instead of 1383. And
    # in f32 registers spill.
    primed = cdiv(length, block) <= FEW.value * splits and element_size < 4
    # Triton keeps one stage less than it counts in shared memory (with 16 queries, through wgmma on sm_90, as many).
    stages = max(1, min(3 if primed else 4, gpu.shared // (2 * block * row)))
    return Plan(block, splits, ahead=False, stages=stages, primed=primed)


def block_d(size: int) -> int:
    """The tile of a head of `size` elements."""
    return max(16, next_power_of_2(size))
