"""`python -m fusepass bench` as a user runs it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import psutil
import pytest
import torch
from typer.testing import CliRunner, Result

from fusepass.bench import run
from fusepass.bench.rows import Row
from fusepass.cli import build
from tests.bench.conftest import MODES, measured, rows

SMALL = ("--context", "8", "--cache", "32", "--steps", "4", "--rounds", "2", "--dtype", "float32", "--device", "cpu")
SAME = ("--commit", "aaa")  # the code may be edited while its tests run


def bench(*arguments: str | Path) -> Result:
    """The command in this process."""
    return CliRunner().invoke(build(), ["bench", *map(str, arguments)])


def test_the_whole_path_on_a_cpu_measures_records_and_then_skips(checkpoint: Path, tmp_path: Path) -> None:
    modes = ("--mode", "eager", "fusepass")
    arguments = ("--model", checkpoint, *modes, "--prefill", "5", *SMALL, *SAME, "--out", tmp_path)
    command = [sys.executable, "-m", "fusepass", "bench", *map(str, arguments)]
    env = {**os.environ, "FUSEPASS_CPU": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr

    files = {path.name: path for path in tmp_path.iterdir()}
    decode, prefill = "decode-small-b1-c8-float32.json", "prefill-small-b1-s5-float32.json"
    assert set(files) == {decode, prefill, "decode.png", "prefill.png"}
    for name in (decode, prefill):
        record = json.loads(files[name].read_text())
        assert (record["gpu"], record["torch"]) == ("cpu", torch.__version__)
        assert list(record["modes"]) == ["eager", "fusepass"]
        for mode in record["modes"].values():
            assert mode["ms"] > 0
            assert len(mode["rounds_ms"]) == 2
            assert mode["logits_error"] < 1e-5
        assert record["modes"]["fusepass"]["fusions"]["norm_qkv_rope"] == 1
        assert ("percent_of_ideal" in record["modes"]["eager"]) == (name == decode)
    for name in ("decode.png", "prefill.png"):
        assert matplotlib.image.imread(files[name]).shape[1] > 600

    assert "small decode, batch 1, context 8: not measured yet" in done.stdout
    assert "fusepass: first calls " in done.stdout
    assert done.stdout.count("│ fusepass ") == 2
    assert "\x1b" not in done.stdout  # it is no terminal

    before = {name: path.stat().st_mtime_ns for name, path in files.items() if name.endswith("json")}
    again = bench(*arguments)
    assert again.exit_code == 0, again.output
    assert again.output.count("skipped, finished on") == 2
    assert again.output.count("│ fusepass ") == 2
    assert {name: files[name].stat().st_mtime_ns for name in before} == before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Replaces the measuring: `fake(answers)` gives each row the next answer, and returns the rows measured so far."""

    def install(*answers: Any) -> list[Row]:
        seen: list[Row] = []
        given = iter(answers)

        def measure_apart(row: Row, tell: Any, verbose: bool) -> Any:
            seen.append(row)
            answer = next(given, None) or measured()
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(run, "measure_apart", measure_apart)
        return seen

    return install


def three(out: Path, *more: str) -> Result:
    return bench("--model", "Qwen3-8B", "--batch", "1", "2", "3", "--mode", *MODES, *SMALL, *SAME, "--out", out, *more)


def test_a_row_that_fails_is_recorded_shown_and_tried_again_while_the_rest_goes_on(tmp_path: Path, fake: Any) -> None:
    seen = fake(None, {"error": "OutOfMemoryError: tried to allocate"})
    first = three(tmp_path)
    assert first.exit_code == 1
    assert [row.batch for row in seen] == [1, 2, 3]
    assert json.loads((tmp_path / seen[1].file).read_text())["error"] == "OutOfMemoryError: tried to allocate"
    assert "OutOfMemoryError: tried to allocate" in first.output

    seen = fake()
    second = three(tmp_path)
    assert second.exit_code == 0
    assert [row.batch for row in seen] == [2]
    assert "failed before: OutOfMemoryError" in second.output


def test_after_ctrl_c_the_same_command_goes_on_with_the_row_it_broke_off(tmp_path: Path, fake: Any) -> None:
    fake(None, KeyboardInterrupt())
    first = three(tmp_path)
    assert first.exit_code == 130
    assert "stopped; the same command goes on" in first.output
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert (tmp_path / "decode.png").exists()

    seen = fake()
    assert three(tmp_path).exit_code == 0
    assert [row.batch for row in seen] == [2, 3]


def test_another_commit_and_force_measure_again(tmp_path: Path, fake: Any) -> None:
    fake()
    assert three(tmp_path).exit_code == 0
    seen = fake()
    assert "commit was aaa, is bbb" in three(tmp_path, "--commit", "bbb").output
    assert len(seen) == 3
    seen = fake()
    three(tmp_path, "--commit", "bbb")
    assert seen == []
    assert three(tmp_path, "--commit", "bbb", "--force").output.count(": --force") == 3
    assert len(seen) == 3


def test_a_failure_does_not_replace_figures_but_is_said_and_tried_again(tmp_path: Path, fake: Any) -> None:
    fake()
    three(tmp_path)
    kept = {path: path.read_text() for path in tmp_path.glob("*.json")}
    everything = {mode.replace("-", "_"): {"error": "an illegal memory access"} for mode in MODES}
    for trouble in ({"error": "an illegal memory access"}, measured(**everything)):
        for more in (["--commit", "bbb"], ["--force"]):
            seen = fake(*[trouble] * 3)
            result = three(tmp_path, *more)
            assert (result.exit_code, len(seen)) == (1, 3)
            assert result.output.count("keeps what was measured on ") == 3
            assert "an illegal memory access" in result.output
            assert {path: path.read_text() for path in kept} == kept


def test_a_mode_is_measured_together_with_those_the_record_has(tmp_path: Path, fake: Any) -> None:
    def one(mode: str, *more: str) -> Result:
        arguments = ("--model", "Qwen3-8B", "--mode", mode, *SMALL, *SAME, "--out", tmp_path)
        return bench(*arguments, *more)

    seen = fake()
    three(tmp_path)
    seen.clear()
    together = "with eager, inductor, inductor-max-autotune, fusepass, fusepass-reduce-overhead, which the record has"
    assert f"measure (without fusepass-max-autotune; {together})" in one("fusepass-max-autotune", "--dry-run").output
    assert "1/1 Qwen3-8B decode, batch 1, context 8: without" in one("fusepass-max-autotune").output
    assert [row.modes for row in seen] == [(*MODES, "fusepass-max-autotune")]
    one("eager")
    assert len(seen) == 1
    assert "--force; with inductor, " in one("eager", "--force").output
    assert [set(row.modes) for row in seen[1:]] == [set(MODES)]
    assert "which the record has" not in one("eager", "--commit", "bbb").output  # they are of other code
    assert seen[-1].modes == ("eager",)


def test_wrong_logits_and_a_failed_mode_are_named_and_make_the_exit_code_1(tmp_path: Path, fake: Any) -> None:
    trouble = {"inductor": {"error": "no memory"}, "fusepass": {"wrong": True, "logits_error": 0.7}}
    fake(measured(**trouble))
    result = three(tmp_path)
    assert result.exit_code == 1
    assert "inductor: no memory" in result.output
    assert "fusepass: WRONG: its logits are 0.7 off eager's, the limit is 0.05" in result.output
    assert three(tmp_path).exit_code == 1  # still true of what is skipped


def test_a_dry_run_says_what_would_be_measured_and_why_and_does_nothing(tmp_path: Path, fake: Any) -> None:
    seen = fake()
    three(tmp_path)
    next(tmp_path.glob("*-b2-*.json")).unlink()
    seen.clear()
    result = three(tmp_path, "--dry-run")
    assert result.exit_code == 0
    assert seen == []
    plan = [line for line in result.output.splitlines() if line.startswith("Qwen3-8B")]
    assert [line.split(": ")[1].split(",")[0] for line in plan] == [
        "skip (finished)",
        "measure (not measured yet)",
        "skip (finished)",
    ]
    assert not list(tmp_path.glob("*-b2-*.json"))


FOREIGN = ["[]", '"x"', "3", "[1]", '{"modes": {"eager": {"ms": 1}}}', '{"model": "Qw']


@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_that_is_no_record_counts_as_none_with_a_warning(
    tmp_path: Path, fake: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = fake()
    three(tmp_path)
    (tmp_path / "decode.png").unlink()
    own, foreign = tmp_path / seen[0].file, tmp_path / "decode-zzz.json"
    own.write_text(text)
    foreign.write_text(text)
    seen.clear()
    assert "measure (not measured yet)" in three(tmp_path, "--dry-run").output
    caplog.clear()
    assert three(tmp_path).exit_code == 0
    assert caplog.messages == [f"{path} is ignored: it is no record of fusepass bench" for path in (own, foreign)]
    assert [row.batch for row in seen] == [1]
    assert json.loads(own.read_text())["batch"] == 1
    assert foreign.read_text() == text
    assert (tmp_path / "decode.png").exists()


def test_a_picture_that_cannot_be_drawn_is_said_and_does_not_change_the_exit_code(tmp_path: Path, fake: Any) -> None:
    fake()
    (tmp_path / "decode.png").mkdir()
    result = three(tmp_path)
    assert result.exit_code == 0
    assert "decode.png is not drawn: IsADirectoryError: " in result.output


def test_a_dry_run_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "1/" not in bench("--dry-run").output
    assert bench("--dry-run").exit_code == 0


def test_without_a_gpu_one_line_says_so_and_the_exit_code_is_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = bench()
    assert (result.exit_code, result.stderr) == (2, "fusepass: needs a CUDA GPU\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "Qwen3-7B"], "fusepass: unknown model 'Qwen3-7B'; known names: Qwen3-0.6B, Qwen3-1.7B, "),
        (["--model", "no/such-model"], "fusepass: cannot load model 'no/such-model' ("),
        (["--context", "1000"], "fusepass: a context of 1000 and 50 steps need a cache of 1050, --cache is 1024"),
        (["--no-decode"], "fusepass: --no-decode without --prefill: nothing to measure"),
        (
            ["--model", "examples/../examples/tiny-qwen3", "examples/tiny-qwen3"],
            "fusepass: examples/../examples/tiny-qwen3 and examples/tiny-qwen3 would share the record "
            "decode-tiny-qwen3-b1-c512-bfloat16.json",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = bench("--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_folder_given_as_a_dot_is_called_by_its_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    output = bench("--dry-run", "--device", "cpu", "--model", ".").output
    assert "small decode, batch 1, context 512: measure (not measured yet), decode-small-b1-c512-" in output


@pytest.mark.parametrize("text", ["[1]", "3", '"x"', '{"auto_map": 3}', '{"model_type": "qwen3", "layer_types": 3}'])
def test_a_configuration_that_is_none_is_one_line_and_exit_code_2(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for model in (tmp_path, tmp_path / "config.json"):
        result = bench("--dry-run", "--device", "cpu", "--model", model)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"fusepass: cannot load model '{model}' (")
        assert result.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_2_and_nothing_is_measured(
    tmp_path: Path, fake: Any
) -> None:
    seen = fake()
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "sub"):
        for more in ((), ("--dry-run",)):
            result = three(out, *more)
            assert (result.exit_code, seen) == (2, [])
            assert result.stderr == f"fusepass: cannot write to {out}: {file} is no folder\n"
            assert result.stdout == ""
    assert file.read_text() == "kept"


def test_a_folder_without_permission_is_one_line_and_exit_code_2_and_nothing_is_made(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, out = fake(), tmp_path / "new" / "results"
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    for more in ((), ("--dry-run",)):
        result = three(out, *more)
        assert (result.exit_code, seen) == (2, [])
        assert result.stderr == f"fusepass: cannot write to {out}: no permission in {tmp_path}\n"
    monkeypatch.undo()
    assert three(out, "--dry-run").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_options_take_several_values_and_may_be_repeated(tmp_path: Path) -> None:
    lists = ["--model", "Qwen3-8B", "Qwen3-14B", "--batch=1", "--batch", "8", "16", "--prefill", "128", "2048"]
    output = bench("--dry-run", "--device", "cpu", *lists, "--out", tmp_path).output
    assert "18 rows" in output
    assert "Qwen3-14B prefill, batch 16, 2048 tokens" in output


def test_the_help_documents_the_exit_codes() -> None:
    assert "Exit codes:" in bench("--help").output


@pytest.mark.parametrize(("package", "extra"), [("typer", "cli"), ("matplotlib", "bench"), ("transformers", "bench")])
def test_a_missing_package_is_one_line_that_says_what_to_install(package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv[1:] = ['bench']; "
    command = [sys.executable, "-c", code + "from fusepass.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"fusepass: needs {package}: pip install fusepass[{extra}]\n")


def test_the_console_script_is_the_module(tmp_path: Path) -> None:
    code = "from importlib.metadata import entry_points as e; print(*e(group='console_scripts', name='fusepass'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "value='fusepass.cli:main'" in done.stdout


class Bomb(Row):
    """A row that ends the process that receives it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


def test_a_crash_takes_its_row_and_no_more() -> None:
    (row,) = rows()
    assert run.measure_apart(Bomb(**vars(row)), print) == {"error": "its process ended with exit code 7: "}


def test_a_row_that_fails_to_load_says_why(tmp_path: Path) -> None:
    (row,) = rows(str(tmp_path))
    assert "Error" in run.measure_apart(row, lambda text, finding: None)["error"]


def test_the_process_of_a_row_ends_with_the_run() -> None:
    def stop(text: str, finding: bool) -> None:
        raise KeyboardInterrupt

    (row,) = rows()
    with pytest.raises(KeyboardInterrupt):
        run.measure_apart(row, stop)
    assert multiprocessing.active_children() == []


def test_sigterm_ends_the_command_and_the_process_of_its_row(tmp_path: Path) -> None:
    arguments = ["--model", "Qwen3-0.6B", "--mode", "eager", *SMALL, "--out", str(tmp_path)]
    command = [sys.executable, "-u", "-m", "fusepass", "bench", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in running.stdout or ():
        if line.startswith("1/1"):
            break
    while not any("spawn_main" in " ".join(one.cmdline()) for one in psutil.Process(running.pid).children()):
        time.sleep(0.1)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 143
    _, alive = psutil.wait_procs(children, timeout=10)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
