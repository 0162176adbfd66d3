"""Small models for tests: every size differs from every other, so that a mix-up cannot pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

from fusepass.options import Options
from fusepass.report import GraphReport
from fusepass.rewrite import fuse


def enlarge_k_norm(attention: nn.Module) -> None:
    """Two weights of k_norm become as large as Qwen3's largest, and those of q_norm that meet them, before or after the
    rotation, as small; without both norms nothing changes. Otherwise products of hundreds would cancel in a score, and
    one rounding of q that another order of sums tips would move it by 0.05: such a row decides the error of all."""
    q_norm, k_norm = (getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm"))
    if q_norm is not None and k_norm is not None:
        size = attention.head_dim
        large = torch.randperm(size)[:2]
        k_norm.data[large] = torch.tensor([41.0, 96.5]).to(k_norm)
        q_norm.data.view(-1, size)[:, torch.cat((large, (large + size // 2) % size))] /= 30


def small_qwen3(
    layers: int = 2, dtype: torch.dtype = torch.float32, family: str = "qwen3", **changes: Any
) -> PreTrainedModel:
    """A Qwen3, or a model of another family: head_dim independent of hidden / heads, grouped heads, and norm weights
    far from one."""
    config = dict(
        vocab_size=152,
        hidden_size=56,
        intermediate_size=88,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**config, **changes}), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.3, 3.0)
    for module in model.modules():
        enlarge_k_norm(module)
    return model.eval().requires_grad_(False)


def static_cache(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    """A static cache whose tensors exist already."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = False, **kwargs: Any) -> list[GraphModule]:
    """The graphs that Dynamo hands to a backend when `function` is called."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return graphs


def fused(
    function: Callable[..., Any], *args: Any, options: Options | None = None, **kwargs: Any
) -> tuple[Any, list[GraphReport], list[GraphModule]]:
    """What `function(*args)` returns when its graphs are rewritten and run eagerly, the reports, and the graphs."""
    graphs: list[GraphModule] = []
    reports: list[GraphReport] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        reports.append(fuse(gm, options or Options()))
        graphs.append(gm)
        return gm.forward

    dynamic = kwargs.pop("dynamic", False)
    return torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs), reports, graphs
