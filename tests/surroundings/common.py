"""What the tests of surroundings share."""

from typing import Any

import torch
from torch import Tensor

import fusepass

EAGER = {"remainder": "eager"}


def ids(batch: int = 1, length: int = 5) -> Tensor:
    """Tokens of `small_qwen3`."""
    return torch.randint(152, (batch, length))


def compiled(model: Any, **options: Any) -> Any:
    """`model` compiled by the backend; what is not fused runs eagerly unless the options say otherwise."""
    return torch.compile(model, backend="fusepass", options={**EAGER, **options})


def fused_sites() -> dict[str, int]:
    """How often each fusion applied in all that was compiled."""
    counts: dict[str, int] = {}
    for report in fusepass.reports():
        for name, count in report.counts().items():
            counts[name] = counts.get(name, 0) + count
    return counts


def reasons() -> set[str]:
    """The codes of what was refused in all that was compiled."""
    return {str(site.code) for report in fusepass.reports() for site in report.sites if not site.fused}


def assert_like_eager(got: Tensor, want: Tensor) -> None:
    """Equal but for the order of f32 sums."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
