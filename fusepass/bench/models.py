"""Qwen3 models of the public dimensions with random weights, and any other by name."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.configuration_utils import PretrainedConfig

# hidden, intermediate, layers, heads, key/value heads, head_dim, tied embeddings: the models' config.json on the hub.
DIMENSIONS = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, False),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, 128, False),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, 128, False),
}


def qwen3_config(name: str) -> PretrainedConfig:
    """The configuration of a Qwen3 by name. Raises KeyError for a name not in `DIMENSIONS`."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, tied = DIMENSIONS[name]
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
    )


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: str, seed: int = 0) -> PreTrainedModel:
    """A model whose norm weights are far from one, and whose first k_norm reaches 96.5 as Qwen3-0.6B's does. (In every
    layer, such weights make attention so sharp that bf16 and f64 diverge, whoever computes.)"""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.3, 3.0)
            if "layers.0.self_attn.k_norm" in name:
                parameter.data[torch.randint(parameter.numel(), (2,))] = 96.5
    return model.requires_grad_(False)


def check_name(name: str) -> None:
    """Raise ValueError, in one line, unless `load` knows the model."""
    known = f"; known names: {', '.join(DIMENSIONS)}, a hub name (owner/name), or a folder with a checkpoint"
    if name in DIMENSIONS:
        return
    if "/" not in name and not Path(name).is_dir():
        raise ValueError(f"unknown model '{name}'{known}")
    try:
        AutoConfig.from_pretrained(name)
    except Exception as fault:  # a config.json may hold any JSON, and then transformers fails in any way
        reason = str(fault).partition("\n")[0]
        raise ValueError(f"cannot load model '{name}' ({reason}){known}") from fault


def load(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model for inference: random weights for a name of `DIMENSIONS`, a checkpoint otherwise."""
    if name in DIMENSIONS:
        return random_model(qwen3_config(name), dtype, device)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def static_cache(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    """A static cache that exists before anything is compiled: one born inside a compiled graph is not marked static,
    and Inductor then drops CUDA graphs."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, head_dim, model.dtype, model.device)
    return cache
