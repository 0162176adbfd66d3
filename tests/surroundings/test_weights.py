"""Weights that are adapted, quantised, replaced, shared or laid out in another way, before compiling and after."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

import fusepass
from tests.models import small_qwen3
from tests.patterns.toys import MLP, hidden, refusal, run
from tests.surroundings.common import assert_like_eager, compiled, fused_sites, ids, reasons

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHOLE = {"norm_qkv_rope": 2, "attention": 2, "linear_residual": 2, "norm_gated_mlp": 2, "norm_linear": 1}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def logits(run: Callable[..., Any], tokens: Tensor) -> Tensor:
    return run(tokens, use_cache=False).logits


def assert_fused_as_eager(fast: Any, model: PreTrainedModel, tokens: Tensor) -> None:
    """The last compilation has every site of a Qwen3 of two layers, and the logits are eager's."""
    assert_like_eager(logits(fast, tokens), logits(model, tokens))
    assert dict(fusepass.reports()[-1].counts()) == WHOLE


# --- the same model, other weights ---


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "assign", "data", "new parameter"])
def test_weights_changed_after_compiling_are_used(how: str) -> None:
    model, tokens = small_qwen3(2), ids()
    fast = compiled(model)
    before = logits(fast, tokens)
    weight = model.model.layers[0].mlp.down_proj.weight
    if how == "in place":
        weight.mul_(-2)
    elif how == "data":
        weight.data = weight.data * -2
    elif how == "new parameter":
        model.model.layers[0].mlp.down_proj.weight = nn.Parameter(weight * -2, requires_grad=False)
    else:
        state = copy.deepcopy(model.state_dict())
        state["model.layers.0.mlp.down_proj.weight"].mul_(-2)
        model.load_state_dict(state, assign=how == "assign")
    assert_fused_as_eager(fast, model, tokens)
    assert not torch.allclose(before, logits(fast, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_converted_after_compiling_is_fused_in_its_new_dtype(dtype: torch.dtype) -> None:
    model, tokens = small_qwen3(2), ids()
    fast = compiled(model)
    logits(fast, tokens)
    model.to(dtype)
    got = logits(fast, tokens)
    assert got.dtype == dtype
    torch.testing.assert_close(got, logits(model, tokens))
    assert dict(fusepass.reports()[-1].counts()) == WHOLE


def test_a_model_in_f64_is_left_alone() -> None:
    model, tokens = small_qwen3(1).double(), ids()
    assert_like_eager(logits(compiled(model), tokens), logits(model, tokens))
    assert fused_sites() == {}
    assert reasons() == {"dtype"}


def test_tied_weights_stay_tied() -> None:
    model, tokens = small_qwen3(2, tie_word_embeddings=True), ids()
    fast = compiled(model)
    assert_fused_as_eager(fast, model, tokens)
    model.model.embed_tokens.weight.mul_(1.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_fused_as_eager(fast, model, tokens)


def test_functional_call_uses_the_weights_it_is_given() -> None:
    model, tokens = small_qwen3(2), ids()
    other = {name: weight * 1.5 for name, weight in model.named_parameters()}

    def call(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return functional_call(model, weights, (tokens,), {"use_cache": False}).logits

    fast = compiled(call)
    for weights in (other, dict(model.named_parameters())):
        assert_like_eager(fast(weights, tokens), call(weights, tokens))
    assert dict(fusepass.reports()[-1].counts()) == WHOLE


# --- LoRA ---


def test_lora_is_left_between_the_fusions_and_fused_when_merged() -> None:
    peft = pytest.importorskip("peft")
    model, tokens = small_qwen3(2), ids()
    config = peft.LoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    want = logits(adapted, tokens)
    assert_like_eager(logits(compiled(adapted), tokens), want)
    # Adapters read what the projections read: norms stand alone, and each projection is added to its adapter's result.
    assert fused_sites() == {"rms_norm": 8, "attention": 2, "linear_residual": 14, "norm_linear": 1}
    extra = [site for site in fusepass.reports()[-1].sites if not site.fused]
    assert extra
    assert all("lora_A" in str(site.reason) or "lora_B" in str(site.reason) for site in extra), extra

    torch._dynamo.reset()
    fusepass.reset()
    merged = adapted.merge_and_unload()
    got = logits(compiled(merged), tokens)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert dict(fusepass.reports()[-1].counts()) == WHOLE


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, merged into its weight or not."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False).requires_grad_(False)
        self.up = nn.Linear(rank, base.out_features, bias=False).requires_grad_(False)
        self.merged = False

    def merge(self) -> None:
        self.base.weight += self.up.weight @ self.down.weight
        self.merged = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.merged else y + self.up(self.down(x))


def test_adapters_merged_in_place_after_compiling_make_the_model_whole() -> None:
    model, tokens = small_qwen3(2), ids()
    for layer in model.model.layers:
        layer.mlp.gate_proj = Adapted(layer.mlp.gate_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    fast = compiled(model)
    adapted = logits(fast, tokens)
    assert_like_eager(adapted, logits(model, tokens))
    assert {"norm_gated_mlp", "norm_qkv_rope"}.isdisjoint(fused_sites())
    for module in model.modules():
        if isinstance(module, Adapted):
            module.merge()
    assert_fused_as_eager(fast, model, tokens)
    torch.testing.assert_close(logits(fast, tokens), adapted, rtol=1e-3, atol=1e-3)


# --- quantised weights ---


class Quantised(Tensor):
    """A weight of a narrow dtype with a scale for each row, as torchao's: its ops compute with what it stands for."""

    @staticmethod
    def __new__(cls, narrow: Tensor, scale: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, narrow.shape, dtype=scale.dtype, device=narrow.device)

    def __init__(self, narrow: Tensor, scale: Tensor) -> None:
        self.narrow_, self.scale_ = narrow, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["narrow_", "scale_"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> "Quantised":
        return Quantised(inner["narrow_"], inner["scale_"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].narrow_, args[0].scale_)
        wide = pytree.tree_map_only(Quantised, lambda w: w.narrow_.to(w.scale_.dtype) * w.scale_, (args, kwargs or {}))
        return func(*wide[0], **wide[1])


def quantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Every linear layer's weight in `dtype`."""
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / most
            weight = Quantised((module.weight / scale).to(dtype), scale)
            module.weight = nn.Parameter(weight, requires_grad=False)


def assert_refused(model: PreTrainedModel) -> None:
    """The norms, and attention, are what has no such weights."""
    tokens = ids()
    assert type(model.model.layers[0].mlp.up_proj.weight.data) is not Tensor
    torch.testing.assert_close(logits(compiled(model), tokens), logits(model, tokens))
    assert set(fused_sites()) == {"rms_norm", "attention"}
    assert "tensor-subclass" in reasons()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_and_give_eagers_logits(dtype: torch.dtype) -> None:
    model = small_qwen3(2, torch.bfloat16)
    quantise(model, dtype)
    assert_refused(model)


@pytest.fixture
def quantization() -> Any:
    """Where `make` puts it. The path stays: who finds the module asks for its version, too."""
    sys.path.append(str(Path(sys.prefix) / "torchao"))
    return pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_weights_are_refused_and_give_eagers_logits(config: str, quantization: Any) -> None:
    model = small_qwen3(2, torch.bfloat16)
    quantization.quantize_(model, getattr(quantization, config)())
    assert_refused(model)


# --- weights that lie in memory in another way ---


def one_element_in(weight: Tensor) -> Tensor:
    """The same numbers, one element into their storage: aligned to nothing but the element."""
    return torch.empty(weight.numel() + 1, dtype=weight.dtype)[1:].view_as(weight).copy_(weight)


def test_weights_that_are_not_contiguous_are_refused() -> None:
    model, tokens = small_qwen3(2), ids()
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data = mlp.up_proj.weight.data.T.contiguous().T
    assert_like_eager(logits(compiled(model), tokens), logits(model, tokens))
    assert fused_sites()["norm_gated_mlp"] == 1
    assert reasons() == {"weight-layout"}


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("cpu", ["interpret", "reference"])
def test_misaligned_weights_are_fused(rows: int, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", cpu)
    mlp = MLP()
    for parameter in mlp.parameters():
        parameter.data = one_element_in(parameter.data)
        assert parameter.data_ptr() % 16
    x = one_element_in(torch.randn(rows, 20))
    assert_like_eager(compiled(mlp)(x), mlp(x))
    assert fused_sites() == {"norm_gated_mlp": 1}


def test_a_weight_on_another_device_is_refused() -> None:
    def mixed(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        return r + F.linear(x, weight)

    with torch.device("meta"):
        args = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8, 8)
    report, _ = run(mixed, *args)
    refusal(report, "linear_residual", "device", "is on meta; expected a CUDA device")


@pytest.mark.parametrize("name", ["norm.weight", "up.weight", "down.weight"])
def test_a_model_with_a_weight_on_another_device_is_dynamos_error(name: str) -> None:
    mlp = MLP()
    owner, _, attribute = name.rpartition(".")
    setattr(mlp.get_submodule(owner), attribute, nn.Parameter(mlp.get_parameter(name).to("meta"), requires_grad=False))
    for fast in (torch.compile(mlp, backend="eager"), compiled(mlp)):
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="meta"):
            fast(hidden())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 100])
def test_misaligned_weights_on_a_gpu_give_the_reference(rows: int) -> None:
    from fusepass.ops import OPS

    def draw(*shape: int) -> Tensor:
        flat = torch.randn(torch.Size(shape).numel() + 1, device="cuda").bfloat16() * shape[-1] ** -0.5
        return flat[1:].view(shape)

    op, weights = OPS["norm_gated_mlp"], (draw(208, 104), draw(208, 104), draw(104, 208))
    x = draw(1, rows, 104) * 10
    for residual in (x, draw(1, rows, 104)):
        args = (x, draw(104) + 1, 1e-6, *weights, None, None, None, residual, "silu", False)
        torch.testing.assert_close(op.overload(*args), op.reference(*args), rtol=2e-2, atol=2e-2)
