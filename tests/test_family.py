"""Every model of the Qwen3 family: exactly what its table says is fused and refused, and the results are eager's."""

from collections import Counter

import pytest
import torch
from transformers import DynamicCache

import fusepass
from fusepass.report import Report
from tests.family import BATCH, FAMILY, PAGE, PROMPT, SIZES, Member, fused_sites, page, refused_sites


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")


@pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.model)
@torch.no_grad()
def test_a_model_of_the_family_is_fused_as_the_table_says_and_computes_what_eager_does(member: Member) -> None:
    model = member.build(torch.bfloat16)
    prompt, step = torch.randint(1, SIZES["vocab_size"], (2, BATCH, PROMPT))
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    want = [member.call(model, tokens, theirs) for tokens in (prompt, step[:, :1])]

    model.compile(backend="fusepass", options={"remainder": "eager"}, dynamic=False)
    for tokens, expected, attention in zip((prompt, step[:, :1]), want, (0, member.attention)):
        fusepass.reset()
        torch.testing.assert_close(member.call(model, tokens, ours), expected)
        sites = Report(fusepass.reports()).sites
        assert fused_sites(sites) == Counter(member.fused) + Counter(attention=attention)
        assert refused_sites(sites) == member.refused


def test_the_page_of_the_family_is_up_to_date() -> None:
    assert PAGE.read_text() == page()
