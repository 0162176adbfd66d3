"""Reports to make pages of: each is explained once for all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, StaticCache

import fusepass
from fusepass.report import Report
from tests.models import small_qwen3, static_cache

LAYERS = 5
ODD = 3


def decode_step(model: Any, cache: StaticCache) -> Report:
    with torch.no_grad():
        return fusepass.explain(model, torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache)


@pytest.fixture(scope="session")
def fused() -> Report:
    """A decode step in which everything is fused."""
    model = small_qwen3(LAYERS)
    return decode_step(model, static_cache(model, 1, 24))


@pytest.fixture(scope="session")
def mixed() -> Report:
    """A prompt, of a model with something between gate and activation in layer `ODD`."""
    model = small_qwen3(LAYERS)
    mlp = model.model.layers[ODD].mlp
    mlp.gate_proj = torch.nn.Sequential(mlp.gate_proj, torch.nn.Tanh())
    with torch.no_grad():
        return fusepass.explain(model, torch.zeros(1, 9, dtype=torch.int64), use_cache=False)


@pytest.fixture(scope="session")
def large() -> Report:
    """A decode step of Qwen3-32B."""
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    config = Qwen3Config(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, **heads)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return decode_step(model, StaticCache(config=config, max_cache_len=1024))


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Report], Path]:
    """The page of a report, as a file."""
    pages: dict[int, Path] = {}

    def write(report: Report) -> Path:
        if id(report) not in pages:
            pages[id(report)] = tmp_path_factory.mktemp("page") / "report.html"
            report.to_html(pages[id(report)], title="a <model>")
        return pages[id(report)]

    return write
