"""The steps themselves, with scripted logits: what the host reads and when, and what is undone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import fusepass
from fusepass.decoding.steps import Results
from tests.decode_loop.common import RUN_AHEAD, STATIC, TEXTS, Recorder, Scripted, kv


@pytest.mark.parametrize("sample", [False, True])
def test_nothing_reads_logits_that_the_next_step_has_written_over(
    sample: bool, model: Any, tokenize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tokenize(*TEXTS[:2])
    peaks = torch.randint(250, (12, 2))
    noise = torch.randn(12, 2, 264)
    scripted = Scripted(model, lambda i: noise[i] + torch.nn.functional.one_hot(peaks[i], 264) * 1e4, monkeypatch)
    loop = fusepass.decode_loop(run_ahead=5)
    ours = model.generate(
        **inputs, max_new_tokens=13, do_sample=sample, eos_token_id=263, custom_generate=loop, **STATIC
    )
    assert scripted.calls == 12
    assert torch.equal(ours[:, -12:], peaks.t())


@pytest.mark.parametrize("run_ahead", [0, 1, 5])
def test_the_host_learns_of_the_end_run_ahead_steps_late_and_no_later(
    run_ahead: int, model: Any, tokenize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = torch.tensor([7, 7, 263, 8, 8, 8, 8, 8, 8, 8, 8, 8])
    scripted = Scripted(model, lambda i: torch.nn.functional.one_hot(peaks[i : i + 1], 264).float(), monkeypatch)
    loop = fusepass.decode_loop(run_ahead=run_ahead)
    ours = model.generate(**tokenize(TEXTS[0]), max_new_tokens=13, eos_token_id=263, custom_generate=loop, **STATIC)
    assert ours[0, -3:].tolist() == [7, 7, 263]
    assert scripted.calls == 3 + run_ahead


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_a_tie_of_many_tokens_is_chosen_from_again_among_all(
    run_ahead: int, model: Any, tokenize: Any, monkeypatch: pytest.MonkeyPatch, reasons: Any
) -> None:
    inputs = tokenize(TEXTS[0], TEXTS[0])
    settings = {"max_new_tokens": 16, "do_sample": True, "top_k": 20, "cache_implementation": "static"}
    steps = [torch.randn(2, 264) * 3 for _ in range(15)]
    for i in (4, 5, 11):
        steps[i][1] = 0.5  # top-k keeps all 264 of the tie, and the choice looks at 104
    for i, step in enumerate(steps):
        step[0, 99] = 100.0 if i == 13 else -100.0  # the end of row 0
    steps[13][1, 99] = 100.0
    sequences, calls = [], []
    for loop in (None, fusepass.decode_loop(run_ahead=run_ahead)):
        with monkeypatch.context() as patch:
            scripted = Scripted(model, steps.__getitem__, patch)
            torch.manual_seed(3)
            sequences.append(model.generate(**inputs, **settings, eos_token_id=99, custom_generate=loop))
            calls.append(scripted.calls)
    assert torch.equal(*sequences)
    assert calls[1] == calls[0] + 1 + run_ahead + min(run_ahead, 1)  # the choice again, and what was surplus each time
    assert not reasons()


def test_an_end_that_was_undone_ends_nothing(
    model: Any, tokenize: Any, monkeypatch: pytest.MonkeyPatch, reasons: Any
) -> None:
    inputs = tokenize(TEXTS[0], TEXTS[0])
    ends = torch.full((2, 264), 0.5).topk(104).indices[1].tolist()  # all that the choice looks at in step 4
    others = [token for token in range(250) if token not in ends]
    steps = [torch.randn(2, 264) for _ in range(11)]
    for i, step in enumerate(steps):
        step[:, others[i]] = 100.0
    steps[4][1] = 0.5
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 20, "cache_implementation": "static"}
    settings |= {"eos_token_id": ends, "pad_token_id": 257}
    for seed in range(20):
        sequences = []
        for loop in (None, fusepass.decode_loop(run_ahead=3)):
            with monkeypatch.context() as patch:
                Scripted(model, steps.__getitem__, patch)
                torch.manual_seed(seed)
                sequences.append(model.generate(**inputs, **settings, custom_generate=loop))
        assert torch.equal(*sequences)
        if int(sequences[0][1, -1]) == others[10] and not reasons():
            return
    raise AssertionError("no seed drew a token in step 4 that ends nothing")


def test_probabilities_that_are_nan_are_the_error_of_hugging_face_and_leave_its_random_state(
    model: Any, tokenize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**tokenize(TEXTS[0]), "max_new_tokens": 9, "do_sample": True, "cache_implementation": "static"}
    settings["eos_token_id"] = 999  # none
    messages = []
    for loop in (None, fusepass.decode_loop(run_ahead=2)):
        with monkeypatch.context() as patch:
            Scripted(model, lambda i: torch.full((1, 264), float("nan") if i > 3 else 1.0), patch)
            torch.manual_seed(4)
            with pytest.raises(RuntimeError) as error:
                model.generate(**settings, custom_generate=loop)
            messages.append((str(error.value), torch.rand(1).item()))
    assert messages[0] == messages[1]


class Enough(Exception):
    pass


class Stopping(Recorder):
    """A streamer whose user has read enough."""

    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.pieces) == 5:
            raise Enough


def test_a_streamer_that_raises_finds_random_state_and_cache_as_hugging_face_leaves_them(
    model: Any, tokenize: Any, reasons: Any
) -> None:
    inputs = tokenize(TEXTS[0])
    left = []
    for custom in (False, True):
        cache, streamer = StaticCache(config=model.config, max_cache_len=60), Stopping()
        way = {"custom_generate": fusepass.decode_loop(streamer, run_ahead=3)} if custom else {"streamer": streamer}
        torch.manual_seed(4)
        with pytest.raises(Enough):
            model.generate(**inputs, max_new_tokens=20, do_sample=True, past_key_values=cache, **way)
        left.append((streamer.pieces, torch.rand(1).item(), int(cache.get_seq_length()), kv(cache)))
    theirs, ours = left
    assert ours[:3] == theirs[:3]
    torch.testing.assert_close(ours[3], theirs[3])
    assert not reasons()


def test_tokens_are_read_on_the_host_whatever_the_default_device_is() -> None:
    token = torch.tensor([7])
    with torch.device("meta"):
        results = Results(token, token, run_ahead=0, streamer=None, sample=False)
    assert results.read(0) == "ended"
