from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fusepass.ops import OPS, force_strategy, norm_linear
from fusepass.ops.library import Strategy
from tests.ops.gate import (
    CASES,
    FORM_CASES,
    HIGH_CASES,
    Case,
    assert_as_exact_as_eager,
    assert_keeps_f32,
    poisoned,
    rms_error,
)
from tests.ops.sites import DEVICE, QWEN3, SITES, SKIPPED, sample

SITE = SITES["norm_linear"]
VOCABULARY = 151936
"""Qwen3's."""

every_strategy = pytest.mark.parametrize("strategy", ["rows", "skinny", "library"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(SITE, case)


@pytest.mark.parametrize("case", HIGH_CASES, ids=str)
def test_high_keeps_f32(case: Case) -> None:
    assert_keeps_f32(SITE, case)


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_with_a_bias_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(SITE, replace(case, config={"attention_bias": True}))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 128])
def test_the_logits_of_a_whole_vocabulary_are_as_exact_as_eager(rows: int) -> None:
    def widen(layer: nn.Module) -> None:
        head = nn.Linear(QWEN3.hidden, VOCABULARY, bias=False, device=DEVICE, dtype=torch.bfloat16)
        layer.self_attn.q_proj = head.requires_grad_(False)

    assert_as_exact_as_eager(SITE, Case(rows, 1, None, torch.bfloat16, sizes=QWEN3), change=widen)


@every_strategy
@pytest.mark.parametrize("high", [False, True], ids=["match", "high"])
@pytest.mark.parametrize(("tokens", "start"), [(2, 0), (2, -9), (3, 1), (3, 2), (3, 3), (3, -1), (3, -2)])
def test_the_rows_from_start_on_and_no_others(tokens: int, start: int, strategy: Strategy, high: bool) -> None:
    """Of two sequences: rows kept lie apart in memory. Those not kept are NaN."""
    arguments = sample("norm_linear", 2, tokens - SKIPPED, high=high) | {"start": start}
    kept = arguments["x"][:, start:].clone()
    arguments["x"].fill_(torch.nan)[:, start:] = kept
    with poisoned(), force_strategy(strategy):
        got = OPS["norm_linear"].overload(*arguments.values())
    want = OPS["norm_linear"].reference(*(arguments | {"x": kept, "start": 0}).values())
    assert got.shape == want.shape
    assert want.numel() == 0 or rms_error(got, want.double()) < 2e-3


@pytest.mark.parametrize(("start", "rows", "copied"), [(0, 10, False), (-1, 2, False), (-2, 4, True)])
def test_only_the_rows_kept_are_read_and_copied_where_no_view_has_them(start: int, rows: int, copied: bool) -> None:
    arguments = sample("norm_linear", 2, 3) | {"start": start}
    with mock.patch.object(norm_linear, "project") as project:
        norm_linear._launch(*arguments.values())
    x: Tensor = project.call_args.args[0]
    assert x.shape == (rows, arguments["x"].shape[-1])
    assert torch.equal(x, arguments["x"][:, start:].flatten(0, 1))
    assert (x.untyped_storage().data_ptr() != arguments["x"].untyped_storage().data_ptr()) == copied


@pytest.mark.gpu
@every_strategy
def test_a_weight_of_more_elements_than_32_bits_count(strategy: Strategy) -> None:
    n, k = 2**19 + 24, 4096
    x, norm = torch.randn(2, 1, k, device=DEVICE).bfloat16(), torch.rand(k, device=DEVICE).bfloat16() + 0.5
    weight = torch.empty(n, k, device=DEVICE, dtype=torch.bfloat16).normal_(std=k**-0.5)
    with poisoned(), force_strategy(strategy):
        got = OPS["norm_linear"].overload(x, norm, 1e-6, weight, None, -1, False)
    for rows in (slice(64), slice(n - 64, n)):
        want = OPS["norm_linear"].reference(x, norm, 1e-6, weight[rows], None, -1, False)
        assert rms_error(got[..., rows], want.double()) < 1e-2
