"""docs/nothing-fused.md says what there is."""

import logging
import re
from pathlib import Path

import pytest
import torch

from fusepass.report import CODES, GraphReport, Site
from tests.models import small_qwen3

PAGE = Path(__file__).parent.parent / "docs" / "nothing-fused.md"
TEXT = PAGE.read_text()


def test_every_reason_code_is_on_the_page_with_what_to_do() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \| (.+) \|$", TEXT, re.M)
    assert [code for code, _, _ in rows] == sorted(CODES)


def test_the_log_lines_are_those_that_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    refused = [Site("f", "", "", "grad", "")] * 20
    assert f"\n    {GraphReport('0/0', refused).summary()}\n" in TEXT
    caplog.set_level(logging.INFO, "fusepass")
    model = small_qwen3(1).requires_grad_(True)
    torch.compile(model, backend="fusepass", options={"remainder": "eager"})(torch.zeros(1, 5, dtype=torch.int64))
    records = [record for record in caplog.records if record.name.startswith("fusepass")]
    (warning,) = (record.getMessage() for record in records if record.levelname == "WARNING")
    (example,) = re.findall(r"^    (graph 0/0 has \d+ RMSNorms.*)$", TEXT, re.M)
    beginning, _, reason = example.partition(": ")
    assert re.sub(r"\d+", "#", warning).startswith(re.sub(r"\d+", "#", f"{beginning}: "))
    assert reason.split("'")[2].split(" (")[0] in warning
    assert warning.endswith(f"({example.rpartition('(')[2]}")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target
