"""`decode_loop` gives what Hugging Face's own loop gives, without its waits, and hands back what it can not do so."""

import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fusepass
from fusepass.decoding.choice import Choice
from fusepass.decoding.handback import CACHES_ARE_MARKED
from tests.models import small_qwen3

EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "tiny-qwen3"
# Before transformers marked the caches that users give, a loop that is to bring none must be told so.
STATIC: dict[str, Any] = {} if CACHES_ARE_MARKED else {"cache_implementation": "static"}
TEXTS = ["Once upon a time", "The fox", "A little girl sat by the river"]
RUN_AHEAD = [0, 3]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads take ten times as long where another process keeps a core busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenize() -> Callable[..., Any]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    return lambda *texts: tokenizer(list(texts), return_tensors="pt", padding=True)


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Why calls were handed back, so far."""
    caplog.set_level(logging.INFO, "fusepass.decoding")
    return lambda: [record.args[2] for record in caplog.records if "handed back" in record.msg]


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.pieces.append("end")


def ends_at(tokens: Tensor, prompt: int, *steps: int) -> list[int]:
    """Tokens to use as ends, so that row i of greedy `tokens` ends in step `steps[i]` (from 0) at the latest."""
    return [int(tokens[row, prompt + step]) for row, step in enumerate(steps)]


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
@pytest.mark.parametrize("count", [1, 2, 40])
def test_greedy_tokens_of_one_prompt_are_those_of_hugging_face(
    count: int, run_ahead: int, model: Any, tokenize: Any, reasons: Any
) -> None:
    inputs = tokenize(TEXTS[0])
    plain = model.generate(**inputs, max_new_tokens=count)
    loop = fusepass.decode_loop(run_ahead=run_ahead)
    ours = model.generate(**inputs, max_new_tokens=count, custom_generate=loop, **STATIC)
    assert ours.shape[1] == inputs["input_ids"].shape[1] + count
    assert torch.equal(ours, plain)
    assert not reasons()


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_sequences_of_a_padded_batch_end_each_in_its_step_and_are_padded_from_there(
    run_ahead: int, model: Any, tokenize: Any, reasons: Any
) -> None:
    inputs = tokenize(*TEXTS)
    prompt = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=30)
    settings = {"max_new_tokens": 30, "eos_token_id": ends_at(free, prompt, 2, 9, 17)}
    plain = model.generate(**inputs, **settings)
    lengths = (plain[:, prompt:] != model.config.pad_token_id).sum(1)
    assert len(set(lengths.tolist())) > 1  # else nothing is padded
    assert plain.shape[1] < prompt + 30  # else nothing is trimmed
    ours = model.generate(**inputs, **settings, custom_generate=fusepass.decode_loop(run_ahead=run_ahead), **STATIC)
    assert torch.equal(ours, plain)
    assert not reasons()


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_an_end_in_the_first_step_leaves_one_token(run_ahead: int, model: Any, tokenize: Any) -> None:
    inputs = tokenize(TEXTS[0])
    free = model.generate(**inputs, max_new_tokens=1)
    settings = {"max_new_tokens": 9, "eos_token_id": int(free[0, -1])}
    ours = model.generate(**inputs, **settings, custom_generate=fusepass.decode_loop(run_ahead=run_ahead), **STATIC)
    assert torch.equal(ours, free)


def test_no_end_before_min_new_tokens(model: Any, tokenize: Any, reasons: Any) -> None:
    inputs = tokenize(TEXTS[0])
    first = int(model.generate(**inputs, max_new_tokens=1)[0, -1])
    settings = {"max_new_tokens": 20, "min_new_tokens": 6, "eos_token_id": first}
    plain = model.generate(**inputs, **settings)
    ours = model.generate(**inputs, **settings, custom_generate=fusepass.decode_loop(run_ahead=3), **STATIC)
    assert ours.shape[1] >= inputs["input_ids"].shape[1] + 6
    assert torch.equal(ours, plain)
    assert not reasons()


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_a_streamer_gets_the_pieces_that_hugging_face_gives(run_ahead: int, model: Any, tokenize: Any) -> None:
    inputs = tokenize(*TEXTS[:2])
    free = model.generate(**inputs, max_new_tokens=20)
    settings = {"max_new_tokens": 20, "eos_token_id": ends_at(free, inputs["input_ids"].shape[1], 3, 8)}
    theirs, ours = Recorder(), Recorder()
    model.generate(**inputs, **settings, streamer=theirs)
    loop = fusepass.decode_loop(streamer=ours, run_ahead=run_ahead)
    model.generate(**inputs, **settings, custom_generate=loop, **STATIC)
    assert len(theirs.pieces) > 4
    assert ours.pieces == theirs.pieces


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"top_k": 0, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
    {"top_k": 30, "min_p": 0.05, "min_new_tokens": 4},
]


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
@pytest.mark.parametrize("how", SAMPLING)
def test_sampling_draws_the_tokens_of_hugging_face_and_leaves_its_random_state(
    how: dict[str, Any], run_ahead: int, model: Any, tokenize: Any, reasons: Any
) -> None:
    inputs = tokenize(*TEXTS)
    prompt = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 24, "do_sample": True, "num_return_sequences": 2, **how}
    torch.manual_seed(5)
    free = model.generate(**inputs, **settings)
    settings["eos_token_id"] = free[:, prompt + 3 : prompt + 9].unique().tolist()  # soon enough to leave surplus steps
    results = []
    for loop in ({}, {"custom_generate": fusepass.decode_loop(run_ahead=run_ahead), **STATIC}):
        torch.manual_seed(5)
        results.append((model.generate(**inputs, **settings, **loop), torch.rand(1)))
    (plain, plain_next), (ours, our_next) = results
    assert plain.shape[1] < prompt + 24
    assert torch.equal(ours, plain)
    assert our_next == plain_next
    assert not reasons()


def test_sampling_from_the_likeliest_token_is_greedy(model: Any, tokenize: Any) -> None:
    inputs = tokenize(*TEXTS)
    greedy = model.generate(**inputs, max_new_tokens=20)
    loop = fusepass.decode_loop()
    ours = model.generate(**inputs, max_new_tokens=20, do_sample=True, top_k=1, custom_generate=loop, **STATIC)
    assert torch.equal(ours, greedy)


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


class Scripted:
    """A compiled forward whose logits are a function of the step, and are written over by the next: a CUDA graph's."""

    def __init__(self, model: Any, logits: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.logits, self.buffer, self.forward = 0, logits, logits(0)[:, None].clone(), model.__call__
        self.first: int | None = None
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
        monkeypatch.setattr(model, "get_compiled_call", lambda _: self)

    def __call__(self, **inputs: Any) -> Any:
        length = int(inputs["past_key_values"].get_seq_length())
        self.first = length if self.first is None else self.first
        outputs = self.forward(**inputs)  # the cache must count
        outputs.logits = self.buffer.copy_(self.logits(length - self.first)[:, None])
        self.calls += 1
        return outputs


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


def test_probabilities_that_are_nan_are_the_error_of_hugging_face(
    model: Any, tokenize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**tokenize(TEXTS[0]), "max_new_tokens": 9, "do_sample": True, "cache_implementation": "static"}
    settings["eos_token_id"] = 999  # none
    messages = []
    for loop in (None, fusepass.decode_loop(run_ahead=2)):
        with monkeypatch.context() as patch:
            Scripted(model, lambda i: torch.full((1, 264), float("nan") if i > 3 else 1.0), patch)
            with pytest.raises(RuntimeError) as error:
                model.generate(**settings, custom_generate=loop)
            messages.append(str(error.value))
    assert messages[0] == messages[1]


def kv(cache: Any) -> list[Tensor]:
    return [item for layer in cache.layers for item in (layer.keys, layer.values)]


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_a_cache_of_the_user_is_left_as_hugging_face_leaves_it(
    run_ahead: int, model: Any, tokenize: Any, reasons: Any
) -> None:
    inputs = tokenize(TEXTS[0])
    prompt = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=12)
    settings = {"max_new_tokens": 20, "eos_token_id": ends_at(free, prompt, 9), "return_dict_in_generate": True}
    caches = [StaticCache(config=model.config, max_cache_len=60) for _ in range(2)]
    plain = model.generate(**inputs, **settings, past_key_values=caches[0])
    loop = fusepass.decode_loop(run_ahead=run_ahead)
    ours = model.generate(**inputs, **settings, past_key_values=caches[1], custom_generate=loop)
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.past_key_values is caches[1]
    assert int(caches[1].get_seq_length()) == int(caches[0].get_seq_length()) == plain.sequences.shape[1] - 1
    for a, b in zip(kv(caches[1]), kv(caches[0])):
        torch.testing.assert_close(a, b)

    # and goes on from there
    more = torch.cat([plain.sequences, tokenize(" and then")["input_ids"]], 1)
    for i, custom in enumerate(({}, {"custom_generate": loop})):
        result = model.generate(more, max_new_tokens=7, past_key_values=caches[i], **custom)
        assert result.shape[1] == more.shape[1] + 7
        free = result if i == 0 else free
    assert torch.equal(result, free)
    assert not reasons()


@pytest.mark.skipif(not CACHES_ARE_MARKED, reason="generate keeps the cache here")
def test_the_cache_is_kept_for_the_next_call_unless_the_user_has_it(model: Any, tokenize: Any) -> None:
    loop = fusepass.decode_loop(cache_length=36)

    def call(*texts: str, count: int = 3, **settings: Any) -> Any:
        """What `generate` returns, and the cache that the loop keeps."""
        result = model.generate(**tokenize(*texts), max_new_tokens=count, custom_generate=loop, **settings)
        return result, kv(loop._kept[1]) if loop._kept else []

    plain = [model.generate(**tokenize(text), max_new_tokens=3) for text in TEXTS]
    first, kept = call(TEXTS[2])
    second, again = call(TEXTS[0])
    assert all(a is b for a, b in zip(kept, again, strict=True))
    assert torch.equal(first, plain[2])
    assert torch.equal(second, plain[0])  # nothing of the longer prompt is left

    output, none = call(TEXTS[1], return_dict_in_generate=True)
    assert none == []
    third, new = call(TEXTS[0])
    assert all(a is b for a, b in zip(kv(output.past_key_values), kept, strict=True))
    assert not any(a is b for a in new for b in kept)
    assert torch.equal(third, plain[0])

    assert [call(TEXTS[0], TEXTS[1])[1][0].shape[i] for i in (0, 2)] == [2, 36]
    assert call(TEXTS[0], count=26)[1][0].shape[2] == 64
    assert call(TEXTS[0])[1][0].shape[2] == 64  # and not back: a new length compiles anew
    loop = fusepass.decode_loop()
    with torch.inference_mode():
        call(TEXTS[0])
    assert torch.equal(call(TEXTS[0])[0], plain[0])  # a tensor of inference mode may not be written outside of it


class Own(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.roll(1, -1)


class Enough(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] > 25)


HANDED_BACK: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, "generation mode is beam_search"),
    "beams, sampled": ({"num_beams": 2, "do_sample": True}, "generation mode is beam_sample"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "generation mode is assisted_generation"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "own processor": ({"logits_processor": [Own()]}, "Own"),
    "known, but reads tokens on the host": ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
    "own criterion": ({"stopping_criteria": [Enough()]}, "Enough"),
    "time limit": ({"max_time": 60.0}, "MaxTimeCriteria"),
    "dynamic cache": ({"cache_implementation": "dynamic"}, "dynamic|DynamicCache"),
    "no cache": ({"use_cache": False}, "use_cache"),
}


@pytest.mark.parametrize("case", HANDED_BACK)
def test_what_the_loop_can_not_do_is_handed_back_with_the_reason(
    case: str, model: Any, tokenize: Any, reasons: Any
) -> None:
    settings, reason = HANDED_BACK[case]
    inputs = tokenize(TEXTS[1])
    results = []
    for loop in (None, fusepass.decode_loop()):
        torch.manual_seed(2)
        results.append(model.generate(**inputs, max_new_tokens=8, **settings, custom_generate=loop))
    plain, ours = results
    assert type(ours) is type(plain)
    if isinstance(plain, Tensor):
        assert torch.equal(ours, plain)
    else:
        assert ours.keys() == plain.keys()
        assert torch.equal(ours.sequences, plain.sequences)
    (given,) = reasons()
    assert re.search(reason, given)


def test_inputs_the_loop_does_not_know_are_handed_back(model: Any, tokenize: Any, reasons: Any) -> None:
    inputs, padded = tokenize(TEXTS[1]), tokenize(TEXTS[1], TEXTS[1])
    padded["attention_mask"][1, -2:] = 0
    cases: list[Callable[[], dict[str, Any]]] = [
        lambda: {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])},
        lambda: {**padded, "cache_implementation": "static"},
        lambda: {**inputs, "past_key_values": DynamicCache(config=model.config)},
    ]
    for case in cases:
        plain = model.generate(**case(), max_new_tokens=6)
        assert torch.equal(model.generate(**case(), max_new_tokens=6, custom_generate=fusepass.decode_loop()), plain)
    for reason, word in zip(reasons(), ("inputs_embeds", "right", "DynamicCache"), strict=True):
        assert word in reason


def test_a_model_of_another_kind_is_handed_back(
    model: Any, tokenize: Any, reasons: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tokenize(TEXTS[1])
    plain = model.generate(**inputs, max_new_tokens=6)
    prepare = type(model).prepare_inputs_for_generation
    for name, value, reason in (
        (
            "prepare_inputs_for_generation",
            lambda *args, **kwargs: prepare(*args, **kwargs),
            "has its own prepare_inputs",
        ),
        ("_can_compile_fullgraph", False, "can not be compiled with a static cache"),
        ("hf_device_map", {"model.layers.0": "cpu", "model.layers.1": "disk"}, "several devices"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), name, value, raising=False)
            ours = model.generate(**inputs, max_new_tokens=6, custom_generate=fusepass.decode_loop(), **STATIC)
        assert torch.equal(ours, plain)
        assert reason in reasons()[-1]


def test_eager_attention_hides_the_same_padding(model: Any, tokenize: Any, reasons: Any) -> None:
    eager = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager").eval()
    inputs = tokenize(*TEXTS)
    plain = model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(
        eager.generate(**inputs, max_new_tokens=12, custom_generate=fusepass.decode_loop(), **STATIC), plain
    )
    assert not reasons()


def test_a_model_with_a_sliding_window_is_handed_back(reasons: Any) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 4}
    model, tokens = small_qwen3(2, **layers), torch.randint(152, (1, 6))
    plain = model.generate(tokens, max_new_tokens=8, **STATIC)
    assert torch.equal(
        model.generate(tokens, max_new_tokens=8, custom_generate=fusepass.decode_loop(), **STATIC), plain
    )
    assert "Sliding" in reasons()[0]


@pytest.mark.parametrize(("room", "prompt"), [(4, 9), (12, 9)])
def test_a_cache_without_room_is_the_error_of_hugging_face(room: int, prompt: int, model: Any) -> None:
    tokens = torch.randint(250, (1, prompt))
    messages = []
    for loop in (None, fusepass.decode_loop()):
        cache = StaticCache(config=model.config, max_cache_len=room)
        with pytest.raises(Exception) as error:  # noqa: PT011
            model.generate(tokens, max_new_tokens=10, past_key_values=cache, custom_generate=loop)
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


def test_a_cache_with_room_up_to_the_end_is_enough(model: Any, tokenize: Any, reasons: Any) -> None:
    inputs = tokenize(TEXTS[0])
    prompt = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=3)
    caches = [StaticCache(config=model.config, max_cache_len=prompt + 2) for _ in range(2)]
    settings = {**inputs, "max_new_tokens": 9, "eos_token_id": int(free[0, -1])}
    plain = model.generate(**settings, past_key_values=caches[0])
    loop = fusepass.decode_loop(run_ahead=3)
    assert torch.equal(model.generate(**settings, past_key_values=caches[1], custom_generate=loop), plain)
    assert "room" in reasons()[0]


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 2}])
def test_a_mode_or_streamer_that_hugging_face_refuses_is_refused_with_its_words(
    settings: dict[str, Any], model: Any, tokenize: Any
) -> None:
    messages = []
    for given in ({"streamer": Recorder()}, {"custom_generate": fusepass.decode_loop(streamer=Recorder())}):
        with pytest.raises(ValueError, match="trust_remote_code|streamer") as error:
            model.generate(**tokenize(TEXTS[0]), max_new_tokens=4, do_sample=False, **settings, **given)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_streamer_is_served_where_the_call_is_handed_back(model: Any, tokenize: Any) -> None:
    theirs, ours = Recorder(), Recorder()
    settings = {**tokenize(TEXTS[0]), "max_new_tokens": 5, "no_repeat_ngram_size": 2}
    model.generate(**settings, streamer=theirs)
    model.generate(**settings, custom_generate=fusepass.decode_loop(streamer=ours))
    assert ours.pieces == theirs.pieces


@pytest.fixture(scope="module")
def on_gpu() -> PreTrainedModel:
    """f32, where two kernels that sum in another order still give the same tokens."""
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).cuda().eval()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
def test_on_a_gpu_the_tokens_are_those_of_hugging_face_and_each_step_is_one_replay(
    count: int, on_gpu: Any, tokenize: Any, reasons: Any
) -> None:
    inputs = tokenize(*TEXTS[:count]).to("cuda")
    prompt = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 64, "cache_implementation": "static"}
    free = on_gpu.generate(**inputs, **settings, disable_compile=True)
    settings["eos_token_id"] = ends_at(free, prompt, *(20, 30, 40)[:count])
    plain = on_gpu.generate(**inputs, **settings, disable_compile=True)
    loop = fusepass.decode_loop(run_ahead=4)
    for _ in range(3):  # compile, record, replay
        assert torch.equal(on_gpu.generate(**inputs, **settings, custom_generate=loop), plain)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        on_gpu.generate(**inputs, **settings, custom_generate=loop)
        torch.cuda.synchronize()
    replays = sum(event.count for event in trace.key_averages() if event.key == "cudaGraphLaunch")
    assert replays == plain.shape[1] - prompt - 1 + 4
    assert len(fusepass.reports()) == 1
    assert all(site.fused for site in fusepass.reports()[0].sites)
    assert not reasons()


@pytest.mark.gpu
def test_on_a_gpu_running_ahead_changes_neither_samples_nor_the_random_state(on_gpu: Any, tokenize: Any) -> None:
    inputs = tokenize(*TEXTS).to("cuda")
    prompt = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 48, "do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 0.8}

    def sample(run_ahead: int) -> tuple[Tensor, float]:
        torch.manual_seed(11)
        loop = fusepass.decode_loop(run_ahead=run_ahead)
        return on_gpu.generate(**inputs, **settings, custom_generate=loop), torch.rand(1, device="cuda").item()

    free, _ = sample(0)
    settings["eos_token_id"] = ends_at(free, prompt, 9, 14, 19)
    waiting, after = sample(0)
    assert waiting.shape[1] < prompt + 48
    for run_ahead in (4, 9):
        tokens, state = sample(run_ahead)
        assert torch.equal(tokens, waiting)
        assert state == after


def qwen3_0_6b() -> PreTrainedModel:
    """The public dimensions, random weights, bf16."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, "vocab_size": 151936}
    layers = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = AutoConfig.for_model("qwen3", **sizes, **layers, tie_word_embeddings=True, max_position_embeddings=4096)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.gpu
def test_on_a_gpu_generate_reaches_nine_tenths_of_the_rate_of_its_steps() -> None:
    model, loop, config = qwen3_0_6b(), fusepass.decode_loop(cache_length=1024), CompileConfig(backend="fusepass")
    prompt = torch.randint(151936, (1, 512), device="cuda")
    settings: dict[str, Any] = {"cache_implementation": "static", "compile_config": config, "pad_token_id": 0}
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}

    def seconds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*args, **kwargs)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def generated(**way: Any) -> float:
        """Tokens per second, without the prompt."""
        times = {n: seconds(model.generate, prompt, max_new_tokens=n, **settings, **way) for n in (100, 400) * 3}
        return 300 / (times[400] - times[100])

    rates = {"decode_loop": generated(do_sample=False, custom_generate=loop)}
    rates["decode_loop, sampling"] = generated(**sampling, custom_generate=loop)

    assert loop._kept is not None
    cache, forward = loop._kept[1], model.get_compiled_call(config)
    token, position = prompt[:, :1].clone(), torch.full((1, 1), 512, device="cuda")
    inputs = {"input_ids": token, "position_ids": position, "past_key_values": cache, "use_cache": True}

    def steps(count: int) -> None:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            forward(**inputs, logits_to_keep=1, return_dict=True)

    with torch.no_grad():
        cache.reset()
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        steps(100)
        rates["the step alone"] = 300 / seconds(steps, 300)

    torch._dynamo.reset()  # else the other cache lengths make its graph a dynamic one
    rates["Hugging Face's loop"] = generated(do_sample=False)
    print("", *(f"{name:24} {rate:8.0f} tokens/s" for name, rate in rates.items()), sep="\n")
    assert rates["decode_loop"] >= 0.9 * rates["the step alone"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"streamer": "stdout"}, TypeError, "streamer is 'stdout'; expected an object with put and end"),
        ({"run_ahead": 1.5}, TypeError, "run_ahead is 1.5; expected an int"),
        ({"run_ahead": True}, TypeError, "run_ahead is True; expected an int"),
        ({"run_ahead": -1}, ValueError, "run_ahead is -1; expected at least 0"),
        ({"cache_length": "4k"}, TypeError, "cache_length is '4k'; expected an int"),
        ({"cache_length": 0}, ValueError, "cache_length is 0; expected at least 1"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusepass.decode_loop(**settings)


def test_the_compiled_step_is_one_graph_with_everything_fused(monkeypatch: pytest.MonkeyPatch, reasons: Any) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    model = small_qwen3(1)
    config = CompileConfig(backend="fusepass", mode=None, options={"remainder": "eager"})
    config._compile_all_devices = True
    loop = fusepass.decode_loop(run_ahead=2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    for length, given in ((5, {}), (9, {}), (9, {"attention_mask": mask})):
        inputs = {"inputs": torch.randint(152, (2, length)), "max_new_tokens": 24 - length, **given}
        inputs |= {"pad_token_id": 0, "eos_token_id": 7, "cache_implementation": "static"}
        plain = model.generate(**inputs, disable_compile=True)
        assert torch.equal(model.generate(**inputs, custom_generate=loop, compile_config=config), plain)
    first, *others = fusepass.reports()
    assert first.counts()["attention"] == 1
    assert all(site.fused for site in first.sites)
    assert [report.counts() for report in others] == [first.counts()]  # with padding; a longer prompt compiles nothing
    assert not reasons()


def test_the_loop_is_public_and_documented() -> None:
    assert "decode_loop" in fusepass.__all__
    assert "custom_generate=decode_loop()" in (fusepass.decode_loop.__doc__ or "")


def test_the_example_prints_tokens_per_second_of_both_loops() -> None:
    command = [sys.executable, str(EXAMPLES / "generate.py"), "--tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Hugging Face's loop +[0-9,]+ tokens/s", done.stdout)
    assert re.search(r"decode_loop +[0-9,]+ tokens/s", done.stdout)
    assert "the same 8 tokens" in done.stdout
