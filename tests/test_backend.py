"""The backend as users call it: what it compiles, what it says, and what it never does to a model."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DistributedDataParallel
from transformers import CompileConfig

import fusepass
from fusepass import backend as backend_module
from tests.models import small_qwen3, static_cache
from tests.patterns.toys import MLP, hidden

LAYERS = 2
COUNTS = {
    "attention": LAYERS,
    "norm_qkv_rope": LAYERS,
    "norm_gated_mlp": LAYERS,
    "linear_residual": LAYERS,
    "norm_linear": 1,
}


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of these tests are about graphs, not kernels: the ops run their references."""
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    monkeypatch.setattr(backend_module, "_logged", set())


def ids(batch: int = 1, length: int = 5) -> torch.Tensor:
    return torch.randint(152, (batch, length))


def compiled(model: torch.nn.Module, mode: str | None = None, **options: Any) -> Any:
    options.setdefault("remainder", "eager")
    return torch.compile(model, backend="fusepass", mode=mode, options={**options} if mode is None else None)


@torch.no_grad()
def test_inductor_runs_the_remainder_and_the_kernels_give_eagers_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "interpret")
    model, tokens = small_qwen3(LAYERS), ids()
    out = torch.compile(model, backend="fusepass")(tokens, use_cache=False).logits
    torch.testing.assert_close(out, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert [dict(report.counts()) for report in fusepass.reports()] == [COUNTS]


@torch.no_grad()
def test_generate_compiles_its_decode_step_and_gives_eagers_tokens() -> None:
    model, tokens = small_qwen3(LAYERS), ids(2)
    config = CompileConfig(backend="fusepass", mode="default", options=None)
    config._compile_all_devices = True
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(tokens, **settings, disable_compile=True)
    assert torch.equal(model.generate(tokens, **settings, compile_config=config), plain)
    assert dict(fusepass.reports()[-1].counts()) == COUNTS


@torch.no_grad()
def test_model_compile_fuses_prefill_and_decode() -> None:
    model, tokens = small_qwen3(LAYERS), ids()
    plain = model.generate(
        tokens, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True
    )
    model.compile(backend="fusepass", options={"remainder": "eager"})
    out = model.generate(tokens, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(out, plain)
    prefill, decode = fusepass.reports()
    assert prefill.counts() == {name: n for name, n in COUNTS.items() if name != "attention"}  # its mask is causal
    assert dict(decode.counts()) == COUNTS


@torch.no_grad()
def test_a_fusion_that_is_switched_off_is_not_tried() -> None:
    compiled(small_qwen3(LAYERS), fusions={"norm_qkv_rope": False})(ids(), use_cache=False)
    counts = fusepass.reports()[0].counts()
    assert counts["norm_qkv_rope"] == 0
    assert counts["rms_norm"] == 3 * LAYERS  # input norm, q norm and k norm of each layer stand alone now


@torch.no_grad()
def test_a_cpu_graph_goes_to_inductor_untouched_by_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("FUSEPASS_CPU")
    caplog.set_level(logging.INFO, "fusepass")
    compiled(small_qwen3(1))(ids(), use_cache=False)
    (report,) = fusepass.reports()
    assert not report.sites
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "untouched: it runs on a CPU" in caplog.text


@torch.no_grad()
def test_disable_is_exactly_inductor_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fusepass")
    seen: list[bool] = []
    monkeypatch.setenv("FUSEPASS_DISABLE", "1")
    monkeypatch.setattr(
        backend_module.inductor, "compile_with_inductor", lambda gm, *_, fused: seen.append(fused) or gm.forward
    )
    for length in (5, 6):
        compiled(small_qwen3(1))(ids(1, length), use_cache=False)
    assert seen == [False, False]
    assert fusepass.reports() == []
    assert caplog.messages == ["FUSEPASS_DISABLE=1: graphs go to Inductor as they are"]


@torch.no_grad()
def test_a_fault_inside_leaves_the_graph_unmodified_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fusepass.patterns.linear_residual import LinearResidualFusion

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(LinearResidualFusion, "check", broken)
    model, tokens = small_qwen3(LAYERS), ids()
    out = compiled(model)(tokens, use_cache=False).logits
    torch.testing.assert_close(out, model(tokens, use_cache=False).logits)
    torch._dynamo.reset()
    compiled(model)(tokens, use_cache=False)
    assert caplog.text.count("Traceback") == 1
    assert "planted" in fusepass.reports()[0].untouched
    assert not fusepass.reports()[0].sites


def test_strict_raises_whatever_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendCompilerFailed, match="5 RMSNorms and got no fusion.*torch.no_grad"):
        compiled(small_qwen3(1).requires_grad_(True), strict=True)(ids(), use_cache=False)
    torch._dynamo.reset()
    monkeypatch.setenv("FUSEPASS_CPU", "off")
    with pytest.raises(BackendCompilerFailed, match="got no fusion: it runs on a CPU"), torch.no_grad():
        compiled(small_qwen3(1), strict=True)(ids(), use_cache=False)


@torch.no_grad()
def test_strict_says_which_fusions_are_switched_off() -> None:
    off = {fusion.name: False for fusion in fusepass.fusions()}
    with pytest.raises(BackendCompilerFailed, match="got no fusion: no fusion matched; switched off: .*rms_norm"):
        compiled(small_qwen3(1), strict=True, fusions=off)(ids(), use_cache=False)


ROOTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "divided by the root": (lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 1),
    "without epsilon": (lambda x: x * (x * x).mean(-1, True).rsqrt(), 1),
    "x ** -0.5": (lambda x: x * (x.square().mean(dim=-1, keepdim=True) + 1e-6) ** -0.5, 1),
    "one operator": (lambda x: F.rms_norm(x, x.shape[-1:]), 1),
    "not divided by": (lambda x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True)), 0),
    "batch norm": (lambda x: (x - x.mean(0)) * torch.rsqrt(x.var(0) + 1e-6), 0),
    "batch norm of squares": (lambda x: x * torch.rsqrt(x.pow(2).mean(0) + 1e-6), 0),
    "cubes": (lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6), 0),
    "products": (lambda x: x * torch.rsqrt((x * x.exp()).mean(-1, keepdim=True) + 1e-6), 0),
    "an input": (lambda x: torch.rsqrt(x), 0),
}


@torch.no_grad()
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", ROOTS)
def test_rms_norms_that_no_fusion_matches_are_counted_and_other_norms_are_not(
    name: str, exported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    function, norms = ROOTS[name]
    module = nn.Module()
    module.forward = function
    compiled(torch.export.export(module, (hidden(),)).module() if exported else module)(hidden())
    warnings = [message for message in caplog.messages if "got no fusion" in message]
    assert [f"has {norms} RMSNorms" in message for message in warnings] == [True] * norms


def test_one_warning_names_no_grad_when_a_gradient_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    model = small_qwen3(1).requires_grad_(True)
    loss = compiled(model)(ids(), use_cache=False).logits.sum()
    loss.backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "torch.no_grad()" in warnings[0].getMessage()


@torch.no_grad()
def test_an_unknown_option_stops_the_compilation() -> None:
    with pytest.raises(BackendCompilerFailed, match="unknown option 'fusion'"):
        torch.compile(small_qwen3(1), backend="fusepass", options={"fusion": {}})(ids())


@torch.no_grad()
def test_an_unknown_mode_stops_the_compilation() -> None:
    with pytest.raises(BackendCompilerFailed, match="option 'mode' is 'fastest'; expected one of .*'max-autotune'"):
        torch.compile(small_qwen3(1), backend="fusepass", mode="fastest")(ids(), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"inductor": {"max_autotune": True}}])
def test_what_an_eager_remainder_can_not_heed_is_warned_about_once(
    given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"remainder": "eager", "verify": True, **given}
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(small_qwen3(1), backend="fusepass", options=options)(ids(), use_cache=False)
    ((name, setting),) = given.items()
    warnings = [message for message in caplog.messages if "has no effect" in message]
    assert warnings == [f"{name}={setting!r} has no effect with remainder='eager'"]


@torch.no_grad()
def test_a_cache_that_is_not_marked_static_is_warned_about_under_cuda_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_module.inductor, "compile_with_inductor", lambda gm, *_, **__: gm.forward)
    model = small_qwen3(1)

    def decode(cache: Any) -> None:
        torch.compile(model, backend="fusepass", mode="reduce-overhead")(
            ids(1, 1), past_key_values=cache, use_cache=True
        )

    decode(static_cache(model, 1, 16))
    assert "not marked static" not in caplog.text
    torch._dynamo.reset()
    cache = static_cache(model, 1, 16)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    decode(cache)
    assert caplog.text.count("not marked static") == 1


@torch.no_grad()
def test_reports_are_kept_by_compile_id_and_reset_forgets_them() -> None:
    model = compiled(small_qwen3(1))
    model(ids(1, 3), use_cache=False)
    model(ids(1, 4), use_cache=False)
    ids_seen = [report.compile_id for report in fusepass.reports()]
    assert ids_seen == ["0/0", "0/1"]
    assert fusepass.reports()[0].summary().startswith("graph 0/0: fused attention x1, linear_residual x1")
    fusepass.reset()
    assert fusepass.reports() == []


@torch.no_grad()
def test_every_graph_that_ddp_makes_of_a_frame_has_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is compiled again from the start, under the same ids."""
    monkeypatch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 100)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = MLP().requires_grad_(True)
        split = compiled(DistributedDataParallel(model, bucket_cap_mb=0.001))
        for _ in range(2):
            torch._dynamo.reset()
            torch.testing.assert_close(split(x := hidden()), model(x))
            assert len({report.compile_id for report in fusepass.reports()}) == 1 < len(fusepass.reports())
            assert fusepass.Report(fusepass.reports()).counts() == {"rms_norm": 1, "linear_residual": 1}
    finally:
        distributed.destroy_process_group()


@torch.no_grad()
def test_weights_changed_in_place_are_seen_by_the_compiled_model() -> None:
    model, tokens = small_qwen3(1), ids()
    fast = compiled(model)
    before = fast(tokens, use_cache=False).logits.clone()
    model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    after = fast(tokens, use_cache=False).logits
    torch.testing.assert_close(after, model(tokens, use_cache=False).logits)
    assert not torch.allclose(before, after)
