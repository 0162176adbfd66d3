"""The small checkpoint, its tokenizer, and the reasons that the loop logs."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.decode_loop.common import CHECKPOINT


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads take ten times as long where another process keeps a core busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenize() -> Callable[..., Any]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    return lambda *texts: tokenizer(list(texts), return_tensors="pt", padding=True)


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Why calls were handed back, so far."""
    caplog.set_level(logging.INFO, "fusepass.decoding")
    return lambda: [record.args[2] for record in caplog.records if "handed back" in record.msg]
