"""Whole decoding on static caches: the numeric gate in the situations of batched and long decoding, what lies beyond a
full cache, a thousand steps, and what a step costs.

A model runs from `tests.decoding`: tiny on a CPU, in Triton's interpreter; with real sizes and CUDA graphs on a GPU.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

import fusepass
from tests.decoding import DEVICE, GPU, compiled, decode, decoder, draw_tokens, fill, replays
from tests.gate import assert_gate, reference, rms
from tests.models import static_cache
from tests.overflow import step_past_the_end

ROOT = Path(__file__).parent.parent
ROWS = 64 if GPU else 32
"""Rows of logits that a gate judges: on a CPU its ratio then varies by 2 % from run to run."""


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


# --- the numeric gate ---


class Trio:
    """A model compiled, eager, and in f64, each with a static cache of its own."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self.model, self.batch = model, batch
        self.runs = (compiled(model), model, reference(model))
        self.caches = [static_cache(run, batch, length) for run in self.runs]

    def assert_gate_of_decoding_from(self, context: int, **inputs: Tensor) -> None:
        """`ROWS` rows of logits of forced tokens, after `context` positions whose contents are drawn."""
        fill(self.caches, context)
        tokens = draw_tokens(self.batch, ROWS // self.batch)
        ours, eager, exact = (decode(run, cache, tokens, **inputs) for run, cache in zip(self.runs, self.caches))
        assert rms(eager - exact) < 0.1 * rms(exact), "the gate would judge nothing"
        assert_gate(ours, eager, exact)

    def assert_all_fused(self, graphs: int = 1) -> None:
        """Every layer, in at most `graphs` graphs: else eager was compared with itself."""
        layers = self.model.config.num_hidden_layers
        reports = fusepass.reports()
        assert 1 <= len(reports) <= graphs
        for report in reports:
            assert all(site.fused for site in report.sites)
            counts = report.counts()
            assert [counts[name] for name in ("attention", "norm_gated_mlp", "norm_qkv_rope")] == [layers] * 3


def test_rows_at_different_positions_pass_the_gate() -> None:
    """A batch of prompts of different lengths. Half of them are padded at the left, half at the right: there a gap
    remains between the prompt and the new tokens."""
    batch, length, context = 8, 1024 if GPU else 128, 600 if GPU else 80
    row, slot = torch.arange(batch, device=DEVICE)[:, None], torch.arange(length, device=DEVICE)
    missing = row * context // batch
    seen = torch.where(row % 2 == 0, slot >= missing, (slot < context - missing) | (slot >= context))
    trio = Trio(decoder(), batch, length)
    trio.assert_gate_of_decoding_from(context, attention_mask=seen.long(), positions=context - missing)
    trio.assert_all_fused()


@pytest.mark.parametrize("batch", [8, pytest.param(1, marks=pytest.mark.gpu)])
def test_every_fill_of_a_long_cache_passes_the_gate_up_to_the_last_slot(batch: int) -> None:
    length = 32768 if GPU else 128
    trio = Trio(decoder(), batch, length)
    for context in (*((500, 16000) if GPU else ()), length - ROWS // batch):
        trio.assert_gate_of_decoding_from(context)
    assert trio.caches[0].get_seq_length() == length
    trio.assert_all_fused()


SLIDING = {
    "mistral": (StaticSlidingWindowLayer,),
    "qwen2": (StaticLayer, StaticSlidingWindowLayer),
}
"""A model of nothing but sliding windows; one that has both kinds of layers, and biases."""


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_windows_pass_the_gate_while_they_fill_and_when_they_are_full(family: str) -> None:
    window, kinds = 256 if GPU else 32, SLIDING[family]
    hybrid = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    trio = Trio(decoder(family, len(kinds), sliding_window=window, **hybrid), 8, 4 * window)
    assert tuple(type(layer) for layer in trio.caches[0].layers) == kinds
    trio.assert_gate_of_decoding_from(window - 2)
    # transformers counts in a Python int here: a graph for the first count, one for the others, one for full windows.
    trio.assert_all_fused(graphs=3)


# --- past the end ---


def started(module: str, *arguments: str) -> Callable[[], str]:
    """Starts a script of the tests in a process of its own; what is returned waits for it and gives its last line."""
    command = [sys.executable, "-m", f"tests.{module}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait() -> str:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        return output.splitlines()[-1]

    return wait


@pytest.fixture(scope="module")
def past_the_end() -> list[dict[str, Any]]:
    """What one step past a full cache does in eager and in fusepass. Eager raises: on a CPU `index_copy_` names the
    index; on a GPU it is an assertion on the device, which ends all work there."""
    if not GPU:
        return [step_past_the_end(how) for how in ("eager", "fusepass")]
    waiting = [started("overflow", how) for how in ("eager", "fusepass")]
    return [json.loads(wait()) for wait in waiting]


def test_a_step_past_a_full_cache_writes_nothing_in_the_cache_or_around_it(past_the_end: list[dict[str, Any]]) -> None:
    assert [outcome["changed"] for outcome in past_the_end if outcome["changed"]] == []


def test_a_step_past_a_full_cache_gives_nothing_that_passes_for_logits(past_the_end: list[dict[str, Any]]) -> None:
    """Eager raises: on a GPU when the host next waits, and the process can use that GPU no more. fusepass gives NaN."""
    eager, ours = past_the_end
    assert eager["error"]
    assert ours["nan"] is True


# --- a thousand steps ---


@dataclass(frozen=True)
class LongRun:
    checksums: Tensor
    """[steps]: one integer for all bits of a step's logits."""
    last: Tensor
    """Logits of the last step."""
    memory: dict[int, tuple[int, int]]
    """By step, bytes allocated and bytes reserved."""
    graphs: int
    """CUDA graphs that a step replays."""


def long_run(steps: int) -> tuple[LongRun, LongRun]:
    """Two runs over the same tokens with the same weights, each compiled and captured for itself."""
    model, tokens = decoder(layers=4 if GPU else 1, vocab_size=151936 if GPU else 1000), draw_tokens(1, steps)
    weight = torch.randint(-(2**40), 2**40, (model.config.vocab_size,), device=DEVICE)

    def once() -> LongRun:
        torch._dynamo.reset()
        fusepass.reset()
        run, cache = compiled(model), static_cache(model, 1, steps)
        checksums = torch.zeros(steps, dtype=torch.int64, device=DEVICE)
        last, memory, graphs = torch.empty(0), {}, 0

        def step(i: int) -> None:
            nonlocal last
            last = decode(run, cache, tokens[:, i : i + 1])
            checksums[i] = (last.view(torch.int16) * weight).sum()

        for i in range(steps):
            if GPU and i == 5:
                graphs = replays(lambda: step(5))
            else:
                step(i)
            if GPU and i + 1 in (10, steps):
                torch.cuda.synchronize()
                memory[i + 1] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return LongRun(checksums, last, memory, graphs)

    with torch.no_grad():
        return once(), once()


@pytest.fixture(scope="module")
def thousand_steps() -> tuple[LongRun, LongRun]:
    return long_run(1000)


def assert_same_bits(first: LongRun, second: LongRun) -> None:
    assert first.last.isfinite().all()
    assert first.checksums.unique().numel() > len(first.checksums) // 2, "steps do not differ"
    assert torch.equal(first.checksums, second.checksums)
    assert torch.equal(first.last.view(torch.int16), second.last.view(torch.int16))


def test_two_runs_of_a_compiled_model_give_the_same_bits() -> None:
    assert_same_bits(*long_run(6))


@pytest.mark.gpu
def test_a_thousand_steps_give_the_same_bits_in_two_captures(thousand_steps: tuple[LongRun, LongRun]) -> None:
    assert [run.graphs for run in thousand_steps] == [1, 1]
    assert_same_bits(*thousand_steps)


@pytest.mark.gpu
def test_a_thousand_steps_take_no_more_memory_than_ten(thousand_steps: tuple[LongRun, LongRun]) -> None:
    for run in thousand_steps:
        (early_allocated, early_reserved), (allocated, reserved) = run.memory[10], run.memory[1000]
        assert allocated <= early_allocated
        assert reserved <= early_reserved


# --- what a step costs ---


@pytest.mark.gpu
def test_peak_memory_is_at_most_inductors_and_one_percent() -> None:
    waiting = {backend: started("peak_memory", backend) for backend in ("inductor", "fusepass")}
    peaks = {backend: [int(number) for number in wait().split()] for backend, wait in waiting.items()}
    print(*(f"\n{backend}: {a / 1e6:.1f} MB allocated, {r / 1e6:.1f} reserved" for backend, (a, r) in peaks.items()))
    assert peaks["fusepass"][0] <= 1.01 * peaks["inductor"][0]


def step_ms(run: Callable[..., Any], cache: StaticCache, context: int, steps: int = 20, rounds: int = 7) -> float:
    """Time on the GPU of one step at `context`: a round is queued while the GPU sleeps, so the host does not count."""
    tokens, times = draw_tokens(1, steps), []
    for _ in range(rounds):
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000_000)  # about 100 ms; a step takes the host less than 2
        start.record()
        decode(run, cache, tokens)
        end.record()
        queued_in_time = not start.query()
        torch.cuda.synchronize()
        assert queued_in_time
        times.append(start.elapsed_time(end) / steps)
    return statistics.median(times[1:])


@pytest.mark.gpu
def test_a_long_cache_costs_what_it_holds() -> None:
    model = decoder(layers=8)
    # Static shapes: the second cache must not be compiled for any length.
    run = compiled(model, dynamic=False)
    caches = {length: static_cache(model, 1, length) for length in (1024, 32768)}
    for cache in caches.values():
        fill([cache], 512)
        decode(run, cache, draw_tokens(1, 4))
    short, long = (step_ms(run, cache, 512) for cache in caches.values())
    full = step_ms(run, caches[32768], 32000)
    print(f"\n512 of 1024: {short:.4f} ms, 512 of 32768: {long:.4f} ms, 32000 of 32768: {full:.4f} ms")
    assert long <= 1.1 * short
    # 134 MB a layer take 29 us at 4.6 TB/s, about as long as all else: so the time does show what is read.
    assert full >= 1.3 * short
