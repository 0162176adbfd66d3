"""What a region needs besides its form, and the reason a user is given when it is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fusepass
from fusepass.options import Options
from fusepass.report import CODES
from fusepass.rewrite import fuse
from tests.models import capture, fused
from tests.patterns.toys import HIDDEN, MLP, Attention, Norm, Residual, all_fused, hidden, refusal, run, tables

ONE = {"linear_residual": 1}


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")


def linear(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    return r + F.linear(x, weight)


def test_the_codes_are_those_that_are_given() -> None:
    package = Path(fusepass.__file__).parent
    sources = [file.read_text() for folder in (package, package / "patterns") for file in folder.glob("*.py")]
    assert {code for text in sources for code in re.findall(r'Refused\(\s*"([^"]+)"', text)} == set(CODES)


def test_a_refused_site_names_the_users_line() -> None:
    report, _ = run(Norm(), hidden(torch.bfloat16))
    site = refusal(report, "rms_norm", "dtype", "weight")
    assert re.search(r"toys\.py:\d+, in \S+: .*weight", site.source)


# --- grad ---


def grads(module: nn.Module, *inputs: Tensor) -> Any:
    """The report of `module` as a user runs it who forgot torch.no_grad()."""
    _, (report,), _ = fused(module, *inputs)
    return report


@pytest.mark.parametrize("name", ["norm.weight", "gate.weight", "up.weight", "down.weight"])
def test_a_region_whose_weight_needs_a_gradient_is_refused(name: str) -> None:
    mlp = MLP()
    mlp.get_parameter(name).requires_grad_(True)
    refusal(grads(mlp, hidden()), "norm_gated_mlp", "grad", r"needs a gradient.*torch\.no_grad\(\)")


def test_a_region_whose_activation_needs_a_gradient_is_refused() -> None:
    refusal(grads(Norm(), hidden().requires_grad_()), "rms_norm", "grad", r"torch\.no_grad\(\)")


def test_a_region_with_one_result_that_needs_a_gradient_is_refused() -> None:
    net = Attention()
    net.linears["v"].requires_grad_(True)
    refusal(grads(net, hidden(), *tables()), "norm_qkv_rope", "grad", r"torch\.no_grad\(\)")


def test_grad_mode_alone_refuses_nothing() -> None:
    assert all_fused(grads(MLP(), hidden())) == {"norm_gated_mlp": 1}


def test_under_no_grad_a_trainable_model_is_fused() -> None:
    assert all_fused(run(MLP().requires_grad_(True), hidden())[0]) == {"norm_gated_mlp": 1}


# --- tensor-subclass ---


class Wrapped(Tensor):
    """As torchao's weights: an outer tensor without memory of its own, whose ops unwrap it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> "Wrapped":
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Wrapped, lambda t: t.inner * 2, (args, kwargs or {}))
        result = func(*args, **kwargs)
        keep = func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default)
        return Wrapped(result / 2) if keep else result


@pytest.mark.parametrize("which", ["x", "r", "weight"])
def test_a_tensor_that_is_not_a_plain_one_is_refused(which: str) -> None:
    inputs = {"x": hidden(), "r": hidden(), "weight": torch.randn(HIDDEN, HIDDEN)}
    inputs[which] = Wrapped(inputs[which])
    report, _ = run(linear, *inputs.values())
    refusal(report, "linear_residual", "tensor-subclass", "is a Wrapped, not a plain tensor")


def test_a_value_inside_that_is_not_a_plain_tensor_is_refused() -> None:
    """As a fusion of one's own may make from what it does not name as an input."""
    (gm,) = capture(MLP(), hidden())
    (act,) = gm.graph.find_nodes(op="call_function", target=F.silu)
    act.meta["example_value"] = None
    refusal(fuse(gm, Options()), "norm_gated_mlp", "tensor-subclass", "'silu' is a NoneType, not a plain tensor")


@pytest.mark.parametrize("which", ["x", "weight"])
def test_a_linear_layer_of_which_nothing_is_known_is_no_site(which: str) -> None:
    (gm,) = capture(linear, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))
    del next(node for node in gm.graph.find_nodes(op="placeholder") if which in node.name).meta["example_value"]
    assert fuse(gm, Options()).sites == []


# --- dtype and device ---


@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_a_weight_of_another_dtype_is_refused(other: torch.dtype) -> None:
    norm = Norm().to(other)
    refusal(run(norm, hidden(torch.bfloat16))[0], "rms_norm", "dtype", f"{other}, the activation torch.bfloat16")


def test_a_device_without_kernels_is_refused() -> None:
    (gm,) = capture(linear, *(torch.randn(HIDDEN, HIDDEN, device="meta") for _ in range(3)))
    refusal(fuse(gm, Options()), "linear_residual", "device", "is on meta; expected a CUDA device")


@pytest.mark.parametrize("which", ["weight", "add"])
def test_tensors_on_two_devices_are_refused(which: str) -> None:
    """No GPU is needed to say that a tensor is on one, to the graph."""
    (gm,) = capture(linear, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))
    tensor = next(node for node in gm.graph.nodes if which in node.name)
    fake = tensor.meta["example_value"]
    assert isinstance(fake, FakeTensor)
    with fake.fake_mode:
        tensor.meta["example_value"] = torch.empty(fake.shape, device="cuda")
    refusal(fuse(gm, Options()), "linear_residual", "device", f"{which}.*on cuda:0, the activation on cpu")


# --- autocast ---


class Autocast(nn.Module):
    def __init__(self, inner: nn.Module, enabled: bool = True) -> None:
        super().__init__()
        self.inner, self.enabled = inner, enabled

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.inner(*inputs)


@pytest.mark.parametrize(("inner", "fusion"), [(Norm(), "rms_norm"), (MLP(), "norm_gated_mlp")], ids=["norm", "mlp"])
def test_a_region_inside_autocast_is_refused(inner: nn.Module, fusion: str) -> None:
    refusal(run(Autocast(inner), hidden())[0], fusion, "autocast", "inside torch.autocast")


@pytest.mark.parametrize(("inner", "fusion"), [(Norm(), "rms_norm"), (MLP(), "norm_gated_mlp")], ids=["norm", "mlp"])
def test_a_model_called_inside_autocast_is_refused(inner: nn.Module, fusion: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report, _ = run(inner, hidden())
    refusal(report, fusion, "autocast", "called inside torch.autocast")


def test_a_region_that_is_half_inside_autocast_is_refused() -> None:
    def net(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, weight)
        return r + y

    report, _ = run(net, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))
    refusal(report, "linear_residual", "autocast", "inside torch.autocast")


def test_a_checkpointed_layer_inside_autocast_is_refused() -> None:
    class Checkpointed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    report, _ = run(Autocast(Checkpointed()), hidden())
    refusal(report, "norm_gated_mlp", "autocast", "autocast")


def test_autocast_elsewhere_or_disabled_refuses_nothing() -> None:
    assert all_fused(run(Autocast(Norm(), enabled=False), hidden())[0]) == {"rms_norm": 1}
    norm = Norm()

    def net(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            before = F.linear(x, weight)
        middle = norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            return before, middle, F.linear(middle, weight)

    assert all_fused(run(net, hidden(), torch.randn(HIDDEN, HIDDEN))[0]) == {"rms_norm": 1}


# --- modes ---


BLOCKS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_op_is_put_behind_a_block_in_which_an_argument_is_made(block: str) -> None:
    def net(x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight)
        with BLOCKS[block]():
            r = x * 2
        return r + y

    report, graph = run(net, hidden(), torch.randn(HIDDEN, HIDDEN))
    assert all_fused(report) == ONE
    names = [node.name for node in graph.graph.nodes]
    (op,) = (name for name in names if "linear_residual" in name)
    assert names.index(op) > max(i for i, name in enumerate(names) if "exit" in name or "grad_enabled" in name)


@pytest.mark.parametrize("block", ["enable_grad", "inference_mode"])
def test_a_region_half_inside_a_block_is_refused(block: str) -> None:
    def net(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        with BLOCKS[block]():
            y = F.linear(x, weight)
        return r + y

    report, _ = run(net, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))
    refusal(report, "linear_residual", "mode", "switched in the middle")


def test_a_region_that_needs_a_gradient_inside_alone_is_refused() -> None:
    net = Residual().requires_grad_()

    def half(x: Tensor, r: Tensor) -> Tensor:
        y = net.linear(x)
        with torch.no_grad():
            return r + y

    _, (report,), _ = fused(half, hidden(), hidden())
    refusal(report, "linear_residual", "mode", "switched in the middle")


def test_a_region_inside_a_level_of_forward_derivatives_is_refused() -> None:
    def net(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return r + F.linear(x, weight)

    report, _ = run(net, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))
    refusal(report, "linear_residual", "grad", "forward-mode derivatives")


def test_a_region_behind_a_level_of_forward_derivatives_is_fused() -> None:
    def net(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        with forward_ad.dual_level():
            x = x * 2
        return r + F.linear(x, weight)

    assert all_fused(run(net, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))[0]) == ONE


def test_what_ends_a_block_ends_none_around_it_and_nothing_else_ends_one() -> None:
    def net(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.inference_mode():
                x = x * 2
            x = x * torch.ones(size=(HIDDEN,))
            return r + F.linear(x, weight)

    report, _ = run(net, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))
    refusal(report, "linear_residual", "autocast", "inside torch.autocast")


def test_a_graph_called_with_and_without_gradients_is_refused_where_its_weights_need_one() -> None:
    mlp = MLP().requires_grad_()
    region = torch.compiler.nested_compile_region(lambda x: mlp(x))

    def net(x: Tensor) -> Tensor:
        with torch.no_grad():
            first = region(x)
        return first + region(x)

    refusal(grads(net, hidden()), "norm_gated_mlp", "grad", r"torch\.no_grad\(\)")  # type: ignore[arg-type]
    mlp.requires_grad_(False)
    assert all_fused(grads(net, hidden())) == {"norm_gated_mlp": 1}  # type: ignore[arg-type]


# --- extra-user ---


def test_a_value_inside_that_is_used_elsewhere_is_refused_and_the_user_is_named() -> None:
    class Probe(nn.Module):
        def forward(self, gate: Tensor) -> Tensor:
            return gate.abs()

    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.probe = Probe()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(x)
            gate = self.gate(h)
            return self.down(F.silu(gate) * self.up(h)), self.probe(gate)

    refusal(run(Net(), hidden())[0], "norm_gated_mlp", "extra-user", "has another user: 'abs_1' in probe")


def test_a_value_inside_that_is_a_weight_too_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return F.linear(h, h)

    report, _ = run(Net(), torch.randn(HIDDEN, HIDDEN))
    refusal(report, "norm_linear", "extra-user", "is made inside the region and is one of its inputs, too")


# --- mutation ---


@torch.library.custom_op("fusepass_tests::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1)


@bump.register_fake
def _(x: Tensor) -> None:
    return None


def plus_equals(x: Tensor) -> None:
    x += 1


def times_equals(x: Tensor) -> None:
    x *= 2


def to_the_power_of(x: Tensor) -> None:
    x **= 2


def item(x: Tensor) -> None:
    x[0, 1:3] = 0.5


def running_mean(x: Tensor) -> None:
    stats = x.view(-1)
    F.batch_norm(x[:, 0], stats[:HIDDEN], stats[HIDDEN : 2 * HIDDEN], training=True)


@torch._dynamo.allow_in_graph
def double_in_place(x: Tensor) -> Tensor:
    return x.mul_(2).sum()


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "+=": plus_equals,
    "*=": times_equals,
    "**=": to_the_power_of,
    "item assignment": item,
    "method": lambda x: x.mul_(2),
    "called by its name": lambda x: x.__iadd__(1),
    "index_copy_": lambda x: x.index_copy_(0, torch.zeros(1, dtype=torch.long), torch.ones_like(x[:1])),
    "function": lambda x: torch.relu_(x),
    "function by keyword": lambda x: torch.relu_(input=x),
    "unbound method": lambda x: Tensor.add_(x, 1),
    "list": lambda x: torch._foreach_add_([x], 1),
    "nn.init": lambda x: nn.init.zeros_(x),
    "out=": lambda x: torch.exp(x, out=x),
    "aten": lambda x: torch.ops.aten.add_(x, 1),
    "aten overload": lambda x: torch.ops.aten.add_.Scalar(x, 1),
    "aten out=": lambda x: torch.ops.aten.exp.out(x, out=x),
    "custom op": bump,
    "any argument of a function": lambda x: torch._fused_sgd_(
        [torch.ones_like(x)],
        [torch.ones_like(x)],
        [x],
        weight_decay=0.0,
        momentum=0.9,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    ),
    "function that Dynamo does not look into": double_in_place,
    "embedding's max_norm": lambda x: F.embedding(torch.tensor([0]), x[0], max_norm=0.1),
    "embedding_bag's max_norm": lambda x: F.embedding_bag(torch.tensor([[0]]), x[0], max_norm=0.1),
    "custom op through torch.ops": lambda x: torch.ops.fusepass_tests.bump(x),
    "inplace=True": lambda x: F.relu(x, inplace=True),
    "inplace by position": lambda x: F.relu(x, True),
    "nn.ReLU": lambda x: nn.ReLU(inplace=True)(x),
    "nn.ELU": lambda x: nn.ELU(inplace=True)(x),
    "nn.LeakyReLU": lambda x: nn.LeakyReLU(inplace=True)(x),
    "nn.Hardtanh": lambda x: nn.Hardtanh(inplace=True)(x),
    "nn.Dropout": lambda x: nn.Dropout(1.0, inplace=True).train()(x),
    "running statistics": running_mean,
    "view": lambda x: x.view(-1).mul_(2),
    "transposed view": lambda x: x.mT.add_(1),
    "slice": lambda x: x[1].add_(1),
    "select": lambda x: x.select(0, 1).add_(1),
    "part of a split": lambda x: x.split(1)[1].add_(1),
    "part of an unbind": lambda x: x.unbind(0)[0].add_(1),
    "detached": lambda x: x.detach().add_(1),
    "data": lambda x: x.data.add_(1),
    "cast to its own dtype": lambda x: x.to(torch.float32).add_(1),
    "as_strided": lambda x: torch.as_strided(x, (2,), (1,)).add_(1),
    "autograd function's higher-order op": lambda x: checkpoint(plus_equals, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_in_the_middle_is_refused_however_it_is_spelled(name: str) -> None:
    net = Residual(between=lambda module, x, r: WRITES[name](r))
    refusal(run(net, hidden(), hidden())[0], "linear_residual", "mutation", "writes in place what the region reads")


def broadcast_row(x: Tensor, weight: Tensor) -> Tensor:
    r = x[0, 0] * 2
    y = F.linear(x[0, :1], weight) + r
    r.unsqueeze_(0)
    return y


def transposed_weight(x: Tensor, weight: Tensor) -> Tensor:
    weight = (weight * 1).t()
    y = F.linear(x, weight) + x
    weight.t_()
    return y


def squeezed_sum(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x[:1], weight) + x[:1]
    z = y * 2
    return z, y.squeeze_(0)


@pytest.mark.parametrize("net", [broadcast_row, transposed_weight, squeezed_sum])
def test_what_changes_its_shape_in_place_later_is_refused(net: Callable[..., Tensor]) -> None:
    """The fake tensor says by then that it fits."""
    report, _ = run(net, hidden(), torch.randn(HIDDEN, HIDDEN))
    refusal(report, "linear_residual", "mutation", "changes the shape of '.*' in place")


def test_a_mask_that_changes_its_shape_in_place_later_is_refused() -> None:
    def net(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        mask = mask & True
        y = F.scaled_dot_product_attention(q, k, k, mask)
        mask.unsqueeze_(0)
        return y

    q, k, mask = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 8, 16), torch.ones(1, 8, dtype=torch.bool)
    refusal(run(net, q, k, mask)[0], "attention", "mutation", "changes the shape of '.*' in place")


def test_what_has_changed_its_shape_in_place_before_is_fused() -> None:
    def net(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        r = (r[0] * 2).unsqueeze_(0)
        return F.linear(x[:1], weight) + r

    assert all_fused(run(net, hidden(), hidden(), torch.randn(HIDDEN, HIDDEN))[0]) == ONE


TARGETS: dict[str, Callable[[Residual, Tensor, Tensor], Tensor]] = {
    "activation": lambda net, x, r: x,
    "residual": lambda net, x, r: r,
    "weight": lambda net, x, r: net.linear.weight,
    "bias": lambda net, x, r: net.linear.bias,
    "row of the weight": lambda net, x, r: net.linear.weight[3],
    "transposed weight": lambda net, x, r: net.linear.weight.t(),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_write_in_the_middle_to_anything_that_is_read_is_refused(target: str) -> None:
    net = Residual(between=lambda *these: TARGETS[target](*these).mul_(2), bias=True)
    refusal(run(net, hidden(), hidden())[0], "linear_residual", "mutation", "'mul_' writes in place")


def test_a_write_in_the_middle_through_an_input_that_is_a_view_of_another_is_refused() -> None:
    def net(x: Tensor, r: Tensor, weight: Tensor, alias: Tensor) -> Tensor:
        y = F.linear(x, weight)
        alias.mul_(2)
        return r + y

    r = hidden()
    report, _ = run(net, hidden(), r, torch.randn(HIDDEN, HIDDEN), r.view(-1))
    refusal(report, "linear_residual", "mutation", "writes in place")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("when", ["before", "after", "before and after"])
def test_a_write_before_or_after_the_region_is_seen_and_refuses_nothing(when: str, target: str) -> None:
    class Net(Residual):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            if "before" in when:
                TARGETS[target](self, x, r).mul_(2)
            result = super().forward(x, r)
            if "after" in when:
                TARGETS[target](self, x, r).mul_(3)
            return result

    assert all_fused(run(Net(bias=True), hidden(), hidden())[0]) == ONE


def test_a_write_in_the_middle_to_something_else_refuses_nothing() -> None:
    class Net(Residual):
        def __init__(self) -> None:
            super().__init__(between=lambda net, x, r: net.count.add_(1))
            self.register_buffer("count", torch.zeros(()))

    net = Net()
    assert all_fused(run(net, hidden(), hidden())[0]) == ONE
    assert net.count == 1


def test_a_write_to_a_weight_between_two_uses_is_seen_by_the_second() -> None:
    net = Residual()

    def twice(x: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        first = r + F.linear(x, weight)
        weight.mul_(2)
        return first + F.linear(x, weight)

    assert all_fused(run(twice, hidden(), hidden(), net.linear.weight)[0]) == {"linear_residual": 2}


def test_a_write_to_a_copy_refuses_nothing() -> None:
    net = Residual(between=lambda module, x, r: r.clone().mul_(2))
    assert all_fused(run(net, hidden(), hidden())[0]) == ONE
