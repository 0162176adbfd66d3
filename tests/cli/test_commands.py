"""The commands that look: explain, fusions, env."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner, Result

import fusepass
from fusepass.cli import build

TINY = str(Path(__file__).parents[2] / "examples" / "tiny-qwen3")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build(), arguments)


def test_explain_counts_the_sites_of_a_prompt() -> None:
    done = run("explain", TINY, "--seq", "9")
    assert done.exit_code == 0, done.output
    rows = {tuple(line.split()[1:2]): line.split()[-1] for line in done.stdout.splitlines() if " fused " in line}
    assert rows[("norm_gated_mlp",)] == rows[("norm_qkv_rope",)] == rows[("linear_residual",)] == "4"
    assert ("attention",) not in rows, "a prompt is left to SDPA"


def test_explain_of_a_decode_step_shows_what_runs_joined() -> None:
    done = run("explain", str(Path(TINY) / "config.json"), "--decode", "--batch", "2", "--dynamic")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if " attention " in line]
    assert line.split()[1:] == ["attention", "fused", "self_attention", "4"]


def test_explain_prints_json() -> None:
    done = run("explain", TINY, "--decode", "--json")
    assert done.exit_code == 0, done.output
    sites = [site for graph in json.loads(done.stdout)["graphs"] for site in graph["sites"]]
    assert len(sites) == 17


def test_a_model_with_nothing_to_fuse_is_said_to_have_nothing(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 31}
    AutoConfig.for_model("gpt2", **sizes).save_pretrained(tmp_path)
    done = run("explain", str(tmp_path))
    assert done.exit_code == 1, done.output
    assert f"nothing in {tmp_path} is fused" in done.stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no/such.json", "no file or folder no/such.json"),
        ("/no/such/folder", "no file or folder /no/such/folder"),
        ("./no", "no file or folder ./no"),
        ("no-such-model", "no configuration of 'no-such-model'"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, text: str) -> None:
    done = run("explain", name)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"fusepass: {text}")
    assert len(done.stderr.splitlines()) == 1


def test_fusions_lists_all() -> None:
    done = run("fusions")
    assert done.exit_code == 0
    assert all(fusion.name in done.stdout for fusion in fusepass.fusions())


def test_env_names_versions_and_settings() -> None:
    done = run("env")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[2:6]] == [
        "fusepass",
        "torch",
        "triton",
        "transformers",
    ]
    assert fusepass.__version__ in done.stdout
