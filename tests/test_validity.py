"""What a region needs besides its form, and the word a user is told when it is not so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fusepass.options import Options
from fusepass.report import CODES, GraphReport
from fusepass.rewrite import fuse
from tests.models import capture, fused
from tests.patterns.toys import (
    BATCH,
    HIDDEN,
    MLP,
    SEQ,
    Attention,
    Norm,
    Residual,
    Spelling,
    all_fused,
    hidden,
    refusal,
    run,
    tables,
)

ONE = {"linear_residual": 1}


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")


@torch.library.custom_op("fusepass_tests::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1)


@bump.register_fake
def _(x: Tensor) -> None:
    return None


def in_place(operation: str, by: float) -> Spelling:
    def write(x: Tensor) -> None:
        space = {"x": x, "by": by}
        exec(f"x {operation} by", space)

    return write
