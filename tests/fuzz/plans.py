"""Which plans are drawn: mostly Qwen3's layer in other words, with a few things that are not."""

from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.blocks import CHANGES, OTHERS, SPELLINGS, USES, Plan
from tests.fuzz.module import PLACES, TARGETS

WRITES = tuple(f"write {target}" for target in TARGETS)
DEEDS = st.tuples(st.sampled_from(PLACES), st.one_of(*map(st.sampled_from, (tuple(USES), tuple(CHANGES), WRITES))))
LINEARS = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
NORMS = ("input", "q_norm", "k_norm", "post", "last")
PARTS = (("mlp",), ("attention",), ("head",), ("attention", "mlp"), ("mlp", "head"), ("attention", "mlp", "head"))
TIES = (("gate", "up"), ("q", "k"), ("k", "v"), ("q_norm", "k_norm"), ("input", "post"), ("input", "last"))


def rarely(*others: Any, usual: Any) -> st.SearchStrategy[Any]:
    """`usual` three times in four."""
    return st.one_of(*[st.just(usual)] * 3, st.sampled_from(others))


@st.composite
def spellings(draw: st.DrawFn) -> dict[str, str]:
    """A way to write each step, and at most one that is another step."""
    chosen = {step: draw(st.sampled_from(tuple(ways))) for step, ways in SPELLINGS.items() if draw(st.booleans())}
    if draw(rarely(True, usual=False)):
        step = draw(st.sampled_from(tuple(OTHERS)))
        chosen[step] = draw(st.sampled_from(tuple(OTHERS[step])))
    return chosen


def plans(**given: Any) -> st.SearchStrategy[Plan]:
    """Plans; `given` replaces the strategies of some fields."""
    batch = st.shared(st.sampled_from((2, 1, 3)), key="batch")
    fields: dict[str, Any] = dict(
        parts=st.sampled_from(PARTS),
        spelling=spellings(),
        deeds=st.lists(DEEDS, max_size=3).map(tuple),
        norms=rarely(*({norm: times} for norm in NORMS for times in (0, 2)), usual={}),
        residuals=rarely(
            *({name: what} for name in ("o", "down") for what in ("none", "twice", "norm", "other")), usual={}
        ),
        ties=rarely(*((tie,) for tie in TIES), usual=()),
        biases=rarely(LINEARS, ("q", "k", "v"), *((name,) for name in LINEARS), usual=()),
        transposed=rarely(*((name,) for name in LINEARS), usual=()),
        f32_norms=rarely(True, usual=False),
        order=rarely("kqv", "vqk", "vkq", usual="qkv"),
        heads=rarely((2, 2, 2), (3, 1, 1), (4, 4, 4), (2, 4, 4), (6, 2, 3), usual=(6, 2, 2)),
        head_norm=rarely("after", usual="before"),
        cache=rarely("none", "late", "one", usual="static"),
        mask=rarely("float", "none", usual="bool"),
        table=batch.flatmap(lambda n: rarely((n,), (1, 1), (n, 1), (1, 2), (), usual=(1,))),
        layout=rarely("transposed", "strided", usual="plain"),
        dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        batch=batch,
        seq=st.sampled_from((1, 2, 5)),
        dynamic=rarely(True, usual=False),
    )
    return st.builds(Plan, **{**fields, **given})
