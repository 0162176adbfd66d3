"""Whole models: logits under the numeric gate, and tokens of a trained checkpoint over 64 greedy steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fusepass
from tests.gate import assert_gate, reference
from tests.models import small_qwen3, static_cache

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-qwen3"
STEPS = 64


@torch.no_grad()
@pytest.mark.parametrize("precision", ["match", "high"])
def test_logits_of_a_whole_model_pass_the_gate(precision: str) -> None:
    model = small_qwen3(2, torch.float16)
    tokens = torch.randint(model.config.vocab_size, (8, 8))  # 64 rows: the worst holds 10 % of the squared error
    options = {"remainder": "eager", "precision": precision}
    ours = torch.compile(model, backend="fusepass", options=options)(tokens, use_cache=False).logits
    assert fusepass.reports()[0].counts()["norm_qkv_rope"] == 2
    assert_gate(ours, model(tokens, use_cache=False).logits, reference(model)(tokens, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.slow
def test_a_trained_checkpoint_gives_eagers_tokens() -> None:
    """More of them than the demo generates, which test_examples.py runs."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(CHECKPOINT)("Once upon a time", return_tensors="pt")["input_ids"]
    fast = torch.compile(model, backend="fusepass", options={"remainder": "eager"})
    caches = [static_cache(model, 1, tokens.shape[1] + STEPS) for _ in range(2)]
    step, generated, worst = tokens, [], 0.0
    for _ in range(STEPS):
        ours, plain = (
            run(step, past_key_values=cache, use_cache=True).logits[:, -1] for run, cache in zip((fast, model), caches)
        )
        worst = max(worst, (ours - plain).abs().max().item() / plain.abs().max().item())
        assert ours.argmax() == plain.argmax()
        step = plain.argmax(-1, keepdim=True)
        generated.append(step)
    assert worst < 1e-4
    assert len(fusepass.reports()) == 2  # prefill and one decode step: no recompilation on the way
    assert len(set(torch.cat(generated, 1)[0].tolist())) > STEPS // 6  # a text, not one token repeated


def decode_logits(
    run: Callable[..., Any], model: PreTrainedModel, tokens: torch.Tensor, prompt: int
) -> tuple[torch.Tensor, int]:
    """Teacher-forced logits of every token after the first `prompt`, one decode step each on one static cache, and
    the number of CUDA graphs that the last step replayed."""
    cache = static_cache(model, tokens.shape[0], tokens.shape[1])
    model(tokens[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(i: int) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(tokens[:, i : i + 1].clone(), past_key_values=cache, use_cache=True).logits[:, -1].clone()

    last = tokens.shape[1] - 1
    logits = [step(i) for i in range(prompt, last)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        logits.append(step(last))
        torch.cuda.synchronize()
    return torch.stack(logits, 1), sum(e.count for e in trace.key_averages() if e.key == "cudaGraphLaunch")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B"])
@torch.no_grad()
def test_full_size_models_pass_the_gate_over_64_decode_steps_in_cuda_graphs(name: str) -> None:
    from fusepass.bench.models import qwen3_config, random_model

    config = qwen3_config(name)
    model = random_model(config, torch.bfloat16, "cuda", seed=torch.seed() % 2**32)
    tokens = torch.randint(config.vocab_size, (1, 16 + STEPS), device="cuda")
    fast = torch.compile(model, backend="fusepass", mode="reduce-overhead", dynamic=False)
    ours, replays = decode_logits(fast, model, tokens, 16)
    assert replays == 1
    layers = config.num_hidden_layers
    (report,) = fusepass.reports()
    each = ("attention", "linear_residual", "norm_gated_mlp", "norm_qkv_rope")
    assert dict(report.counts()) == {**dict.fromkeys(each, layers), "norm_linear": 1}
    assert all(site.fused for site in report.sites)

    eager, _ = decode_logits(model, model, tokens, 16)
    exact = reference(model)(tokens, use_cache=False).logits[:, 16:]
    print(f"\n{name}: {(ours - exact).norm() / exact.norm():.4f} {(eager - exact).norm() / exact.norm():.4f} (eager)")
    assert_gate(ours, eager, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8])
@torch.no_grad()
def test_prefill_and_decode_with_dynamic_shapes_pass_the_gate_on_a_gpu(batch: int) -> None:
    model = small_qwen3(2, torch.bfloat16, hidden_size=896, num_attention_heads=14, head_dim=64, vocab_size=1000).cuda()
    fast = torch.compile(model, backend="fusepass", dynamic=True)
    exact_model = reference(model)
    for length in (5, 40, 200):
        draws = [torch.randint(1000, (batch, length), device="cuda") for _ in range(32)]
        ours, eager, exact = (
            torch.stack([run(tokens, use_cache=False).logits.double() for tokens in draws])
            for run in (fast, model, exact_model)
        )
        assert_gate(ours, eager, exact)
    assert len(fusepass.reports()) <= 2
