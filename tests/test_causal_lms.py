"""Ten models of other families give eager's logits; `make all-models` does every one, and its page is up to date."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fusepass.patterns.norm_gated_mlp import NormGatedMLPFusion
from tests.causal_lms import judge as judging
from tests.causal_lms import page
from tests.causal_lms.judge import NOT_BUILT, NOT_COMPILED, NOT_RUN, OURS, SAME, difference, judge
from tests.causal_lms.process import in_a_process

FAMILIES = ("llama", "gemma2", "phi3", "olmo2", "cohere", "mixtral", "gpt2", "deepseek_v3", "mamba", "granite")
"""One each: plain, (1 + weight) norms, packed projections, norms behind the layers, interleaved rotary, experts,
no RMSNorm, latent attention, no attention, multipliers."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_of_another_family_gives_eagers_logits_and_fuses_what_the_record_says(model_type: str) -> None:
    verdict = judge(model_type)
    assert (verdict.outcome, verdict.reason) == (SAME, "")
    assert verdict.fused == page.read()[model_type]["fused"]


def test_the_record_has_every_causal_lm_and_no_fault_of_ours() -> None:
    records = page.read()
    assert records.keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert [name for name, record in records.items() if record["outcome"] == OURS] == []


def test_the_page_of_all_models_is_up_to_date() -> None:
    assert page.PAGE.read_text() == page.text(page.read())


def test_a_wrong_rewrite_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NormGatedMLPFusion.rewrite

    def without_residual(self: Any, match: Any, high: bool) -> Any:
        overload, arguments = right(self, match, high)
        return overload, (*arguments[:9], None, *arguments[10:])

    monkeypatch.setattr(NormGatedMLPFusion, "rewrite", without_residual)
    verdict = judge("llama")
    assert verdict.outcome == OURS
    assert verdict.reason.startswith("logits differ by ")


def test_what_fails_in_fusepass_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, match: Any) -> None:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(NormGatedMLPFusion, "check", fail)
    verdict = judge("llama")
    assert (verdict.outcome, verdict.reason) == (OURS, "a fault in fusepass: ZeroDivisionError: here")


def test_what_eager_dynamo_does_to_a_model_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Linear.forward

    def other_when_compiled(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * (2 if torch.compiler.is_compiling() else 1)

    monkeypatch.setattr(nn.Linear, "forward", other_when_compiled)
    assert judge("gpt2").outcome == NOT_COMPILED


def test_what_cannot_be_built_or_run_eagerly_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (judge("dbrx").outcome, "rope_theta" in judge("dbrx").reason) == (NOT_BUILT, True)

    def fail(model: Any) -> None:
        raise NotImplementedError("not now")

    monkeypatch.setattr(judging, "generate", fail)
    verdict = judge("gpt2")
    assert (verdict.outcome, verdict.reason) == (NOT_RUN, "NotImplementedError: not now")


def test_a_model_that_takes_too_long_or_ends_its_process_takes_no_other_with_it() -> None:
    assert in_a_process("llama", timeout=0.0).reason == "no answer within 0 s"
    assert in_a_process("no such model", timeout=100).outcome == NOT_BUILT


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [([1.0, 2.0], [1.0, 2.0], 0.0), ([1.0, 3.0], [1.0, 4.0], 0.25), ([float("nan"), 4.0], [float("nan"), 4.0], 0.0)],
)
def test_a_difference_is_in_parts_of_the_largest_logit(got: list[float], want: list[float], error: float) -> None:
    assert difference([torch.tensor(got)], [torch.tensor(want)]) == error


def test_a_nan_that_eager_has_not_is_a_difference() -> None:
    assert not difference([torch.tensor([float("nan")])], [torch.tensor([1.0])]) <= 1
