"""The main job on real input: load a checkpoint, compile it with fusepass, generate, and compare with the plain model.

    python examples/demo.py                                   # the small checkpoint beside this file
    python examples/demo.py --model Qwen/Qwen3-0.6B           # any Qwen3: a hub name or a local folder

With a GPU it prints tokens per second of eager, Inductor and fusepass. Without one the kernels run in Triton's
interpreter: the tokens are real, the times say nothing.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FUSEPASS_CPU", "interpret")

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

import fusepass
from fusepass.report import collapse

console = Console(highlight=False)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int, backend: str | None) -> torch.Tensor:
    """Greedy tokens with a static cache. `generate` compiles its decode step if it is given a CompileConfig."""
    settings: dict[str, Any] = {"disable_compile": True}
    if backend:
        config = CompileConfig(backend=backend, mode="reduce-overhead" if GPU else "default")
        config._compile_all_devices = True  # by default, generate compiles nothing on a CPU
        settings = {"compile_config": config}
    return model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, cache_implementation="static", **settings
    )  # fmt: skip


def timed(*args: Any) -> tuple[torch.Tensor, list[float]]:
    """The tokens, and the seconds of a first call, which compiles, and (on a GPU) of a second one."""
    seconds = []
    for _ in range(2 if GPU else 1):
        start = time.perf_counter()
        output = generate(*args)
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return output, seconds


def show_sites() -> None:
    """What was fused where, layers folded."""
    table = Table(title="What fusepass did", title_justify="left")
    for column in ("where", "fusion", "result", "sites"):
        table.add_column(column, overflow="fold")
    for report in fusepass.reports():
        for path, site, count in collapse(report.sites):
            table.add_row(path, site.fusion, "fused" if site.fused else f"refused: {site.reason}", str(count))
        if report.untouched:
            table.add_row(f"graph {report.compile_id}", "", report.untouched, "0")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny-qwen3"), help="hub name or local folder")
    parser.add_argument("--prompt", default="The fox sat by the river.", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="number of tokens to generate")
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if GPU else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to("cuda" if GPU else "cpu").eval()
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    where = torch.cuda.get_device_name() if GPU else "the CPU, kernels in Triton's interpreter"
    console.print(f"[bold]{Path(args.model).name}[/], {model.num_parameters():,} parameters, {dtype}, on {where}\n")

    runs: dict[str, tuple[torch.Tensor, list[float]]] = {}
    with torch.no_grad():
        for name, backend in {"eager": None, "inductor": "inductor", "fusepass": "fusepass"}.items():
            if GPU or name != "inductor":
                with console.status(f"generating {args.tokens} tokens with {name} ..."):
                    runs[name] = timed(model, inputs, args.tokens, backend)
                torch._dynamo.reset()
    show_sites()

    prompt = inputs["input_ids"].shape[1]
    plain, ours = runs["eager"][0][0], runs["fusepass"][0][0]
    for name in ("eager", "fusepass"):
        text = tokenizer.decode(runs[name][0][0][prompt:], skip_special_tokens=True)
        console.print(Text.assemble((f"\n{name}: ", "bold"), (args.prompt, "dim"), text))
    if torch.equal(plain, ours):
        console.print(f"\n[green]All {len(ours) - prompt} tokens agree with the plain model's.[/]")
    else:
        shared = min(len(plain), len(ours))
        first = next((i for i in range(shared) if plain[i] != ours[i]), shared) - prompt
        console.print(f"\n[yellow]The first {first} tokens agree.[/] In {dtype} two logits can tie within rounding.")

    times = Table(title="Time", title_justify="left")
    for column in ("", "first call, with compiling", *(["second call", "tokens/s"] if GPU else [])):
        times.add_column(column, justify="left" if not column else "right")
    for name, (output, seconds) in runs.items():
        speed = [f"{(output.shape[1] - prompt) / seconds[1]:.0f}"] if GPU else []
        times.add_row(name, *(f"{s:.2f} s" for s in seconds), *speed)
    console.print()
    console.print(times)
    if not GPU:
        console.print("The interpreter runs each kernel as NumPy code; its times say nothing about a GPU.")


if __name__ == "__main__":
    main()
