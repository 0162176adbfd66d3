"""Through `generate`, the loop gives what Hugging Face's own gives, and one graph with everything fused."""

import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    StaticCache,
)

import fusepass
from fusepass.decoding.handback import CACHES_ARE_MARKED
from tests.decode_loop.common import CHECKPOINT, EXAMPLES, RUN_AHEAD, STATIC, TEXTS, Recorder, ends_at, kv
from tests.models import small_qwen3


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


@pytest.mark.parametrize("count", [12.0, 11.5, np.int64(12), torch.tensor(12)])
def test_a_length_may_be_any_number(count: Any, model: Any, tokenize: Any, reasons: Any) -> None:
    inputs, loop = tokenize(TEXTS[0]), fusepass.decode_loop(cache_length=8)
    plain = model.generate(**inputs, max_new_tokens=count)
    assert torch.equal(model.generate(**inputs, max_new_tokens=count, custom_generate=loop, **STATIC), plain)
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

    static = {"return_dict_in_generate": True, "cache_implementation": "static"}
    theirs = model.generate(**tokenize(TEXTS[1]), max_new_tokens=3, **static).past_key_values
    output, again = call(TEXTS[1], **static)
    assert [item.shape for item in kv(output.past_key_values)] == [item.shape for item in kv(theirs)]
    assert not any(a is b for a in kv(output.past_key_values) for b in kept)
    assert all(a is b for a, b in zip(again, kept, strict=True))
    assert torch.equal(call(TEXTS[0])[0], plain[0])

    assert [call(TEXTS[0], TEXTS[1])[1][0].shape[i] for i in (0, 2)] == [2, 36]
    assert call(TEXTS[0], count=26)[1][0].shape[2] == 64
    assert call(TEXTS[0])[1][0].shape[2] == 64  # and not back: a new length compiles anew
    assert call(TEXTS[0], max_cache_len=100)[1][0].shape[2] == 64  # as `generate`, which sizes static caches by it
    assert call(TEXTS[0], max_cache_len=100, cache_implementation="static")[1][0].shape[2] == 128
    copied = pickle.loads(pickle.dumps(loop))
    assert (copied.cache_length, copied._kept) == (36, None)
    loop = fusepass.decode_loop()
    with torch.inference_mode():
        call(TEXTS[0])
    assert torch.equal(call(TEXTS[0])[0], plain[0])  # a tensor of inference mode may not be written outside of it


@pytest.mark.skipif(not CACHES_ARE_MARKED, reason="generate keeps the cache here, and asks layers that have none")
def test_a_model_whose_layers_become_fewer_or_more(reasons: Any) -> None:
    model, tokens, loop = small_qwen3(2), torch.randint(1, 152, (1, 6)), fusepass.decode_loop(run_ahead=3)
    layers = model.model.layers
    for depth, configured in ((1, 2), (1, 1), (2, 2)):
        model.model.layers = layers[:depth]
        model.config.num_hidden_layers, model.config.layer_types = configured, ["full_attention"] * configured
        free = model.generate(tokens, max_new_tokens=9)
        settings = {"max_new_tokens": 9, "eos_token_id": ends_at(free, 6, 3)}
        plain = model.generate(tokens, **settings)
        assert torch.equal(model.generate(tokens, **settings, custom_generate=loop, **STATIC), plain)
    assert not reasons()


def test_eager_attention_hides_the_same_padding(model: Any, tokenize: Any, reasons: Any) -> None:
    eager = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager").eval()
    inputs = tokenize(*TEXTS)
    plain = model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(
        eager.generate(**inputs, max_new_tokens=12, custom_generate=fusepass.decode_loop(), **STATIC), plain
    )
    assert not reasons()


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
        inputs = {"inputs": torch.randint(1, 152, (2, length)), "max_new_tokens": 24 - length, **given}
        inputs |= {"pad_token_id": 0, "eos_token_id": 7, "cache_implementation": "static"}
        plain = model.generate(**inputs, disable_compile=True)
        assert torch.equal(model.generate(**inputs, custom_generate=loop, compile_config=config), plain)
    assert not reasons()
    first, *others = fusepass.reports()
    assert first.counts()["attention"] == 1
    assert all(site.fused for site in first.sites)
    assert [report.counts() for report in others] == [first.counts()]  # with padding; a longer prompt compiles nothing


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
