"""`python -m fusepass explain`: what would be fused in a model, from its configuration alone."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusepass.cli import fail, require

EPILOG = (
    "Exit codes: 0 something is fused; 1 nothing is, and the report says why; 2 nothing was explained (no such model "
    "or file, wrong arguments, a package is missing)."
)


def explain(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, or config.json.", show_default=False)],
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of the prompt; with --decode, length of the cache.")] = 128,
    decode: Annotated[bool, typer.Option("--decode", help="A decode step with a static cache, not a prompt.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="As torch.compile(dynamic=True).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/report-schema.md).")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to look at, too.", show_default=False)] = None,
) -> None:
    """Say what fusepass would fuse in a model and what not, and why not.

    Only the configuration is read: no weights, no GPU, and the model is not run.
    """
    require("transformers", *(["jinja2"] if html else []), extra="cli")
    import torch

    import fusepass

    built, kwargs = _build(model, batch, seq if decode else None)
    ids = torch.zeros(batch, 1 if decode else seq, dtype=torch.int64, device="meta")
    with torch.no_grad():
        report = fusepass.explain(built, ids, dynamic=dynamic, **kwargs)
    if html:
        kind = f"a decode step, cache of {seq}" if decode else f"a prompt of {seq}"
        try:
            report.to_html(html, title=f"{Path(model).name if Path(model).exists() else model}: {kind}")
        except OSError as fault:
            fail(f"cannot write {html}: {fault.strerror}")
    fused = sum(site.fused for site in report.sites)
    print(report.to_json() if as_json else report)
    if not fused and not as_json:
        print(f"\nnothing in {model} is fused" + ("" if report.sites else ": nothing looks like any fusion's pattern"))
    sys.exit(0 if fused else 1)


def _build(name: str, batch: int, cache: int | None) -> tuple[Any, dict[str, Any]]:
    """The model on "meta" with its language-model head if it has one, and the arguments besides the tokens."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

    # A hub name is owner/name; transformers takes what is no folder for one.
    is_path = name.endswith(".json") or name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_path and not Path(name).exists():
        fail(f"no file or folder {name}")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as fault:
        fail(f"no configuration of '{name}': {str(fault).splitlines()[0]}")
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with torch.device("meta"):
        try:
            model = kind.from_config(config, dtype=getattr(config, "dtype", None) or torch.bfloat16)
        except (ValueError, ImportError) as fault:
            fail(f"'{name}' cannot be built: {str(fault).splitlines()[0]}")
    if cache is None:
        return model.eval(), {"use_cache": False}
    return model.eval(), {"past_key_values": StaticCache(config=config, max_cache_len=cache), "use_cache": True}
