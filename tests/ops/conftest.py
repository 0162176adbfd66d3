"""Every test here draws fresh numbers; pytest prints the seed of a test that fails."""

import os

import pytest
import torch

from fusepass.ops.library import forget_launches


@pytest.fixture(autouse=True)
def seed(fresh_dynamo: None) -> int:
    """SEED=<seed> in the environment repeats a failure."""
    value = int(os.environ.get("SEED") or torch.seed() % 2**32)
    torch.manual_seed(value)
    print(f"SEED={value}")
    forget_launches()  # tests change what launches depend on: configs, plans, strategies
    return value
