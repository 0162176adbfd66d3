from dataclasses import replace

import pytest

from tests.ops.gate import CASES, FORM_CASES, HIGH_CASES, Case, assert_as_exact_as_eager, assert_keeps_f32
from tests.ops.sites import SITES

SITE = SITES["linear_residual"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(SITE, case)


@pytest.mark.parametrize("case", HIGH_CASES, ids=str)
def test_high_keeps_f32(case: Case) -> None:
    assert_keeps_f32(SITE, case)


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_with_a_bias_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(SITE, replace(case, config={"attention_bias": True}))
