"""One row, measured in this process; what each mode runs is replaced where a test needs a fault."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from fusepass.bench import measure as module
from fusepass.bench.device import Cpu
from fusepass.bench.measure import Subject, distance, measure, one_round
from fusepass.bench.rows import Row
from tests.bench.conftest import rows
from tests.models import small_qwen3

Modes = dict[str, Callable[[nn.Module], Callable[..., Any]]]


def with_modes(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, modes: Modes, **changes: Any) -> dict[str, Any]:
    """The modes' records where each runs what `modes` makes of the model."""
    monkeypatch.setattr(module, "compiled", lambda model, name: modes[name](model))
    (row,) = rows(str(checkpoint), modes=tuple(modes), **changes)
    return measure(row, lambda text, finding: None)["modes"]


def test_a_mode_that_cannot_compile_is_recorded_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    def broken(model: nn.Module) -> Callable[..., Any]:
        raise RuntimeError("\n  no such backend\nand more")

    modes = with_modes(monkeypatch, checkpoint, {"inductor": broken, "eager": lambda model: model})
    assert modes["inductor"] == {"error": "RuntimeError: no such backend"}
    assert modes["eager"]["ms"] > 0


def test_a_mode_that_fails_while_it_is_timed_is_recorded_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    def tired(model: nn.Module) -> Callable[..., Any]:
        calls = iter(range(11))  # first calls and check are 5, a round is 5

        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise torch.cuda.OutOfMemoryError("out of memory")
            return model(*args, **kwargs)

        return run

    modes = with_modes(monkeypatch, checkpoint, {"inductor": tired, "eager": lambda model: model})
    assert "out of memory" in modes["inductor"]["error"]
    assert "ms" not in modes["inductor"]
    assert len(modes["eager"]["rounds_ms"]) == 3


def test_a_mode_whose_logits_differ_is_marked_wrong_and_one_that_rounds_otherwise_is_not(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    def without_attention(model: nn.Module) -> Callable[..., Any]:
        weight = model.model.layers[0].self_attn.o_proj.weight
        kept = weight.clone()

        def run(*args: Any, **kwargs: Any) -> Any:
            weight.zero_()
            output = model(*args, **kwargs)
            weight.copy_(kept)
            return output

        return run

    def in_f32(model: nn.Module) -> Callable[..., Any]:
        exact = type(model)(model.config).float()
        exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
        return lambda ids, past_key_values, **kwargs: exact(ids, **kwargs)

    modes: Modes = {"inductor": without_attention, "inductor-max-autotune": in_f32}
    # Without context, so that a run that leaves the cache alone sees the same prompt.
    found = with_modes(monkeypatch, checkpoint, modes, dtype="float16", decode=False, prefill=[5])
    assert found["inductor"]["wrong"]
    assert "ms" in found["inductor"]
    assert found["inductor-max-autotune"]["logits_error"] > 0
    assert not found["inductor-max-autotune"]["wrong"]


def test_logits_that_are_not_finite_are_a_failure_and_do_not_reach_the_next_mode(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    def poison(model: nn.Module) -> Callable[..., Any]:
        def run(ids: torch.Tensor, past_key_values: Any, **kwargs: Any) -> Any:
            output = model(ids, past_key_values=past_key_values, **kwargs)
            for layer in past_key_values.layers:
                layer.values[:, :, layer.cumulative_length :] = math.nan
            output.logits = output.logits * math.nan
            return output

        return run

    found = with_modes(monkeypatch, checkpoint, {"inductor": poison, "eager": lambda model: model})
    assert found["inductor"]["error"] == "ValueError: its logits are not finite"
    assert not found["eager"]["wrong"]


def test_a_fusepass_mode_that_fused_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    found = with_modes(monkeypatch, checkpoint, {"fusepass": lambda model: model, "eager": lambda model: model})
    assert found["fusepass"]["error"] == "RuntimeError: nothing was fused: no graph"
    assert "ms" in found["eager"]


def test_a_fusepass_mode_in_which_plain_torch_stood_in_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setattr(module, "STOOD_IN", {"norm_linear": "too much shared memory"})
    found = with_modes(monkeypatch, checkpoint, {"fusepass": lambda model: model})
    assert found["fusepass"]["error"] == "RuntimeError: norm_linear ran in plain torch: too much shared memory"


def positions(row: Row) -> list[int]:
    """How full the cache is before each forward of a round."""
    subject, seen = Subject(row), []

    def run(ids: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(int(subject.layers[0].cumulative_length))
        return subject.model(ids, **kwargs)

    with torch.no_grad():
        one_round(subject, run, Cpu())
    return seen


def test_every_round_of_decode_steps_begins_at_the_context(checkpoint: Path) -> None:
    (row,) = rows(str(checkpoint), context=8, steps=4)
    assert positions(row) == [8, 8, 9, 10, 11]


def test_every_prefill_begins_with_an_empty_cache(checkpoint: Path) -> None:
    (row,) = rows(str(checkpoint), decode=False, prefill=[5], steps=30)
    assert positions(row) == [0, 0, 0, 0]


def test_the_clock_leaves_out_what_runs_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def takes(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    assert Cpu().milliseconds(takes(10.0), takes(0.25), 3) == pytest.approx(750)


@pytest.mark.parametrize("tied", [True, False])
def test_the_ideal_reads_every_weight_but_the_embedding_once_and_the_keys_and_values_of_the_context(
    tmp_path: Path, tied: bool
) -> None:
    model = small_qwen3(2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m")
    (row,) = rows(str(tmp_path / "m"), batches=[3], context=7)
    numbers = sum(p.numel() for p in model.parameters()) - (0 if tied else 152 * 56)
    assert Subject(row).ideal_bytes() == 4 * (numbers + 2 * 2 * 3 * 2 * 16 * 7)  # k and v, layers, batch, heads, size


def test_the_flops_of_a_prefill_are_those_of_its_matrix_products(checkpoint: Path) -> None:
    (row,) = rows(str(checkpoint), batches=[2], decode=False, prefill=[5])
    subject = Subject(row)
    linears = {name: m.weight.numel() for name, m in subject.model.named_modules() if isinstance(m, nn.Linear)}
    head = linears.pop("lm_head")
    attention = 2 * 2 * 6 * 16 * 5 * 5 * 2  # two products of all heads and pairs of positions, for each sequence
    with torch.no_grad():
        want = 2 * 2 * (5 * sum(linears.values()) + head) + attention
        assert subject.flops() == pytest.approx(want, rel=1e-3)  # the rotary table has a product too


def test_a_cache_that_cannot_be_rewound_is_refused(tmp_path: Path) -> None:
    sliding = dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    small_qwen3(1, layer_types=["sliding_attention"], **sliding).save_pretrained(tmp_path / "m")
    (row,) = rows(str(tmp_path / "m"))
    with pytest.raises(ValueError, match="StaticSlidingWindowLayer, which cannot be rewound"):
        Subject(row)


def test_the_limit_grows_with_the_rounding_of_the_dtype(checkpoint: Path) -> None:
    limits = {}
    for dtype in ("float32", "float16", "bfloat16"):
        (row,) = rows(str(checkpoint), dtype=dtype)
        subject = Subject(row)
        with torch.no_grad():
            limits[dtype] = subject.rounding(subject.logits(subject.model))
    assert limits["float32"] < limits["float16"] / 10
    assert limits["float16"] < limits["bfloat16"] / 3
    assert limits["bfloat16"] < 0.5


def test_the_hook_that_shakes_the_model_is_gone_afterwards(checkpoint: Path) -> None:
    (row,) = rows(str(checkpoint))
    subject = Subject(row)
    with torch.no_grad():
        eager = subject.logits(subject.model)
        subject.rounding(eager)
        assert distance(subject.logits(subject.model), eager) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, {"decode": False, "prefill": [64]}])
def test_a_gpu_row_has_kernels_graph_replays_and_memory(tmp_path: Path, shape: dict[str, Any]) -> None:
    sizes = dict(hidden_size=896, num_attention_heads=14, head_dim=64, vocab_size=1000)
    small_qwen3(2, torch.bfloat16, **sizes).save_pretrained(tmp_path / "m")
    modes = ("eager", "inductor-reduce-overhead", "fusepass", "fusepass-reduce-overhead")
    (row,) = rows(str(tmp_path / "m"), cache=128, dtype="bfloat16", modes=modes, device="cuda", steps=10, **shape)
    found = measure(row, lambda text, finding: None)
    for name, mode in found["modes"].items():
        assert "error" not in mode, mode
        assert not mode["wrong"]
        assert mode["graph_replays"] == ("reduce-overhead" in name)
        assert 0 < mode["peak_gb"] < 5
    kernels = {name: mode["kernels"] for name, mode in found["modes"].items()}
    assert 0 < kernels["fusepass-reduce-overhead"] < kernels["inductor-reduce-overhead"] < kernels["eager"]
    assert found["modes"]["fusepass"]["fusions"]["norm_qkv_rope"] == 2


@pytest.mark.gpu
def test_every_mode_measures_the_kernels_that_inductor_makes_for_it_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peak of memory contains the buffer that this takes: else the first mode of a backend would seem to take more
    than the others."""
    measured: Counter[str] = Counter()
    now = [""]
    measuring = CachingAutotuner.benchmark_all_configs

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        measured[now[0]] += 1
        return measuring(self, *args, **kwargs)

    monkeypatch.setattr(CachingAutotuner, "benchmark_all_configs", counting)
    small_qwen3(2, torch.bfloat16, hidden_size=896, num_attention_heads=14, head_dim=64).save_pretrained(tmp_path / "m")
    modes = ("inductor", "inductor-reduce-overhead", "fusepass", "fusepass-reduce-overhead")
    (row,) = rows(str(tmp_path / "m"), cache=128, dtype="bfloat16", modes=modes, device="cuda", steps=10)
    measure(row, lambda text, _: now.__setitem__(0, text))
    counts = [measured[f"{mode}: first calls"] for mode in modes]
    assert counts[0] == counts[1] > 0
    assert counts[2] == counts[3]
