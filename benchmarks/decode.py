"""Time one decode step of a Qwen3 under each compiler and mode, all in one process, interleaved.

    python benchmarks/decode.py --model Qwen3-0.6B --batch 1 --out benchmarks/results/h200

A step is the whole forward of the Hugging Face model, embedding to logits, with its StaticCache. Rounds visit every
variant once, so that a drift of the GPU touches all alike; the median over the rounds is reported. The weights do
not fit the cache (1.2 GB against 60 MB), so every step reads them from memory.
"""

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
import triton.language as tl
from models import qwen3_config, random_model, static_cache

VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "inductor reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
    "inductor max-autotune": {"backend": "inductor", "mode": "max-autotune"},
    "fusepass": {"backend": "fusepass"},
    "fusepass reduce-overhead": {"backend": "fusepass", "mode": "reduce-overhead"},
    "fusepass max-autotune": {"backend": "fusepass", "mode": "max-autotune"},
}


@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Read STEPS * BLOCK numbers and write one: a stream that is never written back."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        total += tl.load(x_ptr + start + step * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def stream_bandwidth() -> float:
    """Bytes per second that a plain read of 4 GB reaches on this GPU, measured now."""
    block, steps = 4096, 8
    x = torch.randint(1 << 30, (1 << 30,), dtype=torch.int32, device="cuda")
    out = torch.empty(x.numel() // (block * steps), dtype=torch.int32, device="cuda")
    ms = triton.testing.do_bench(
        lambda: read_kernel[(out.numel(),)](x, out, BLOCK=block, STEPS=steps), return_mode="median"
    )
    return x.numel() * x.element_size() / ms * 1e3


def step_bytes(model: Any, batch: int, context: int) -> int:
    """Fewest bytes a decode step must read: every weight but the embedding table once, and the keys and values."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel() * model.dtype.itemsize
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context * batch
    return weights + kv * model.dtype.itemsize


def profile_step(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels and memory operations that one step runs on the GPU: name, count and microseconds of each."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = [e for e in trace.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    rows = [{"kernel": e.key, "count": e.count, "us": round(e.self_device_time_total, 1)} for e in events]
    return sorted(rows, key=lambda row: -row["us"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row for each variant: ms and tokens per second of a step, and what it took to get there."""
    torch._dynamo.config.recompile_limit = 64
    model = random_model(qwen3_config(args.model), torch.bfloat16, "cuda")
    cache = static_cache(model, args.batch, args.cache)
    ids = torch.randint(model.config.vocab_size, (args.batch, 1), device="cuda")
    prompt = torch.randint(model.config.vocab_size, (args.batch, args.context), device="cuda")
    start = torch.full_like(cache.layers[0].cumulative_length, args.context)

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.copy_(start)

    def stepper(forward: Callable[..., Any]) -> Callable[[], Any]:
        def step() -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return forward(ids, past_key_values=cache, use_cache=True).logits

        return step

    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for name in args.variants:
            rewind()
            kwargs = VARIANTS[name]
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            steps[name] = stepper(torch.compile(model, dynamic=False, **kwargs) if kwargs else model)
            for _ in range(4):
                steps[name]()
            torch.cuda.synchronize()
            rows[name] = {"first_calls_s": round(time.perf_counter() - begin, 2)}
            rows[name]["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            print(f"{name}: ready after {rows[name]['first_calls_s']} s", flush=True)
        profiles: dict[str, list[dict[str, Any]]] = {}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds):
            for name, step in steps.items():
                rewind()
                step()
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                count = min(args.steps, 8) if name == "eager" else args.steps
                events[0].record()
                for _ in range(count):
                    step()
                events[1].record()
                torch.cuda.synchronize()
                times[name].append(events[0].elapsed_time(events[1]) / count)
        for name, step in steps.items():
            rewind()
            profiles[name] = profile_step(step)
            rows[name]["kernels"] = sum(row["count"] for row in profiles[name])
    bandwidth = stream_bandwidth()
    ideal = step_bytes(model, args.batch, args.context) / bandwidth * 1e3
    for name, row in rows.items():
        row["ms"] = round(statistics.median(times[name]), 4)
        row["spread_ms"] = round(max(times[name]) - min(times[name]), 4)
        row["tokens_per_s"] = round(args.batch / row["ms"] * 1e3, 1)
        row["percent_of_ideal"] = round(100 * ideal / row["ms"], 1)
    return {
        "model": args.model,
        "batch": args.batch,
        "context": args.context,
        "cache": args.cache,
        "dtype": "bfloat16",
        "ideal_ms": round(ideal, 4),
        "bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "rows": rows,
        "profiles": {name: rows[:40] for name, rows in profiles.items()},
        **environment(args.commit),
    }


def environment(commit: str) -> dict[str, str]:
    """What a figure depends on besides the code that is measured."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": commit or git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text, one line a variant."""
    lines = [
        f"{result['model']}, batch {result['batch']}, context {result['context']}, {result['gpu']}, "
        f"ideal {result['ideal_ms']} ms at {result['bandwidth_tb_s']} TB/s",
        f"{'':26}{'ms':>9}{'tok/s':>9}{'% ideal':>9}{'kernels':>9}{'first s':>9}{'peak GB':>9}",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"{name:26}{row['ms']:9.3f}{row['tokens_per_s']:9.0f}{row['percent_of_ideal']:9.1f}{row['kernels']:9d}"
            f"{row['first_calls_s']:9.1f}{row['peak_gb']:9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cache", type=int, default=1024, help="length of the static cache")
    parser.add_argument("--steps", type=int, default=50, help="steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--profile", nargs="*", default=[], choices=list(VARIANTS), help="print these variants' kernels"
    )
    parser.add_argument("--out", type=Path, help="folder to write <model>-b<batch>.json to")
    parser.add_argument("--commit", default="", help="recorded where the repository is not a git checkout")
    args = parser.parse_args()
    result = measure(args)
    for name in args.profile:
        print(f"\nkernels of a step, {name}")
        for row in result["profiles"].get(name, []):
            print(f"{row['us']:9.1f} us {row['count']:4d} x {row['us'] / row['count']:7.2f}  {row['kernel'][:90]}")
    print(table(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"decode-{args.model}-b{args.batch}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    gc.collect()


if __name__ == "__main__":
    main()
