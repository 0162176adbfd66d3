"""The records: one JSON file a row. What they depend on, which are finished, and what they say.

A record holds the fields of its `Row`, the environment, and under "modes" for each mode:

    first_calls_s, peak_gb            what it took to get to full speed
    logits_error, wrong               relative error against eager's logits; beyond the record's "logits_limit"
    ms, spread_ms, rounds_ms          median over the rounds, longest minus shortest, and all of them
    tokens_per_s                      and percent_of_ideal (decode) or tflops (prefill)
    kernels, graph_replays, profile   of one forward, on a GPU
    fusions, refused, graphs          fused sites by fusion, refused sites, graphs compiled; fusepass only
    error                             what stopped it
"""

import json
import logging
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

import torch

import fusepass
from fusepass.bench.rows import Row, compiler, torch_mode
from fusepass.inductor import code_identity

Record = dict[str, Any]

log = logging.getLogger(__name__)

# The keys that are read, by where they are: in every record, in a measured one, in a mode of it, in what failed.
_ROW = {
    **dict.fromkeys(("model", "dtype", "gpu", "torch", "triton", "transformers", "commit", "date"), str),
    **dict.fromkeys(("batch", "context", "tokens", "cache"), int),
}
_MEASURED = {**dict.fromkeys(("weight_bytes", "bandwidth_tb_s", "logits_limit"), Real), "modes": dict}
_MODE = dict.fromkeys(("ms", "tokens_per_s", "logits_error"), Real)
_FAILED = {"error": str}


def environment(device: str, commit: str = "") -> dict[str, str]:
    """What a figure depends on besides its row: GPU, versions and commit."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "cpu",
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "commit": commit or code_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def code_version() -> str:
    """The commit of this package's code; with a hash of the code where it was changed since or is in no checkout, so
    that two states of the code never share a name."""
    package = Path(fusepass.__file__).parent

    def git(*arguments: str | Path) -> str:
        done = subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    tracked = git("ls-files", "__init__.py")
    if tracked and not git("status", "--porcelain", "--", package, (package / "patterns").resolve()):
        return git("rev-parse", "--short", "HEAD")
    return f"{git('rev-parse', '--short', 'HEAD') if tracked else fusepass.__version__}+{code_identity().hex()[:8]}"


def identity(row: Row, environment: dict[str, str]) -> Record:
    """What must be the same for a record to be this row's, but the modes."""
    return {**{name: value for name, value in asdict(row).items() if name != "modes"}, **environment}


def read(path: Path) -> Record | None:
    """A record; None if there is none, with a warning if there is something else."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if is_record(found):
        return found
    log.warning("%s is ignored: it is no record of fusepass bench", path)
    return None


def is_record(found: Any) -> bool:
    """Whether JSON is what `write` writes, as far as it is read."""
    if not _has(found, _ROW):
        return False
    if "modes" not in found:
        return _has(found, _FAILED)
    return _has(found, _MEASURED) and all(_has(mode, _MODE) or _has(mode, _FAILED) for mode in found["modes"].values())


def _has(found: Any, types: Mapping[str, type]) -> bool:
    """Whether JSON is an object with these keys, their values of these types."""
    return isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in types.items())


def read_all(folder: Path, kind: str) -> list[Record]:
    """The measured records of a kind, smallest model first."""
    records = [record for path in sorted(folder.glob(f"{kind}-*.json")) if (record := read(path))]
    measured = [record for record in records if record.get("modes")]
    return sorted(measured, key=lambda record: (record["weight_bytes"], record["batch"], record["tokens"]))


def check_folder(folder: Path) -> None:
    """Raise ValueError, in one line, unless records can be written to a folder that exists, or that can be made."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"cannot write to {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}: no permission in {there}")


def write(path: Path, row: Row, environment: dict[str, str], measured: Record) -> Record:
    """Keep what was measured; a stop on the way leaves the old file."""
    record = {**identity(row, environment), "date": time.strftime("%Y-%m-%d"), **measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)
    return record


def unfinished(row: Row, environment: dict[str, str], record: Record | None) -> str | None:
    """Why the row is to be measured; None if the record is of this row, in this environment, and was not broken off."""
    if record is None:
        return "not measured yet"
    if "error" in record:
        return f"failed before: {record['error']}"
    for name, value in identity(row, environment).items():
        if record.get(name) != value:
            return f"{name} was {record.get(name)}, is {value}"
    missing = [mode for mode in row.modes if mode not in record["modes"]]
    return f"without {', '.join(missing)}" if missing else None


def due(row: Row, environment: dict[str, str], record: Record | None, force: bool) -> tuple[Row, str | None]:
    """The row as it is to be measured, and why; no reason if it is finished, unless with `force`.

    Modes that its record has besides are measured again: the new figures compare with no others, so they can only
    replace the record, not join it."""
    why = unfinished(row, environment, record) or ("--force" if force else None)
    comparable = record if record and identity(row, environment).items() <= record.items() else {}
    besides = [mode for mode in comparable.get("modes", {}) if mode not in row.modes]
    if why and besides:
        why = f"{why}; with {', '.join(besides)}, which the record has"
        row = replace(row, modes=(*besides, *row.modes))
    return row, why


def failed(measured: Record) -> bool:
    """Whether a row has no figures: it failed, or all its modes did."""
    return all("error" in mode for mode in measured.get("modes", {}).values())


def best(record: Record, who: str) -> str | None:
    """The fastest mode of a compiler, of those that ran and agree with eager."""
    times = {name: mode["ms"] for name, mode in record["modes"].items() if compiler(name) == who and sound(mode)}
    return min(times, key=times.__getitem__, default=None)


def sound(mode: Record) -> bool:
    """Whether a mode was measured and agrees with eager."""
    return "ms" in mode and not mode.get("wrong") and "error" not in mode


def over_inductor(record: Record, name: str) -> float | None:
    """How many times as fast as Inductor's best mode."""
    rival, mode = best(record, "inductor"), record["modes"][name]
    return record["modes"][rival]["ms"] / mode["ms"] if rival and sound(mode) else None


def troubles(record: Record) -> list[str]:
    """What went wrong in a row, a line each."""
    if "error" in record:
        return [record["error"]]
    lines = []
    for name, mode in record["modes"].items():
        if "error" in mode:
            lines.append(f"{name}: {mode['error']}")
        elif mode.get("wrong"):
            lines.append(
                f"{name}: WRONG: its logits are {mode['logits_error']:.2g} off eager's, "
                f"the limit is {record['logits_limit']:.2g}"
            )
        elif torch_mode(name) and mode.get("graph_replays") == 0:
            lines.append(f"{name}: no CUDA graph was replayed")
    return lines
