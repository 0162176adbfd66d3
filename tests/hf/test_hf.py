"""The plugin that puts fusepass in Inductor's place, and what is made of the results, on a small tree of tests."""

from pathlib import Path

import pytest

from tests.hf.__main__ import MODELS, Outcome, _section, run

TESTS = """
import pytest
import torch
import unittest


def norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class TestToy(unittest.TestCase):
    def test_fused(self):
        with torch.no_grad():
            torch.compile(norm, mode="reduce-overhead")(torch.randn(3, 8), torch.ones(8))

    def test_fused_through_a_module(self):
        module = torch.nn.RMSNorm(8)
        module.forward = lambda x: norm(x, module.weight)
        module.compile()
        with torch.no_grad():
            module(torch.randn(3, 8))

    def test_nothing_fused(self):
        torch.compile(lambda x: x + 1)(torch.ones(3))

    def test_training(self):
        torch.compile(norm)(torch.randn(3, 8), torch.ones(8, requires_grad=True))

    def test_nothing_compiled(self):
        pass

    def test_another_backend(self):
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))

    def test_that_fails(self):
        torch.compile(norm, mode="reduce-overhead")(torch.randn(3, 8), torch.ones(8))
        self.assertEqual(1, 2, "one | two")

    @unittest.skip("slow")
    def test_skipped(self):
        pass
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    folder = tmp_path / "tests" / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "test_toy.py").write_text(TESTS)
    return tmp_path


def by_name(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.test.split("::")[-1].removeprefix("test_"): outcome for outcome in outcomes}


def test_a_test_passes_with_fusepass_if_something_was_fused_or_needed_gradients(checkout: Path) -> None:
    found = by_name(run(checkout, "fusepass", ["--remainder=eager"], ["tests/models/toy"]))
    assert {name: (outcome.state, outcome.fused) for name, outcome in found.items()} == {
        "fused": ("passed", True),
        "fused_through_a_module": ("passed", True),
        "nothing_fused": ("failed", False),
        "training": ("passed", False),
        "nothing_compiled": ("passed", False),
        "another_backend": ("passed", False),
        "that_fails": ("failed", True),
        "skipped": ("skipped", False),
    }
    reason = found["nothing_fused"].reason
    assert "torch.compile was called 1 times: graph " in reason
    assert reason.endswith(": fused nothing")
    assert found["that_fails"].reason == "AssertionError: 1 != 2 : one | two"

    failed = [outcome.test for outcome in found.values() if outcome.state == "failed"]
    others = by_name(run(checkout, "eager", ["--remainder=eager"], failed))
    assert {name: outcome.state for name, outcome in others.items()} == {
        "nothing_fused": "passed",
        "that_fails": "failed",
    }


def test_a_run_of_pytest_that_does_not_come_about_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-option"):
        run(tmp_path, "fusepass", ["--no-such-option"], [])


@pytest.mark.parametrize(
    ("tests", "why"), [("tests/models/none", "not found: tests/models/none"), ("-k no_such", "deselected")]
)
def test_a_run_that_finds_no_test_says_why(checkout: Path, tests: str, why: str) -> None:
    with pytest.raises(SystemExit, match=why):
        run(checkout, "fusepass", [], ["tests/models/toy", *tests.split()])


def test_what_fails_is_listed_with_what_the_other_backends_do() -> None:
    test = f"tests/models/{MODELS[0]}/test_modeling.py::Test::test_a"
    passed = [Outcome("b", "passed", "", True), Outcome("c", "passed", "", False)]
    skipped = [Outcome(name, "skipped", "it is slow", False) for name in "de"]
    outcomes = [Outcome(test, "failed", "1 | 2", True), *passed, *skipped]
    section = _section("Title", "a or b", outcomes, {"inductor": {test: "failed"}, "eager": {test: "passed"}})
    assert section.startswith(
        "## Title\n\n`-k 'a or b'`: 2 passed (1 of them ran fused graphs), 2 skipped, 1 failed.\n"
    )
    assert "Skipped: it is slow (2).\n" in section
    assert "| qwen3 `Test::test_a` | 1 \\| 2 | failed | passed |" in section
