"""A small checkpoint, and what a measurement of it could look like."""

from pathlib import Path
from typing import Any

import pytest

from fusepass.bench.rows import Row, plan
from tests.models import small_qwen3

MODES = ("eager", "inductor", "inductor-max-autotune", "fusepass", "fusepass-reduce-overhead")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Qwen3 of one layer."""
    folder = tmp_path_factory.mktemp("models") / "small"
    small_qwen3(1).save_pretrained(folder)
    return folder


def rows(model: str = "Qwen3-0.6B", **changes: Any) -> list[Row]:
    """Rows of a plan of small sizes on a CPU."""
    shape: dict[str, Any] = dict(context=8, cache=32, dtype="float32", modes=MODES, steps=4, rounds=3, device="cpu")
    settings = {"models": [model], "batches": [1], "prefill": [], "decode": True, **shape, **changes}
    return plan(**settings)


def measured(**changes: dict[str, Any]) -> dict[str, Any]:
    """What `measure` returns for a decode row of MODES; `changes` are put into the records of modes by name."""
    ms = dict(zip(MODES, (20.0, 6.0, 2.0, 8.0, 1.0)))
    modes = {
        name: {
            **{"first_calls_s": 9.0, "peak_gb": 1.5, "logits_error": 0.01, "wrong": False},
            **{"ms": one, "spread_ms": 0.01, "rounds_ms": [one] * 3, "tokens_per_s": 1000 / one},
            **{"percent_of_ideal": 50 / one, "tflops": 50 / one, "kernels": 300, "graph_replays": 1, "profile": []},
            **changes.get(name.replace("-", "_"), {}),
        }
        for name, one in ms.items()
    }
    shared = {"weight_bytes": 1200, "bandwidth_tb_s": 4.4, "ideal_ms": 0.5, "logits_limit": 0.05}
    return {**shared, "modes": modes}
