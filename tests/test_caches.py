"""Inductor's caches work across processes, and a change of this package's code is a miss."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Prints the counters of FxGraphCache and AOTAutogradCache after compiling one norm and MLP.
PROGRAM = """
import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers import Qwen3Config
import fusepass

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = Qwen3RMSNorm(24), Qwen3MLP(Qwen3Config(hidden_size=24, intermediate_size=40))
    def forward(self, x):
        return x + self.mlp(self.norm(x))

torch.manual_seed(0)
with torch.no_grad():
    torch.compile(Block(), backend="fusepass")(torch.randn(1, 3, 24))
assert fusepass.reports()[0].counts()["norm_gated_mlp"] == 1
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""


def hits(package: Path, cache: Path) -> tuple[int, int]:
    """FxGraphCache and AOTAutogradCache hits of a fresh process that imports fusepass from `package`."""
    env = {
        **os.environ,
        "FUSEPASS_CPU": "reference",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": str(package),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=package, env=env)
    assert done.returncode == 0, done.stderr
    fx, aot = done.stdout.split()[-2:]
    return int(fx), int(aot)


def test_a_second_process_hits_both_caches_and_changed_code_misses(tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(ROOT / "fusepass", package / "fusepass")  # follows the link to patterns/
    cache = tmp_path / "cache"
    assert hits(package, cache) == (0, 0)
    fx, aot = hits(package, cache)
    # An AOTAutogradCache hit brings the compiled code with it, so FxGraphCache need not be asked.
    assert aot >= 1
    assert fx + aot >= 1
    changed = package / "fusepass" / "patterns" / "rms_norm.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    assert hits(package, cache) == (0, 0)


@pytest.mark.parametrize("setting", [None, "list"])
def test_a_users_own_inductor_pass_still_runs(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch._inductor.custom_graph_pass import CustomGraphPass

    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    ran = []

    class Own(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            ran.append(len(list(graph.nodes)))

        def uuid(self) -> str:
            return "own"

    norm = torch.nn.RMSNorm(8)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return norm.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    own = Own() if setting is None else [Own()]
    options = {"inductor": {"post_grad_custom_post_pass": own, "fx_graph_cache": False}}
    with torch.no_grad():
        torch.compile(f, backend="fusepass", options=options)(torch.randn(2, 8))
    assert ran
