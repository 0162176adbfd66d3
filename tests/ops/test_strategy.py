"""Which kernels run: by the number of rows in a call, and on a CPU by FUSEPASS_CPU."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from fusepass.kernels import attention, gated_mul, gemv, rms_norm, rope, skinny
from fusepass.ops import OPS, force_strategy
from fusepass.ops.library import ROWS_BEST, SKINNY_LIMIT, Strategy, strategy
from tests.ops.sites import Sizes, as_tuple, sample

WITH_WEIGHTS = ("linear_residual", "norm_gated_mlp", "norm_linear", "norm_qkv_rope", "self_attention")
LAUNCHERS = {
    gemv: ("linears", "gated"),
    skinny: ("linears", "gated"),
    gated_mul: ("gated_mul",),
    rms_norm: ("rms_norm",),
    rope: ("qk_norm_rope",),
    attention: ("attention",),
}


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """The kernel files whose launchers ran."""
    files: list[str] = []

    def spy(module: object, name: str) -> mock._patch:
        launcher = getattr(module, name)

        def run(*args: object, **options: object) -> object:
            files.append(module.__name__.rpartition(".")[2])
            return launcher(*args, **options)

        return mock.patch.object(module, name, run)

    with contextlib.ExitStack() as stack:
        for module, names in LAUNCHERS.items():
            for name in names:
                stack.enter_context(spy(module, name))
        yield files


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, "rows"), (2, "rows"), (3, "skinny"), (64, "skinny"), (65, "library"), (4096, "library")],
)
def test_the_number_of_rows_chooses(rows: int, expected: Strategy) -> None:
    assert strategy(rows) == expected


@pytest.mark.parametrize("name", WITH_WEIGHTS)
@pytest.mark.parametrize(
    ("rows", "file"),
    [(ROWS_BEST, "gemv"), (ROWS_BEST + 1, "skinny"), (SKINNY_LIMIT, "skinny"), (SKINNY_LIMIT + 1, None)],
)
def test_every_op_goes_by_the_strategy(name: str, rows: int, file: str | None, launched: list[str]) -> None:
    """Rows are counted over batch and sequence; above the limits a library GEMM runs."""
    for batch, seq in {(1, rows), (rows, 1)}:
        launched.clear()
        OPS[name].overload(*sample(name, batch, seq).values())
        assert set(launched) & {"gemv", "skinny"} == ({file} if file else set())


@pytest.mark.parametrize(
    ("tokens", "heads", "files"),
    [
        (1, 16, ["gemv", "attention"]),
        (1, 17, ["gemv", "rope"]),
        (2, 8, ["gemv", "rope", "attention"]),
        (2, 9, ["gemv", "rope"]),
    ],
)
def test_attention_of_one_token_rotates_and_writes_it_too(
    tokens: int, heads: int, files: list[str], launched: list[str]
) -> None:
    """Of one K/V head: more than 16 queries are left to SDPA."""
    OPS["self_attention"].overload(*sample("self_attention", 1, tokens, sizes=Sizes(24, 8, heads, 1, 16)).values())
    assert launched == files


def test_a_forced_strategy_ends_with_its_context() -> None:
    with force_strategy("library"):
        with contextlib.suppress(KeyError), force_strategy("skinny"):
            assert strategy(1) == "skinny"
            raise KeyError
        assert strategy(1) == "library"
    assert strategy(1) == "rows"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("setting", "dtype"), [("interpret", torch.bfloat16), ("reference", torch.float32), (None, torch.float32)]
)
def test_the_cpu_runs_the_reference_unless_told_to_interpret(
    name: str, setting: str | None, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the interpreter for bf16: it is wrong there."""
    if setting is None:
        monkeypatch.delenv("FUSEPASS_CPU", raising=False)
    else:
        monkeypatch.setenv("FUSEPASS_CPU", setting)
    arguments = list(sample(name, 1, 3).values())
    for i, arg in enumerate(arguments):
        if isinstance(arg, torch.Tensor):
            arguments[i] = arg.to("cpu", dtype if arg.is_floating_point() else arg.dtype)
    got, want = as_tuple(OPS[name].overload(*arguments)), as_tuple(OPS[name].reference(*arguments))
    assert launched == []
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("name", OPS)
def test_the_cpu_interprets_the_kernels_when_told_to(name: str, launched: list[str]) -> None:
    OPS[name].overload(*sample(name, 1, 3).values())
    assert launched
