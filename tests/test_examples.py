"""Each example runs as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_demo_fuses_the_checkpoint_and_its_tokens_agree() -> None:
    env = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    for fusion in ("norm_qkv_rope", "norm_gated_mlp", "linear_residual", "norm_linear"):
        assert f"{fusion}" in done.stdout
    assert "model.layers.{0-3}.self_attn " in done.stdout
    assert "All 12 tokens agree with the plain model's." in done.stdout


def test_a_models_graphs_are_inspected_and_written_as_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = [sys.executable, str(EXAMPLES / "inspect_graphs.py"), "--html", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "17 fused, 0 refused" in done.stdout
    assert "  norm_qkv_rope     47 nodes at model.layers.0.self_attn, 9 tensors read\n" in done.stdout
    assert "tiny-qwen3: a decode step" in page.read_text()


@pytest.mark.parametrize(
    ("example", "arguments", "text"),
    [
        ("inspect_graphs.py", ("--cache", "-4"), "--cache is -4; expected at least 1"),
        ("inspect_graphs.py", ("--html", "/no/such/page.html"), "cannot write /no/such/page.html: No such file"),
        ("generate.py", ("--tokens", "0"), "--tokens is 0; expected at least 1"),
        ("generate.py", ("--prompt", ""), "--prompt '' has no tokens; expected text to continue"),
    ],
)
def test_a_wrong_argument_is_one_line(example: str, arguments: tuple[str, ...], text: str) -> None:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert text in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
