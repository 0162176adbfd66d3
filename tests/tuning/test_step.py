"""The decode step that configs are refined in is that of a model."""

import pytest
import torch
from transformers import AutoConfig

from fusepass.bench.models import DIMENSIONS, qwen3_config
from fusepass.tuning.problem import problems
from fusepass.tuning.step import ENOUGH, Model, decode_step, layers_of_step
from tests.decoding import compiled, decode, decoder, draw_tokens
from tests.models import static_cache
from tests.tuning.conftest import Launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, ops replay launches that were recorded")
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_launches_what_a_decode_step_of_the_model_launches(rows: int, launched: list[Launch]) -> None:
    """Kernel for kernel, with the same constants: sizes, configs, early reads."""
    model = decoder()
    with torch.no_grad():
        decode(compiled(model), static_cache(model, rows, 1024), draw_tokens(rows, 1), logits_to_keep=1)
    of_the_model = launched.copy()
    assert [launch.kernel for launch in of_the_model].count("attention_kernel") == 2
    launched.clear()
    decode_step(Model.of(model.config), rows, "meta")()
    assert launched == of_the_model


def test_a_step_has_enough_weights_and_no_more_layers_than_the_model() -> None:
    for name, count in zip(DIMENSIONS, (28, 15, 8, 4, 3, 2), strict=True):
        model = Model.of(qwen3_config(name))
        layer = sum(problem.nbytes for problem in problems(model, 1)[:4])
        assert layers_of_step(model) == count
        assert count == model.layers or (count - 1) * layer <= ENOUGH < count * layer
    huge = model._replace(hidden=1 << 17)
    assert layers_of_step(huge) == 2
    assert layers_of_step(huge._replace(layers=1)) == 1


def test_the_sizes_of_a_model_that_names_no_head_size() -> None:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=96, intermediate_size=40, num_attention_heads=6, num_key_value_heads=2,
        num_hidden_layers=5, vocab_size=77,
    )  # fmt: skip
    assert Model.of(config) == Model(96, 40, 5, 6, 2, 16, 77)
