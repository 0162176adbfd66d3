"""`model.compile` and then `generate`: with every cache, every way of decoding, the tokens are eager's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from tests.models import small_qwen3
from tests.surroundings.common import EAGER, fused_sites, ids

NEW = 4


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_STREAMS = [kind for kind in ALL_CACHE_IMPLEMENTATIONS if kind.startswith("offloaded")]


def model_and_twin(**config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models of the same weights, the first compiled in place."""
    twin, model = (small_qwen3(1, **config).to(DEVICE) for _ in range(2))
    model.load_state_dict(twin.state_dict())
    model.compile(backend="fusepass", options=EAGER)
    return model, twin


def outcome(model: PreTrainedModel, tokens: Tensor, **settings: Any) -> Any:
    """The tokens that `generate` gives, or the name of its error."""
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": NEW, "disable_compile": True, **settings}
    try:
        return model.generate(tokens.to(DEVICE), **settings).tolist()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.gpu] * (kind in NEEDS_STREAMS)) for kind in ALL_CACHE_IMPLEMENTATIONS],
)
def test_every_cache_of_hugging_face_gives_the_tokens_or_the_error_that_it_gives_without(kind: str) -> None:
    model, twin = model_and_twin()
    if kind in NEEDS_STREAMS and torch.__version__ < "2.12":
        pytest.skip("at the second compilation with a stream torch 2.11 ends the process, before it calls any backend")
    if kind in NEEDS_STREAMS:
        twin.compile(backend="eager")  # it may be that Dynamo has no streams
    tokens = ids(2, 6)
    want = outcome(twin, tokens, cache_implementation=kind)
    assert outcome(model, tokens, cache_implementation=kind) == want
    # "quantized" needs a package that is not installed.
    assert isinstance(want, list) or kind in ("quantized", *NEEDS_STREAMS)
    if isinstance(want, list):
        assert {"norm_qkv_rope", "norm_gated_mlp", "linear_residual", "norm_linear"} <= set(fused_sites())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 3, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"do_sample": True, "top_k": 5},
        {"use_cache": False},
    ],
    ids=str,
)
def test_every_way_of_decoding_gives_eagers_tokens(settings: dict[str, Any]) -> None:
    model, twin = model_and_twin()
    tokens = ids(1 if "prompt_lookup_num_tokens" in settings else 2, 6)
    want = outcome(twin, tokens, **settings)
    assert isinstance(want, list), want
    assert outcome(model, tokens, **settings) == want
    assert {"norm_qkv_rope", "norm_gated_mlp", "norm_linear"} <= set(fused_sites())


def test_assisted_decoding_with_a_compiled_assistant_gives_eagers_tokens() -> None:
    (model, twin), (assistant, plain) = model_and_twin(), model_and_twin(hidden_size=40)
    tokens = ids(1, 6)
    want = outcome(twin, tokens, assistant_model=plain)
    assert isinstance(want, list), want
    assert outcome(model, tokens, assistant_model=assistant) == want
    assert fused_sites()["norm_qkv_rope"] >= 2


def test_continuous_batching_gives_eagers_tokens() -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = small_qwen3(1).to(DEVICE)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(**compile_configs: Any) -> list[list[int]]:
        batching = ContinuousBatchingConfig(block_size=16, num_blocks=8, max_batch_tokens=32, **compile_configs)
        made = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=batching)
        return [output.generated_tokens for output in made.values()]

    want = run()
    assert all(len(tokens) == NEW for tokens in want)
    config = CompileConfig(backend="fusepass", mode=None, options=EAGER)
    assert run(varlen_compile_config=config, decode_compile_config=config) == want
    # Its attention breaks the graph; what follows is whole.
    assert fused_sites() == {"norm_qkv_rope": 1, "linear_residual": 1, "norm_gated_mlp": 1, "rms_norm": 1}
