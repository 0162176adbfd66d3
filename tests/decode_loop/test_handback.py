"""What the loop can not do exactly it hands back: result or error are Hugging Face's, and the reason is logged."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation import MaxLengthCriteria

import fusepass
from tests.decode_loop.common import STATIC, TEXTS, Recorder
from tests.models import small_qwen3


class Own(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.roll(1, -1)


class Enough(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] > 25)


TWO: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2}
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
    "several lengths": (
        {"max_new_tokens": None, "max_length": 30, "stopping_criteria": [MaxLengthCriteria(30), MaxLengthCriteria(12)]},
        "stops at 12 tokens and max_length is 30",
    ),
    "no limit": ({"max_new_tokens": 10**9, "eos_token_id": ord(" ")}, "512 positions|DynamicCache"),
    "a pad token beyond the embedding": ({"pad_token_id": 5000, **TWO}, "pad token, 5000"),
    "a pad token that is a label": ({"pad_token_id": -100, **TWO}, "pad token, -100"),
    "a returned cache": ({"return_dict_in_generate": True}, "DynamicCache"),
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
        results.append(model.generate(**{**inputs, "max_new_tokens": 8, **settings}, custom_generate=loop))
    plain, ours = results
    assert type(ours) is type(plain)
    if isinstance(plain, Tensor):
        assert torch.equal(ours, plain)
    else:
        assert ours.keys() == plain.keys()
        assert torch.equal(ours.sequences, plain.sequences)
    (given,) = reasons()
    assert re.search(reason, given)


@contextmanager
def training(model: Any) -> Iterator[None]:
    model.train()
    yield
    model.eval()


def gradients(model: Any) -> AbstractContextManager[Any]:
    """Those who learn a prompt call `generate` without its `no_grad`."""
    return mock.patch.object(type(model), "generate", inspect.unwrap(type(model).generate))


def autocast(_: Any) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("surroundings", "reason"),
    [(training, "in training mode"), (gradients, "gradients are enabled"), (autocast, "autocast is enabled")],
)
def test_surroundings_in_which_it_would_not_be_the_same_are_handed_back(
    surroundings: Any, reason: str, model: Any, tokenize: Any, reasons: Any
) -> None:
    inputs = tokenize(TEXTS[1])
    with surroundings(model):
        plain = model.generate(**inputs, max_new_tokens=6)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, custom_generate=fusepass.decode_loop()), plain)
    assert reason in reasons()[0]


@pytest.mark.parametrize(("length", "handed_back"), [(17, False), (18, True)])  # the last token is not fed
def test_a_call_for_more_positions_than_the_model_has_is_handed_back(
    length: int, handed_back: bool, reasons: Any
) -> None:
    model, tokens = small_qwen3(1, max_position_embeddings=16), torch.randint(1, 152, (1, 6))
    plain = model.generate(tokens, max_length=length, **STATIC)
    loop = fusepass.decode_loop()
    assert torch.equal(model.generate(tokens, max_length=length, custom_generate=loop, **STATIC), plain)
    assert [re.search("16 positions, and 17", reason) is not None for reason in reasons()] == [True] * handed_back


def test_inputs_the_loop_does_not_know_are_handed_back(model: Any, tokenize: Any, reasons: Any) -> None:
    def filled() -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=60)
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        return cache

    inputs, padded = tokenize(TEXTS[1]), tokenize(TEXTS[1], TEXTS[1])
    more = {"inputs": inputs["input_ids"].repeat(1, 3)}
    padded["attention_mask"][1, -2:] = 0
    cases: list[Callable[[], dict[str, Any]]] = [
        lambda: {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])},
        lambda: {**padded, "cache_implementation": "static"},
        lambda: {**inputs, "past_key_values": DynamicCache(config=model.config)},
        lambda: {**more, "past_key_values": filled(), "prefill_chunk_size": 4},
    ]
    for case in cases:
        plain = model.generate(**case(), max_new_tokens=6)
        assert torch.equal(model.generate(**case(), max_new_tokens=6, custom_generate=fusepass.decode_loop()), plain)
    for reason, word in zip(reasons(), ("inputs_embeds", "right", "DynamicCache", "in chunks"), strict=True):
        assert word in reason


@pytest.mark.filterwarnings("ignore:You are calling .generate")
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
        ("device", torch.device("meta"), "and the model on meta"),
        ("hf_device_map", {"model.layers.0": "cpu", "model.layers.1": "disk"}, "several devices"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), name, value, raising=False)
            ours = model.generate(**inputs, max_new_tokens=6, custom_generate=fusepass.decode_loop(), **STATIC)
        assert torch.equal(ours, plain)
        assert reason in reasons()[-1]


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
