"""One model of test size: generated with eagerly and compiled with fusepass, and what differs."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import fusepass
from fusepass.report import Site
from tests.causal_lms.shrink import FIRST_TOKEN, VOCABULARY, shrunk

BATCH, PROMPT, NEW = 2, 9, 3
"""The first new token comes from the prompt, each other one from a decode step."""
TOLERANCE = 1e-4
"""Of the largest logit. The references round where eager does: 1e-6 is the most that was seen in 169 models."""

SAME, NOT_BUILT, NOT_RUN, NOT_COMPILED, OURS = "same", "not built", "not run", "not compiled", "FAULT"


@dataclass
class Verdict:
    """What became of one model."""

    model_type: str
    outcome: str
    """`SAME`; `NOT_BUILT`, `NOT_RUN`, `NOT_COMPILED`: by transformers, eagerly, by torch.compile(backend="eager");
    `OURS`: it works without fusepass, and fails or differs with it."""
    cls: str = ""
    reason: str = ""
    """Why it is not `SAME`, in a line."""
    fused: dict[str, int] = field(default_factory=dict)
    """Fusions, and at how many places of the model each is in some graph."""
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Fusions, at how many places each is refused and nowhere fused, and the first reason."""
    error: float | None = None
    """Largest difference of a logit from eager's, in parts of the largest logit."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(model_type: str) -> Verdict:
    """Build, generate eagerly, compile with fusepass, generate again, compare. Raises nothing."""
    os.environ["FUSEPASS_CPU"] = "reference"
    transformers.logging.set_verbosity_error()
    verdict = Verdict(model_type, NOT_BUILT)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(shrunk(model_type)).eval()
        verdict.cls = type(model).__name__
        _randomise_norms(model)
        verdict.outcome = NOT_RUN
        want = generate(model)
    except Exception as fault:
        return _because(verdict, fault)

    try:
        model.compile(backend="fusepass", options={"remainder": "eager"})
        got = generate(model)
    except Exception as fault:
        return _because(_blamed(verdict, model, want), fault)
    verdict.fused, verdict.refused = places(fusepass.Report(fusepass.reports()).sites)
    verdict.error, verdict.outcome = difference(got, want), SAME
    faults = [report.untouched for report in fusepass.reports() if "a fault in fusepass" in (report.untouched or "")]
    if faults:
        verdict.outcome, verdict.reason = OURS, str(faults[0])
    elif not verdict.error <= TOLERANCE:
        verdict = _because(_blamed(verdict, model, want), f"logits differ by {verdict.error:.1e}")
    return verdict


def _blamed(verdict: Verdict, model: PreTrainedModel, want: list[Tensor]) -> Verdict:
    """The outcome where fusepass's is not eager's: `OURS` unless Dynamo alone has none of eager's either."""
    torch.compiler.reset()
    model.compile(backend="eager")
    try:
        sound = difference(generate(model), want) <= TOLERANCE
    except Exception:
        sound = False
    verdict.outcome = OURS if sound else NOT_COMPILED
    return verdict


def _because(verdict: Verdict, fault: Exception | str) -> Verdict:
    lines = str(fault).strip().splitlines() or [""]
    verdict.reason = fault if isinstance(fault, str) else f"{type(fault).__name__}: {' '.join(lines)[:160].strip()}"
    return verdict


def _randomise_norms(model: PreTrainedModel) -> None:
    """Norm weights of one hide whether they are used."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)


@torch.no_grad()
def generate(model: PreTrainedModel) -> list[Tensor]:
    """The logits of a prompt and the decode steps after it, with the cache that the model brings."""
    torch.manual_seed(0)
    tokens = torch.randint(FIRST_TOKEN, VOCABULARY, (BATCH, PROMPT))
    model.generation_config = GenerationConfig(pad_token_id=0)  # nothing ends it, nothing is drawn
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return list(found.logits)


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference in parts of the largest value; NaN where one has a NaN and the other has not."""
    a, b = torch.stack(got).double(), torch.stack(want).double()
    if a.isnan().equal(b.isnan()):
        a, b = a.nan_to_num(), b.nan_to_num()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def places(sites: list[Site]) -> tuple[dict[str, int], dict[str, tuple[int, str]]]:
    """`Verdict.fused` and `.refused` of a model whose prompt and steps are graphs of their own."""
    fused = {(site.fusion, site.path) for site in sites if site.fused}
    refused: dict[tuple[str, str], str] = {}
    for site in sites:
        if not site.fused and (site.fusion, site.path) not in fused:
            refused.setdefault((site.fusion, site.path), str(site.reason))
    names = dict.fromkeys(site.fusion for site in sites)
    counts = {name: sum(fusion == name for fusion, _ in fused) for name in names}
    reasons = {name: [reason for (fusion, _), reason in refused.items() if fusion == name] for name in names}
    return (
        {name: count for name, count in counts.items() if count},
        {name: (len(found), found[0]) for name, found in reasons.items() if found},
    )
