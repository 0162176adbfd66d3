"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import os
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FUSEPASS_CPU", "interpret")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
