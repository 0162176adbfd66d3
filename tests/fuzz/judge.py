"""Run a plan with fusepass and without, and compare everything that can be seen: results, inputs, weights, strides."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import fusepass
from tests.fuzz.blocks import HIDDEN, INTERMEDIATE, Plan
from tests.fuzz.module import Block, inputs
from tests.gate import FACTOR, rms


@dataclass(frozen=True)
class Verdict:
    """How many sites of the graph were fused and refused."""

    fused: int
    refused: int


def _seen(block: Block, given: tuple[Any, ...]) -> tuple[list[Tensor], list[int]]:
    """What the caller sees of a call: its results and what it left in the inputs and in the weights; and for each of
    these tensors, which is the first that shares its memory."""
    leaves = [leaf for leaf in pytree.tree_leaves((block(*given), given, dict(block.weights))) if leaf is not None]
    memory = [leaf.untyped_storage()._cdata for leaf in leaves]
    # The next call writes the weights again.
    return [leaf.clone() for leaf in leaves], [memory.index(one) for one in memory]


def _judge(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert (ours.shape, ours.dtype, ours.stride()) == (eager.shape, eager.dtype, eager.stride())
    if torch.equal(ours, eager) or not ours.is_floating_point():
        assert torch.equal(ours, eager)
        return
    assert torch.equal(ours.isfinite(), eager.isfinite())
    if not eager.isfinite().all() or not exact.isfinite().all():  # nothing to measure an error by
        torch.testing.assert_close(ours, eager, equal_nan=True)
        return
    # Summation order alone moves a single f32 ratio between 0.45 and 2.2: DESIGN's floor.
    floor = 4 * torch.finfo(torch.float32).eps * max(HIDDEN, INTERMEDIATE) ** 0.5 * rms(exact)
    error, allowed = rms(ours - exact), max(FACTOR * rms(eager - exact), floor)
    assert error <= allowed, f"error {error:.3e}, eager's {rms(eager - exact):.3e}"


@torch.no_grad()
@sdpa_kernel(SDPBackend.MATH)  # of scores that are nan, torch's flash kernel for CPUs makes finite numbers
def judge(plan: Plan) -> Verdict | None:
    """What was fused in `plan`, which computes what eager does, or fails; None if eager itself refuses to run it."""
    block = Block(plan)
    eager, exact = copy.deepcopy(block), copy.deepcopy(block).exact()
    calls = [inputs(plan, seq) for seq in (plan.seq, plan.seq + 2 * plan.dynamic)]
    try:
        wanted = [_seen(eager, copy.deepcopy(call)) for call in calls]
        best = [_seen(exact, pytree.tree_map(_in_f64, call)) for call in calls]
    except (RuntimeError, IndexError):  # shapes that do not fit, a write to a tensor that lies over itself
        return None
    torch._dynamo.reset()
    fusepass.reset()
    compiled = torch.compile(block, backend="fusepass", options={"remainder": "eager"}, dynamic=plan.dynamic)
    for call, (want, shared), (truth, _) in zip(calls, wanted, best):
        got, sharing = _seen(compiled, call)
        assert sharing == shared
        for item in zip(got, want, truth, strict=True):
            _judge(*item)
    reports = fusepass.reports()
    assert [report.untouched for report in reports if report.untouched] == []
    sites = [site for site in reports[-1].sites if site.inputs]
    return Verdict(sum(site.fused for site in sites), sum(not site.fused for site in sites))


def _in_f64(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.double() if x.is_floating_point() else x.clone()
