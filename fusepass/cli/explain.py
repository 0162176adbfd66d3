"""`python -m fusepass explain`: what would be fused in a model, from its configuration alone."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fusepass.cli import fail, require

EPILOG = (
    "Exit codes: 0 something is fused; 1 nothing is, and the report says why; 2 nothing was explained (no such model "
    "or file, a configuration that makes no model, wrong arguments, a package is missing) or the page was not written."
)


def explain(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, or config.json.", show_default=False)],
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    seq: Annotated[
        int, typer.Option(min=1, max=2**30, help="Tokens of the prompt; with --decode, length of the cache.")
    ] = 128,
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

    built = _build(model)
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it logs the traceback of what it then raises
    ids = torch.zeros(batch, 1 if decode else seq, dtype=torch.int64, device="meta")
    with torch.no_grad(), _one_line(f"'{model}' cannot be explained"):
        kwargs = {"past_key_values": _cache(built, ids, seq)} if decode else {}
        report = fusepass.explain(built, ids, use_cache=decode, dynamic=dynamic, **kwargs)
    fused = sum(site.fused for site in report.sites)
    print(report.to_json() if as_json else report)
    if not fused and not as_json:
        print(f"\nnothing in {model} is fused" + ("" if report.sites else ": nothing looks like any fusion's pattern"))
    if html:
        kind = f"a decode step, cache of {seq}" if decode else f"a prompt of {seq}"
        try:
            report.to_html(html, title=f"{Path(model).name if os.path.exists(model) else model}: {kind}")
        except OSError as fault:
            fail(f"cannot write {html}: {fault.strerror}")
    sys.exit(0 if fused else 1)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever transformers, the model or Dynamo raise inside is their answer to this configuration."""
    try:
        yield
    except Exception as fault:
        said = " ".join(line.strip() for line in str(fault).strip().splitlines()[:2])  # of two, the second says why
        fail(f"{what}: {type(fault).__name__}: {said}")


def _build(name: str) -> Any:
    """The model on "meta", with its language-model head if it has one."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    # A hub name is owner/name; transformers takes what is no folder for one.
    is_path = name.endswith(".json") or name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_path and not os.path.exists(name):  # unlike Path.exists, False as well where the folder above is closed to us
        fail(f"no file or folder {name} (or none that may be read)")
    with _one_line(f"no configuration of '{name}'"):
        config = AutoConfig.from_pretrained(name)
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with _one_line(f"'{name}' cannot be built"), torch.device("meta"):
        model = kind.from_config(config, dtype=getattr(config, "dtype", None) or torch.bfloat16).eval()
    expected = "expected a model that takes input_ids alone"
    if model.config.is_encoder_decoder:
        fail(f"'{name}' is an encoder-decoder ({type(model).__name__}); {expected}")
    if model.main_input_name != "input_ids":
        fail(f"'{name}' takes {model.main_input_name} ({type(model).__name__}); {expected}")
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else type(quantised).__name__
        print(
            f"fusepass: '{name}' is quantised ({method}); what follows is the model with plain weights: "
            "sites that read quantised ones are not fused",
            file=sys.stderr,
        )
    return model


def _cache(model: Any, ids: Any, length: int) -> Any:
    """A static cache that has its tensors, as before any decode step but the first: a graph in which they are born
    holds two fills a layer more."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    try:
        for _ in range(2):  # the second reads the length, a tensor now, which on "meta" has no value
            model(ids, past_key_values=cache, use_cache=True)
    except Exception:  # it needs values: there is more to say of it with an empty cache
        return StaticCache(config=model.config, max_cache_len=length)
    return cache
