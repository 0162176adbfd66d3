"""Launch configs: tables measured per GPU and shipped as data, and the user's by `python -m fusepass.tuning.tune`.

A table is a JSON object {key: config}; a key says kernel, rows, N, K and dtype. What is in no table gets the kernel's
own safe default.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

Config = dict[str, int]

_overrides: dict[str, Config] = {}


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


@contextlib.contextmanager
def override(configs: Mapping[str, Config]) -> Iterator[None]:
    """Use these configs, by key, before those of the tables and of an `override` around this one: how the tuner tries
    them. An op's overload may replay what it has recorded; its `launch` chooses anew in every call."""
    global _overrides
    before, _overrides = _overrides, {**_overrides, **configs}
    try:
        yield
    finally:
        _overrides = before


def lookup(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config | None:
    """The measured launch config for this GPU, if there is one."""
    name = key(kernel, m, n, k, dtype)
    return _overrides.get(name) or table().get(name)
