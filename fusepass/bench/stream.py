"""The bandwidth that a plain read of memory reaches: the yardstick of the ideal."""

import torch
import triton
import triton.language as tl


@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Read STEPS * BLOCK numbers and write one: a stream that is never written back."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        total += tl.load(x_ptr + start + step * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def bandwidth() -> float:
    """Bytes per second that a read of 4 GB reaches on this GPU, measured now."""
    block, steps = 4096, 8
    x = torch.randint(1 << 30, (1 << 30,), dtype=torch.int32, device="cuda")
    out = torch.empty(x.numel() // (block * steps), dtype=torch.int32, device="cuda")
    ms = triton.testing.do_bench(
        lambda: read_kernel[(out.numel(),)](x, out, BLOCK=block, STEPS=steps), return_mode="median"
    )
    return x.numel() * x.element_size() / ms * 1e3
