"""Options and environment: what is accepted, and what a mistake is answered with."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from fusepass.options import Options, cpu_mode, disabled


def test_an_unknown_option_names_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown option 'precison'.*did you mean 'precision'.*known options: fusions"):
        Options.parse({"precison": "high"}, None)


def test_an_unknown_fusion_names_the_registered_ones() -> None:
    with pytest.raises(ValueError, match="unknown fusion 'norm_qkv'.*did you mean.*registered fusions: norm_gated_mlp"):
        Options.parse({"fusions": {"norm_qkv": False}}, None)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"precision": "low"}, ValueError),
        ({"remainder": "onnx"}, ValueError),
        ({"strict": 1}, TypeError),
        ({"verify": "yes"}, ValueError),
        ({"verify": 1}, ValueError),
        ({"fusions": ["rms_norm"]}, TypeError),
        ({"fusions": {"rms_norm": "off"}}, TypeError),
        ({"inductor": None}, TypeError),
        ({"inductor": {1: 2}}, TypeError),
        ({"mode": "fast", "remainder": "eager"}, ValueError),
        ({"mode": ["max-autotune"]}, ValueError),
        ("precision", TypeError),
    ],
)
def test_a_wrong_value_names_the_option_and_what_was_expected(options: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        Options.parse(options, None)


def test_mode_may_come_as_an_option_but_not_twice() -> None:
    assert Options.parse({"mode": "max-autotune"}, None).mode == "max-autotune"
    assert Options.parse(None, "reduce-overhead").mode == "reduce-overhead"
    with pytest.raises(ValueError, match="mode is given twice"):
        Options.parse({"mode": "max-autotune"}, "reduce-overhead")


def test_every_mode_that_torch_knows_is_one() -> None:
    for mode in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        assert Options.parse({"mode": mode}, None).mode == mode


@pytest.mark.parametrize(("setting", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_disable_is_0_or_1(setting: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEPASS_DISABLE", raising=False)
    if setting is not None:
        monkeypatch.setenv("FUSEPASS_DISABLE", setting)
    assert disabled() is expected


@pytest.mark.parametrize(
    ("name", "setting", "read", "expected"),
    [
        ("FUSEPASS_DISABLE", "false", disabled, "0 or 1"),
        ("FUSEPASS_CPU", "fast", cpu_mode, "one of off, reference, interpret"),
    ],
)
def test_an_environment_variable_set_to_anything_else_is_an_error(
    name: str, setting: str, read: Callable[[], object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, setting)
    with pytest.raises(ValueError, match=f"{name} is '{setting}'; expected {expected}"):
        read()


def test_an_empty_cpu_mode_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "")
    assert cpu_mode() == "off"


def test_interpret_without_tritons_interpreter_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "interpret")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1 in the environment before Python starts"):
        cpu_mode()


def test_tritons_interpreter_cannot_be_asked_for_once_triton_is_imported() -> None:
    program = (
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; import fusepass.options; fusepass.options.cpu_mode()"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**env, "FUSEPASS_CPU": "interpret"}, capture_output=True, text=True)
    assert "RuntimeError: FUSEPASS_CPU=interpret needs TRITON_INTERPRET=1 in the environment before" in done.stderr
