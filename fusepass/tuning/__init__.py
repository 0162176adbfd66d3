"""Launch configs: tables measured per GPU and shipped as data, and the user's by `python -m fusepass.tuning.tune`.

A table is a JSON object {key: config}; a key says kernel, rows, N, K and dtype. What is in no table gets the kernel's
own safe default.
"""

import contextlib
import functools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

Config = dict[str, int]

log = logging.getLogger(__name__)
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


_MOST_TILES = 64
"""Of K in a walk that is unrolled: 96 take 4 s to compile, 384 two minutes; on tensor cores 128 take 34 s."""


def _usable(name: str, config: object) -> bool:
    """Whether `config` may be that of the launch `name`: at worst it is slow or does not compile."""
    found = re.fullmatch(r"(skinny )?(\w+) m(\d+) n\d+ k(\d+) (\w+)", name)
    if not found or not isinstance(config, dict) or not all(type(setting) is int for setting in config.values()):
        return False
    skinny, rows, k = bool(found[1]), int(found[3]), int(found[4])
    needed, optional = {"BLOCK_N", "BLOCK_K", "num_warps"}, {"AHEAD"}
    if skinny:
        needed |= {"SLICES"}
        optional |= {"BLOCK_M", "PREFETCH", "num_stages"}
    elif "CHUNKS" in config:
        needed = {"BLOCK_N", "CHUNKS", "num_warps"}
        # One row of 16-bit numbers, pairs of rows of weights, pairs of chunks of 128 of K: see `kernels.gemv_mma`.
        pairs = config["CHUNKS"] % 2 == 0 and (found[2] == "gated" or config.get("BLOCK_N", 0) % 2 == 0)
        if rows != 1 or found[5] not in ("bfloat16", "float16") or not pairs:
            return False
    if not needed <= config.keys() <= needed | optional:
        return False
    if any(config[size] <= 0 for size in needed) or config.get("AHEAD", 1) < (0 if skinny else 1):
        return False
    tile = config.get("BLOCK_K") or 128 * config["num_warps"]  # a chunk of each warp
    tiles, ahead = math.ceil(k / (tile * config.get("SLICES", 1))), config.get("AHEAD", 0)
    if skinny and (ahead == 0 or config.get("num_stages", 1) > 1):  # of a pipeline, only what is loaded ahead
        tiles = min(tiles, ahead)
    if tiles > _MOST_TILES:
        return False
    # A BLOCK_M of fewer rows would leave some out.
    return bool(config.get("BLOCK_M", rows) == rows)


def read(path: Path) -> dict[str, Config]:
    """The table at `path`, {} if there is none. Entries that no kernel takes, of an older release say, are left out,
    with a warning. Raises OSError, or ValueError if it is no table; both name the file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as fault:  # brackets in brackets, a thousand deep
        raise ValueError(f"{path} is no table of launch configs: {fault}") from fault
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no table of launch configs: expected an object")
    usable = {name: config for name, config in found.items() if _usable(name, config)}
    if strange := [f"'{name}' is {config}" for name, config in found.items() if name not in usable]:
        log.warning("%d launch configs are ignored, which no kernel takes: in %s, %s", len(strange), path, strange[0])
    return usable


@functools.cache
def table() -> dict[str, Config]:
    """The configs for this GPU: the shipped ones, and the user's own before them, if they can be read."""
    shipped = read(Path(__file__).parent / f"{slug()}.json")
    try:
        return {**shipped, **read(user_table())}
    except (OSError, ValueError) as fault:
        log.warning("this user's launch configs are ignored: %s", fault)
        return shipped


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
