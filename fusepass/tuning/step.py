"""The kernels of a model's decode step, on random weights: what launch configs are refined in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fusepass.ops import OPS

if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig

CACHE, CONTEXT = 1024, 536
"""Positions of the static cache, and how many of them are filled before the step: half way through the 50 steps that
`fusepass bench` runs from 512 on. (Where 512 are seen, or 513, every split may have equally many blocks.)"""
ENOUGH = 1_500_000_000
"""Bytes of layers' weights in a step: many times any L2 (60 MB on an H200), and of a 32B model two layers in 64."""
EPS = 1e-6

Work = Callable[[], object]


class Model(NamedTuple):
    """The sizes of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "Model":
        """The sizes that a transformers configuration gives."""
        c = config.get_text_config()
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        heads = c.num_attention_heads, c.num_key_value_heads, head_dim
        return cls(c.hidden_size, c.intermediate_size, c.num_hidden_layers, *heads, c.vocab_size)

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


def layers_of_step(model: Model) -> int:
    """As many layers as have more than `ENOUGH` bytes of bf16 weights, at least two, but no more than the model has."""
    layer = 2 * model.hidden * (2 * model.q_size + 2 * model.kv_size + 3 * model.intermediate)
    return min(model.layers, max(2, ENOUGH // layer + 1))


def decode_step(model: Model, rows: int, device: str = "cuda") -> Work:
    """A function that launches what the layers and the language-model head of a model with Qwen3's layers launch for
    one new token of each of `rows` sequences, in bf16. It chooses launch configs anew in every call."""
    hidden, inner, q, kv, d = model.hidden, model.intermediate, model.q_size, model.kv_size, model.head_dim
    self_attention, linear_residual, norm_gated_mlp, norm_linear = (
        OPS[name].launch for name in ("self_attention", "linear_residual", "norm_gated_mlp", "norm_linear")
    )

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)

    cos, sin = new(1, 1, 1, d), new(1, 1, 1, d)
    position = torch.full((1,), CONTEXT, device=device)
    mask = (torch.arange(CACHE, device=device) <= CONTEXT).expand(rows, 1, 1, CACHE)

    def layer(early: bool) -> Callable[[Tensor], Tensor]:
        projection = new(hidden), EPS, new(q, hidden), new(kv, hidden), new(kv, hidden), None, None, None
        head_norms = new(d), EPS, new(d), EPS
        caches = new(rows, model.kv_heads, CACHE, d), new(rows, model.kv_heads, CACHE, d)
        o = new(hidden, q)
        mlp = new(hidden), EPS, new(inner, hidden), new(inner, hidden), new(hidden, inner), None, None, None

        def run(x: Tensor) -> Tensor:
            attended = self_attention(
                x, *projection, *head_norms, cos, sin, d, *caches, position, mask, d**-0.5, False, early
            )
            x = linear_residual(attended.transpose(1, 2).reshape(rows, 1, q), o, None, x, False, True)
            return norm_gated_mlp(x, *mlp, x, "silu", False, True)

        return run

    # The backend lets every op but a graph's first read its weights early.
    layers = [layer(early=i > 0) for i in range(layers_of_step(model))]
    tokens, norm, head = new(rows, 1, hidden), new(hidden), new(model.vocabulary, hidden)

    def step() -> Tensor:
        x = tokens
        for run in layers:
            x = run(x)
        return norm_linear(x, norm, EPS, head, None, -1, False, True)

    return step
