"""The spans of a Hugging Face decoder layer that each op replaces, run by the layer's own modules.

A layer of `transformers` is built alone, in any size, and its parameters are drawn anew as often as wanted. A `Site`
says what eager computes in the span and which arguments the op gets for it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusepass.ops import OPS, Op
from tests.models import enlarge_k_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.float32)
"""Of the tests that run on any device: Triton's interpreter is wrong for bf16."""

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one decoder layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.intermediate}-{self.heads}:{self.kv_heads}x{self.head_dim}"


SMALL = Sizes(66, 88, 6, 2, 16)
"""For the interpreter: no size is a power of two or equals another."""
QWEN3 = Sizes(1024, 3072, 16, 8, 128)
"""Qwen3-0.6B."""


def _capture(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """An attention function that keeps what attention would have read."""
    attention.captured = (query, key, value)
    return query.transpose(1, 2), None


AttentionInterface.register("capture", _capture)


def decoder_layer(sizes: Sizes, dtype: torch.dtype, family: str = "qwen3", **config: Any) -> nn.Module:
    """A layer of a family of models on `DEVICE`, its parameters not yet drawn; `rotary` is the model's embedding."""
    settings = AutoConfig.for_model(
        family,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        num_hidden_layers=1,
        **config,
    )
    settings._attn_implementation = "capture"
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = family.capitalize()
    with torch.device(DEVICE):
        layer = getattr(module, f"{name}DecoderLayer")(settings, 0)
        rotary = getattr(module, f"{name}RotaryEmbedding")(settings)
    layer.to(dtype).eval().requires_grad_(False)
    layer.rotary = rotary  # stays in f32, as in a model
    return layer


def redraw(layer: nn.Module) -> None:
    """Fresh parameters: norm weights far from one (Qwen3's k_norm goes up to 96.5), biases as large as the products."""
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.3, 3.0)
        elif parameter.dim() == 1:
            parameter.normal_()
        else:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    enlarge_k_norm(layer.self_attn)


def activations(layer: nn.Module, *shape: int, outliers: int = 3) -> Tensor:
    """Normal activations, some channels of them a hundred times as large."""
    x = torch.randn(shape, device=DEVICE)
    x[..., torch.randperm(shape[-1])[:outliers]] *= 100
    return x.to(layer.mlp.down_proj.weight.dtype)


@dataclass(frozen=True)
class Site:
    """A span of a layer. `inputs(layer, batch, seq)` draws its activations, which `eager` and `arguments` take."""

    op: Op
    inputs: Callable[..., Tensors]
    eager: Callable[..., Tensors]
    arguments: Callable[..., tuple[Any, ...]]

    def run(self, layer: nn.Module, inputs: Tensors, high: bool) -> Tensors:
        """What the op returns in place of the span."""
        return as_tuple(self.op.overload(*self.named(layer, inputs, high).values()))

    def named(self, layer: nn.Module, inputs: Tensors, high: bool = False) -> dict[str, Any]:
        """The op's arguments by name, those with a default left out."""
        names = [argument.name for argument in self.op.overload._schema.arguments]
        settings = (high,) if "high" in names else ()
        return dict(zip(names, (*self.arguments(layer, *inputs), *settings)))


def sample(
    name: str, batch: int, seq: int, *, optional: bool = True, high: bool = False, sizes: Sizes = SMALL
) -> dict[str, Any]:
    """Arguments of an op by name, with every optional one or with none."""
    site = SITES[name]
    family = "llama" if name == "norm_gated_mlp" else "qwen3"  # of the two, only Llama's MLP may have biases
    layer = decoder_layer(sizes, torch.float16, family, attention_bias=True, mlp_bias=True)
    redraw(layer)
    arguments = site.named(layer, site.inputs(layer, batch, seq), high)
    if not optional:
        empty = {a.name: None for a in site.op.overload._schema.arguments if isinstance(a.type, torch.OptionalType)}
        arguments |= empty
    return arguments


def as_tuple(result: Tensor | Tensors) -> Tensors:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _hidden(layer: nn.Module, batch: int, seq: int) -> Tensors:
    return (activations(layer, batch, seq, layer.hidden_size),)


def _norm(layer: nn.Module, x: Tensor) -> Tensors:
    return (layer.input_layernorm(x),)


def _norm_arguments(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
    return x, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon


SKIPPED = 2
"""Tokens whose rows `norm_linear` does not keep."""


def _prompt(layer: nn.Module, batch: int, seq: int) -> Tensors:
    return _hidden(layer, batch, SKIPPED + seq)


def _head(layer: nn.Module, x: Tensor) -> Tensors:
    """A layer has no lm_head; q_proj is a linear layer like it."""
    return (layer.self_attn.q_proj(layer.input_layernorm(x)[:, SKIPPED:]),)


def _head_arguments(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
    return *_norm_arguments(layer, x), layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias, SKIPPED


def _attention_output(layer: nn.Module, batch: int, seq: int) -> Tensors:
    attended = activations(layer, batch, seq, layer.self_attn.o_proj.in_features)
    return attended, activations(layer, batch, seq, layer.hidden_size)


def _output_projection(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensors:
    return (residual + layer.self_attn.o_proj(x),)


def _output_projection_arguments(layer: nn.Module, x: Tensor, residual: Tensor) -> tuple[Any, ...]:
    return x, layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias, residual


def _mlp(layer: nn.Module, x: Tensor) -> Tensors:
    return (x + layer.mlp(layer.post_attention_layernorm(x)),)


def _mlp_arguments(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
    norm, linears = layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    activation = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[layer.mlp.config.hidden_act]
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    return x, norm.weight, norm.variance_epsilon, *weights, *biases, x, activation


def tokens(layer: nn.Module, batch: int, seq: int) -> Tensors:
    """Hidden states and the rotary tables [batch, seq, head_dim] of tokens far into their sequences."""
    (x,) = _hidden(layer, batch, seq)
    positions = torch.randint(0, 4096, (batch, 1), device=DEVICE) + torch.arange(seq, device=DEVICE)
    return x, *layer.rotary(x, positions)


def _attention(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    layer.self_attn(layer.input_layernorm(x), position_embeddings=(cos, sin), attention_mask=None)
    return layer.self_attn.captured


def _attention_arguments(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
    attention = layer.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    head_norms = [(None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon) for norm in norms]
    tables = cos.unsqueeze(1), sin.unsqueeze(1)
    return *_norm_arguments(layer, x), *weights, *biases, *head_norms[0], *head_norms[1], *tables, attention.head_dim


def draw_cache(layer: nn.Module, batch: int, queries: int, length: int) -> Tensors:
    """Keys, values, and a mask that hides some of them, no two rows alike."""
    attention = layer.self_attn
    shape = batch, attention.config.num_key_value_heads, length, attention.head_dim
    k, v = activations(layer, *shape, outliers=0), activations(layer, *shape)
    mask = torch.zeros(batch, 1, queries, length, device=DEVICE, dtype=k.dtype)
    return k, v, mask.masked_fill_(torch.rand(mask.shape, device=DEVICE) < 0.3, torch.finfo(k.dtype).min)


def _queries(layer: nn.Module, batch: int, seq: int) -> Tensors:
    """The last tokens' queries, and a cache longer than one block."""
    queries, attention = min(seq, 3), layer.self_attn
    heads = attention.config.num_attention_heads
    q = activations(layer, batch, heads, queries, attention.head_dim, outliers=0) * 3
    return q, *draw_cache(layer, batch, queries, seq + 70)


def _attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensors:
    attention = layer.self_attn
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](attention, q, k, v, mask, scaling=attention.scaling)
    return (output.transpose(1, 2),)  # in transformers the heads come after the tokens


def _attend_arguments(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    return q, k, v, mask, layer.self_attn.scaling


def _tokens_and_cache(layer: nn.Module, batch: int, seq: int) -> Tensors:
    """Tokens whose place is anywhere in a cache longer than one block."""
    length = seq + 70
    k, v, mask = draw_cache(layer, batch, seq, length)
    position = torch.randint(length - seq + 1, (1,), device=DEVICE) + torch.arange(seq, device=DEVICE)
    return *tokens(layer, batch, seq), k, v, position, mask


def _self_attend(layer: nn.Module, *inputs: Tensor) -> Tensors:
    """The output, and the keys and values that the cache would hold at the tokens' position."""
    x, cos, sin, keys, values, position, mask = inputs
    q, k, v = _attention(layer, x, cos, sin)
    keys, values = keys.index_copy(2, position, k), values.index_copy(2, position, v)
    return *_attend(layer, q, keys, values, mask), k, v


def _self_attend_arguments(layer: nn.Module, *inputs: Tensor) -> tuple[Any, ...]:
    return *_attention_arguments(layer, *inputs[:3]), *inputs[3:], layer.self_attn.scaling


SITES = {
    "rms_norm": Site(OPS["rms_norm"], _hidden, _norm, _norm_arguments),
    "linear_residual": Site(
        OPS["linear_residual"], _attention_output, _output_projection, _output_projection_arguments
    ),
    "norm_linear": Site(OPS["norm_linear"], _prompt, _head, _head_arguments),
    "norm_gated_mlp": Site(OPS["norm_gated_mlp"], _hidden, _mlp, _mlp_arguments),
    "norm_qkv_rope": Site(OPS["norm_qkv_rope"], tokens, _attention, _attention_arguments),
    "attention": Site(OPS["attention"], _queries, _attend, _attend_arguments),
    "self_attention": Site(OPS["self_attention"], _tokens_and_cache, _self_attend, _self_attend_arguments),
}
