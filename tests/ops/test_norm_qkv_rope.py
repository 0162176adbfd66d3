from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepass.ops import OPS
from tests.ops.gate import CASES, FORM_CASES, HIGH_CASES, Case, assert_as_exact_as_eager, assert_keeps_f32, rms_error
from tests.ops.sites import SITES, Sizes, Tensors, sample
from tests.ops.test_contract import launch, reference

SITE = SITES["norm_qkv_rope"]
LINEARS = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(SITE, case)


@pytest.mark.parametrize("case", HIGH_CASES, ids=str)
def test_high_keeps_f32(case: Case) -> None:
    assert_keeps_f32(SITE, case)


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_without_head_norms_as_exact_as_eager(case: Case, family: str) -> None:
    """Qwen2 has biases instead, Llama has neither."""
    assert_as_exact_as_eager(SITE, replace(case, family=family))


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
@pytest.mark.parametrize("biased", [LINEARS, LINEARS[:1], LINEARS[1:2], LINEARS[2:], LINEARS[::2]], ids="+".join)
def test_with_biases_as_exact_as_eager(case: Case, biased: tuple[str, ...]) -> None:
    """Beside head norms; Qwen2's, without them, are in the test above."""

    def keep(layer: nn.Module) -> None:
        for name in LINEARS:
            if name not in biased:
                getattr(layer.self_attn, name).bias = None

    assert_as_exact_as_eager(SITE, replace(case, config={"attention_bias": True}), change=keep)


@pytest.mark.parametrize("absent", ["q_norm", "k_norm"])
def test_one_head_norm_alone_is_as_exact_as_eager(absent: str) -> None:
    def remove(layer: nn.Module) -> None:
        setattr(layer.self_attn, absent, nn.Identity())

    def arguments(layer: nn.Module, *inputs: Tensor) -> tuple[Any, ...]:
        norm = getattr(layer.self_attn, absent)
        norm.weight, norm.variance_epsilon = None, 0.0
        return SITE.arguments(layer, *inputs)

    assert_as_exact_as_eager(replace(SITE, arguments=arguments), FORM_CASES[0], change=remove)


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_without_the_first_norm_as_exact_as_eager(case: Case) -> None:
    def eager(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
        layer.self_attn(x, position_embeddings=(cos, sin), attention_mask=None)
        return layer.self_attn.captured

    def arguments(layer: nn.Module, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple((SITE.named(layer, inputs) | {"norm_weight": None}).values())[:-1]  # the last is `high`

    assert_as_exact_as_eager(replace(SITE, eager=eager, arguments=arguments), case)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (5, 5, 6), (8, 1, 40)])
def test_any_heads_are_as_exact_as_eager(heads: int, kv_heads: int, head_dim: int) -> None:
    """Head sizes and counts that fill no block."""
    sizes = Sizes(48, 72, heads, kv_heads, head_dim)
    assert_as_exact_as_eager(SITE, Case(2, 2, "rows", torch.float16, sizes=sizes))


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_each_norm_has_its_own_eps(case: Case) -> None:
    """As large as the mean squares that they are added to."""

    def set_eps(layer: nn.Module) -> None:
        layer.input_layernorm.variance_epsilon = 300.0
        layer.self_attn.q_norm.variance_epsilon = 0.5
        layer.self_attn.k_norm.variance_epsilon = 2.0

    assert_as_exact_as_eager(SITE, case, change=set_eps)


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "of each sequence": lambda t: t,
    "of the first sequence": lambda t: t[:1],
    "of one token": lambda t: t[:1, :, :1],
    "of one token of each sequence": lambda t: t[:, :, :1],
    "expanded over the batch": lambda t: t[:1].expand_as(t),
    "expanded over the tokens": lambda t: t[:, :, :1].expand_as(t),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "tokens first": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "within a longer table": lambda t: torch.cat((t, t), 2)[:, :, 1 : 1 + t.shape[2]],
}
"""Of [batch, 1, seq, head_dim]: the shapes and strides that models give cos and sin."""


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("names", [("cos", "sin"), ("sin",)], ids="+".join)
def test_rotary_tables_may_have_any_form(form: str, names: tuple[str, ...]) -> None:
    """Both tables, or one unlike the other. Their halves differ, as in no model."""
    arguments = sample("norm_qkv_rope", 2, 3)
    arguments |= {name: torch.randn_like(arguments[name]) for name in ("cos", "sin")}
    arguments |= {name: TABLES[form](arguments[name]) for name in names}
    for got, want in zip(launch("norm_qkv_rope", arguments, "skinny"), reference("norm_qkv_rope", arguments)):
        assert rms_error(got, want.double()) < 5e-3


def test_a_number_of_tokens_that_only_the_data_decides_is_traced() -> None:
    arguments = sample("norm_qkv_rope", 2, 3)
    torch._dynamo.decorators.mark_unbacked(arguments["x"], 1)

    def call(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = (table[:, :, :1].expand(-1, -1, x.shape[1], -1) for table in (cos, sin))
        return OPS["norm_qkv_rope"].overload(*(arguments | {"x": x, "cos": cos, "sin": sin}).values())

    inputs = (arguments[name] for name in ("x", "cos", "sin"))
    assert [out.shape[2] for out in torch.compile(call, backend="eager", fullgraph=True)(*inputs)] == [3, 3, 3]
