"""Measure one row: every mode of one model at one shape, interleaved, in this process."""

import math
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import clear_caches
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import StaticLayer

import fusepass
from fusepass.bench.device import Cuda, device
from fusepass.bench.models import load, static_cache
from fusepass.bench.rows import WARM_UP, Row, compiler, torch_mode
from fusepass.ops.library import STOOD_IN
from fusepass.report import one_line

Tell = Callable[[str, bool], None]
"""Hears what goes on: a line of text, and whether it is a finding to keep or only what is being done now."""


class Subject:
    """The model of a row and its cache, ready for the forward that is measured."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.model = load(row.model, getattr(torch, row.dtype), row.device)
        self.cache = static_cache(self.model, row.batch, row.cache)
        self.layers: list[Any] = list(self.cache.layers)
        for layer in self.layers:
            if (kind := type(layer)) is not StaticLayer:
                raise ValueError(f"its cache has a {kind.__name__}, which cannot be rewound")
            # What the keys and values are does not change the work: no prompt has to be run.
            for x in (layer.keys, layer.values):
                x[:, :, : row.context].normal_()
        self.ids = torch.randint(self.model.config.vocab_size, (row.batch, row.tokens), device=row.device)

    def rewind(self) -> None:
        """Go back to the context."""
        for layer in self.layers:
            layer.cumulative_length.fill_(self.row.context)

    def forward(self, run: Callable[..., Any]) -> Tensor:
        """Logits [batch, 1, vocabulary] of the last token: embedding to logits, as `generate` calls it."""
        torch.compiler.cudagraph_mark_step_begin()
        return run(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits

    def logits(self, run: Callable[..., Any]) -> Tensor:
        """The same from a rewound cache, free of what other modes wrote (a NaN shows through the mask), in f64."""
        for layer in self.layers:
            for x in (layer.keys, layer.values):
                x[:, :, self.row.context :].zero_()
        self.rewind()
        return self.forward(run).double()

    def rounding(self, eager: Tensor) -> float:
        """How far logits may lie from eager's and still be called the same: four times what one more rounding after
        every linear layer changes. Depth, dtype and sharp attention are in that figure; f32 sums in another order
        are not, so they get a floor."""
        half = torch.finfo(self.model.dtype).eps / 2

        def shake(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(module, nn.Linear):
                return output * (1 + half * (2 * torch.rand_like(output) - 1))
            return output

        hook = nn.modules.module.register_module_forward_hook(shake)
        shaken = self.logits(self.model)
        hook.remove()
        floor = 16 * torch.finfo(torch.float32).eps * math.sqrt(self.model.config.hidden_size)
        return max(4 * distance(shaken, eager), floor)

    def ideal_bytes(self) -> int:
        """Fewest bytes a decode step must read: every weight (of the embedding one row), and the context's K and V."""
        weights = sum(p.nbytes for p in self.model.parameters())
        if not self.model.config.tie_word_embeddings:
            embedding: Any = self.model.get_input_embeddings()
            weights -= embedding.weight.nbytes
        used = (x[:, :, : self.row.context] for layer in self.layers for x in (layer.keys, layer.values))
        return weights + sum(x.nbytes for x in used)

    def flops(self) -> int:
        """Floating-point operations of the forward without a cache, attention counted in full."""
        # As plain products: the counter's rule for fused attention does not take fewer heads of K and V.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.model(self.ids, use_cache=False, logits_to_keep=1)
        return counter.get_total_flops()


def distance(ours: Tensor, eager: Tensor) -> float:
    """Relative error: the norm of the difference over the norm of eager's."""
    return ((ours - eager).norm() / eager.norm()).item()


def compiled(model: nn.Module, mode: str) -> Callable[..., Any]:
    """The model as this mode runs it."""
    if mode == "eager":
        return model
    return torch.compile(model, backend=compiler(mode), mode=torch_mode(mode), dynamic=False)


def live(modes: dict[str, dict[str, Any]]) -> list[str]:
    """The modes that have not failed."""
    return [name for name, record in modes.items() if "error" not in record]


@contextmanager
def noted(record: dict[str, Any]) -> Iterator[None]:
    """Keep a fault inside in the mode's record, so that the other modes go on."""
    try:
        yield
    except Exception as fault:
        traceback.print_exc()
        record["error"] = one_line(fault)


@torch.no_grad()
def measure(row: Row, tell: Tell) -> dict[str, Any]:
    """The record of a row: what `results` keeps, without the shape and the environment."""
    torch._dynamo.config.recompile_limit = 64  # each mode compiles the same code object
    torch._inductor.config.autotune_local_cache = False  # see `first_calls`
    where = device(row.device)
    tell("bandwidth", False)
    bandwidth = where.bandwidth()
    tell("loading the model", False)
    subject = Subject(row)
    base = where.reset_peak()
    eager = subject.logits(subject.model)
    limit = subject.rounding(eager)
    modes: dict[str, dict[str, Any]] = {name: {} for name in row.modes}
    runs: dict[str, Callable[..., Any]] = {}
    for name, record in modes.items():
        tell(f"{name}: first calls", False)
        with noted(record):
            where.collect()
            runs[name] = compiled(subject.model, name)
            first_calls(subject, runs[name], record, where, base)
            check(subject.logits(runs[name]), eager, limit, record)
            if compiler(name) == "fusepass":
                record.update(fused())
        tell(f"{name}: {first_line(record)}", True)

    times: dict[str, list[float]] = {name: [] for name in modes}
    for i in range(row.rounds):
        for name in live(modes):
            tell(f"round {i + 1} of {row.rounds}: {name}", False)
            with noted(modes[name]):
                times[name].append(one_round(subject, runs[name], where))
    bytes_, flops = (subject.ideal_bytes(), 0) if row.kind == "decode" else (0, subject.flops())
    ideal = bytes_ / bandwidth * 1e3
    for name in live(modes):
        tell(f"{name}: profile", False)
        with noted(modes[name]):
            modes[name].update(figures(row, times[name], ideal, flops))
            modes[name].update(profile(subject, runs[name], where))
    return {
        "weight_bytes": sum(p.nbytes for p in subject.model.parameters()),
        "bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "ideal_ms": round(ideal, 4) if ideal else None,
        "logits_limit": limit,
        "modes": modes,
    }


def first_calls(subject: Subject, run: Callable[..., Any], record: dict[str, Any], where: Cuda, base: int) -> None:
    """Seconds until the mode is at full speed, and the peak of memory as if no other mode had run before: each mode of
    Inductor's measures its Triton kernels itself, which takes seconds and a buffer of 63 MB on an H200, and does not
    find what another measured. (Compiled kernels on the disk it does find.)"""
    fusepass.reset()
    clear_caches()
    allocated = where.reset_peak()
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        subject.rewind()
        subject.forward(run)
    where.wait()
    record["first_calls_s"] = round(time.perf_counter() - begin, 2)
    record["peak_gb"] = round((base + where.peak() - allocated) / 1e9, 3)


def check(ours: Tensor, eager: Tensor, limit: float, record: dict[str, Any]) -> None:
    """Compare the logits; a mode beyond the limit is measured but marked wrong. Raises ValueError for NaN."""
    error = distance(ours, eager)
    if not math.isfinite(error):
        raise ValueError("its logits are not finite")
    record["logits_error"] = error
    record["wrong"] = error > limit


def fused() -> dict[str, Any]:
    """What the reports since the last reset say. Raises RuntimeError if nothing was fused, or an op had no kernel and
    ran in plain torch: then it is not fusepass that is measured."""
    if STOOD_IN:
        raise RuntimeError("; ".join(f"{op} ran in plain torch: {reason}" for op, reason in STOOD_IN.items()))
    reports = fusepass.reports()
    counts = sum((report.counts() for report in reports), Counter())
    if not counts:
        raise RuntimeError(f"nothing was fused: {'; '.join(report.summary() for report in reports) or 'no graph'}")
    refused = sum(not site.fused for report in reports for site in report.sites)
    return {"fusions": dict(sorted(counts.items())), "refused": refused, "graphs": len(reports)}


def first_line(record: dict[str, Any]) -> str:
    """How the first calls went."""
    if "error" in record:
        return f"failed: {record['error']}"
    fusions = "".join(f", {name} x{count}" for name, count in record.get("fusions", {}).items())
    off = f"{record['logits_error']:.2g}{' WRONG' if record['wrong'] else ''}"
    return f"first calls {record['first_calls_s']:.1f} s, logits off by {off}{fusions}"


def one_round(subject: Subject, run: Callable[..., Any], where: Cuda) -> float:
    """Milliseconds of one forward."""
    times, forwards = subject.row.forwards

    def work() -> None:
        for _ in range(forwards):
            subject.forward(run)

    subject.rewind()
    subject.forward(run)  # the first one after another mode pays for the change
    return where.milliseconds(subject.rewind, work, times) / (times * forwards)


def profile(subject: Subject, run: Callable[..., Any], where: Cuda) -> dict[str, Any]:
    """The kernels of one forward."""
    subject.rewind()
    subject.forward(run)
    subject.rewind()
    return where.profile(lambda: subject.forward(run))


def figures(row: Row, times: list[float], ideal: float, flops: int) -> dict[str, Any]:
    """What the times of the rounds say."""
    ms = statistics.median(times)
    return {
        "ms": round(ms, 4),
        "spread_ms": round(max(times) - min(times), 4),
        "rounds_ms": [round(t, 4) for t in times],
        "tokens_per_s": round(row.batch * row.tokens / ms * 1e3, 1),
        **({"percent_of_ideal": round(100 * ideal / ms, 1)} if ideal else {"tflops": round(flops / ms / 1e9, 2)}),
    }
