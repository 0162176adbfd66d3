"""Launch configs: tables measured per GPU and shipped as data, and the user's by `python -m fusepass.tuning.tune`.

A table is a JSON object {key: config}; a key says kernel, rows, N, K and dtype. What is in no table gets the kernel's
own safe default.
"""

import functools
import json
import re
from pathlib import Path

import torch

Config = dict[str, int]

forced: Config | None = None
"""Used instead of any table while set: how the tuner tries one config after another."""


def key(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> str:
    """The table key of one launch."""
    return f"{kernel} m{m} n{n} k{k} {str(dtype).removeprefix('torch.')}"


@functools.cache
def slug() -> str:
    """The GPU's name as a file name: "nvidia-h200"; "none" without one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_table() -> Path:
    """Where the tuner writes this user's table for this GPU."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("fusepass")) / "tuning" / f"{slug()}.json"


@functools.cache
def table() -> dict[str, Config]:
    """The configs for this GPU: the shipped ones, and the user's own before them."""
    merged: dict[str, Config] = {}
    for path in (Path(__file__).parent / f"{slug()}.json", user_table()):
        if path.is_file():
            merged.update(json.loads(path.read_text()))
    return merged


@functools.cache
def _lookup(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config | None:
    return table().get(key(kernel, m, n, k, dtype))


def lookup(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config | None:
    """The measured launch config for this GPU, if there is one."""
    return forced if forced is not None else _lookup(kernel, m, n, k, dtype)
