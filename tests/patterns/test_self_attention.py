"""Where norm_qkv_rope, the write to a static cache and attention are joined, and which of their neighbours are not."""

import copy
import logging
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fusepass.options import Options
from fusepass.report import GraphReport
from tests.models import fused, small_qwen3, static_cache
from tests.patterns.toys import BATCH, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, Attention, all_fused, hidden, run, tables

LENGTH = 11
JOINED = {"norm_qkv_rope": "self_attention", "attention": "self_attention"}
APART = {"norm_qkv_rope": "norm_qkv_rope", "attention": "attention"}

Spelling = Callable[["State"], Any]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, size).reshape(batch, heads * groups, length, size)


class State:
    """What a step of an attention layer is given, and may change."""

    def __init__(self, keys: Tensor, values: Tensor, project: nn.Module, *inputs: Any) -> None:
        self.keys, self.values, self.project = keys, values, project
        self.x, self.cos, self.sin, self.position, self.mask = inputs
        self.q, self.k, self.v = project(self.x, self.cos, self.sin)


class Net(nn.Module):
    """An attention layer with a static cache, in which a test spells a step another way, or does something between; or
    several layers, which take the caches by turns."""

    STEPS: ClassVar[dict[str, Spelling]] = {
        "first": lambda s: None,
        "keys": lambda s: s.keys.index_copy_(2, s.position, s.k),
        "between": lambda s: None,
        "values": lambda s: s.values.index_copy_(2, s.position, s.v),
        "then": lambda s: None,
        "attend": lambda s: attend(s.q, s.keys, s.values, s.mask),
        "last": lambda s: None,
    }

    def __init__(
        self,
        *,
        layers: int = 1,
        caches: int = 1,
        part: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda keys, values: (keys, values),
        projection: dict[str, Any] | None = None,
        **steps: Spelling,
    ) -> None:
        super().__init__()
        self.project, self.layers, self.part = Attention(**projection or {}), layers, part
        self.steps = {**self.STEPS, **steps}
        self.caches = nn.ParameterList(torch.randn(BATCH, KV_HEADS, LENGTH, HEAD_DIM) for _ in range(2 * caches))
        self.requires_grad_(False)

    def forward(self, x: Tensor, *others: Any) -> Any:
        results = []
        for i in range(self.layers):
            cache = 2 * i % len(self.caches)
            state = State(*self.part(self.caches[cache], self.caches[cache + 1]), self.project, x, *others)
            done = {name: step(state) for name, step in self.steps.items()}
            results += [done[name] for name in done if name not in ("keys", "values")]
            x = done["attend"].transpose(1, 2).flatten(2)[..., :HIDDEN]
        return x, results


def inputs(tokens: int = 1, place: int = 4) -> tuple[Tensor, ...]:
    """x, cos, sin, the position of the tokens, and a mask that hides what comes after each."""
    position = torch.arange(place, place + tokens)
    mask = (torch.arange(LENGTH) <= position[:, None]).expand(BATCH, 1, -1, -1)
    return hidden()[:, :tokens], *tables(1, 1, tokens, HEAD_DIM), position, mask.clone()


def ops(report: GraphReport) -> dict[str, str | None]:
    """Which op runs the sites of each fusion: one op all of them. None was refused."""
    assert all(site.fused for site in report.sites)
    assert len({(site.fusion, site.op) for site in report.sites}) == len(report.counts())
    return {site.fusion: site.op for site in report.sites}


# --- joined ---


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_two_sites_and_the_writes_between_them_become_one_op(tokens: int, dynamic: bool) -> None:
    report, graph = run(Net(), *inputs(tokens), dynamic=dynamic)
    assert all_fused(report) == {"norm_qkv_rope": 1, "attention": 1}
    assert ops(report) == JOINED
    calls = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    assert calls.count(torch.ops.fusepass.self_attention.default) == 1
    assert not {torch.ops.fusepass.norm_qkv_rope.default, torch.ops.fusepass.attention.default} & {*calls}
    assert "index_copy_" not in calls


@pytest.mark.parametrize(
    "projection",
    [
        {"norm": False},
        {"head_norm": None},
        {"head_norm": "after"},
        {"biases": "qkv"},
        {"biases": "k"},
        {"order": "vkq"},
    ],
    ids=str,
)
def test_projections(projection: dict[str, Any]) -> None:
    assert ops(run(Net(projection=projection), *inputs())[0]) == JOINED


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.arange(LENGTH).expand(1, 1, 1, -1) < 6,
        torch.randn(BATCH, HEADS, 1, LENGTH),
        torch.zeros(LENGTH).masked_fill(torch.arange(LENGTH) < 3, -torch.inf).expand(BATCH, 1, 1, -1),
    ],
    ids=["none", "bool", "per head", "additive"],
)
def test_masks(mask: Tensor | None) -> None:
    assert ops(run(Net(), *inputs()[:4], mask)[0]) == JOINED


SPELLINGS: dict[str, dict[str, Spelling]] = {
    "values first": {"keys": Net.STEPS["values"], "values": Net.STEPS["keys"]},
    "keywords": {"keys": lambda s: s.keys.index_copy_(dim=-2, index=s.position, source=s.k)},
    "returned cache": {
        "keys": lambda s: None,
        "attend": lambda s: attend(s.q, s.keys.index_copy_(2, s.position, s.k), s.values, s.mask),
    },
    "repeated heads": {"attend": lambda s: attend(s.q, repeat_kv(s.keys, 3), repeat_kv(s.values, 3), s.mask)},
    "late mask": {"attend": lambda s: attend(s.q, s.keys, s.values, s.mask & (s.mask.sum() > 0))},
    "read and written afterwards": {
        "last": lambda s: (s.keys.sum(), s.keys.mul_(2), s.position.add_(1), s.mask.zero_())
    },
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dynamic: bool) -> None:
    """With dynamic shapes `repeat_kv` reads the sizes of a cache after it is written."""
    assert ops(run(Net(**SPELLINGS[name]), *inputs(), dynamic=dynamic)[0]) == JOINED


def test_layers_that_share_a_cache() -> None:
    """Each writes it before it reads it."""
    report, _ = run(Net(layers=2), *inputs())
    assert report.counts() == {"norm_qkv_rope": 2, "attention": 2}
    assert ops(report) == JOINED


# --- left apart ---

USES, WRITES = "uses the cache while it is written", "writes in place what the region reads"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "read before": ({"first": lambda s: s.keys.sum()}, USES),
    "read between": ({"between": lambda s: s.values.sum()}, USES),
    "read after": ({"then": lambda s: s.keys.view(-1)[3:].sum()}, USES),
    "mask of the keys": (
        {"attend": lambda s: attend(s.q, s.keys, s.values, s.mask & (s.keys[:, :1, :, 0, None].mT < 9))},
        USES,
    ),
    "written before": ({"first": lambda s: s.keys.mul_(2).sum()}, WRITES),
    "written twice": ({"then": lambda s: s.values.view(-1)[3:].mul_(2).sum()}, WRITES),
    "position written": ({"first": lambda s: s.position.add_(1).sum()}, WRITES),
    "mask written": ({"between": lambda s: s.mask[..., :2].zero_().sum()}, WRITES),
    "x written": (
        {
            "first": lambda s: s.x.add_(1).sum(),
            "attend": lambda s: attend(s.q, s.keys, s.values, s.mask & (s.x.sum() < 9)),
        },
        WRITES,
    ),
    "one cache": ({"part": lambda keys, _: (keys, keys)}, "share memory"),
    "parts of one cache": (
        {
            "part": lambda keys, _: (keys[:, :, :7], keys[:, :, 3:10]),
            "attend": lambda s: attend(s.q, s.keys, s.values, s.mask[..., :7]),
        },
        "share memory",
    ),
    "key used": ({"last": lambda s: s.k + 1}, "another user"),
    "value used": ({"last": lambda s: s.v + 1}, "another user"),
    "value written again": ({"then": lambda s: s.values.index_copy_(2, s.position + 1, s.v).sum()}, "another user"),
    "query used": ({"last": lambda s: s.q + 1}, "another user"),
    "result of the write used": (
        {"keys": lambda s: setattr(s, "k", s.keys.index_copy_(2, s.position, s.k)), "last": lambda s: s.k + 1},
        "another user",
    ),
    "position without a dimension": ({"first": lambda s: setattr(s, "position", s.position[0])}, "'position' is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    steps, words = REFUSED[name]
    with caplog.at_level(logging.DEBUG, "fusepass"):
        report, _ = run(Net(**steps), *inputs())
    assert ops(report) == APART
    assert re.search(f"self_attention at .* not joined: .*{words}", caplog.text)


@pytest.mark.parametrize("which", ["x", "cos", "mask"])
def test_what_is_read_may_not_lie_in_the_cache(which: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the token is written, so that it matters which comes first."""
    net, given = Net(), dict(zip(("x", "cos", "sin", "position", "mask"), inputs()))
    if which == "mask":
        given["mask"] = given["mask"].float()
    shape = given[which].shape
    given[which] = net.caches[0].data[0, 0, 4].as_strided(shape, [0] * (len(shape) - 1) + [1])
    with caplog.at_level(logging.DEBUG, "fusepass"), torch.no_grad():
        _, (report,), _ = fused(net, *given.values())
    assert ops(report) == APART
    assert re.search("not joined: .*shares memory with the cache", caplog.text)


NO_CANDIDATE: dict[str, dict[str, Spelling]] = {
    "another position": {"values": lambda s: s.values.index_copy_(2, s.position + 1, s.v)},
    "added": {"keys": lambda s: s.keys.index_add_(2, s.position, s.k)},
    "set by index": {"keys": lambda s: s.keys.__setitem__((slice(None), slice(None), s.position), s.k)},
    "another value": {"values": lambda s: s.values.index_copy_(2, s.position, s.v * 2)},
    "copied": {"keys": lambda s: setattr(s, "keys", s.keys.index_copy(2, s.position, s.k))},
    "dynamic cache": {
        "keys": lambda s: setattr(s, "keys", torch.cat((s.keys, s.k), 2)),
        "values": lambda s: setattr(s, "values", torch.cat((s.values, s.v), 2)),
        "attend": lambda s: attend(s.q, s.keys, s.values, None),
    },
    "written afterwards": {
        "values": lambda s: None,
        "last": lambda s: (s.values.index_copy_(2, s.position, s.v), 0)[1],
    },
    "not written": {"values": lambda s: None},
    "swapped": {
        "keys": lambda s: s.keys.index_copy_(2, s.position, s.v),
        "values": lambda s: s.values.index_copy_(2, s.position, s.k),
    },
    "part of the cache": {"attend": lambda s: attend(s.q, s.keys[:, :, 1:], s.values[:, :, 1:], s.mask[..., 1:])},
    "keys attended without their cache": {
        "first": lambda s: setattr(s, "mask", None),
        "attend": lambda s: attend(s.q, s.k, s.v, None),
    },
    "query, key and value of one tensor": {
        "first": lambda s: vars(s).update(
            zip("qkv", torch.cat((s.q, s.k, s.v), 1).split([HEADS, KV_HEADS, KV_HEADS], 1))
        )
    },
    "key as query": {"attend": lambda s: attend(s.k, s.keys, s.values, s.mask)},
    "query of another projection": {
        "attend": lambda s: attend(s.project(s.x + 1, s.cos, s.sin)[0], s.keys, s.values, s.mask)
    },
}


@pytest.mark.parametrize("name", NO_CANDIDATE)
def test_no_candidate(name: str) -> None:
    report, _ = run(Net(**NO_CANDIDATE[name]), *inputs())
    assert {site.op for site in report.sites} == {*APART}


def test_another_dimension() -> None:
    """As many tokens as K/V heads, and no more room: only the dimension tells."""
    net = Net(
        part=lambda keys, values: (keys[:, :, :KV_HEADS], values[:, :, :KV_HEADS]),
        keys=lambda s: s.keys.index_copy_(1, s.position, s.k),
        values=lambda s: s.values.index_copy_(1, s.position, s.v),
    )
    x, cos, sin, _, _ = inputs(KV_HEADS)
    report, _ = run(net, x, cos, sin, torch.tensor([1, 0]), None)
    assert ops(report) == APART


@pytest.mark.parametrize("fusion", ["self_attention", "norm_qkv_rope", "attention"])
def test_switched_off(fusion: str) -> None:
    report, _ = run(Net(), *inputs(), options=Options.parse({"fusions": {fusion: False}}, None))
    assert {site.op for site in report.sites if site.fusion in APART} == {*APART} - {fusion}


# --- models ---


def decode(model: PreTrainedModel, cache: Any, tokens: Tensor, dynamic: bool) -> GraphReport:
    """Five tokens of a prompt run eagerly, `tokens` as one step fused. The logits and the cache are eager's."""
    prompt = torch.randint(model.config.vocab_size, (tokens.shape[0], 5))
    model(prompt, past_key_values=cache, use_cache=True, cache_position=torch.arange(5))
    theirs = copy.deepcopy(cache)
    # transformers 4 counts the positions outside of the cache.
    options = {"use_cache": True, "cache_position": torch.arange(5, 5 + tokens.shape[1])}
    want = model(tokens, past_key_values=theirs, **options).logits
    got, reports, _ = fused(model, tokens, past_key_values=cache, **options, dynamic=dynamic)
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-4)
    for ours, eager in zip(cache.layers, theirs.layers, strict=True):
        torch.testing.assert_close((ours.keys, ours.values), (eager.keys, eager.values), rtol=1e-4, atol=1e-4)
        assert ours.keys.any()
    return reports[-1]


def ops_of_layers(report: GraphReport) -> dict[str, str | None]:
    """Which op runs the sites of the attention layers, of which there are two."""
    sites = [site for site in report.sites if site.fusion in APART]
    assert sorted(site.path for site in sites) == [f"model.layers.{i}.self_attn" for i in (0, 0, 1, 1)]
    return ops(GraphReport(report.compile_id, sites))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_step_of_a_model_with_a_static_cache(family: str, tokens: int, dynamic: bool) -> None:
    model = small_qwen3(2, family=family, hidden_size=60)
    report = decode(model, static_cache(model, 2, 16), torch.randint(152, (2, tokens)), dynamic)
    assert ops_of_layers(report) == JOINED
    others = {"linear_residual": 2, "norm_gated_mlp": 2, "norm_linear": 1}
    assert all_fused(report) == {"norm_qkv_rope": 2, "attention": 2} | others
    assert all(site.op == site.fusion for site in report.sites if site.fusion in others)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_of_a_model_with_a_dynamic_cache(dynamic: bool) -> None:
    model = small_qwen3(2)
    assert ops_of_layers(decode(model, DynamicCache(config=model.config), torch.randint(152, (2, 1)), dynamic)) == APART


@torch.no_grad()
def test_a_prompt_of_a_model_is_joined_where_it_is_not_known_to_be_one() -> None:
    """The op leaves so many queries to SDPA."""
    model = small_qwen3(2)
    report = decode(model, static_cache(model, 2, 32), torch.randint(152, (2, 17)), dynamic=True)
    assert ops_of_layers(report) == JOINED
