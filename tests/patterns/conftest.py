import pytest


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is matched and what it computes is asked here; the kernels are tested where the ops are."""
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
