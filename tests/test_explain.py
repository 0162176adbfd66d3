"""`explain` says what would happen, and leaves everything as it was."""

import copy
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import fusepass
from tests.models import small_qwen3, static_cache

LAYERS, PROMPT = 2, 17
COUNTS = {"norm_qkv_rope": LAYERS, "norm_gated_mlp": LAYERS, "linear_residual": LAYERS, "norm_linear": 1}


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU where nothing is set."""
    monkeypatch.delenv("FUSEPASS_CPU", raising=False)


def ids(batch: int = 1, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(152, (batch, length))


class Broken(torch.nn.Module):
    """Behind a graph break Dynamo compiles functions of the model, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return self.inner(y)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.linear(x)
        torch._dynamo.graph_break()
        return torch.relu(y)


@torch.no_grad()
def test_it_explains_what_would_happen_on_a_gpu_where_there_is_none() -> None:
    report = fusepass.explain(small_qwen3(LAYERS), ids(), use_cache=False)
    assert dict(report.counts()) == COUNTS
    assert [graph.untouched for graph in report.graphs] == [None]
    assert {site.path for site in report.sites if site.fusion == "norm_gated_mlp"} == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    }


def contents(cache: Any) -> list[dict[str, Any]]:
    return [
        {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in vars(layer).items()}
        for layer in cache.layers
    ]


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["static", "uninitialised", "dynamic", "filled"])
def test_caches_are_explained_and_not_touched(kind: str, dynamic: bool) -> None:
    model = small_qwen3(LAYERS)
    cache: Any = static_cache(model, 1, 24) if kind == "static" else DynamicCache(config=model.config)
    if kind == "uninitialised":
        cache = StaticCache(config=model.config, max_cache_len=24)
    if kind == "filled":
        model(ids(), past_key_values=cache)
    before = contents(cache)
    report = fusepass.explain(model, ids(1, 1), past_key_values=cache, use_cache=True, dynamic=dynamic)
    assert dict(report.counts()) == COUNTS | {"attention": LAYERS}
    assert contents(cache) == before


@torch.no_grad()
def test_the_users_tensors_and_modules_are_the_same_ones_with_the_same_contents() -> None:
    model, tokens = small_qwen3(LAYERS, tie_word_embeddings=True), ids()
    tensors = [*model.parameters(), *model.buffers(), tokens]
    contents, modules = copy.deepcopy(tensors), [*model.modules()]
    fusepass.explain(model, tokens, use_cache=False)
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers(), tokens], strict=True))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    torch.testing.assert_close(tensors, contents, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: (small_qwen3(1), ids()), lambda: (Broken(), torch.randn(2, 8))])
def test_what_the_user_compiled_stays_valid_and_has_its_recompilations_left(make: Callable[[], Any]) -> None:
    model, x = make()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    compiled(x)
    frames = counter.frame_count
    for _ in range(2):
        fusepass.explain(model, x)
    compiled(x)
    assert counter.frame_count == frames
    # As many shapes as without `explain`, each of which is compiled and none of which falls back to eager.
    for extra in range(1, torch._dynamo.config.recompile_limit):
        compiled(torch.cat([x] * (extra + 1)))
        assert counter.frame_count == frames * (extra + 1)


@torch.no_grad()
def test_a_user_who_is_at_his_recompile_limit_gets_an_explanation() -> None:
    model = Broken()
    with torch._dynamo.config.patch(recompile_limit=1):
        torch.compile(model, backend="eager", dynamic=False)(torch.randn(2, 8))
        assert len(fusepass.explain(model, torch.randn(3, 8)).graphs) == 2


@torch.no_grad()
def test_nothing_stays_on_the_code_of_a_model_that_was_never_compiled() -> None:
    fusepass.explain(Broken(), torch.randn(2, 8))
    assert _debug_get_cache_entry_list(Broken.forward.__code__) == []
    assert _debug_get_cache_entry_list(Broken.inner.__code__) == []


@torch.no_grad()
def test_the_shapes_explained_do_not_make_the_users_compilation_dynamic() -> None:
    model, shapes = Broken(), []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        shapes.extend(type(size) for x in example_inputs if isinstance(x, torch.Tensor) for size in x.shape)
        return gm.forward

    fusepass.explain(model, torch.randn(2, 8))
    torch.compile(model, backend=backend)(torch.randn(3, 8))
    assert set(shapes) == {int}


@torch.no_grad()
def test_the_reports_of_what_was_compiled_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    model = small_qwen3(1)
    torch.compile(model, backend="fusepass", options={"remainder": "eager"})(ids(), use_cache=False)
    before = fusepass.reports()
    assert len(before) == 1
    fusepass.explain(model, ids(), use_cache=False)
    assert fusepass.reports() == before


@torch.no_grad()
def test_it_explains_each_way_of_holding_a_compiled_model() -> None:
    def counts(model: Any) -> dict[str, int]:
        return dict(fusepass.explain(model, ids(), use_cache=False).counts())

    plain = small_qwen3(LAYERS)
    assert counts(torch.compile(plain, backend="eager")) == COUNTS
    in_place = small_qwen3(LAYERS)
    in_place.compile(backend="eager")
    assert counts(in_place) == COUNTS
    assert in_place._compiled_call_impl is not None
    forward = small_qwen3(LAYERS)
    forward.forward = torch.compile(forward.forward, backend="eager")
    assert counts(forward) == COUNTS
    assert counts(lambda *args, **kwargs: plain(*args, **kwargs)) == COUNTS


@torch.no_grad()
def test_options_are_the_backends() -> None:
    model = small_qwen3(LAYERS)
    report = fusepass.explain(model, ids(), use_cache=False, options={"fusions": {"norm_qkv_rope": False}})
    assert report.counts()["norm_qkv_rope"] == 0
    with pytest.raises(ValueError, match="unknown option 'fusion'"):
        fusepass.explain(model, ids(), options={"fusion": {}})


def test_the_grad_mode_in_force_counts() -> None:
    model = small_qwen3(1).requires_grad_(True)
    assert {site.code for site in fusepass.explain(model, ids(), use_cache=False).sites} == {"grad"}
    with torch.no_grad():
        assert {site.code for site in fusepass.explain(model, ids(), use_cache=False).sites} == {None}


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_autocast_in_force_counts(device: str) -> None:
    with torch.autocast("cpu", torch.bfloat16) if device == "cpu" else _cuda_autocast():
        sites = fusepass.explain(small_qwen3(1), ids(), use_cache=False).sites
    assert {site.code for site in sites} == {"autocast"}


def _cuda_autocast() -> Any:
    """torch.autocast("cuda") turns itself off where there is no GPU."""

    class On:
        def __enter__(self) -> None:
            torch.set_autocast_enabled("cuda", True)

        def __exit__(self, *_: object) -> None:
            torch.set_autocast_enabled("cuda", False)

    return On()


@torch.no_grad()
def test_a_graph_break_makes_several_graphs_in_order() -> None:
    report = fusepass.explain(Broken(), torch.randn(2, 8))
    # The second half of `forward` calls what Dynamo has just compiled.
    assert [graph.compile_id for graph in report.graphs] == ["0", "1"]
    assert report.counts() == {"linear_residual": 1}
    assert report.stopped is None


def test_what_depends_on_values_stops_it_and_it_says_so() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y + 1 if y.sum() > 0 else y - 1

    report = fusepass.explain(model, torch.ones(3))
    assert len(report.graphs) == 1
    assert "depends on the values of a tensor" in str(report.stopped)


def test_what_the_model_raises_is_raised() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        fusepass.explain(torch.nn.Linear(2, 2), torch.randn(2), nonsense=1)


def test_a_model_that_cannot_be_copied_is_a_clear_error() -> None:
    import threading

    model = torch.nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="copies the model's structure, and cannot: .*lock"):
        fusepass.explain(model, torch.randn(2))


@torch.no_grad()
def test_it_keeps_nothing_of_its_copy() -> None:
    seen: list[weakref.ref[Any]] = []
    model = Broken()
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(module)))
    fusepass.explain(model, torch.randn(2, 8))
    handle.remove()
    gc.collect()
    assert [ref() for ref in seen if ref() is not model] == [None] * len(seen)


def qwen3_32b(layers: int = 64) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def test_a_32b_model_without_weights_is_explained_in_seconds() -> None:
    model = qwen3_32b()
    cache = StaticCache(config=model.config, max_cache_len=64)
    cache.early_initialization(1, 8, 128, torch.bfloat16, "meta")
    start = time.process_time()
    report = fusepass.explain(model, torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache)
    assert time.process_time() - start < 60  # of a core that others share; 11 s alone
    assert {site.fused for site in report.sites} == {True}
    assert report.counts()["norm_gated_mlp"] == report.counts()["attention"] == 64
    assert report.graphs[0].work_before.weight_bytes == pytest.approx(65.5e9, rel=0.01)
    assert all(parameter.is_meta for parameter in model.parameters())
