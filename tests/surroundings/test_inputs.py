"""Input at the edges of what a model may be given: not finite, empty, odd, huge. The kernels run in the interpreter."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.ops import OPS
from fusepass.ops.library import force_strategy
from tests.models import small_qwen3, static_cache
from tests.patterns.toys import HIDDEN, MLP, hidden
from tests.surroundings.common import EAGER, assert_like_eager, compiled, fused_sites, ids

Sparse = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def interpreted(reference: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FUSEPASS_CPU", "interpret")
    with torch.no_grad():
        yield


def logits(run: Any, tokens: Tensor) -> Tensor:
    return run(tokens, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("length", [1, 4])
def test_what_is_not_finite_spreads_as_in_eager_and_no_further(value: float, length: int) -> None:
    """One sequence of three has a token whose embedding is not finite (or overflows when squared)."""
    model, tokens = small_qwen3(1), ids(3, length)
    tokens[tokens == 7] = 8
    model.model.embed_tokens.weight[7] = value
    tokens[1, -1] = 7
    got, want = logits(compiled(model), tokens), logits(model, tokens)
    assert fused_sites()["norm_gated_mlp"] == 1
    assert want[[0, 2]].isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_weight_that_is_not_finite_spoils_what_it_spoils_in_eager() -> None:
    model, tokens = small_qwen3(1), ids(1, 3)
    model.lm_head.weight[5, 3] = math.nan
    got, want = logits(compiled(model), tokens), logits(model, tokens)
    assert want.isnan().sum() == 3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_no_rows_are_fused_and_give_none(batch: int, length: int, dynamic: bool) -> None:
    mlp = MLP()
    fast = torch.compile(mlp, backend="fusepass", dynamic=dynamic, options=EAGER)
    for x in (hidden(), torch.randn(batch, length, HIDDEN)):
        got = fast(x)
        assert got.shape == x.shape
        assert_like_eager(got, mlp(x))
    assert set(fused_sites()) == {"norm_gated_mlp"}


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("cached", [False, True])
def test_a_model_given_no_tokens_raises_what_it_raises_with_any_backend(batch: int, length: int, cached: bool) -> None:
    """Hugging Face's models view an empty tensor with a size of -1."""
    model, tokens = small_qwen3(1), torch.zeros(batch, length, dtype=torch.int64)

    def outcome(run: Any) -> Any:
        cache = {"past_key_values": static_cache(model, batch, 8)} if cached else {}
        with pytest.raises((RuntimeError, IndexError)) as raised:
            run(tokens, use_cache=cached, **cache)
        return raised.type

    want = outcome(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    assert outcome(compiled(model)) == want
    outcome(model)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 17, 67])
def test_sizes_that_are_multiples_of_nothing_are_fused(length: int) -> None:
    odd = {"hidden_size": 53, "intermediate_size": 89, "num_attention_heads": 5, "num_key_value_heads": 1}
    model, tokens = small_qwen3(1, **odd, head_dim=14, vocab_size=151), ids(1, length) % 151
    assert_like_eager(logits(compiled(model), tokens), logits(model, tokens))
    assert {"norm_qkv_rope", "norm_gated_mlp", "linear_residual", "norm_linear"} <= set(fused_sites())


# --- more than 2^31 elements ---


@pytest.fixture
def sparse(tmp_path: Path) -> Sparse:
    """Memory in a file with holes: what is not written takes neither memory nor disk."""
    return lambda size: torch.from_file(str(tmp_path / f"{size}"), shared=True, size=size, dtype=torch.float16)


def rows_far_apart(memory: Tensor, values: Tensor) -> Tensor:
    """`values` [rows, n] as rows of one tensor that begin 2^31 elements apart, or as far as there is memory."""
    far = memory.as_strided(values.shape, ((memory.numel() - values.shape[1]) // (len(values) - 1), 1))
    return far.copy_(values)


@pytest.mark.parametrize(("strategy", "rows"), [("rows", 2), ("skinny", 3), ("skinny", 16), ("library", 5)])
def test_rows_further_apart_than_32_bits_count_are_read_where_they_are(
    strategy: Any, rows: int, sparse: Sparse
) -> None:
    """A prompt's last positions are views with the stride of the whole prompt: 16 of 40,960 tokens and 4096 features
    lie 2.5e9 elements apart."""
    x, residual = (rows_far_apart(sparse((1 << 32) + i), torch.randn(rows, 40 + i).half()) for i in (0, 8))
    weight = torch.randn(48, 40).half()
    with force_strategy(strategy):
        got = OPS["linear_residual"].overload(x, weight, None, residual, False)
    want = OPS["linear_residual"].reference(x.clone(), weight, None, residual.clone(), False)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("length", [1, 3])
def test_a_cache_of_more_elements_than_32_bits_count_is_read_and_written(length: int, sparse: Sparse) -> None:
    heads, size, room = 2, 16, 1 << 26
    cache = [sparse(heads * room * size + i).narrow(0, 0, heads * room * size) for i in range(2)]
    k, v = (memory.view(1, heads, room, size)[:, :, -40:] for memory in cache)
    for part in (k, v):
        part.copy_(torch.randn(part.shape))
    q = torch.randn(1, length, 4, size).half().transpose(1, 2)
    mask = torch.ones(1, 1, length, 40, dtype=torch.bool).tril(40 - length)
    got = OPS["attention"].overload(q, k, v, mask, 0.25)
    want = OPS["attention"].reference(q, k.clone(), v.clone(), mask, 0.25)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["rms_norm", "norm_linear", "linear_residual", "norm_gated_mlp"])
def test_shapes_of_more_elements_than_32_bits_count_are_traced(name: str) -> None:
    with torch.device("meta"):
        x, norm, square = torch.empty(1 << 20, 4096), torch.empty(4096), torch.empty(4096, 4096)
    args: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, norm, 1e-6, False),
        "norm_linear": (x, norm, 1e-6, square, None, 0, False),
        "linear_residual": (x, square, None, x, False),
        "norm_gated_mlp": (x, norm, 1e-6, square, square, square, None, None, None, x, "silu", False),
    }
    out = OPS[name].overload(*args[name])
    assert out.shape == x.shape
    assert out.numel() > 1 << 31
