"""What the tests of the loop share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fusepass.decoding.handback import CACHES_ARE_MARKED

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CHECKPOINT = EXAMPLES / "tiny-qwen3"
# Before transformers marked the caches that users give, a loop that is to bring one must be told so.
STATIC: dict[str, Any] = {} if CACHES_ARE_MARKED else {"cache_implementation": "static"}
TEXTS = ["Once upon a time", "The fox", "A little girl sat by the river"]
RUN_AHEAD = [0, 3]


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.pieces.append("end")


def ends_at(tokens: Tensor, prompt: int, *steps: int) -> list[int]:
    """Tokens to use as ends, so that row i of greedy `tokens` ends in step `steps[i]` (from 0) at the latest."""
    return [int(tokens[row, prompt + step]) for row, step in enumerate(steps)]


def kv(cache: Any) -> list[Tensor]:
    return [item for layer in cache.layers for item in (layer.keys, layer.values)]


class Scripted:
    """A compiled forward whose logits are a function of the step, and are written over by the next: a CUDA graph's."""

    def __init__(self, model: Any, logits: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.logits, self.buffer, self.forward = 0, logits, logits(0)[:, None].clone(), model.__call__
        self.first: int | None = None
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
        monkeypatch.setattr(model, "get_compiled_call", lambda _: self)

    def __call__(self, **inputs: Any) -> Any:
        length = int(inputs["past_key_values"].get_seq_length())
        self.first = length if self.first is None else self.first
        outputs = self.forward(**inputs)  # the cache must count
        outputs.logits = self.buffer.copy_(self.logits(length - self.first)[:, None])
        self.calls += 1
        return outputs
