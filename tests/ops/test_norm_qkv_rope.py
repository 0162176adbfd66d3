import pytest

from tests.ops.gate import CASES, Case, assert_as_exact_as_eager
from tests.ops.sites import SITES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager(case):
    assert_as_exact_as_eager(SITES["norm_qkv_rope"], case)
