"""Every op at odd sizes and two decode steps of a model, without CUDA graphs: a program for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m tests.sanitize

After the word "finished" come two faults that a working sanitizer finds. (PyTorch's memory pool would hide both.)
"""

import torch
import triton
import triton.language as tl

import fusepass
from tests.decoding import DEVICE, decode, decoder, draw_tokens, fill
from tests.models import static_cache
from tests.ops.sites import SITES, as_tuple, sample

STEPS = ((1, 1), (1, 7), (5, 13))
"""Batch and sequence of what the row-vector kernels, the skinny kernels and library GEMMs run."""


@triton.jit
def faulty_read_kernel(source_ptr, target_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets))


@triton.jit
def faulty_write_kernel(target_ptr, BLOCK: tl.constexpr):
    tl.store(target_ptr + tl.arange(0, BLOCK), 1.0)


def plant_faults() -> None:
    """A read of memory that nobody has written, and a write past the end of a tensor, which ends the process."""
    faulty_read_kernel[(1,)](torch.empty(1024, device=DEVICE), torch.empty(1024, device=DEVICE), BLOCK=1024)
    faulty_write_kernel[(1,)](torch.empty(1000, device=DEVICE), BLOCK=2048)
    torch.cuda.synchronize()


def run_every_op() -> None:
    for name, site in SITES.items():
        for (batch, seq), optional in zip(STEPS, (True, False, True)):
            outputs = as_tuple(site.op.overload(*sample(name, batch, seq, optional=optional).values()))
            assert all(output.isfinite().all() for output in outputs)


def run_a_model() -> None:
    model = decoder()
    run = torch.compile(model, backend="fusepass", options={"remainder": "eager"})
    for batch in (1, 3):
        cache = static_cache(model, batch, 77)
        fill([cache], 70)
        assert decode(run, cache, draw_tokens(batch, 2)).isfinite().all()
    assert {site.fused for report in fusepass.reports() for site in report.sites} == {True}


@torch.no_grad()
def main() -> None:
    run_every_op()
    run_a_model()


if __name__ == "__main__":
    main()
    print("finished", flush=True)
    plant_faults()
