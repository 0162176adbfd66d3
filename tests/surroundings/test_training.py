"""Training: nothing is fused, one warning says why, and every gradient and loss is eager's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fusepass
from tests.models import small_qwen3
from tests.surroundings.common import assert_like_eager, compiled, fused_sites, ids, reasons

STEPS = 20


def trainable() -> PreTrainedModel:
    return small_qwen3(1).requires_grad_(True).train()


def train(model: PreTrainedModel, run: Any, batches: list[Tensor]) -> list[float]:
    """The loss of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for tokens in batches:
        loss = run(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_twenty_steps_give_eagers_losses_and_one_warning(checkpointing: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = trainable()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    twin = copy.deepcopy(model)
    batch = ids(2, 9)
    batches = [batch[:, torch.randperm(9)] for _ in range(STEPS)]
    ours, eager = train(model, compiled(model), batches), train(twin, twin, batches)
    assert ours == pytest.approx(eager, rel=1e-3)
    assert eager[-1] < 0.8 * eager[0], "it learnt"
    assert reasons() == {"grad"}
    assert fused_sites() == {}
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("fusepass"))
    assert "got no fusion" in warning
    assert "torch.no_grad()" in warning


def test_evaluation_between_training_steps_is_fused_and_sees_their_weights() -> None:
    model, tokens = trainable(), ids(2, 9)
    fast = compiled(model)
    train(model, fast, [tokens])
    for _ in range(2):
        with torch.no_grad():
            assert_like_eager(fast(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
        train(model, fast, [tokens])
    assert [bool(report.counts()) for report in fusepass.reports()] == [False, True]


def test_every_parameter_gets_eagers_gradient_where_only_some_are_trained() -> None:
    """A frozen model with one trainable layer: what comes before that layer may be fused, what follows may not."""
    model, tokens = small_qwen3(3), ids(2, 9)
    model.model.layers[1].requires_grad_(True)
    twin = copy.deepcopy(model)
    for run, net in ((compiled(model), model), (twin, twin)):
        run(tokens, labels=tokens, use_cache=False).loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    for ours, eager in zip(model.parameters(), twin.parameters()):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-3, atol=1e-5)
    fused = {site.path.split(".")[2] for report in fusepass.reports() for site in report.sites if site.fused}
    assert fused == {"0"}, "the layers behind the trainable one pass its gradient on"
    assert reasons() == {"grad"}


def test_inductor_trains_as_eager_does() -> None:
    model, tokens = small_qwen3(1), ids(2, 9)
    # Its outlier amplifies another order of summation from step to step: by 2.5e-3 in one run of many, 2e-5 without.
    model.model.layers[0].self_attn.k_norm.weight[0] = 1.0
    twin = copy.deepcopy(model.requires_grad_(True))
    ours = train(model, compiled(model, remainder="inductor"), [tokens] * 3)
    assert ours == pytest.approx(train(twin, twin, [tokens] * 3), rel=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trained", [False, True])
def test_no_grad_and_inference_mode_are_fused(mode: Any, trained: bool) -> None:
    model, tokens = small_qwen3(2).requires_grad_(trained), ids(2, 9)
    fast = compiled(model)
    with mode():
        assert_like_eager(fast(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    assert fused_sites()["norm_gated_mlp"] == 2
    assert reasons() == set()


def test_no_grad_after_inference_mode_compiles_for_itself() -> None:
    model, tokens = small_qwen3(1).requires_grad_(True), ids(2, 9)
    fast = compiled(model)
    want = model(tokens, use_cache=False).logits
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            got = fast(tokens, use_cache=False).logits
            assert got.requires_grad == (mode is torch.enable_grad)
            assert_like_eager(got.clone(), want)


# --- autocast ---


@torch.no_grad()
def test_under_autocast_nothing_is_fused_and_the_result_is_eagers() -> None:
    model, tokens = small_qwen3(2), ids(2, 9)
    fast = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fast(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    assert fused_sites() == {}
    assert reasons() == {"autocast"}
    assert_like_eager(fast(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    assert fused_sites()["norm_gated_mlp"] == 2, "outside of it the model is fused"
