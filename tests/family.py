"""The Qwen3 family at test size: what of each model is fused, and what is refused and why.

The table that tests/test_family.py holds fusepass to, and that docs/models.md is made from: python -m tests.family
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fusepass.report import Site

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BATCH, PROMPT = 2, 9
# Every size differs from every other, so that a mix-up cannot pass.
SIZES: dict[str, Any] = {
    "vocab_size": 152,
    "hidden_size": 56,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED: dict[str, Any] = {**MOE, "shared_expert_intermediate_size": 40}
MROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
}
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}

GATED = "gated query: 'chunk' (chunk) in model.layers.#.self_attn takes each head of 'linear' apart"
PARTIAL = "partial rotary: 4 of 16"
ZERO_CENTRED = "the weight multiplies torch.float32, not the input's torch.bfloat16: expected the cast first"


@dataclass(frozen=True)
class Member:
    """One model class, and what is expected of it in bf16."""

    model: str
    """The class in transformers."""
    config: str
    """The class of its configuration."""
    fused: Mapping[str, int]
    """Fused sites of a prompt; a decode step has `attention` besides."""
    attention: int
    """Sites of `attention` in a decode step."""
    note: str
    """What of the model decides that, for the page."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration, besides `SIZES`."""
    refused: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Refused sites, by fusion and reason (numbers of nodes and paths left out)."""

    def build(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with random weights, on a CPU."""
        kind = getattr(transformers, self.model)
        configs = import_module(kind.__module__.replace(".modeling_", ".configuration_"))
        model = kind(getattr(configs, self.config)(**{**SIZES, **self.changes})).to(dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.data.uniform_(0.3, 3.0)
            elif parameter.ndim > 1:  # large enough that a wrong layer shows
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        return model.eval().requires_grad_(False)

    def call(self, model: PreTrainedModel, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """Logits or hidden states of `tokens` [BATCH, S]."""
        inputs = {"input_ids": tokens}
        if "Talker" in self.model:  # it speaks what another model has embedded
            size = SIZES["hidden_size"]
            inputs = {"inputs_embeds": F.one_hot(tokens % size, size).to(model.dtype)}
        return model(**inputs, past_key_values=cache, use_cache=True)[0]


def fused_sites(sites: Iterable[Site]) -> dict[str, int]:
    """As `Member.fused`."""
    return dict(Counter(site.fusion for site in sites if site.fused))


def refused_sites(sites: Iterable[Site]) -> dict[tuple[str, str], int]:
    """As `Member.refused`."""
    refused = [(site.fusion, str(site.reason)) for site in sites if not site.fused]
    # "'linear_24'", "layers.3": the numbers of nodes and layers say nothing about the model.
    return dict(Counter((name, re.sub(r"\.\d+\.", ".#.", re.sub(r"_\d+'", "'", reason))) for name, reason in refused))


def _whole(head: str, **others: int) -> dict[str, int]:
    """Sites of two layers with Qwen3's attention, of the last norm (in the fusion `head`), and others."""
    return dict(Counter({"norm_qkv_rope": 2, "linear_residual": 2, head: 1}) + Counter(others))


_HEADS = {
    "ForCausalLM": "norm_linear",
    "Model": "rms_norm",
    "ForSequenceClassification": "norm_linear",
    "ForTokenClassification": "rms_norm",
    "ForQuestionAnswering": "norm_linear",
}
"""Which fusion has the last norm: a token classifier has a dropout between it and its linear layer."""


def _members() -> Iterator[Member]:
    for head, last in _HEADS.items():
        note = {"Model": "as Qwen3-Embedding uses it"}.get(head, "")
        yield Member(f"Qwen3{head}", "Qwen3Config", _whole(last, norm_gated_mlp=2), 2, note)
    for head, last in _HEADS.items():
        note, fused = "one of two layers is dense", _whole(last, norm_gated_mlp=1, rms_norm=1)
        yield Member(f"Qwen3Moe{head}", "Qwen3MoeConfig", fused, 2, note, {**MOE, "mlp_only_layers": [0]})

    dense, experts = _whole("rms_norm", norm_gated_mlp=2), _whole("rms_norm", rms_norm=2)
    shared = _whole("rms_norm", norm_gated_mlp=2, rms_norm=2)
    omni, moe = "Qwen3OmniMoe", {**MOE, **MROPE}
    yield Member("Qwen3VLTextModel", "Qwen3VLTextConfig", dense, 2, "", MROPE)
    yield Member("Qwen3VLMoeTextModel", "Qwen3VLMoeTextConfig", experts, 2, "", moe)
    yield Member(f"{omni}ThinkerTextModel", f"{omni}TextConfig", experts, 2, "", moe)
    note = "the shared expert is a gated MLP"
    yield Member(f"{omni}TalkerModel", f"{omni}TalkerTextConfig", shared, 2, note, {**SHARED, **MROPE})
    yield Member(f"{omni}TalkerCodePredictorModel", f"{omni}TalkerCodePredictorConfig", dense, 2, "")

    # Three of four layers are linear attention: their gated norm is an RMSNorm, their last linear layer a residual's.
    hybrid = {"norm_gated_mlp": 4, "linear_residual": 4, "rms_norm": 3}
    # Two norms a layer, those of q and k, and the last.
    refused = {("norm_qkv_rope", f"{GATED}; {PARTIAL}"): 1, ("rms_norm", ZERO_CENTRED): 11}
    for model, config, changes in (
        ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**SHARED, "mlp_only_layers": [0]}),
        ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {}),
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", SHARED),
    ):
        note = "3 of 4 layers are linear attention"
        yield Member(model, config, hybrid, 1, note, {**HYBRID, **changes}, refused)


FAMILY = tuple(_members())


def page() -> str:
    """docs/models.md."""
    columns = ("norm_qkv_rope", "norm_gated_mlp", "attention", "linear_residual", "norm_linear", "rms_norm")
    rows = []
    for member in FAMILY:
        counts = {**member.fused, "attention": member.attention}
        cells = [f"`{member.model}`{f': {member.note}' * bool(member.note)}"]
        cells += [str(counts.get(name, "")) for name in columns]
        cells.append("<br>".join(f"{n} {fusion}: {reason}" for (fusion, reason), n in member.refused.items()))
        rows.append(f"| {' | '.join(cells)} |")
    return f"""# Models of the Qwen3 family

What of each is fused, at test size: two layers, or four where most are linear attention; bfloat16, transformers
{transformers.__version__}. `attention` is that of a decode step, the rest is the same for a prompt.
`tests/test_family.py` holds every number and reason to what the backend does, and the results to eager's; this page
is made by `python -m tests.family`. [Every other causal LM](causal-lms.md).

| model | {" | ".join(columns)} | refused |
|---|{"---|" * (len(columns) + 1)}
{chr(10).join(rows)}

Packed experts are no gated MLP: the norm before them stands alone, and router and experts are left to the
remainder. The language model of Qwen3-ASR is `Qwen3Model`. Vision and audio towers are not in this table.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
