"""Transformers' own tests of compiling and generating, with fusepass instead of Inductor, from a source checkout.

python -m tests.hf CHECKOUT [--models ...] [--record FILE]

Each selection of `RUNS` is run with fusepass; what fails is run again with Inductor and with "eager". Exits with 1
where something fails with fusepass alone. `--record` writes the page (docs/hf-tests.md) too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from fusepass.bench.results import code_version

MODELS = ("qwen3", "qwen3_moe", "llama", "mistral")
RUNS = (
    ("The tests as they are, Inductor for the remainder", "compile or static_cache or generate", []),
    # Not those of compiling: they count recompilations, and a compiled prompt is one more with any backend.
    (
        "`generate()` compiles the forward first, the remainder eager",
        "generate and not compil and not export",
        ["--compile-generate", "--remainder=eager"],
    ),
)
"""Titles, pytest's -k, and options of the plugin."""


@dataclass(frozen=True)
class Outcome:
    """What one test came to."""

    test: str
    """Its pytest id."""
    state: str
    """"passed", "skipped", "failed"."""
    reason: str
    fused: bool
    """Whether it compiled something that was fused."""


def run(checkout: Path, backend: str, options: list[str], tests: list[str]) -> list[Outcome]:
    """The outcomes of `tests` (pytest's selection) of `checkout`, compiled with `backend`."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-p", "compile_with", f"--compile-with={backend}", *options]
        command += ["-q", "-p", "no:cacheprovider", f"--junitxml={record}", *tests]
        # The plugin by its file, since `tests` is the checkout's own package there; and the checkout's transformers.
        paths = [Path(__file__).parent, checkout / "src", os.environ.get("PYTHONPATH", "")]
        environment = {"FUSEPASS_CPU": "reference", "HF_HUB_OFFLINE": "1", **os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        outcomes = [_outcome(case) for case in xml.parse(record).iter("testcase")] if record.exists() else []
        if not outcomes:
            raise SystemExit(f"pytest ran no test:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        return outcomes


def _outcome(case: xml.Element) -> Outcome:
    *path, cls = case.get("classname", "").split(".")
    test = f"{'/'.join(path)}.py::{cls}::{case.get('name')}"
    trouble = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
    state = {None: "passed", "skipped": "skipped"}.get(None if trouble is None else trouble.tag, "failed")
    fused = next((part.get("value", "{}") for part in case.iter("property") if part.get("name") == "fused"), "{}")
    reason = "" if trouble is None else (trouble.get("message") or "").strip().split("\n")[0]
    return Outcome(test, state, reason, fused != "{}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()

    checkout = asked.checkout.resolve()
    page, ours = [_head(checkout, asked.models)], 0
    for title, keyword, options in RUNS:
        selection = [f"tests/models/{model}" for model in asked.models] + ["-k", keyword]
        outcomes = run(checkout, "fusepass", options, selection)
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        others = {backend: _states(checkout, backend, options, failed) for backend in ("inductor", "eager")}
        ours += sum(all(states[outcome.test] == "passed" for states in others.values()) for outcome in failed)
        page.append(_section(title, keyword, outcomes, others))
        print(page[-1], flush=True)
    if asked.record:
        asked.record.write_text("\n".join(page))
    return int(ours > 0)


def _states(checkout: Path, backend: str, options: list[str], failed: list[Outcome]) -> dict[str, str]:
    if not failed:
        return {}
    return {outcome.test: outcome.state for outcome in run(checkout, backend, options, [o.test for o in failed])}


def _head(checkout: Path, models: list[str]) -> str:
    git = ["git", "-C", str(checkout), "describe", "--always", "--tags"]
    described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    (version,) = [
        line.split('"')[1]
        for line in (checkout / "src/transformers/__init__.py").read_text().splitlines()
        if line.startswith("__version__")
    ]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU, where the ops run their references"
    return f"""# Hugging Face's own tests

What `make hf-tests TRANSFORMERS_SRC=...` found: tests of {", ".join(models)}, with fusepass
in the place of Inductor. A test that compiles something and has nothing fused fails, unless it needs gradients.

transformers {version} {described}, torch {torch.__version__}, fusepass {code_version()}, on {where}.
"""


def _section(title: str, keyword: str, outcomes: list[Outcome], others: dict[str, dict[str, str]]) -> str:
    """A run as Markdown: how many passed, and what failed with which backends."""
    count = {state: sum(outcome.state == state for outcome in outcomes) for state in ("passed", "skipped", "failed")}
    fused = sum(outcome.state == "passed" and outcome.fused for outcome in outcomes)
    lines = [
        f"## {title}\n",
        f"`-k '{keyword}'`: {count['passed']} passed ({fused} of them ran fused graphs), {count['skipped']} skipped, "
        f"{count['failed']} failed.\n",
    ]
    if count["skipped"]:
        why = Counter(outcome.reason for outcome in outcomes if outcome.state == "skipped").most_common()
        lines.append(f"Skipped: {'; '.join(f'{reason} ({number})' for reason, number in why)}.\n")
    if count["failed"]:
        lines += ["| failed | reason | Inductor | eager |", "|---|---|---|---|"]
        for outcome in outcomes:
            if outcome.state == "failed":
                states = (found.get(outcome.test, "not run") for found in others.values())
                reason = outcome.reason.replace("|", "\\|")[:160]
                path, _, test = outcome.test.partition("::")
                lines.append(f"| {path.split('/')[-2]} `{test}` | {reason} | {' | '.join(states)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
