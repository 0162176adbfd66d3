"""What kernels would be launched, and with which configs, on the meta device."""

from typing import Any, NamedTuple

import pytest

from fusepass.kernels import attention, gemv, rms_norm, skinny


class Launch(NamedTuple):
    kernel: str
    constants: dict[str, Any]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would be launched; nothing is."""
    seen: list[Launch] = []

    def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        seen.append(Launch(kernel.fn.__name__, constants))

    for module in (attention, gemv, rms_norm, skinny):
        monkeypatch.setattr(module, "run", run)
        # As on a GPU with early reads, which the interpreter has not.
        monkeypatch.setattr(module, "pdl_options", lambda early: {"EARLY": early})
    return seen
