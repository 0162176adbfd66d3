"""One decode step past a full static cache, in a process of its own: an assertion on the device ends the process.

    python -m tests.overflow eager|fusepass

prints {"error": what was raised or null, "nan": whether all logits are (null after an error), "changed": how many
numbers in and around the cache (null if unreadable)}.
"""

import contextlib
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from tests.decoding import compiled, decode, decoder, draw_tokens, fill
from tests.models import static_cache

LENGTH, STEPS = 40, 3


def fenced_cache(model: PreTrainedModel) -> tuple[StaticCache, list[Tensor]]:
    """A cache whose tensors lie each in the middle third of memory of its own; and those memories."""
    cache, memories = static_cache(model, 1, LENGTH), []
    for layer in cache.layers:
        for name in ("keys", "values"):
            inside = getattr(layer, name)
            memories.append(torch.randn(3, inside.numel(), dtype=inside.dtype, device=inside.device))
            setattr(layer, name, memories[-1][1].view(inside.shape))
            torch._dynamo.mark_static_address(getattr(layer, name))
    return cache, memories


@torch.no_grad()
def step_past_the_end(backend: str) -> dict[str, Any]:
    """Fill the last slots step by step, then take one step more. There is no slot left that it may write."""
    model = decoder()
    run = model if backend == "eager" else compiled(model, backend)
    cache, memories = fenced_cache(model)
    fill([cache], LENGTH - STEPS)
    tokens = draw_tokens(1, STEPS + 1)
    decode(run, cache, tokens[:, :STEPS])
    before = [memory.clone() for memory in memories]
    outcome: dict[str, Any] = {"error": None, "nan": None, "changed": None}
    try:
        outcome["nan"] = decode(run, cache, tokens[:, STEPS:]).isnan().all().item()  # waits for the device
    except (RuntimeError, IndexError) as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):  # after an assertion on the device nothing can be read, nor written
        outcome["changed"] = sum(int((now != then).sum()) for now, then in zip(memories, before, strict=True))
    return outcome


if __name__ == "__main__":
    print(json.dumps(step_past_the_end(sys.argv[1])), flush=True)
    os._exit(0)  # a lost device makes the ordinary way out fail
