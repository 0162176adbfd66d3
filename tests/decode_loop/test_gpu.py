"""The loop on a GPU: replays of CUDA graphs, random numbers, and the rate of `generate` beside that of its steps."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    PreTrainedModel,
)
from transformers.generation import EosTokenCriteria
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import fusepass
from fusepass.decoding.step import Recorder
from tests.decode_loop.common import CHECKPOINT, TEXTS, ends_at


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
    assert replays == plain.shape[1] - prompt - 1 + 4 - 1  # surplus steps, and the first, which is not recorded
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


class Waiting(Qwen3RMSNorm):
    """A norm that makes the host wait: Dynamo has to break the graph."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.abs().sum().item() >= 0
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.gpu
@pytest.mark.parametrize("sample", [False, True])
def test_on_a_gpu_a_forward_that_makes_the_host_wait_is_not_recorded(
    sample: bool, tokenize: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).cuda().eval()
    model.model.norm.__class__ = Waiting
    inputs, loop = tokenize(*TEXTS).to("cuda"), fusepass.decode_loop()
    settings = {"max_new_tokens": 24, "do_sample": sample, "top_k": 20, "cache_implementation": "static"}
    sequences = []
    for way in ({"disable_compile": True}, {"custom_generate": loop}, {"custom_generate": loop}):
        torch.manual_seed(7)
        sequences.append(model.generate(**inputs, **settings, **way))
        sequences[-1] = torch.cat([sequences[-1].flatten(), torch.randint(9999, (4,), device="cuda")])
    assert torch.equal(sequences[1], sequences[0])
    assert torch.equal(sequences[2], sequences[0])
    assert len([record for record in caplog.records if "is not recorded by the loop" in record.getMessage()]) == 1


@pytest.mark.gpu
def test_on_a_gpu_a_recording_that_fails_leaves_memory_and_random_numbers_as_they_were() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(3)
    want = [torch.rand(9, device=device) for _ in range(3)]
    earlier, recorder = Recorder(device), Recorder(device)
    drawn = earlier.record(lambda: torch.rand(9, device=device))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="captur"):
            recorder.record(lambda: torch.rand(9, device=device).sum().item())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(9, device=device), want[0])
    earlier.replay()
    assert torch.equal(drawn, want[1])
    numbers = recorder.record(lambda: torch.rand(9, device=device))
    recorder.replay()
    assert torch.equal(numbers, want[2])


@pytest.mark.gpu
def test_on_a_gpu_calls_share_the_memory_of_their_graphs(on_gpu: Any, tokenize: Any) -> None:
    inputs, loop = tokenize(*TEXTS).to("cuda"), fusepass.decode_loop()
    taken = set()
    for i in range(12):
        on_gpu.generate(**inputs, max_new_tokens=12, do_sample=bool(i % 2), custom_generate=loop)
        torch.cuda.synchronize()
        if i > 3:
            taken.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(taken) <= 2  # greedy, sampling


@pytest.mark.gpu
def test_on_a_gpu_the_ends_of_a_criterion_may_be_given_on_the_host(on_gpu: Any, tokenize: Any, reasons: Any) -> None:
    inputs = tokenize(TEXTS[0]).to("cuda")
    free = on_gpu.generate(**inputs, max_new_tokens=12, disable_compile=True)
    ends = ends_at(free, inputs["input_ids"].shape[1], 7)

    def generated(**way: Any) -> Tensor:
        criteria = [EosTokenCriteria(torch.tensor(ends))]  # Hugging Face's loop moves it
        return on_gpu.generate(**inputs, max_new_tokens=12, stopping_criteria=criteria, **way)

    assert torch.equal(generated(custom_generate=fusepass.decode_loop()), generated(disable_compile=True))
    assert not reasons()


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
    assert rates["decode_loop, sampling"] >= 0.9 * rates["the step alone"]
