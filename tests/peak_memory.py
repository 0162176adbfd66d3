"""The most memory that decoding a full-size Qwen3-0.6B takes, in a process of its own: no pool is shared.

    python -m tests.peak_memory inductor|fusepass

prints the peaks from the loaded model on, compilation included: bytes allocated, bytes reserved.
"""

import sys

import torch

from fusepass.bench.models import qwen3_config, random_model, static_cache
from tests.decoding import compiled, decode

STEPS = 8


@torch.no_grad()
def peak_memory(backend: str) -> tuple[int, int]:
    """Bytes allocated and bytes reserved at their peaks."""
    model = random_model(qwen3_config("Qwen3-0.6B"), torch.bfloat16, "cuda")
    tokens = torch.randint(model.config.vocab_size, (1, STEPS), device="cuda")
    cache = static_cache(model, 1, 1024)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    decode(compiled(model, backend), cache, tokens)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


if __name__ == "__main__":
    print(*peak_memory(sys.argv[1]))
