"""Tokens are chosen as `torch.multinomial` does after the same processors."""

import math
from typing import Any
from unittest import mock

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

from fusepass.decoding.choice import Choice, _settings, _split
from fusepass.kernels import KernelUnavailable
from fusepass.kernels.sample import fits, sample
from tests.ops.gate import poisoned

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = {"cpu": 1, "cuda": 2}
"""Where a row of 128 likely tokens takes Triton's interpreter half a minute, one is enough."""
PROCESSORS: list[list[LogitsProcessor]] = [
    [],
    [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20), TopPLogitsWarper(0.95)],
    [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20)],
    [TopKLogitsWarper(5), MinPLogitsWarper(0.1)],
    [TopKLogitsWarper(20), MinPLogitsWarper(0.9, min_tokens_to_keep=5)],
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
    for seed in range(40):
        logits = torch.randn(7, 2000, device=device).mul(2 * 4).round().div(4)
        scores = LogitsProcessorList(processors)(torch.zeros(7, 3, dtype=torch.long, device=device), logits)
        torch.manual_seed(seed)
        want = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
        torch.manual_seed(seed)
        got, alarm = choose(choice, logits)
        assert torch.equal(got, want)
        assert alarm is not None
        assert torch.isfinite(alarm).all()


def test_the_likeliest_token_is_that_of_the_logits_in_f32() -> None:
    logits = torch.zeros(1, 9, dtype=torch.float64)
    logits[0, 5] = 1e-9 + 1
    logits[0, 2] = 1
    token, _ = choose(Choice(LogitsProcessorList([]), sample=False), logits)
    assert token.item() == 2, "the first of a tie"


def test_a_choice_of_too_few_among_ties_says_so_and_a_wide_one_is_right() -> None:
    processors = LogitsProcessorList([TopKLogitsWarper(3), MinPLogitsWarper(0.9)])
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


SETTINGS: list[list[LogitsProcessor]] = [
    [TopKLogitsWarper(1)],
    [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20), TopPLogitsWarper(0.95)],
    [TopKLogitsWarper(5), MinPLogitsWarper(0.1)],
    [
        TemperatureLogitsWarper(1.5),
        TopKLogitsWarper(128),
        TopPLogitsWarper(0.3, min_tokens_to_keep=4),
        MinPLogitsWarper(0.5),
    ],
]


def sampled(processors: list[LogitsProcessor], logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels choose, in Triton's interpreter on a CPU."""
    settings = _settings(*_split(processors))
    assert settings is not None
    assert fits(len(logits), logits.shape[1], settings["top_k"])
    with poisoned():
        return sample(logits, noise, **settings)


def wanted(processors: list[LogitsProcessor], logits: Tensor, noise: Tensor) -> Tensor:
    """Which of the tokens that tie top-p drops is open on a CPU: `torch.sort` is made stable, as it is on a GPU."""
    tokens, sort = torch.zeros(len(logits), 3, dtype=torch.long, device=logits.device), torch.sort
    with mock.patch("torch.sort", lambda *args, **kwargs: sort(*args, **kwargs, stable=True)):
        scores = LogitsProcessorList(processors)(tokens, logits)
    return torch.argmax(torch.softmax(scores, -1) / noise, -1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("processors", SETTINGS)
def test_the_kernels_choose_what_the_processors_leave_and_multinomial_draws(
    processors: list[LogitsProcessor], device: str
) -> None:
    settings = _settings(*_split(processors))
    assert settings is not None
    for vocabulary in [151_936, 512 * settings["top_k"] + 77] * 20 if device == "cuda" else [512 * settings["top_k"]]:
        logits = torch.randn(ROWS[device], vocabulary, device=device).mul(3 * 8).round().div(8)  # 0.0 and -0.0 tie, too
        noise = torch.empty_like(logits).exponential_()
        got, alarm = sampled(processors, logits, noise)
        assert torch.equal(got, wanted(processors, logits, noise))
        assert torch.isfinite(alarm).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("processors", SETTINGS[1:])
@pytest.mark.parametrize(("likely", "dtype"), [(15, torch.bfloat16), (60, torch.float32), (200, torch.bfloat16)])
def test_the_kernels_choose_among_likely_tokens_that_are_neighbours(
    likely: int, dtype: torch.dtype, processors: list[LogitsProcessor], device: str
) -> None:
    """In few chunks: far more than k reach the k-th largest of the chunks' maxima."""
    settings = _settings(*_split(processors))
    assert settings is not None
    logits = torch.randn(ROWS[device], 512 * settings["top_k"], device=device)
    logits[:, 300 : 300 + likely] += 9.0 * torch.rand(ROWS[device], likely, device=device)
    logits = logits.to(dtype)
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
    got, alarm = sampled(processors, logits, noise)
    assert torch.equal(got, wanted(processors, logits.float(), noise))
    assert torch.isfinite(alarm).all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_tell_where_there_is_no_distribution_or_too_many_tie(device: str) -> None:
    logits = torch.randn(6, 20_000, device=device)
    logits[1, 7000] = math.nan
    logits[2, 19_999] = math.inf
    logits[3] = -math.inf
    logits[4] = 0.0
    logits[5, 30:] = -math.inf  # fewer than k: all of them are kept
    noise = torch.empty_like(logits).exponential_()
    got, alarm = sampled(SETTINGS[1], logits, noise)
    assert torch.isnan(alarm).tolist() == [False, True, True, True, False, False]
    assert torch.isinf(alarm).tolist() == [False, False, False, False, True, False]
    assert ((got >= 0) & (got < 20_000)).all(), "tokens that the forward can take, whatever the host learns later"
    kept = torch.tensor([0, 5], device=device)
    assert torch.equal(got[kept], wanted(SETTINGS[1], logits[kept], noise[kept]))


@pytest.mark.parametrize(
    "processors",
    [
        [],
        [TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.9)],
        [TopKLogitsWarper(20), TemperatureLogitsWarper(0.6)],
        [TopPLogitsWarper(0.9), TopKLogitsWarper(20)],
        [TopKLogitsWarper(20), TopKLogitsWarper(5)],
        [TopKLogitsWarper(20, filter_value=-1e4)],
        [TopKLogitsWarper(20), MinPLogitsWarper(0.1, min_tokens_to_keep=2)],
        [TopKLogitsWarper(20), RepetitionPenaltyLogitsProcessor(3.0)],
    ],
)
def test_other_processors_are_not_taken_for_those_of_the_kernels(processors: list[LogitsProcessor]) -> None:
    assert _settings(*_split(processors)) is None


def test_a_vocabulary_of_few_chunks_or_a_large_k_is_left_to_torch() -> None:
    assert fits(1, 151_936, 128)
    assert not fits(1, 151_936, 129)
    assert not fits(1, 2_000, 20)
    assert not fits(1, 1 << 22, 20)
    assert not fits(1 << 16, 151_936, 20)


@pytest.mark.gpu
def test_kernels_that_can_not_be_made_leave_the_choice_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable(*_: Any, **__: Any) -> None:
        raise KernelUnavailable("no shared memory")

    logits = torch.randn(3, 50_000, device="cuda")
    torch.manual_seed(3)
    want, _ = choose(Choice(LogitsProcessorList(SETTINGS[1]), sample=True), logits)
    monkeypatch.setattr("fusepass.kernels.sample.run", unavailable)
    choice = Choice(LogitsProcessorList(SETTINGS[1]), sample=True)
    with caplog.at_level("WARNING", "fusepass"):
        torch.manual_seed(3)
        got, _ = choose(choice, logits)
        choose(choice, logits)
    assert torch.equal(got, want)
    assert [record.getMessage() for record in caplog.records] == [
        "decode_loop: tokens are chosen in plain torch: no shared memory"
    ]


@pytest.mark.gpu
def test_a_choice_among_more_than_the_kernels_have_room_for_is_torchs_and_then_of_all() -> None:
    processors = LogitsProcessorList(SETTINGS[1])
    choice = Choice(processors, sample=True)
    logits = torch.randn(2, 50_000, device="cuda")
    logits[:, :2000] += 20  # in 8 chunks, fewer than k: the bound lies below all of them
    for tries in (1, 0):
        torch.manual_seed(1)
        got, alarm = choose(choice, logits)
        assert alarm is not None
        assert torch.isinf(alarm).all() == bool(tries)
        assert bool(choice.settings) == bool(tries)
        if tries:
            choice.widen()
            assert choice.few, "top-k still spares the others the whole vocabulary"
    torch.manual_seed(1)
    want = torch.multinomial(torch.softmax(processors(torch.zeros(2, 3, device="cuda").long(), logits), -1), 1)
    assert torch.equal(got, want.squeeze(1))


def test_a_choice_may_be_recorded_only_where_processors_look_at_logits_alone() -> None:
    processors = [TopKLogitsWarper(20), RepetitionPenaltyLogitsProcessor(3.0)]
    assert Choice(LogitsProcessorList(processors[:1]), sample=True).recordable
    assert Choice(LogitsProcessorList(), sample=False).recordable
    assert not Choice(LogitsProcessorList(processors), sample=True).recordable
    assert not Choice(LogitsProcessorList(processors[1:]), sample=False).recordable
