"""Decode steps of small models on static caches whose contents are drawn, so that no prompt has to be run.

On a GPU the models have Qwen3-0.6B's head and hidden sizes and are compiled as users do, with CUDA graphs; on a CPU
they are tiny, and the kernels run in Triton's interpreter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float16  # Triton's interpreter is wrong for bf16
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SIZES = dict(zip(_SIZES, (1024, 3072, 16, 8, 128) if GPU else (304, 520, 6, 2, 32)))


def decoder(family: str = "qwen3", layers: int = 2, **config: Any) -> PreTrainedModel:
    """A model with random weights that all matter: linears give values as large as those they read, norm weights are
    far from one, biases are not zero."""
    settings = dict(num_hidden_layers=layers, vocab_size=1000, max_position_embeddings=32768, **SIZES)
    settings["initializer_range"] = SIZES["hidden_size"] ** -0.5
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**settings, **config}), dtype=DTYPE)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.3, 3.0)
        elif name.endswith("bias"):
            parameter.data.normal_()
    return model.eval().requires_grad_(False)


def compiled(model: PreTrainedModel, backend: str = "fusepass", **settings: Any) -> Callable[..., Any]:
    """`model` compiled for decoding."""
    settings |= {"mode": "reduce-overhead"} if GPU else {"options": {"remainder": "eager"}}
    return torch.compile(model, backend=backend, **settings)


def draw_tokens(batch: int, steps: int) -> Tensor:
    return torch.randint(1000, (batch, steps), device=DEVICE)


def fill(caches: Sequence[StaticCache], context: int) -> None:
    """Draw keys and values, the same for all caches (the first one's dtype is the narrowest), and make the first
    `context` of them the past. The others, which no query may see, are no smaller."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            # Twice the normal size: a head then sees few positions, and one that is missing shows.
            content = 2 * torch.randn_like(getattr(layers[0], name))
            for layer in layers:
                getattr(layer, name).copy_(content)
        for layer in layers:
            layer.cumulative_length.fill_(context)
            if layer.is_sliding:
                layer.cumulative_length_int = context


def decode(
    run: Callable[..., Any], cache: StaticCache, tokens: Tensor, positions: Tensor | None = None, **inputs: Any
) -> Tensor:
    """Logits [batch, steps, vocabulary] of the forced `tokens` [batch, steps], one step each. `positions` [batch, 1]
    are those of the first step, where they are not the cache's."""
    logits = []
    for i, token in enumerate(tokens.split(1, dim=1)):
        torch.compiler.cudagraph_mark_step_begin()
        if positions is not None:
            inputs["position_ids"] = positions + i
        token = token.clone(memory_format=torch.contiguous_format)  # strides of its own: no recompilation
        output = run(token, past_key_values=cache, use_cache=True, **inputs)
        logits.append(output.logits[:, -1].clone())
    return torch.stack(logits, 1)


def replays(step: Callable[[], Any]) -> int:
    """How many CUDA graphs `step` replays."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.key == "cudaGraphLaunch")
