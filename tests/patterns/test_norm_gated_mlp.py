"""Which gated MLPs are one `norm_gated_mlp`, with how much around them, and which are not."""

from itertools import chain, combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.toys import HIDDEN, INTERMEDIATE, MLP, Norm, Spelling, all_fused, hidden, refusal, run

SPELLINGS: dict[tuple[str, str], Spelling] = {
    ("act", "inplace=False"): lambda g: F.silu(g, inplace=False),
    ("act", "False"): lambda g: F.silu(g, False),
    ("act", "inplace=True"): lambda g: F.silu(g, inplace=True),
    ("act", "True"): lambda g: F.silu(g, True),
    ("act", "by keyword"): lambda g: F.silu(input=g),
    ("act", "nn.SiLU"): lambda g: nn.SiLU()(g),
    ("act", "nn.SiLU(inplace=True)"): lambda g: nn.SiLU(inplace=True)(g),
    ("act", "tanh GELU"): lambda g: F.gelu(g, approximate="tanh"),
    ("act", "nn.GELU"): lambda g: nn.GELU("tanh")(g),
    ("act", "torch._C._nn.gelu"): lambda g: torch._C._nn.gelu(g, approximate="tanh"),
    ("mul", "up * act"): lambda act, up: up * act,
    ("mul", "mul()"): lambda act, up: act.mul(up),
    ("mul", "torch.mul"): lambda act, up: torch.mul(up, act),
    ("mul", "torch.multiply"): lambda act, up: torch.multiply(act, up),
    ("add", "y + x"): lambda x, y: y + x,
    ("add", "add()"): lambda x, y: x.add(y),
    ("add", "torch.add"): lambda x, y: torch.add(y, x, alpha=1),
    ("add", "another residual"): lambda x, y: x.cos() + y,
    ("add", "none"): lambda x, y: y,
}


@pytest.mark.parametrize(("step", "name"), SPELLINGS)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_every_spelling_of_a_step_is_fused(step: str, name: str, norm: bool) -> None:
    report, gm = run(MLP(norm=norm, **{step: SPELLINGS[step, name]}), hidden())
    assert all_fused(report) == {"norm_gated_mlp": 1}
    assert not any(word in gm.code for word in ("linear(", "rsqrt", "silu(", "gelu("))


@pytest.mark.parametrize("biases", chain.from_iterable(combinations("gud", n) for n in range(4)), ids="".join)
def test_every_combination_of_biases_is_fused(biases: tuple[str, ...]) -> None:
    assert all_fused(run(MLP(biases="".join(biases)), hidden())[0]) == {"norm_gated_mlp": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtypes_of_models_are_fused(dtype: torch.dtype) -> None:
    assert all_fused(run(MLP().to(dtype), hidden(dtype))[0]) == {"norm_gated_mlp": 1}


def test_gate_and_up_are_told_apart_by_what_reads_them() -> None:
    class Net(MLP):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            up = self.up(h)
            return x + self.down(up * F.silu(self.gate(h)))

    assert all_fused(run(Net(), hidden())[0]) == {"norm_gated_mlp": 1}


def test_gate_and_up_may_share_a_weight() -> None:
    mlp = MLP()
    mlp.up.weight = mlp.gate.weight
    assert all_fused(run(mlp, hidden())[0]) == {"norm_gated_mlp": 1}


def test_a_norm_that_somebody_else_reads_stays_one_and_the_group_begins_behind_it() -> None:
    class Net(MLP):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h)), h.sum()

    report, gm = run(Net(), hidden())
    assert all_fused(report) == {"rms_norm": 1, "norm_gated_mlp": 1}
    assert "rsqrt" not in gm.code


def test_a_norm_that_is_its_own_residual_stays_one() -> None:
    class Net(MLP):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return h + self.down(F.silu(self.gate(h)) * self.up(h))

    assert all_fused(run(Net(), hidden())[0]) == {"rms_norm": 1, "norm_gated_mlp": 1}


def test_an_adapter_on_the_gate_leaves_the_norm_and_the_other_linears() -> None:
    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, 3, bias=False), nn.Linear(3, INTERMEDIATE, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.down(F.silu(self.gate(h) + self.b(self.a(h))) * self.up(h))

    assert all_fused(run(Net(), hidden())[0]) == {"rms_norm": 1, "linear_residual": 2}


NOT_FOLDED: dict[str, Spelling] = {
    "scaled": lambda x, y: torch.add(x, y, alpha=2),
    "broadcast": lambda x, y: x[:1] + y,
    "used twice": lambda x, y: x + y * y,
    "its own double": lambda x, y: y + y,
    "a number": lambda x, y: y + 1,
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_an_add_that_is_no_residual_stays_behind_the_op(name: str) -> None:
    report, gm = run(MLP(add=NOT_FOLDED[name]), hidden())
    assert all_fused(report) == {"norm_gated_mlp": 1}
    (call,) = (node for node in gm.graph.nodes if "norm_gated_mlp" in str(node.target))
    assert call.args[9] is None


OTHERS: dict[str, MLP] = {
    "exact GELU": MLP(act=lambda g: F.gelu(g)),
    "ReLU": MLP(act=lambda g: F.relu(g)),
    "sigmoid": MLP(act=lambda g: g.sigmoid()),
    "scaled gate": MLP(act=lambda g: F.silu(2 * g)),
    "sum": MLP(mul=lambda act, up: act + up),
    "clamped up": MLP(mul=lambda act, up: act * up.clamp(-1, 1)),
    "no gate": MLP(mul=lambda act, up: act * act),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_a_gated_mlp_is_no_site(name: str) -> None:
    report, _ = run(OTHERS[name], hidden())
    assert "norm_gated_mlp" not in {site.fusion for site in report.sites}
    assert report.counts()["rms_norm"] == 1


def test_gate_and_up_of_different_inputs_are_no_site() -> None:
    class Net(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x.cos()))

    assert run(Net(), hidden())[0].sites == []


def broken(mlp: MLP, name: str, weight: Tensor) -> MLP:
    getattr(mlp, name).weight = nn.Parameter(weight, requires_grad=False)
    return mlp


def test_a_value_inside_that_is_used_elsewhere_is_refused() -> None:
    class Net(MLP):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            gate = self.gate(x)
            return self.down(F.silu(gate) * self.up(x)), gate.exp()

    refusal(run(Net(), hidden())[0], "norm_gated_mlp", "extra-user", "gate.*has another user: 'exp'")


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_transposed_weight_is_refused(name: str) -> None:
    mlp = MLP()
    weight = getattr(mlp, name).weight
    mlp = broken(mlp, name, weight.detach().t().contiguous().t())
    refusal(run(mlp, hidden())[0], "norm_gated_mlp", "weight-layout", f"{name}.*strides.*not contiguous")


def test_an_up_that_broadcasts_is_refused() -> None:
    mlp = broken(MLP(), "up", torch.randn(1, HIDDEN))
    refusal(run(mlp, hidden())[0], "norm_gated_mlp", "shape", "up")


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_bias_that_broadcasts_is_refused(name: str) -> None:
    mlp = MLP(biases="gud")
    getattr(mlp, name).bias = nn.Parameter(torch.randn(1), requires_grad=False)
    refusal(run(mlp, hidden())[0], "norm_gated_mlp", "shape", rf"^bias '.*{name}.*' is \(1,\); expected")


def test_a_norm_that_the_op_does_not_compute_is_refused() -> None:
    mlp = MLP()
    mlp.norm = Norm(widen=lambda x: x)
    report, _ = run(mlp.bfloat16(), hidden(torch.bfloat16))
    refusal(report, "norm_gated_mlp", "dtype", "statistics are torch.bfloat16")


def test_a_norm_that_rounds_elsewhere_is_refused() -> None:
    mlp = MLP()
    mlp.norm = Norm(narrow=lambda h, x: h.half())
    refusal(run(mlp, hidden())[0], "norm_gated_mlp", "dtype", "the weight multiplies torch.float16, not the input's")
