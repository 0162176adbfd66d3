"""Whatever is fused of a drawn block, it computes what eager does. `make fuzz` draws 10,000 of them.

A plan that fails is printed with a blob that reproduces it: it stays here as an `@example` of `one`.
"""

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from fusepass import validity
from fusepass.patterns import norm_gated_mlp
from tests.fuzz.blocks import Plan
from tests.fuzz.judge import Verdict, judge
from tests.fuzz.plans import plans

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))


def fuzz(count: int, strategy: st.SearchStrategy[Plan]) -> Counter[str]:
    """Judge `count` plans. How many of those that eager runs had a site that was fused, and one that was refused."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        print_blob=True,
        suppress_health_check=[*HealthCheck],
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    )
    @example(
        Plan(
            parts=("attention",), spelling={"attend": "repeat_interleave"}, heads=(2, 4, 4), cache="static", mask="bool"
        )
    )
    @example(
        Plan(
            parts=("attention",), spelling={"square": "h * h.abs()"}, heads=(6, 2, 2), cache="none", mask="bool",
            batch=2, seq=1,
        )
    )  # fmt: skip
    @given(strategy)
    def one(plan: Plan) -> None:
        verdict = judge(plan)
        if verdict is not None:
            seen.update(run=1, fused=verdict.fused > 0, refused=verdict.refused > 0)

    one()
    return seen


def test_whatever_is_fused_of_a_drawn_block_computes_what_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    seen = fuzz(EXAMPLES, plans())
    print(f"\n{dict(seen)}")
    # Plans of which nothing is fused judge nothing, and without refusals they are not daring enough.
    assert seen["run"] > 0.6 * EXAMPLES
    assert seen["fused"] > 0.5 * seen["run"]
    assert seen["refused"] > 0.15 * seen["run"]


def test_the_kernels_compute_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, where a launch takes milliseconds: few plans, in f32, which needs few draws."""
    monkeypatch.setenv("FUSEPASS_CPU", "interpret")
    seen = fuzz(EXAMPLES // 10, plans(dtype=st.just(torch.float32)))
    print(f"\n{dict(seen)}")
    assert seen["fused"] > 0.1 * seen["run"] > 0


def test_a_plan_that_eager_refuses_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view, in halves, of a mean over everything: an IndexError."""
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    deeds = (("q_norm mean", "a view returned"),)
    assert judge(Plan(parts=("attention",), spelling={"mean": "everything"}, deeds=deeds)) is None


WRITTEN = Plan(parts=("mlp",), deeds=(("act", "write down"),))


@pytest.mark.parametrize("fault", ["unchecked", "another activation", "a fault of ours"])
def test_a_fault_in_fusepass_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    assert judge(WRITTEN) == Verdict(fused=2, refused=1)  # the norm and down for themselves, the MLP not
    assert judge(Plan(parts=("mlp",))) == Verdict(fused=1, refused=0)
    if fault == "unchecked":
        monkeypatch.setattr(validity, "check", lambda *_: None)
    elif fault == "another activation":
        monkeypatch.setattr(norm_gated_mlp, "activation_of", lambda node: (node.args[0], "gelu_tanh"))
    else:
        monkeypatch.setattr(validity, "insertion_point", lambda *_: None)
    with pytest.raises(AssertionError):
        judge(WRITTEN if fault == "unchecked" else Plan(parts=("mlp",)))
