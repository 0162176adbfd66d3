"""A pytest plugin for the tests of others: what they compile with Inductor is compiled with fusepass instead.

python -m pytest -p compile_with --compile-with fusepass ...     # with the folder of this file on PYTHONPATH

`CompileConfig` and `nn.Module.compile` end in `torch.compile`, too. A test that passed although nothing it compiled was
fused fails, unless gradients were the reason. What each test fused is among the properties of its JUnit record.
"""

import functools
from collections.abc import Generator
from typing import Any

import pytest
import torch

import fusepass


class NothingFused(AssertionError):
    """The test passed, and says nothing about fusepass."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusepass")
    group.addoption("--compile-with", default="fusepass", help="the backend instead of inductor")
    group.addoption("--remainder", default="inductor", help="what runs the rest of a fused graph: inductor or eager")
    group.addoption("--compile-generate", action="store_true", help="generate() compiles the forward of its model")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Replacement(config), "compile-with")


class Replacement:
    """The replacement of `torch.compile`, and the check after each test."""

    def __init__(self, config: pytest.Config) -> None:
        self.backend, self.remainder = config.getoption("--compile-with"), config.getoption("--remainder")
        self.compiled = 0
        """Calls of torch.compile by the test that runs."""
        torch.compile = self.replaced(torch.compile)
        if config.getoption("--compile-generate"):
            from transformers import GenerationMixin

            GenerationMixin.generate = compiled_first(GenerationMixin.generate)  # type: ignore[method-assign]

    def replaced(self, original: Any) -> Any:
        @functools.wraps(original)
        def compile(model: Any = None, *, backend: Any = "inductor", mode: Any = None, **rest: Any) -> Any:
            if backend == "inductor":
                backend, self.compiled = self.backend, self.compiled + 1
                if backend == "fusepass" and self.remainder != "inductor":
                    rest["options"] = {**(rest.get("options") or {}), "mode": mode, "remainder": self.remainder}
                    mode = None
            return original(model, backend=backend, mode=mode, **rest)

        return compile

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        self.compiled = 0
        torch.compiler.reset()  # the recompile limit counts per code object: later tests would run eagerly
        fusepass.reset()
        result = yield
        if self.backend == "fusepass" and self.compiled:
            found = fusepass.Report(fusepass.reports())
            item.user_properties.append(("fused", dict(found.counts())))
            if not found.counts() and {site.code for site in found.sites} != {"grad"}:
                why = "; ".join(report.summary() for report in found.graphs) or "no graph was compiled"
                raise NothingFused(f"torch.compile was called {self.compiled} times: {why}")
        return result


def compiled_first(generate: Any) -> Any:
    @functools.wraps(generate)
    def compiled_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model._compiled_call_impl is None:
            model.compile()
        return generate(model, *args, **kwargs)

    return compiled_generate
