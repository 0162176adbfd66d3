"""What looks like a fusion and is none is refused with the reason: models that differ from Qwen3 in one thing."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import fusepass
from fusepass.report import CODES, Report, Site
from tests.models import small_qwen3, static_cache
from tests.patterns.toys import BATCH, HEAD_DIM, HIDDEN, MLP, SEQ, Attention, Norm, hidden, tables

LAYERS, PROMPT = 2, 17
CLEAN = {"norm_qkv_rope": LAYERS, "norm_gated_mlp": LAYERS, "linear_residual": LAYERS, "norm_linear": 1}


@torch.no_grad()
def explained(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    if isinstance(model, PreTrainedModel):
        args, kwargs = (torch.randint(152, (1, PROMPT)),), {"use_cache": False, **kwargs}
    report = fusepass.explain(model, *args, **kwargs)
    assert {site.code for site in report.sites} <= {None, *CODES}
    return report


def refused(report: Report) -> list[tuple[str, str, str | None, str | None]]:
    return [(site.path, site.fusion, site.code, site.reason) for site in report.sites if not site.fused]


def the_only(report: Report) -> Site:
    (site,) = (site for site in report.sites if not site.fused)
    return site


class LoRA(nn.Module):
    """peft's linear layer, without dropout."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 3, bias=False)
        self.lora_B = nn.Linear(3, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 2


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_lora_on_a_projection_names_the_norms_other_user(name: str) -> None:
    model = small_qwen3(LAYERS)
    for layer in model.model.layers:
        setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
    report = explained(model)
    misses = refused(report)
    assert [(path, fusion, code) for path, fusion, code, _ in misses] == [
        (f"model.layers.{i}.self_attn.q_proj{'.base_layer' * (name == 'q_proj')}", "norm_qkv_rope", "extra-user")
        for i in range(LAYERS)
    ]
    for i, (_, _, _, reason) in enumerate(misses):
        assert reason is not None
        assert reason.startswith("'hidden_states_") or reason.startswith("'mul_"), reason
        assert reason.endswith(f"(linear) in model.layers.{i}.self_attn.{name}.lora_A")
    assert report.counts()["norm_gated_mlp"] == LAYERS


def test_lora_on_the_gate_names_the_add_that_stands_there() -> None:
    model = small_qwen3(LAYERS)
    for layer in model.model.layers:
        layer.mlp.gate_proj = LoRA(layer.mlp.gate_proj)
    report = explained(model)
    for i, (path, fusion, code, reason) in enumerate(refused(report)):
        assert (path, fusion, code) == (f"model.layers.{i}.mlp", "norm_gated_mlp", "structure")
        assert reason is not None
        assert reason.startswith("expected the linear layer 'gate', got 'add")
        assert reason.endswith(f"(add) in model.layers.{i}.mlp.gate_proj")
    assert len(refused(report)) == report.counts()["norm_qkv_rope"] == LAYERS


class Int8Tensor(Tensor):
    """A weight of int8 and scales that says it is f32, as torchao's."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> "Int8Tensor":
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> "Int8Tensor":
        return cls(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].data8, args[0].scale)
        plain = torch.utils._pytree.tree_map_only(cls, lambda x: x.data8 * x.scale, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def test_an_int8_weight_names_the_subclass() -> None:
    model = small_qwen3(LAYERS)
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        wrapped = Int8Tensor(weight.to(torch.int8), torch.ones(weight.shape[0], 1))
        layer.mlp.up_proj.weight = nn.Parameter(wrapped, requires_grad=False)
    report = explained(model)
    misses = refused(report)
    assert [(path, fusion, code) for path, fusion, code, _ in misses] == [
        (f"model.layers.{i}.mlp", "norm_gated_mlp", "tensor-subclass") for i in range(LAYERS)
    ]
    assert all(
        "up_proj" in str(reason) and "is a Int8Tensor, not a plain tensor" in str(reason) for *_, reason in misses
    )


def test_autocast_is_the_reason_for_every_site() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report = explained(small_qwen3(LAYERS))
    assert report.counts() == {}
    assert {site.reason for site in report.sites} == {"the model is called inside torch.autocast"}


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {}, {"hidden_act": "gelu_pytorch_tanh"}], ids=str)
def test_what_is_fused_is_no_near_miss(changes: dict[str, Any]) -> None:
    report = explained(small_qwen3(LAYERS, **changes))
    assert refused(report) == []
    assert dict(report.counts()) == CLEAN


def test_prefill_and_decode_with_a_cache_have_no_near_miss() -> None:
    model = small_qwen3(LAYERS)
    for length in (1, PROMPT):
        with torch.no_grad():
            tokens, cache = torch.randint(152, (1, length)), static_cache(model, 1, 24)
            assert refused(fusepass.explain(model, tokens, past_key_values=cache)) == []


def test_checkpointed_layers_in_training_are_refused_for_their_gradient() -> None:
    model = small_qwen3(LAYERS).requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    report = fusepass.explain(model, torch.randint(152, (1, PROMPT)), use_cache=False)
    assert report.counts() == {}
    assert {(site.code, str(site.reason).split("; ")[1]) for site in report.sites} == {
        ("grad", "run the model under torch.no_grad()")
    }
    assert {site.path for site in report.sites if site.fusion == "norm_gated_mlp"} == {
        f"model.layers.{i}.mlp" for i in range(LAYERS)
    }


def test_a_graph_break_in_a_layer_leaves_the_norm_alone_and_no_near_miss() -> None:
    model = small_qwen3(LAYERS)
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    report = explained(model)
    assert len(report.graphs) > LAYERS
    assert refused(report) == []
    assert report.counts()["rms_norm"] > 0


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos) + (turned * sin)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    part, rest = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
    low, high = part.chunk(2, dim=-1)
    cos, sin = cos[..., : HEAD_DIM // 2], sin[..., : HEAD_DIM // 2]
    return torch.cat(((part * cos) + (torch.cat((-high, low), dim=-1) * sin), rest), dim=-1)


@pytest.mark.parametrize("head_norm", ["before", None])
@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (interleaved, "interleaved rotary: expected the two halves of one tensor, got every second value: 'getitem"),
        (partial, f"partial rotary: {HEAD_DIM // 2} of {HEAD_DIM}"),
    ],
    ids=["interleaved", "partial"],
)
def test_another_rotary_embedding_is_named(rope: Any, reason: str, head_norm: str | None) -> None:
    site = the_only(explained(Attention(rope=rope, head_norm=head_norm), hidden(), *tables()))
    assert (site.fusion, site.code, site.path) == ("norm_qkv_rope", "rotary", "linears.q")
    assert str(site.reason).startswith(reason)


class Rotated(Attention):
    """`turned`: which of q, k and v are rotated."""

    def __init__(self, turned: str) -> None:
        super().__init__()
        self.turned = turned

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        heads = ((name, self.heads(name, x)) for name in "qkv")
        return [self.steps["rope"](y, cos, sin) if name in self.turned else y for name, y in heads]


@pytest.mark.parametrize(
    ("turned", "found"), [("", "found no rotary embedding"), ("q", "got 1 and 2"), ("qkv", "got 3 and 0")]
)
def test_other_branches_than_q_and_k_rotated_are_counted(turned: str, found: str) -> None:
    site = next(site for site in explained(Rotated(turned), hidden(), *tables()).sites if not site.fused)
    assert (site.fusion, site.code, site.path) == ("norm_qkv_rope", "structure", "linears.q")
    assert site.reason == f"expected two rotated branches and one that is not, {found}"


@pytest.mark.parametrize("head_norm", ["before", "after"])
def test_another_norm_of_the_heads_is_named(head_norm: str) -> None:
    """Gemma's: zero-centred, its weight multiplies before the cast."""
    net = Attention(head_norm=head_norm)
    for name in "qk":
        net.norms[name] = Norm(HEAD_DIM, narrow=unrounded, weigh=lambda w, h: (h * (1.0 + w.float())).type_as(w))
    site = next(site for site in explained(net, hidden(), *tables()).sites if site.fusion == "norm_qkv_rope")
    assert (site.code, site.path) == ("structure", "linears.q")
    expected = (
        r"expected the heads of a linear layer, or their RMSNorm, to be rotated, got '\w+' \(type_as\) in norms.q"
    )
    assert re.fullmatch(expected, str(site.reason))


def test_heads_of_a_symbolic_size_are_named() -> None:
    """As many tokens as sequences: Dynamo takes the two for one symbol, and does not reduce (s * s) // s."""
    x, (cos, sin) = torch.randn(SEQ, SEQ, HIDDEN), tables()
    report = explained(Attention(head_norm=None), x, cos, sin, dynamic=True)
    site = next(site for site in report.sites if site.fusion == "norm_qkv_rope")
    assert site.code == "shape"
    assert str(site.reason).startswith("expected a number for the size of a head, got the symbol ")


def test_a_gated_query_is_named_beside_the_partial_rotary_of_the_keys() -> None:
    class Gated(Attention):
        """Qwen3-Next's: q_proj makes a query and a gate of each head."""

        def heads(self, name: str, h: Tensor) -> Tensor:
            if name != "q":
                return super().heads(name, h)
            query, gate = self.linears["q"](h).view(*h.shape[:-1], -1, 2 * HEAD_DIM).chunk(2, dim=-1)
            return (query * gate.sigmoid()).transpose(1, 2)

    site = the_only(explained(Gated(rope=partial), hidden(), *tables()))
    assert (site.fusion, site.code) == ("norm_qkv_rope", "structure")
    assert site.reason == (
        "gated query: 'chunk' (chunk) in the top level takes each head of 'linear' apart; "
        f"partial rotary: {HEAD_DIM // 2} of {HEAD_DIM}"
    )


def unrounded(h: Tensor, x: Tensor) -> Tensor:
    return h


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("norm", "dtype", "multiplied"),
    [
        # Gemma's and Qwen3-Next's
        (Norm(narrow=unrounded, weigh=lambda w, h: (h * (1.0 + w.float())).to(BF16)).to(BF16), BF16, F32),
        (Norm(narrow=unrounded).to(BF16), BF16, F32),
        (Norm(narrow=lambda h, x: h.half()), F32, torch.float16),
    ],
    ids=["zero-centred", "result in f32", "rounded in between"],
)
def test_a_norm_whose_weight_multiplies_in_another_dtype_than_the_input_names_both(
    norm: Norm, dtype: torch.dtype, multiplied: torch.dtype
) -> None:
    site = the_only(explained(norm, hidden(dtype)))
    assert (site.fusion, site.code) == ("rms_norm", "dtype")
    assert site.reason == f"the weight multiplies {multiplied}, not the input's {dtype}: expected the cast first"
    assert "weigh" in site.source


@torch.library.custom_op("fusepass_test::rms_norm", mutates_args=())
def opaque_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight)


@opaque_norm.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("op", [opaque_norm, lambda x, w: F.rms_norm(x, w.shape, w)], ids=["custom", "torch"])
def test_an_opaque_norm_is_named(op: Any) -> None:
    site = the_only(explained(lambda x, w: op(x, w), hidden(), torch.ones(20)))
    assert (site.fusion, site.code) == ("rms_norm", "opaque")
    assert "rms_norm" in str(site.reason)
    assert str(site.reason).endswith("in the top level is one operator, whose rounding is not known")


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ({"mean": lambda s: s.mean(1, keepdim=True)}, "the mean of squares is not over the last dimension"),
        (
            {"mean": lambda s: torch.mean(input=s, dim=1, keepdim=True)},
            "the mean of squares is not over the last dimension",
        ),
        (
            {"shift": lambda m, eps: m + torch.full((1,), eps)},
            "expected a number (epsilon) added to the mean, got 'full",
        ),
        ({"shift": lambda m, eps: m}, "expected a number (epsilon) added to the mean, got 'rsqrt"),
        ({"scale": lambda h, r: (h + 1) * r}, "expected 'h' (to) in norm times 'rsqrt', got 'h_1' (mul) in norm"),
        ({"weigh": lambda w, h: w + h}, "expected 'to_1' times the norm's weight, got 'add_1' (add) in norm"),
    ],
    ids=["dim", "dim by keyword", "tensor-eps", "no-eps", "other-value", "add"],
)
def test_a_norm_with_one_other_step_names_that_step(spelling: Any, reason: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm(**spelling)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    site = the_only(explained(Net(), hidden()))
    assert (site.fusion, site.code, site.path) == ("rms_norm", "structure", "norm")
    assert str(site.reason).startswith(reason), site.reason


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ({"act": F.gelu}, "expected SiLU or tanh-GELU, got 'gelu' (gelu) in the top level"),
        ({"mul": lambda act, up: act * up.clamp(-7, 7)}, "expected the linear layer 'up', got 'clamp' (clamp)"),
        ({"act": lambda gate: F.silu(gate.clamp(max=7))}, "expected the linear layer 'gate', got 'clamp' (clamp)"),
        ({"mul": lambda act, up: (act * up).relu()}, "expected the linear layer 'down', got 'relu' (relu)"),
    ],
    ids=["exact-gelu", "clamped-up", "clamped-gate", "before-down"],
)
def test_a_gated_mlp_with_one_other_step_names_that_step(spelling: Any, reason: str) -> None:
    site = the_only(explained(MLP(**spelling), hidden()))
    assert (site.fusion, site.code) == ("norm_gated_mlp", "structure")
    assert str(site.reason).startswith(reason), site.reason


def test_gate_and_up_of_different_tensors_are_named() -> None:
    class Net(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x.sin())) * self.up(x.cos()))

    assert the_only(explained(Net(), hidden())).reason == (
        "gate reads 'sin' (sin) in the top level, up reads 'cos' (cos) in the top level"
    )


@pytest.mark.parametrize(("dropout", "words"), [(0.5, "dropout_p=0.5"), (0.0, None)])
def test_attention_of_one_query_with_dropout_is_named(dropout: float, words: str | None) -> None:
    q, k = torch.randn(1, 6, 1, 8), torch.randn(1, 6, 12, 8)
    report = explained(lambda q, k: F.scaled_dot_product_attention(q, k, k, dropout_p=dropout), q, k)
    assert [site.reason for site in report.sites] == [words and f"expected no dropout, got {words}"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, x.shape[-1:]),
        lambda x: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
        lambda x: F.silu(x) * x.sigmoid(),
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True, dropout_p=0.5),
        lambda x: F.linear(x, x[0]) * F.linear(x, x[1]) * F.linear(x, x[2]),
        lambda x: [F.linear(x, rows).sin().cos().tanh().exp().view(BATCH, SEQ, 1, SEQ) for rows in x.unbind()],
    ],
    ids=["layer-norm", "variance", "l2-norm", "gate-without-linears", "prefill", "linears", "heads-far-behind"],
)
def test_what_only_resembles_a_fusion_is_no_site(function: Callable[[Tensor], Tensor]) -> None:
    assert explained(function, hidden()).sites == []


def test_a_fusion_that_is_switched_off_has_no_near_miss() -> None:
    norm = Norm(weigh=lambda w, h: w + h)
    assert explained(norm, hidden(), options={"fusions": {"rms_norm": False}}).sites == []
