"""For compute-sanitizer: every op at odd sizes, every plan of attention, two decode steps of a model, and sampled
tokens, without CUDA graphs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m tests.sanitize

After the word "finished" come two faults that a working sanitizer finds. (PyTorch's memory pool would hide both.)
"""

from unittest import mock

import torch
import triton
import triton.language as tl

import fusepass
from fusepass import tuning
from fusepass.kernels import attention, gemv
from fusepass.kernels import sample as sampling
from fusepass.kernels.attention_plan import Plan
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


def run_one_row_on_tensor_cores() -> None:
    """What only tables ask for: 3 tiles of K, the last cut off, and rows that are no multiple of a tile."""
    config, k, sizes = {"BLOCK_N": 8, "CHUNKS": 2, "AHEAD": 2, "num_warps": 2}, 1101, (13, 21, 5)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)

    x, norm, weights, biases = drawn(1, k), drawn(k), [drawn(n, k) for n in sizes], [drawn(n) for n in sizes]
    outs = [torch.empty(1, n, dtype=x.dtype, device=DEVICE) for n in sizes]
    keys = [("linears", sum(sizes)), ("linears", sizes[0]), ("gated", sizes[0])]
    with tuning.override({tuning.key(name, 1, n, k, x.dtype): config for name, n in keys}):
        gemv.linears(x, norm, 1e-6, weights, biases, outs, None, False, True)
        gemv.linears(x, None, 0.0, weights[:1], [None], outs[:1], outs[0].clone(), False, True)
        gate, up = weights[0], drawn(sizes[0], k)
        gemv.gated(x, norm, 1e-6, gate, up, biases[0], biases[0], outs[0], "silu", False, True)
    assert all(out.isfinite().all() for out in outs)


def run_every_plan_of_attention() -> None:
    """Of which some are for many sequences and long caches; here in blocks of 16, more than are loaded ahead."""
    arguments = sample("self_attention", 2, 1)
    arguments |= {name: arguments[name].repeat(1, 1, 2, 1) for name in ("k_cache", "v_cache")}
    visible = torch.rand(2, 1, 1, arguments["k_cache"].shape[2], device=DEVICE) < 0.9
    for plan in (Plan(16, 2, True, 0), Plan(16, 1, True, 3), Plan(16, 2, False, 4), Plan(16, 2, False, 3, primed=True)):
        with mock.patch.object(attention, "plan", lambda *_, plan=plan: plan):
            for mask in (None, visible):
                output = SITES["self_attention"].op.overload(*(arguments | {"mask": mask}).values())
                assert output.isfinite().all()


def run_a_model() -> None:
    model = decoder()
    run = torch.compile(model, backend="fusepass", options={"remainder": "eager"})
    for batch in (1, 3):
        cache = static_cache(model, batch, 77)
        fill([cache], 70)
        assert decode(run, cache, draw_tokens(batch, 2)).isfinite().all()
    assert {site.fused for report in fusepass.reports() for site in report.sites} == {True}


def run_sampling() -> None:
    """Of a vocabulary that is no multiple of a tile; in the last row more numbers are equal than there is room for."""
    logits = torch.randn(3, 5003, device=DEVICE)
    logits[2, 7 : 7 + 2 * sampling.ROOM] = 9.0
    tokens, alarm = sampling.sample(logits, torch.rand_like(logits) + 0.1, 0.7, 9, (0.9, 1), 0.05)
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
    assert alarm.isinf().tolist() == [False, False, True]


@torch.no_grad()
def main() -> None:
    run_every_op()
    run_one_row_on_tensor_cores()
    run_every_plan_of_attention()
    run_a_model()
    run_sampling()


if __name__ == "__main__":
    main()
    print("finished", flush=True)
    plant_faults()
