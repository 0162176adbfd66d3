"""Each example runs as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

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
