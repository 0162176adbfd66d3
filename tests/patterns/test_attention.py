"""Which spellings of attention are one `attention`, and which of its neighbours are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from fusepass.options import Options
from fusepass.rewrite import fuse
from tests.models import capture, fused, small_qwen3, static_cache
from tests.patterns.toys import all_fused, refusal, run
from tests.test_validity import Wrapped

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 6, 3, 11, 8


def tensors(seq: int = 1, kv_heads: int = KV_HEADS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q as the projections leave it, k and v as a cache holds them."""
    q = torch.randn(BATCH, seq, HEADS, HEAD_DIM, dtype=dtype).transpose(1, 2)
    return q, *torch.randn(2, BATCH, kv_heads, LENGTH, HEAD_DIM, dtype=dtype)


def visible(*shape: int) -> Tensor:
    mask = torch.rand(shape or (BATCH, 1, 1, LENGTH)) > 0.4
    mask[..., 0] = True
    return mask


def getitem(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, 2, length, size).reshape(batch, heads * 2, length, size)


def short_getitem(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, -1, LENGTH, HEAD_DIM)


def unsqueezed(x: Tensor) -> Tensor:
    return torch.reshape(x.unsqueeze(2).expand(-1, -1, 2, -1, -1), (BATCH, HEADS, LENGTH, HEAD_DIM))


@pytest.mark.parametrize("repeat", [getitem, short_getitem, unsqueezed])
def test_repeated_heads(repeat: Callable[[Tensor], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, dropout_p=0.0, scale=0.3)

    report, graph = run(attend, *tensors(), visible())
    assert all_fused(report) == {"attention": 1}
    assert [node.target for node in graph.graph.nodes if node.op.startswith("call")] == [
        torch.ops.fusepass.attention.default
    ]


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda q, k, v: torch._C._nn.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.2, enable_gqa=True),
    ],
)
def test_spellings_without_repeat(attend: Callable[..., Tensor]) -> None:
    report, _ = run(attend, *tensors())
    assert all_fused(report) == {"attention": 1}


def test_as_many_kv_heads() -> None:
    report, _ = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *tensors(kv_heads=HEADS))
    assert all_fused(report) == {"attention": 1}


@pytest.mark.parametrize(
    "mask",
    [
        visible(1, 1, 1, LENGTH),
        visible(BATCH, HEADS, 1, LENGTH),
        visible().expand(BATCH, HEADS, 1, LENGTH),
        torch.randn(BATCH, 1, 1, LENGTH).masked_fill(~visible(), -torch.inf),
    ],
)
def test_masks(mask: Tensor) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, getitem(k), getitem(v), attn_mask=mask)

    report, _ = run(attend, *tensors(), mask)
    assert all_fused(report) == {"attention": 1}


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, getitem(k), getitem(v), **options)


def tiled(x: Tensor) -> Tensor:
    """Copies of a head are not neighbours."""
    return x[:, None].expand(-1, 2, -1, -1, -1).reshape(BATCH, HEADS, LENGTH, HEAD_DIM)


@pytest.mark.parametrize(
    ("attend", "inputs"),
    [
        (lambda q, k, v: sdpa(q, k, v, is_causal=True), tensors(seq=3)),
        (lambda q, k, v: sdpa(q, k, v), tensors(seq=9)),  # a prompt
        (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), tensors(kv_heads=HEADS)),
        (torch.addcmul, torch.randn(3, BATCH, HEADS, 1, HEAD_DIM).unbind()),
    ],
    ids=["causal", "prompt", "no batch", "another function of three tensors"],
)
def test_no_sites(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    report, _ = run(attend, *inputs)
    assert report.sites == []


def test_heads_repeated_in_another_order_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, tiled(k), tiled(v))

    report, graph = run(attend, *tensors())
    assert all_fused(report) == {"attention": 1}
    assert sum(node.target == "expand" for node in graph.graph.nodes) == 2


def tiled_by_unsqueeze(x: Tensor) -> Tensor:
    return x.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def tiled_by_index(x: Tensor) -> Tensor:
    return x[:, None].expand(-1, 2, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def other_positions(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[2]).flip(0)
    return x[:, :, None, positions].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def scaled_copies(x: Tensor) -> Tensor:
    return (x[:, :, None] * torch.arange(1.0, 3.0)[:, None, None]).reshape(x.shape[0], -1, *x.shape[2:])


def one_position(x: Tensor) -> Tensor:
    return x[:, :, 0].repeat_interleave(2, 1).unsqueeze(2).expand(-1, -1, 7, -1).reshape(2, -1, 7, HEAD_DIM)


def longer(x: Tensor) -> Tensor:
    x = x.repeat_interleave(2, 1)
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(*x.shape[:2], -1, x.shape[3])


@pytest.mark.parametrize(
    "repeat", [tiled_by_unsqueeze, tiled_by_index, other_positions, scaled_copies, one_position, longer]
)
def test_what_only_looks_like_repeated_heads_stays(repeat: Callable[[Tensor], Tensor]) -> None:
    """As many K/V heads as copies of each: the shapes do not tell."""
    q, k, v = torch.randn(2, 4, 1, HEAD_DIM), *torch.randn(2, 2, 2, 7, HEAD_DIM)
    report, graph = run(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), q, k, v)
    assert all_fused(report) == {"attention": 1}
    assert sum(node.target == "reshape" for node in graph.graph.nodes) == 2


def test_one_query_head_for_many_key_heads_is_no_site() -> None:
    q, k, v = tensors()
    assert run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q[:, :1], k, v)[0].sites == []


def test_keys_without_heads_are_no_site() -> None:
    """`repeat_interleave` with half as many query heads as K/V heads, say: it repeats each no time."""
    q, k, v = tensors(kv_heads=0)
    assert run(lambda q, k, v: F.scaled_dot_product_attention(q[:, :1], k, v), q, k, v)[0].sites == []


def test_numbers_of_heads_that_are_symbols_are_no_site_and_stay_symbols() -> None:
    """Else Dynamo raises a ConstraintViolationError."""
    q, k, v = tensors(kv_heads=HEADS)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 1)
    assert run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v)[0].sites == []


def test_keys_of_one_batch_for_all_queries_are_refused() -> None:
    q, k, v = tensors(kv_heads=HEADS)
    report, _ = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k[:1], v[:1])
    refusal(report, "attention", "shape", "expected one batch")


def test_a_query_of_which_nothing_is_known_is_no_site() -> None:
    (gm,) = capture(sdpa, *tensors())
    for node in gm.graph.find_nodes(op="placeholder"):
        del node.meta["example_value"]
    assert fuse(gm, Options()).sites == []


def test_repeated_keys_used_elsewhere() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        repeated = getitem(k)
        return F.scaled_dot_product_attention(q, repeated, getitem(v)), repeated + 1

    report, _ = run(attend, *tensors())
    refusal(report, "attention", "extra-user", "another user")


@pytest.mark.parametrize("which", ["k", "mask"])
def test_written_in_the_middle(which: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        key = getitem(k)
        if which == "k":
            k.add_(1)
        else:
            mask.logical_or_(q[:, :1, :, :1] > 0)
        return F.scaled_dot_product_attention(q, key, getitem(v), attn_mask=mask)

    report, _ = run(attend, *tensors(), visible())
    refusal(report, "attention", "mutation", "writes in place")


def test_other_head_size_of_v() -> None:
    q, k, v = tensors()
    report, _ = run(sdpa, q, k, v.repeat_interleave(2, -1))
    refusal(report, "attention", "shape", "^q is .*; expected one batch, one head size")


def test_mask_of_two_dimensions() -> None:
    q, k, v = tensors()
    report, _ = run(lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask), q, k, v, visible(1, LENGTH))
    refusal(report, "attention", "shape", "mask.*; expected four dimensions")


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask)


def test_a_mask_that_is_no_plain_tensor() -> None:
    report, _ = run(masked, *tensors(), Wrapped(torch.randn(BATCH, 1, 1, LENGTH)))
    refusal(report, "attention", "tensor-subclass", "is a Wrapped, not a plain tensor")


def test_a_mask_of_another_dtype() -> None:
    report, _ = run(masked, *tensors(dtype=torch.bfloat16), torch.randn(BATCH, 1, 1, LENGTH))
    refusal(report, "attention", "dtype", "float32; expected torch.bool or torch.bfloat16")


def test_a_mask_on_another_device() -> None:
    (gm,) = capture(masked, *tensors(), visible())
    node = next(node for node in gm.graph.nodes if "mask" in node.name)
    fake = node.meta["example_value"]
    with fake.fake_mode:
        node.meta["example_value"] = torch.empty(fake.shape, dtype=torch.bool, device="cuda")
    refusal(fuse(gm, Options()), "attention", "device", "mask.*on cuda:0, the activation on cpu")


def test_needs_grad() -> None:
    q, k, v = tensors()
    _, reports, _ = fused(sdpa, q.requires_grad_(), k, v)
    refusal(reports[0], "attention", "grad", "needs a gradient")


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoding_step_of_a_model(cache: str, dynamic: bool, padded: bool) -> None:
    model = small_qwen3(2)
    tokens = torch.randint(model.config.vocab_size, (2, 6))
    ours, eager = (
        static_cache(model, 2, 16) if cache == "static" else DynamicCache(config=model.config) for _ in range(2)
    )
    everyone = torch.ones(2, 6, dtype=torch.long)
    everyone[1, :2] = 0
    options = {"use_cache": True} | ({"cache_position": torch.arange(5)} if cache == "static" else {})

    def arguments(kv: Any, end: int) -> dict[str, Any]:
        mask = {"attention_mask": everyone[:, :end]} if padded else {}
        return options | mask | {"past_key_values": kv}

    for kv in (ours, eager):
        model(tokens[:, :5], **arguments(kv, 5))
    if cache == "static":
        options["cache_position"] = torch.tensor([5])
    want = model(tokens[:, 5:], **arguments(eager, 6)).logits
    got, reports, graphs = fused(model, tokens[:, 5:], dynamic=dynamic, **arguments(ours, 6))
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-5)
    assert reports[-1].counts()["attention"] == 2
    assert all(site.fused for site in reports[-1].sites)
    assert not any(node.target is F.scaled_dot_product_attention for node in graphs[-1].graph.nodes)
