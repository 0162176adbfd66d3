"""`python -m fusepass bench`: what to measure, from the command line to the records."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fusepass.bench.rows import Mode, plan
from fusepass.cli import fail, require

MODELS = ["Qwen3-0.6B"]
BATCHES = [1]
LENGTHS: list[int] = []
MODES = list(Mode)
EPILOG = (
    "Exit codes: 0 every row is measured; 1 a row or a mode failed, or gave other logits than eager; 2 nothing was "
    "started (no GPU, wrong arguments, nowhere to write, a package is missing); 130 and 143 stopped by Ctrl-C, SIGTERM."
)


def bench(
    model: Annotated[
        list[str], typer.Option(help="Qwen3-0.6B, 1.7B, 4B, 8B, 14B, 32B with random weights; or hub name; or folder.")
    ] = MODELS,
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences.")] = BATCHES,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache before a decode step.")] = 512,
    cache: Annotated[int, typer.Option(min=1, help="Length of the static cache.")] = 1024,
    prefill: Annotated[list[int], typer.Option(min=2, help="Measure the prefill of prompts this long too.")] = LENGTHS,
    decode: Annotated[bool, typer.Option(help="Measure decode steps.")] = True,
    mode: Annotated[list[Mode], typer.Option(help="Modes to run; all by default.")] = MODES,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option()] = "bfloat16",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed in a round.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median is reported.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; benchmarks/results/GPU by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure finished rows again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be measured.")] = False,
    commit: Annotated[str, typer.Option(help="Recorded as the commit; what git says by default.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the compilers print.")] = False,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(hidden=True)] = "cuda",
) -> None:
    """Measure whole models, embedding to logits: eager, and each mode of Inductor and fusepass.

    A row is one model at one shape; its modes run interleaved in one process. Each row is written as soon as it is
    measured, as JSON, and a row that the folder has for the same commit, versions, GPU and settings is skipped: after
    a stop, the same command goes on. Otherwise it is measured and its record replaced, also where only --cache, --steps
    or --rounds differ; modes that the record of the same settings has are measured again with those asked for. What
    fails altogether replaces no figures. Options that may be repeated take several values: --batch 1 8.
    """
    require("transformers", "matplotlib", extra="bench")
    import torch

    from fusepass.bench.models import check_name
    from fusepass.bench.results import check_folder, environment
    from fusepass.bench.run import go_through, preview
    from fusepass.bench.table import console
    from fusepass.tuning import slug

    folder = out or Path("benchmarks/results") / slug()
    try:
        check_folder(folder)
        for name in model:
            check_name(name)
        rows = plan(
            model,
            batch,
            prefill,
            decode=decode,
            context=context,
            cache=cache,
            dtype=dtype,
            modes=tuple(one.value for one in mode),
            steps=steps,
            rounds=rounds,
            device=device,
        )
    except ValueError as fault:
        fail(str(fault))
    if device == "cuda" and not torch.cuda.is_available() and not dry_run:
        fail("needs a CUDA GPU")

    screen, where = console(), environment(device, commit)
    versions = ", ".join(f"{name} {value}" for name, value in where.items() if name != "gpu")
    screen.print(f"{where['gpu']}, {versions}; {len(rows)} rows, to {folder}")
    if dry_run:
        preview(rows, folder, where, screen, force)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit, so that the process of the row ends too
    try:
        sys.exit(go_through(rows, folder, where, screen, force, verbose))
    except KeyboardInterrupt:
        screen.print("stopped; the same command goes on from here")
        sys.exit(130)
