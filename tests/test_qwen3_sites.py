"""Every layer of a Qwen3 is fused, however the model is called, and computes what it did."""

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import DynamicCache, PreTrainedModel

from fusepass.options import Options
from fusepass.report import GraphReport
from fusepass.rewrite import fuse
from tests.models import fused, small_qwen3, static_cache

LAYERS, PROMPT, ROOM = 2, 17, 24
COUNTS = {"norm_qkv_rope": LAYERS, "norm_gated_mlp": LAYERS, "linear_residual": LAYERS, "norm_linear": 1}


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")


def new_cache(kind: str | None, model: PreTrainedModel, batch: int) -> Any:
    if kind is None:
        return None
    return static_cache(model, batch, ROOM) if kind == "static" else DynamicCache(config=model.config)


def arguments(tokens: torch.Tensor, cache: Any, start: int) -> dict[str, Any]:
    if cache is None:
        return {"input_ids": tokens, "use_cache": False}
    # transformers 4 counts the positions outside of the cache.
    positions = torch.arange(start, start + tokens.shape[1])
    return {"input_ids": tokens, "past_key_values": cache, "use_cache": True, "cache_position": positions}


def contents(cache: Any) -> list[torch.Tensor]:
    return [] if cache is None else [x for layer in cache.layers for x in (layer.keys, layer.values)]


def assert_all_fused(reports: list[GraphReport], graphs: list[GraphModule], attention: bool | None = False) -> None:
    """`attention`: whether that is fused as well; None if it may be."""
    assert [site for report in reports for site in report.sites if not site.fused] == []
    counts = sum((report.counts() for report in reports), Counter())
    attentions = counts.pop("attention", 0)
    assert counts == COUNTS
    assert attention is None or attentions == (LAYERS if attention else 0)
    modules = (module for gm in graphs for module in gm.modules() if isinstance(module, GraphModule))
    assert not any("rsqrt" in module.code for module in modules)


CASES = [
    # Half of all cases: every choice of three of the five meets every other.
    (batch, dynamic, kind, phase, ("eager", "sdpa")[(batch + dynamic + (phase == "decode")) % 2])
    for batch, dynamic, kind, phase in itertools.product(
        (1, 2), (False, True), (None, "dynamic", "static"), ("prefill", "decode")
    )
]


@pytest.mark.parametrize(("batch", "dynamic", "cache", "phase", "attention"), CASES)
@torch.no_grad()
def test_every_layer_is_fused(batch: int, dynamic: bool, cache: str | None, phase: str, attention: str) -> None:
    model = small_qwen3(LAYERS, attn_implementation=attention)
    tokens, start = torch.randint(model.config.vocab_size, (batch, PROMPT)), 0
    ours = new_cache(cache, model, batch)
    if phase == "decode":
        if ours is not None:
            model(**arguments(tokens, ours, 0))
            start = PROMPT
        tokens = tokens[:, :1]
    theirs = copy.deepcopy(ours)

    want = model(**arguments(tokens, theirs, start)).logits
    got, reports, graphs = fused(model, **arguments(tokens, ours, start), dynamic=dynamic)
    # A SymFloat epsilon given to an op makes Dynamo start again: the last graph is the one that runs.
    assert dynamic or len(graphs) == 1
    # A prompt is left to SDPA where it is known to be one.
    unknown = None if dynamic and attention == "sdpa" else False
    assert_all_fused(reports[-1:], graphs[-1:], attention == "sdpa" if phase == "decode" else unknown)
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-4)
    assert len(contents(ours)) == (0 if cache is None else 2 * LAYERS)
    torch.testing.assert_close(contents(ours), contents(theirs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_site_names_the_users_module_and_line() -> None:
    _, (report,), _ = fused(small_qwen3(LAYERS), torch.randint(152, (1, PROMPT)), use_cache=False)
    layers = [f"model.layers.{i}" for i in range(LAYERS)]
    assert sorted((site.fusion, site.path) for site in report.sites) == sorted(
        [("norm_linear", "lm_head")]
        + [("norm_qkv_rope", f"{layer}.self_attn") for layer in layers]
        + [("norm_gated_mlp", f"{layer}.mlp") for layer in layers]
        + [("linear_residual", f"{layer}.self_attn.o_proj") for layer in layers]
    )
    code = {
        "norm_linear": "logits = self.lm_head(hidden_states",
        "norm_qkv_rope": "query_states = self.q_norm(self.q_proj(hidden_states)",
        "norm_gated_mlp": "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        "linear_residual": "attn_output = self.o_proj(attn_output)",
    }
    for site in report.sites:
        place, function, line = site.source.split(", in ")[0], *site.source.split(", in ")[1].split(": ", 1)
        file, number = place.rsplit(":", 1)
        assert file.endswith("modeling_qwen3.py")
        assert int(number) > 0
        assert function == "forward"
        assert code[site.fusion] in line


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"num_key_value_heads": 6}, {"tie_word_embeddings": True}], ids=str
)
@torch.no_grad()
def test_variants_of_the_configuration_are_fused(changes: dict[str, Any]) -> None:
    model, tokens = small_qwen3(LAYERS, **changes), torch.randint(152, (2, PROMPT))
    got, reports, graphs = fused(model, tokens, use_cache=False)
    assert_all_fused(reports, graphs)
    torch.testing.assert_close(got.logits, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 5])], ids=["1", "3", "indices"])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_the_last_norm_and_lm_head_are_one_op_unless_logits_are_kept_by_index(keep: Any, dynamic: bool) -> None:
    model, tokens = small_qwen3(1), torch.randint(152, (2, PROMPT))
    got, reports, _ = fused(model, tokens, use_cache=False, logits_to_keep=keep, dynamic=dynamic)
    last = "norm_linear" if isinstance(keep, int) else "rms_norm"
    assert {site.fusion for site in reports[-1].sites if site.path in ("model.norm", "lm_head")} == {last}
    want = model(tokens, use_cache=False, logits_to_keep=keep).logits
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_last_norm_of_a_model_without_lm_head_stands_alone() -> None:
    _, (report,), _ = fused(small_qwen3(LAYERS).model, torch.randint(152, (2, PROMPT)), use_cache=False)
    assert (report.counts()["norm_linear"], report.counts()["rms_norm"]) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_fused_and_rounds_where_eager_does(dtype: torch.dtype) -> None:
    model, tokens = small_qwen3(LAYERS, dtype), torch.randint(152, (2, PROMPT))
    got, reports, graphs = fused(model, tokens, use_cache=False)
    assert_all_fused(reports, graphs)
    torch.testing.assert_close(got.logits, model(tokens, use_cache=False).logits)


@torch.no_grad()
def test_checkpointed_layers_are_fused() -> None:
    model, tokens = small_qwen3(LAYERS), torch.randint(152, (2, PROMPT))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Some releases break the graph on the way to the layers: it is all graphs together that count.
    got, reports, graphs = fused(model, tokens, use_cache=False)
    assert sum(isinstance(module, GraphModule) for gm in graphs for module in gm.modules()) == len(graphs) + LAYERS
    assert_all_fused(reports, graphs)
    torch.testing.assert_close(got.logits, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_is_refused_with_the_way_out() -> None:
    model = small_qwen3(LAYERS).requires_grad_(True)
    _, (report,), _ = fused(model, torch.randint(152, (1, PROMPT)), use_cache=False)
    assert report.sites
    assert {site.code for site in report.sites} == {"grad"}
    assert all("torch.no_grad()" in str(site.reason) for site in report.sites)


@torch.no_grad()
def test_fusing_a_dynamic_graph_adds_no_guard() -> None:
    compiled_graphs = set()

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        compiled_graphs.add(str(torch._guards.CompileContext.current_compile_id()))
        fuse(gm, Options())
        return gm.forward

    model = small_qwen3(1)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    # Sizes that meet one another, and the model's own: heads, head_dim, hidden.
    for batch, length in ((2, 7), (7, 2), (4, 4), (6, 16), (16, 6), (2, 56), (56, 2)):
        tokens = torch.randint(152, (batch, length))
        got = compiled(tokens, use_cache=False).logits
        torch.testing.assert_close(got, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert len(compiled_graphs) == 1
