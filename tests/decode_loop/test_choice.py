"""Tokens are chosen as `torch.multinomial` does after the same processors."""

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusepass.decoding.choice import Choice

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROCESSORS: list[list[LogitsProcessor]] = [
    [],
    [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20), TopPLogitsWarper(0.95)],
    [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20)],
    [TopKLogitsWarper(5), MinPLogitsWarper(0.1)],
    [TopPLogitsWarper(0.7)],
    [TopPLogitsWarper(0.7), TopKLogitsWarper(20)],
    [TopKLogitsWarper(20), RepetitionPenaltyLogitsProcessor(3.0)],
]


def choose(choice: Choice, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    out = torch.full((len(logits),), -1, device=logits.device)
    return out, choice(logits, torch.zeros(3, len(logits), dtype=torch.long, device=logits.device), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("processors", PROCESSORS)
def test_a_choice_is_multinomials_after_the_same_processors(processors: list[LogitsProcessor], device: str) -> None:
    choice = Choice(LogitsProcessorList(processors), sample=True)
    # On a CPU, `torch.sort` leaves it open which of the tokens that tie top-p drops.
    ties = device == "cuda" or not any(isinstance(processor, TopPLogitsWarper) for processor in processors)
    for seed in range(40):
        logits = torch.randn(7, 2000, device=device) * 2
        logits = logits.mul(4).round().div(4) if ties else logits
        scores = LogitsProcessorList(processors)(torch.zeros(7, 3, dtype=torch.long, device=device), logits)
        torch.manual_seed(seed)
        want = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
        torch.manual_seed(seed)
        got, alarm = choose(choice, logits)
        assert torch.equal(got, want)
        assert alarm is not None
        assert torch.isfinite(alarm).all()


def test_a_choice_of_too_few_among_ties_says_so_and_a_wide_one_is_right() -> None:
    processors = LogitsProcessorList([TopKLogitsWarper(3), TopPLogitsWarper(0.9)])
    logits = torch.zeros(2, 1000)
    logits[0] = torch.arange(1000)
    choice = Choice(processors, sample=True)
    _, alarm = choose(choice, logits)
    assert alarm is not None
    assert torch.isinf(alarm).tolist() == [False, True]
    choice.widen()
    torch.manual_seed(1)
    want = torch.multinomial(torch.softmax(processors(logits.long(), logits), -1), 1).squeeze(1)
    torch.manual_seed(1)
    got, alarm = choose(choice, logits)
    assert torch.equal(got, want)
    assert alarm is not None
    assert torch.isfinite(alarm).all()


@pytest.mark.gpu
def test_a_recorded_choice_is_the_one_that_was_recorded_only_where_processors_look_at_logits_alone() -> None:
    processors = [TopKLogitsWarper(20), RepetitionPenaltyLogitsProcessor(3.0)]
    for some, recorded in ((processors, False), (processors[:1], True)):
        choice = Choice(LogitsProcessorList(some), sample=True)
        for _ in range(8):
            choose(choice, torch.randn(3, 5000, device="cuda"))
        assert (choice.graph is not None) == recorded
