"""These tests are about what is fused and what is left alone, not about kernels: the ops run their references."""

import pytest

from fusepass import backend


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    monkeypatch.setattr(backend, "_logged", set())
