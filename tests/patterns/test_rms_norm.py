"""Which spellings of RMSNorm are one `rms_norm`, and which of its neighbours are not."""

import pytest
import torch
from torch import Tensor, nn

import fusepass
from tests.patterns.toys import HIDDEN, SEQ, Norm, Spelling, all_fused, hidden, refusal, run

SPELLINGS: dict[tuple[str, str], Spelling] = {
    ("widen", "float()"): lambda x: x.float(),
    ("widen", "type"): lambda x: x.type(torch.float32),
    ("widen", "to(dtype=)"): lambda x: x.to(dtype=torch.float32),
    ("widen", "to(device, dtype)"): lambda x: x.to(x.device, torch.float32),
    ("widen", "none"): lambda x: x,
    ("square", "pow(2.0)"): lambda h: h.pow(2.0),
    ("square", "pow(exponent=)"): lambda h: h.pow(exponent=2),
    ("square", "torch.pow"): lambda h: torch.pow(h, 2),
    ("square", "**"): lambda h: h**2,
    ("square", "square()"): lambda h: h.square(),
    ("square", "torch.square"): lambda h: torch.square(h),
    ("square", "h * h"): lambda h: h * h,
    ("square", "torch.mul"): lambda h: torch.mul(h, h),
    ("mean", "dim="): lambda s: s.mean(dim=-1, keepdim=True),
    ("mean", "positional"): lambda s: s.mean(-1, True),
    ("mean", "list"): lambda s: s.mean([-1], keepdim=True),
    ("mean", "tuple"): lambda s: s.mean((-1,), keepdim=True),
    ("mean", "dim counted from the front"): lambda s: s.mean(2, keepdim=True),
    ("mean", "torch.mean"): lambda s: torch.mean(s, dim=-1, keepdim=True),
    ("shift", "eps + m"): lambda m, eps: eps + m,
    ("shift", "add()"): lambda m, eps: m.add(eps),
    ("shift", "torch.add"): lambda m, eps: torch.add(m, eps),
    ("rsqrt", "rsqrt()"): lambda v: v.rsqrt(),
    ("rsqrt", "pow(-0.5)"): lambda v: v.pow(-0.5),
    ("rsqrt", "torch.pow"): lambda v: torch.pow(v, -0.5),
    ("rsqrt", "**"): lambda v: v**-0.5,
    ("scale", "r * h"): lambda h, r: r * h,
    ("scale", "mul()"): lambda h, r: h.mul(r),
    ("scale", "torch.mul"): lambda h, r: torch.mul(h, r),
    ("narrow", "type_as"): lambda h, x: h.type_as(x),
    ("narrow", "none"): lambda h, x: h,
    ("weigh", "h * w"): lambda w, h: h * w,
    ("weigh", "mul()"): lambda w, h: h.mul(w),
    ("weigh", "torch.multiply"): lambda w, h: torch.multiply(w, h),
    ("weigh", "by keyword"): lambda w, h: torch.mul(h, other=w),
    ("weigh", "1 + w"): lambda w, h: h * (1.0 + w),
}


@pytest.mark.parametrize(("step", "name"), SPELLINGS)
def test_every_spelling_of_a_step_is_fused(step: str, name: str) -> None:
    report, gm = run(Norm(**{step: SPELLINGS[step, name]}), hidden())
    assert all_fused(report) == {"rms_norm": 1}
    assert "rsqrt" not in gm.code
    assert "pow" not in gm.code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtypes_of_models_are_fused(dtype: torch.dtype) -> None:
    assert all_fused(run(Norm().to(dtype), hidden(dtype))[0]) == {"rms_norm": 1}


def test_a_norm_without_casts_is_fused_in_f32() -> None:
    report, _ = run(Norm(widen=lambda x: x, narrow=lambda h, x: h), hidden())
    assert all_fused(report) == {"rms_norm": 1}


@pytest.mark.parametrize("eps", [0.5, 1])
def test_the_epsilon_of_the_graph_is_the_ops(eps: float) -> None:
    report, gm = run(Norm(eps=eps), hidden())
    assert all_fused(report) == {"rms_norm": 1}
    assert next(n for n in gm.graph.nodes if "rms_norm" in str(n.target)).args[2] == eps


@pytest.mark.parametrize("eps", [0.25, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_epsilon_that_is_a_symbol_is_passed_on(dynamic: bool, eps: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def forward(self, x: Tensor, eps: float) -> Tensor:
            self.norm.eps = eps
            return self.norm(x)

    assert all_fused(run(Net(), hidden(), eps, dynamic=dynamic)[0]) == {"rms_norm": 1}


def test_an_integer_epsilon_that_is_a_symbol_is_not_guarded_on() -> None:
    norm = Norm()

    def net(x: Tensor, eps: int) -> Tensor:
        norm.eps = eps
        return norm(x)

    call = torch.compile(net, backend="fusepass", dynamic=True, options={"remainder": "eager"})
    for eps in (2, 3, 4):
        x = hidden()
        torch.testing.assert_close(call(x, eps), net(x, eps))
    assert [all_fused(report) for report in fusepass.reports()] == [{"rms_norm": 1}]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[0, 0],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.unsqueeze(0).expand(2, -1, -1, -1),
        lambda x: x[:, ::2],
    ],
    ids=["one row", "transposed", "expanded", "4-d", "strided"],
)
def test_an_input_of_any_strides_is_fused(view: Spelling) -> None:
    norm = Norm()

    def net(x: Tensor) -> Tensor:
        return norm(view(x))

    assert all_fused(run(net, hidden())[0]) == {"rms_norm": 1}


def test_two_norms_with_one_weight_are_two_sites() -> None:
    norm = Norm()
    assert all_fused(run(lambda x: norm(norm(x)), hidden())[0]) == {"rms_norm": 2}


OTHERS: dict[str, Norm] = {
    "mean over another dimension": Norm(mean=lambda s: s.mean(1, keepdim=True)),
    "mean over two dimensions": Norm(mean=lambda s: s.mean((-2, -1), keepdim=True)),
    "mean over everything": Norm(mean=lambda s: s.mean()),
    "mean without keepdim": Norm(mean=lambda s: s.mean(-1).unsqueeze(-1)),
    "mean in another dtype": Norm(mean=lambda s: s.mean(-1, keepdim=True, dtype=torch.float64)),
    "sum": Norm(mean=lambda s: s.sum(-1, keepdim=True)),
    "fourth power": Norm(square=lambda h: h.pow(4)),
    "product of two values": Norm(square=lambda h: h.abs() * h.exp()),
    "scaled epsilon": Norm(eps=0.5, shift=lambda m, eps: torch.add(m, eps, alpha=2)),
    "epsilon is a tensor": Norm(shift=lambda m, eps: m + m.new_full((), 0.5)),
    "sum, and a keyword of NumPy's": Norm(
        mean=lambda s: s.sum(-1, keepdim=True), scale=lambda h, r: torch.mul(r, x2=h)
    ),
    "no epsilon": Norm(shift=lambda m, eps: m),
    "another root": Norm(rsqrt=lambda v: v.pow(-0.25)),
    "square root": Norm(rsqrt=lambda v: v.sqrt()),
    "no weight": Norm(weigh=lambda w, h: h + w),
    "weight is a number": Norm(weigh=lambda w, h: 2.0 * h),
    "centred": Norm(scale=lambda h, r: (h - h.mean(-1, keepdim=True)) * r),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_an_rms_norm_is_no_site(name: str) -> None:
    assert run(OTHERS[name], hidden())[0].sites == []


BF16 = torch.bfloat16
REFUSED: dict[str, tuple[Norm, Tensor, str, str]] = {
    "f32 weight on a bf16 activation": (Norm(), hidden(BF16), "dtype", "float32.*activation.*bfloat16"),
    "statistics in bf16": (Norm(widen=lambda x: x).to(BF16), hidden(BF16), "dtype", "statistics.*bfloat16"),
    "statistics in f64": (Norm(widen=lambda x: x.to(torch.float64)), hidden(), "dtype", "statistics.*float64"),
    "everything in f64": (Norm(widen=lambda x: x).double(), hidden(torch.float64), "dtype", "float64.*expected"),
    "one weight for all": (Norm(1), hidden(), "shape", rf"norm weight.*\(1,\).*row of {HIDDEN}"),
    "a weight for each position": (
        Norm(weigh=lambda w, h: w.expand(SEQ, HIDDEN).contiguous() * h),
        hidden(),
        "shape",
        rf"norm weight.*\({SEQ}, {HIDDEN}\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_norm_that_the_op_does_not_compute_is_refused(name: str) -> None:
    norm, x, code, words = REFUSED[name]
    refusal(run(norm, x)[0], "rms_norm", code, words)
