"""Self attention of new tokens as one op: its output, and what then stands in the cache."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepass.kernels import attention as kernels
from fusepass.kernels.attention_plan import Plan
from fusepass.ops import OPS
from tests.ops.gate import FORM_CASES, Case, assert_as_exact_as_eager, rms_error
from tests.ops.sites import DEVICE, DTYPES, QWEN3, SITES, Site, Sizes, Tensors, draw_cache, sample, tokens
from tests.ops.test_attention import MASKS, Shape, no_mask
from tests.ops.test_contract import bits
from tests.ops.test_norm_qkv_rope import TABLES

OP, SITE = OPS["self_attention"], SITES["self_attention"]
QWEN3_8B = Sizes(4096, 64, 32, 8, 128)
CACHES = ("k_cache", "v_cache")

Mask = Callable[[Shape, torch.dtype], Tensor | None]


def given(length: int, mask: Mask, positions: Iterable[int] = ()) -> Site:
    """The span over a cache of this length, the tokens at each of `positions` in turn, or anywhere."""
    places = itertools.cycle(positions)

    def inputs(layer: nn.Module, batch: int, seq: int) -> Tensors:
        config = layer.self_attn.config
        k, v, _ = draw_cache(layer, batch, seq, length)
        first = next(places, None)
        position = torch.arange(seq, device=DEVICE) + (torch.randint(length - seq + 1, ()) if first is None else first)
        shape = batch, config.num_attention_heads, config.num_key_value_heads, seq, length, layer.self_attn.head_dim
        return *tokens(layer, batch, seq), k, v, position, mask(shape, k.dtype)

    return replace(SITE, inputs=inputs)


def surrounded(cache: Tensor) -> tuple[Tensor, Tensor]:
    """A view with the content of `cache` into memory that is NaN around it, and that memory."""
    batch, heads, length, size = cache.shape
    memory = cache.new_full((batch + 1, heads + 2, length + 9, size + 8), math.nan)
    memory[:-1, 1:-1, 4:-5, :-8] = cache
    return memory[:-1, 1:-1, 4:-5, :-8], memory


def step(
    layer: nn.Module, inputs: Tensors, *, high: bool = False, compute: Callable[..., Any] = OP.overload
) -> Tensors:
    """The op's result, and the keys and values that it left at the tokens' position, where there was NaN before. In and
    around the cache nothing else has changed."""
    arguments = SITE.named(layer, inputs, high)
    position = arguments["position"]
    left = []
    for name in CACHES:
        arguments[name], memory = surrounded(arguments[name])
        arguments[name].index_fill_(2, position, math.nan)
        left.append((arguments[name], memory, memory.clone()))
    out = compute(*arguments.values())
    written = [cache.index_select(2, position) for cache, _, _ in left]
    for cache, memory, before in left:
        cache.index_fill_(2, position, math.nan)
        assert torch.equal(bits(memory), bits(before))
    return out, *written


def assert_exact(case: Case, site: Site = SITE, **how: Any) -> None:
    assert_as_exact_as_eager(site, case, run=partial(step, high=case.high), **how)


F16, F32 = DTYPES
SHAPES = [
    (2, 200, Sizes(66, 8, 3, 1, 16)), (8, 37, Sizes(40, 8, 2, 2, 24)), (8, 150, Sizes(48, 8, 7, 1, 32)),
    (4, 70, Sizes(34, 8, 2, 1, 80)), (16, 1, Sizes(20, 8, 4, 2, 16)),
]  # fmt: skip
"""Batch, length of the cache, sizes: one split and several, groups and heads that are no power of two, one position."""
MASKED = [(SHAPES[i % len(SHAPES)], DTYPES[i % 2], mask) for i, mask in enumerate(MASKS)]
REAL = [
    (batch, length, sizes)
    for sizes in (QWEN3, QWEN3_8B)
    for batch, length in ((1, 1), (1, 511), (1, 4096), (2, 1000), (7, 300), (8, 1000), (32, 600), (1, 32768))
]
MASKED += [
    pytest.param(shape, torch.bfloat16, mask, marks=pytest.mark.gpu) for shape, mask in itertools.product(REAL, MASKS)
]


@pytest.mark.parametrize(("shape", "dtype", "mask"), MASKED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_as_exact_as_eager_under_any_mask(shape: tuple[int, int, Sizes], dtype: torch.dtype, mask: Mask) -> None:
    """The masks hide the tokens' own position, too."""
    batch, length, sizes = shape
    assert_exact(Case(batch, 1, None, dtype, sizes=sizes), given(length, mask))


@pytest.mark.parametrize("plan", [{}, {"ahead": True}, {"primed": True}], ids=str)
def test_a_pipeline_sees_the_new_token(plan: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one split, and of two, after blocks that are loaded ahead or without them."""
    for splits in (1, 2):
        chosen = Plan(16, splits, **{"ahead": False, "stages": 3, **plan})
        monkeypatch.setattr(kernels, "plan", lambda *_, chosen=chosen: chosen)
        case = Case(2, 1, None, F16, sizes=Sizes(40, 8, 3, 1, 24), draws=32)
        assert_exact(case, given(100, no_mask, [0, 40, 70, 99]))


@pytest.mark.parametrize("place", [0, 16, 37, 63])
@pytest.mark.parametrize("kind", ["causal", "beyond", "hidden", "numbers", "heads", "lowest"])
def test_a_primed_pipeline_attends_to_the_token_apart(kind: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 16, at the start, within and at the end of one, whose slot held NaN: the last position seen, one
    before the last, a hidden one, one with a number to add. In the last two one head sees nothing but the token, and
    one nothing at all, or only what is as low as can be."""
    arguments = sample("self_attention", 2, 1)
    heads, (kv_heads, size) = arguments["q"].shape[0] // arguments["head_dim"], arguments["k_cache"].shape[1::2]
    for name in CACHES:
        arguments[name] = torch.randn(2, kv_heads, 100, size, device=DEVICE).half()
        arguments[name][:, :, place] = math.nan
    t = torch.arange(100, device=DEVICE)
    visible = (t <= place + 20 * (kind in ("beyond", "hidden"))).repeat(2, heads, 1, 1)
    if kind == "hidden":
        visible[..., place] = False
    if kind in ("heads", "lowest"):
        visible[:, 0, :, :place] = False
        visible[:, 1] = False
    mask = visible if kind == "heads" else visible[:, :1]
    if kind in ("numbers", "lowest"):
        numbers = torch.randn(visible.shape, device=DEVICE).half()
        mask = numbers.masked_fill(~visible, -math.inf if kind == "numbers" else torch.finfo(torch.float16).min)
    arguments |= {"mask": mask, "position": torch.tensor([place], device=DEVICE)}
    for splits in (1, 2):
        monkeypatch.setattr(kernels, "plan", lambda *_, n=splits: Plan(16, n, False, 3, primed=True))
        got, want = (arguments | {name: arguments[name].clone() for name in CACHES} for _ in range(2))
        assert rms_error(OP.overload(*got.values()), OP.reference(*want.values()).double()) < 5e-3
        assert all(rms_error(got[name], want[name].double()) < 5e-3 for name in CACHES)


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 40])
def test_as_exact_as_eager_at_either_end_of_a_block(size: int) -> None:
    """Blocks are 32 and 64 positions long."""
    edges = [0, 15, 16, 31, 32, 63, 64, 66]
    case = Case(4, 1, None, F16, sizes=Sizes(32, 8, 2, 1, size))
    assert case.launches == len(edges)
    assert_exact(case, given(67, no_mask, edges))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "size"), [(1, 16), (3, 64), (5, 96), (15, 2), (16, 32), (17, 16)])
def test_any_group_and_head_size_is_as_exact_as_eager(group: int, size: int) -> None:
    assert_exact(Case(8, 1, None, F16, sizes=Sizes(24, 8, group, 1, size)))


@pytest.mark.parametrize(
    "case",
    [
        *FORM_CASES,  # of 2, 7 and 4 tokens: 6, 21 and 12 queries of a K/V head
        Case(5, 1, None, F16), Case(3, 1, "skinny", F32), Case(3, 1, "library", F16), Case(1, 5, None, F32),
        Case(66, 1, None, F16, sizes=Sizes(20, 8, 1, 1, 16)),
    ],
    ids=str,
)  # fmt: skip
def test_any_number_of_tokens_and_sequences_is_as_exact_as_eager(case: Case) -> None:
    assert_exact(case)


HIGH = [
    Case(2, 1, None, F16, high=True), Case(4, 1, "skinny", F16, high=True), Case(2, 2, "rows", F16, high=True),
    Case(1, 7, "skinny", F16, high=True),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", HIGH, ids=str)
def test_high_keeps_f32(case: Case) -> None:
    """As in `assert_keeps_f32`: the yardstick is the reference."""
    assert_exact(case, yardstick=partial(step, high=True, compute=OP.reference))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("high", [False, True], ids=["match", "high"])
def test_without_head_norms_as_exact_as_eager(family: str, high: bool) -> None:
    """Qwen2 has biases instead, Llama has neither."""
    assert_exact(Case(4, 1, None, F16, high, family=family))


@pytest.mark.parametrize("absent", ["q_norm", "k_norm"])
def test_one_head_norm_alone_is_as_exact_as_eager(absent: str) -> None:
    def remove(layer: nn.Module) -> None:
        norm = nn.Identity()
        norm.weight, norm.variance_epsilon = None, 0.0
        setattr(layer.self_attn, absent, norm)

    assert_exact(Case(4, 1, None, F16), change=remove)


@pytest.mark.parametrize("biased", [("q_proj", "k_proj", "v_proj"), ("k_proj",)], ids="+".join)
def test_with_biases_as_exact_as_eager(biased: tuple[str, ...]) -> None:
    def keep(layer: nn.Module) -> None:
        for name in {"q_proj", "k_proj", "v_proj"} - {*biased}:
            getattr(layer.self_attn, name).bias = None

    assert_exact(Case(4, 1, None, F16, config={"attention_bias": True}), change=keep)


def test_without_the_first_norm_as_exact_as_eager() -> None:
    def remove(layer: nn.Module) -> None:
        layer.input_layernorm = nn.Identity()
        layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon = None, 0.0

    assert_exact(Case(4, 1, None, F16), change=remove)


def test_each_norm_has_its_own_eps() -> None:
    """As large as the mean squares that they are added to."""

    def set_eps(layer: nn.Module) -> None:
        layer.input_layernorm.variance_epsilon = 300.0
        layer.self_attn.q_norm.variance_epsilon = 0.5
        layer.self_attn.k_norm.variance_epsilon = 2.0

    assert_exact(Case(4, 1, None, F16), change=set_eps)


def compare(arguments: dict[str, Any]) -> None:
    """Against the reference: the op's result, and its caches."""
    twin = arguments | {name: arguments[name].clone() for name in CACHES}
    want = OP.reference(*twin.values())
    got = OP.overload(*arguments.values())
    for ours, theirs in zip((got, *map(arguments.get, CACHES)), (want, *map(twin.get, CACHES)), strict=True):
        assert rms_error(ours, theirs.double()) < 5e-3


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("names", [("cos", "sin"), ("sin",)], ids="+".join)
def test_rotary_tables_may_have_any_form(form: str, names: tuple[str, ...]) -> None:
    """Both tables, or one unlike the other. Their halves differ, as in no model."""
    arguments = sample("self_attention", 2, 1)
    arguments |= {name: torch.randn_like(arguments[name]) for name in ("cos", "sin")}
    compare(arguments | {name: TABLES[form](arguments[name]) for name in names})


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "tokens before heads": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last but one": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "within a longer cache": lambda t: torch.cat((t, t), 2)[:, :, 3 : 3 + t.shape[2]],
    "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [CACHES, ("v_cache",)], ids="+".join)
def test_caches_may_have_any_strides(layout: str, names: tuple[str, ...]) -> None:
    arguments = sample("self_attention", 2, 1)
    compare(arguments | {name: LAYOUTS[layout](arguments[name]) for name in names})


@pytest.mark.parametrize("length", [64, 71])
@pytest.mark.parametrize("past", [0, 1, 56, 57, 64, (1 << 31) + 3, -100])
@pytest.mark.parametrize("masked", [False, True])
def test_outside_of_the_cache_nothing_is_written_and_the_result_is_nan(length: int, past: int, masked: bool) -> None:
    """Where eager stops with an error: behind the end, in its block of 64 or in a later one, and before the start."""
    arguments = sample("self_attention", 2, 1)
    arguments |= {name: arguments[name][:, :, :length] for name in CACHES}
    arguments["mask"] = arguments["mask"][..., :length] if masked else None
    arguments["position"] = torch.tensor([length + past], device=DEVICE)
    memory = []
    for name in CACHES:
        arguments[name], around = surrounded(arguments[name])
        memory.append((around, around.clone()))
    assert OP.overload(*arguments.values()).isnan().all()
    assert all(torch.equal(bits(after), bits(before)) for after, before in memory)


@pytest.mark.parametrize("place", [20, 50, 140])
def test_what_is_hidden_is_neither_read_nor_written(place: int) -> None:
    """Blocks of 64: the token's place is in the one that is visible, hidden there, or in one that is hidden."""
    arguments = sample("self_attention", 2, 1)
    shape = (*arguments["k_cache"].shape[:2], 200, 16)
    visible = torch.arange(200, device=DEVICE) < 40
    arguments |= {name: torch.randn(shape, device=DEVICE).half() for name in CACHES}
    arguments |= {"mask": visible.expand(1, 1, 1, -1), "position": torch.tensor([place], device=DEVICE)}
    want = OP.reference(*(arguments | {name: arguments[name].clone() for name in CACHES}).values())
    for name in CACHES:
        arguments[name][:, :, 64:] = math.nan
    before = {name: arguments[name].clone() for name in CACHES}
    assert rms_error(OP.overload(*arguments.values()), want.double()) < 5e-3
    for name, cache in before.items():
        assert arguments[name][:, :, place].isfinite().all()
        arguments[name][:, :, place] = cache[:, :, place]
        assert torch.equal(bits(arguments[name]), bits(cache))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    *(Case(*rows, None, torch.bfloat16, high, sizes)
      for rows in ((1, 1), (2, 1), (8, 1), (128, 1), (1, 2), (1, 8), (1, 100))
      for high, sizes in ((False, QWEN3), (True, QWEN3), (False, QWEN3_8B))),
    *(Case(1, 1, None, dtype, sizes=QWEN3) for dtype in DTYPES),
    *(Case(1, 1, None, torch.bfloat16, sizes=QWEN3, family=family) for family in ("qwen2", "llama")),
], ids=str)  # fmt: skip
def test_as_exact_as_eager_at_real_sizes(case: Case) -> None:
    assert_exact(case)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_what_is_read_early_changes_no_bits(batch: int) -> None:
    """Layers in which every kernel reads what the one before it wrote, the masks and caches of a step what the step
    before it wrote."""

    def layers(early: bool) -> Tensors:
        position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        caches = torch.zeros(16, 2, *cache_shape, dtype=torch.bfloat16, device=DEVICE)
        x = start
        for _ in range(40):
            mask = (torch.arange(cache_shape[2], device=DEVICE) <= position).expand(batch, 1, 1, -1)
            for i, (keys, values) in enumerate(caches):
                inputs = {"x": x, "k_cache": keys, "v_cache": values, "position": position, "mask": mask}
                attended = OP.overload(*(attention | inputs).values(), early and i > 0)
                inputs = {"x": attended.transpose(1, 2).reshape(batch, 1, -1), "residual": x}
                x = OPS["linear_residual"].overload(*(projection | inputs).values(), early)
                x = OPS["norm_gated_mlp"].overload(*(mlp | {"x": x, "residual": x}).values(), early)
            position.add_(1)
            x = x / x.square().mean().sqrt()
        return x, caches

    attention, projection, mlp = (
        {n: a.bfloat16() if isinstance(a, Tensor) else a for n, a in sample(name, batch, 1, sizes=QWEN3).items()}
        for name in ("self_attention", "linear_residual", "norm_gated_mlp")
    )
    start, cache_shape = attention["x"], attention["k_cache"].shape
    want = layers(early=False)
    assert all(t.isfinite().all() for t in want)
    assert all(map(torch.equal, layers(early=True), want) for _ in range(10))
