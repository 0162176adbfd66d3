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


CONFIG = {"model_type": "qwen3", "vocab_size": 31, "num_hidden_layers": 2, "dtype": "float32"}
CONFIG |= {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"model_type": "t5", "num_layers": 1},
            "is an encoder-decoder (T5Model); expected a model that takes input_ids",
        ),
        ({"model_type": "vit", "num_hidden_layers": 1}, "takes pixel_values (ViTModel); expected a model that takes"),
        ({"model_type": "clip"}, "cannot be explained: AttributeError"),
        ([1, 2], "no configuration of '{}': TypeError"),
        (None, "no configuration of '{}': TypeError"),
        (CONFIG | {"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
        (CONFIG | {"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types` (1)"),
        (CONFIG | {"hidden_size": -5}, "'{}' cannot be built: RuntimeError: Trying to create tensor with negative"),
        (CONFIG | {"hidden_act": "nosuch"}, "'{}' cannot be built: KeyError: 'nosuch'"),
        (CONFIG | {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1e4}}, "KeyError: 'nosuch'"),
        (CONFIG | {"dtype": "float99"}, "no configuration of '{}': AttributeError: module 'torch' has no attribute"),
        (CONFIG | {"num_attention_heads": 3}, "'{}' cannot be explained: TorchRuntimeError: "),
        (CONFIG | {"head_dim": 7}, "expected shape should be broadcastable"),
    ],
)
def test_a_configuration_that_makes_no_model_to_explain_is_one_line(config: object, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("explain", str(tmp_path), "--seq", "5")
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fusepass: ")]
    assert text.replace("{}", str(tmp_path)) in line
    assert "Traceback" not in done.stderr


def test_a_length_that_no_memory_holds_is_a_wrong_argument() -> None:
    done = run("explain", TINY, "--seq", "9999999999999")
    assert done.exit_code == 2
    assert "--seq" in done.stderr


def test_a_quantised_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}))
    done = run("explain", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    assert f"'{tmp_path}' is quantised (fp8); what follows is the model with plain weights" in done.stderr


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "bloom"])
def test_the_cache_of_a_decode_step_has_its_tensors_unless_the_model_needs_values(kind: str, tmp_path: Path) -> None:
    """bloom makes a number of the cache's length, which on "meta" has none: its cache is left empty."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": kind, "sliding_window": 32, "n_head": 2}))
    done = run("explain", str(tmp_path), "--decode", "--json")
    report = json.loads(done.stdout)
    assert report["stopped"] is None
    (graph,) = report["graphs"]
    assert ("zeros" in graph["before"]) == (kind == "bloom")


def test_a_page_that_can_not_be_written_does_not_cost_the_report(tmp_path: Path) -> None:
    page = tmp_path / "no" / "page.html"
    done = run("explain", TINY, "--html", str(page))
    assert done.exit_code == 2
    assert " fused, 0 refused" in done.stdout
    assert done.stderr.endswith(f"fusepass: cannot write {page}: No such file or directory\n")


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
