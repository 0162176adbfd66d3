"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FUSEPASS_CPU", "interpret")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def hasten_the_interpreter() -> None:
    """Of two things in Triton's interpreter, which take half of the time that these tests would need: it replaces the
    functions of `triton.language` while a kernel runs, and looks for all of them again at every call of a jitted
    function; and it checks every sum of int32 for an overflow, which tests this small never have."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch, patched = interpreter._patch_lang, set[str]()

    def patch_once(fn: Any) -> Any:
        modules = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules <= patched:
            return interpreter._LangPatchScope()
        launch, scope = not patched, patch(fn)
        patched.update(modules)
        if launch:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


if not GPU:
    hasten_the_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo's recompile limit counts per code object: many models of one class would silently fall back to eager."""
    import fusepass

    torch.manual_seed(torch.seed() % 2**32)
    torch._dynamo.reset()
    fusepass.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def kernels_are_available(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a kernel can not be compiled its op runs in plain torch, so that a test of it would judge nothing."""
    from fusepass.ops import library

    stood_in: dict[str, str] = {}
    monkeypatch.setattr(library, "STOOD_IN", stood_in)
    yield
    assert not stood_in
