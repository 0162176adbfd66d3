"""What rewriting does to a graph, and what it must never do: lose or move a write, or leave a graph half done."""

import copy
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.tools_common import legalize_graph
from torch.utils.checkpoint import checkpoint

import fusepass
from fusepass import patterns, rewrite
from fusepass.graph import mutated
from fusepass.options import Options
from fusepass.patterns.norm_gated_mlp import NormGatedMLPFusion
from fusepass.patterns.rms_norm import RMSNormFusion
from fusepass.rewrite import fuse
from tests.models import capture, fused, small_qwen3, static_cache
from tests.patterns.test_self_attention import Net, attend, inputs
from tests.patterns.toys import HIDDEN, MLP, Attention, Norm, Residual, all_fused, hidden, refusal, run, tables


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")


def calls(gm: GraphModule, op: str) -> list[Node]:
    """The nodes that call `fusepass::<op>`."""
    return [node for node in gm.graph.nodes if str(node.target) == f"fusepass.{op}.default"]


def writers(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if mutated(node)]


def decode_graph(layers: int = 2, **changes: Any) -> GraphModule:
    """A decoding step of a Qwen3 with a static cache."""
    model = small_qwen3(layers, **changes)
    with torch.no_grad():
        cache = static_cache(model, 1, 8)
        (gm,) = capture(model, torch.randint(152, (1, 1)), past_key_values=cache, use_cache=True)
    return gm


# --- writes ---


def test_every_write_of_a_static_cache_stays_in_its_place() -> None:
    gm = decode_graph()
    before = writers(gm)
    assert sum("index_copy" in name for name in before) == 4
    fuse(gm, Options(fusions={"self_attention": False}))
    assert writers(gm) == before


def test_a_join_writes_what_it_took_in_and_no_other_write_moves() -> None:
    gm = decode_graph()
    before = [name for name in writers(gm) if "index_copy" not in name]
    fuse(gm, Options())
    joined = [node.name for node in calls(gm, "self_attention")]
    assert len(joined) == 2
    assert [name for name in writers(gm) if name not in joined] == before
    assert [name for name in writers(gm) if name in joined] == joined


def remove_dead_code(graph: Graph) -> None:
    graph.eliminate_dead_code()


def legalize(graph: Graph) -> None:
    """torch.fx's `legalize_graph`, which orders nodes by their arguments alone, done to `graph` itself."""
    order = legalize_graph(GraphModule(nn.Module(), copy.deepcopy(graph))).graph.nodes
    nodes = {node.name: node for node in graph.nodes}
    last = next(iter(graph.nodes))
    for name in (node.name for node in order):
        if nodes[name] is not last:
            last.append(nodes[name])
            last = nodes[name]


class Writer(nn.Module):
    """A write that depends on everything comes first, one that depends on nothing second; nobody reads a result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cache, self.count = Norm(), nn.Buffer(torch.zeros(HIDDEN)), nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.cache.copy_(y[0, 0])
        self.count.add_(1)
        return y


@pytest.mark.parametrize("fault", [remove_dead_code, legalize])
def test_a_rewrite_that_loses_or_moves_a_write_is_caught(
    fault: Callable[[Graph], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    erase = rewrite._erase

    def faulty(graph: Graph, *args: Any) -> Any:
        result = erase(graph, *args)
        fault(graph)
        return result

    (gm,) = capture(Writer(), hidden())
    code, before = gm.code, writers(gm)
    assert len(before) == 2
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "_erase", faulty)
        with pytest.raises(AssertionError, match="write in place"):
            fuse(gm, Options())
    assert gm.code == code
    assert all_fused(fuse(gm, Options())) == {"rms_norm": 1}
    assert writers(gm) == before


def test_dead_code_removal_would_delete_the_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    erase = rewrite._erase
    monkeypatch.setattr(rewrite, "_erase", lambda graph, *args: (erase(graph, *args), graph.eliminate_dead_code()))
    with pytest.raises(AssertionError, match="write in place"):
        fuse(decode_graph(), Options())


# --- all or nothing ---


@pytest.mark.parametrize("verb", ["match", "check", "rewrite"])
def test_a_fault_at_the_second_site_leaves_the_graph_as_it_was(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = getattr(RMSNormFusion, verb), []

    def faulty(self: RMSNormFusion, *args: Any) -> Any:
        result = original(self, *args)
        if verb != "match" or result is not None:
            seen.append(args)
        if len(seen) == 2:
            raise ZeroDivisionError("planted")
        return result

    first, second = Norm(), Norm()
    (gm,) = capture(lambda x: second(first(x)), hidden())
    code, names = gm.code, [node.name for node in gm.graph.nodes]
    monkeypatch.setattr(RMSNormFusion, verb, faulty)
    with pytest.raises(ZeroDivisionError, match="planted"):
        fuse(gm, Options())
    assert (gm.code, [node.name for node in gm.graph.nodes]) == (code, names)


def test_a_fault_in_an_inner_graph_leaves_the_outer_one_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = Norm(), MLP()
    (gm,) = capture(lambda x: outer(checkpoint(inner, x, use_reentrant=False)), hidden())
    codes = [module.code for module in gm.modules() if isinstance(module, GraphModule)]
    assert len(codes) == 2

    def faulty(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(NormGatedMLPFusion, "rewrite", faulty)
    with pytest.raises(ZeroDivisionError, match="planted"):
        fuse(gm, Options())
    assert [module.code for module in gm.modules() if isinstance(module, GraphModule)] == codes


# --- what the new nodes are ---


def test_a_new_node_has_the_metadata_of_what_it_replaces() -> None:
    net = nn.ModuleDict({"attention": Attention()})

    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return net["attention"](x, cos, sin)

    inputs = hidden(), *tables()
    (old,), (_, _, (new,)) = capture(forward, *inputs), fused(forward, *inputs)
    (call,) = calls(new, "norm_qkv_rope")
    assert len(call.meta["example_value"]) == 3
    for was, item in zip(old.graph.output_node().args[0], new.graph.output_node().args[0], strict=True):
        want, got = was.meta["example_value"], item.meta["example_value"]
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
        assert item.meta["stack_trace"] == was.meta["stack_trace"]
        assert list(item.meta["nn_module_stack"]) == list(was.meta["nn_module_stack"])


def test_placeholders_stay_first_and_keep_what_the_compiler_knows_of_them() -> None:
    (gm,) = capture(Residual(), hidden(), hidden())
    before = [vars(node).get("_dynamo_source") for node in gm.graph.find_nodes(op="placeholder")]
    assert None not in before
    fuse(gm, Options())
    nodes = list(gm.graph.nodes)
    assert [node.op for node in nodes[: len(before)]] == ["placeholder"] * len(before)
    assert [vars(node).get("_dynamo_source") for node in nodes[: len(before)]] == before


def with_size_of(gm: GraphModule, node: Node) -> str:
    """Also return the size of `node`. Dynamo reads a size where it cannot name it by an input's."""
    with gm.graph.inserting_after(node):
        size = gm.graph.call_method("size", (node,))
        size.meta["example_value"] = node.meta["example_value"].shape
    output = gm.graph.output_node()
    output.args = ((*output.args[0], size),)
    return size.name


def test_who_read_the_shape_of_an_erased_value_reads_the_activations() -> None:
    (gm,) = capture(MLP(), hidden())
    gate = next(node for node in gm.graph.nodes if "linear" in str(node.target))
    size = with_size_of(gm, gate.args[0])
    assert all_fused(fuse(gm, Options())) == {"norm_gated_mlp": 1}
    (reader,) = (node for node in gm.graph.nodes if node.name == size)
    assert reader.args == (calls(gm, "norm_gated_mlp")[0].args[0],)
    assert reader.args[0].op == "placeholder"


def test_who_reads_another_shape_than_the_activations_is_an_extra_user() -> None:
    (gm,) = capture(MLP(), hidden())
    gate = next(node for node in gm.graph.nodes if "linear" in str(node.target))
    size = with_size_of(gm, gate)
    refusal(fuse(gm, Options()), "norm_gated_mlp", "extra-user", f"another user: '{size}'")


# --- early reads of weights ---


class Stack(nn.Module):
    """Two layers, with something between."""

    def __init__(self, between: Callable[[nn.Module], Any] = lambda net: None) -> None:
        super().__init__()
        self.first, self.second, self.between = MLP(), MLP(), between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.between(self)
        return self.second(y)


def early(gm: GraphModule, op: str = "norm_gated_mlp") -> list[bool]:
    return [call.kwargs.get("early", False) for call in calls(gm, op)]


def test_ops_behind_an_op_may_read_their_weights_early() -> None:
    assert early(run(Stack(), hidden())[1]) == [False, True]


WRITTEN: dict[str, Callable[[Any], Any]] = {
    "weight": lambda net: net.second.down.weight.mul_(2),
    "view of a weight": lambda net: net.second.norm.weight.view(-1)[2:].mul_(2),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_op_whose_weight_the_graph_writes_may_not(name: str) -> None:
    assert early(run(Stack(WRITTEN[name]), hidden())[1]) == [False, False]


def test_an_op_whose_weight_the_graph_computes_may_not() -> None:
    class Net(Stack):
        def forward(self, x: Tensor) -> Tensor:
            y, m = self.first(x), self.second
            h = m.norm(y)
            return y + m.down(nn.functional.silu(m.gate(h)) * nn.functional.linear(h, m.up.weight * 2))

    assert early(run(Net(), hidden())[1]) == [False, False]


def test_an_op_that_follows_none_may_not() -> None:
    net = Stack()
    _, gm = run(lambda x: (net.first(x), net.second(x)), hidden())
    assert early(gm) == [False, False]


def test_an_op_in_an_inner_graph_may_not() -> None:
    net = Stack()
    _, gm = run(lambda x: checkpoint(net, x, use_reentrant=False), hidden())
    assert [early(module) for module in gm.modules() if isinstance(module, GraphModule)] == [[], [False, False]]


def early_attention(gm: GraphModule) -> list[bool]:
    return early(gm, "self_attention")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["full"] * 3, [False, True, True]), (["full", "sliding", "full", "sliding"], [False, False, True, True])],
    ids=str,
)
def test_attention_may_read_a_mask_early_that_an_op_before_it_has_waited_for(
    kinds: list[str], expected: list[bool]
) -> None:
    """A model computes one mask for all layers of a kind. The first op of a graph reads nothing early."""
    gm = decode_graph(
        len(kinds), layer_types=[f"{kind}_attention" for kind in kinds], sliding_window=5, use_sliding_window=True
    )
    fuse(gm, Options())
    assert early_attention(gm) == expected


def test_attention_may_read_a_mask_early_that_the_caller_computed() -> None:
    assert early_attention(run(Net(layers=2, caches=2), *inputs())[1]) == [False, True]


def test_attention_that_does_not_follow_the_op_that_waited_for_its_mask_may_not() -> None:
    first, mlp, second = Net(), MLP(), Net()

    def net(follow: bool, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        mask = mask & (position > 0)
        y, _ = first(x, cos, sin, position, mask)
        z, _ = second(mlp(y if follow else x), cos, sin, position, mask)
        return y + z

    for follow in (False, True):
        assert early_attention(run(partial(net, follow), *inputs())[1]) == [False, follow]


STEPS: dict[str, dict[str, Any]] = {
    "every layer computes its mask": {"attend": lambda s: attend(s.q, s.keys, s.values, s.mask & (s.x[:1, :, :1] < 9))},
    "the mask is written": {"last": lambda s: s.mask.logical_or_(s.x[:1, :, :1] < 9).sum()},
    "keys are written": {"last": lambda s: s.keys.mul_(2).sum()},
    "values are written": {"last": lambda s: s.values.view(-1)[3:].mul_(2).sum()},
    "a weight is written": {"last": lambda s: s.project.norm.weight.mul_(2).sum()},
}


@pytest.mark.parametrize("name", STEPS)
def test_attention_may_not_read_early_what_the_graph_computes_or_writes(name: str) -> None:
    assert early_attention(run(Net(layers=3, caches=3, **STEPS[name]), *inputs())[1]) == [False] * 3


def test_attention_may_not_read_a_cache_early_that_another_layer_writes() -> None:
    """Of three layers the last has the cache of the first."""
    assert early_attention(run(Net(layers=3, caches=2), *inputs())[1]) == [False, True, False]


# --- inner graphs ---


def test_checkpointed_layers_are_fused() -> None:
    net = Stack()
    report, gm = run(lambda x: net.second(checkpoint(net.first, x, use_reentrant=False)), hidden())
    assert all_fused(report) == {"norm_gated_mlp": 2}
    assert not any("rsqrt" in module.code for module in gm.modules() if isinstance(module, GraphModule))


def test_both_branches_of_a_cond_are_fused() -> None:
    norm = Norm()

    def net(x: Tensor, weight: Tensor) -> Tensor:
        norm.weight = nn.Parameter(weight, requires_grad=False)
        return torch.cond(x.sum() > 0, lambda x: norm(x), lambda x: norm(-x), (x,))

    x, weight = hidden(), torch.rand(HIDDEN)
    for sign in (1, -1):
        with torch.no_grad():
            got, (report,), _ = fused(net, sign * x, weight)
            torch.testing.assert_close(got, net(sign * x, weight))
        assert all_fused(report) == {"rms_norm": 2}
        torch._dynamo.reset()


# --- options ---


def test_a_fusion_that_is_switched_off_leaves_its_nodes_to_the_others() -> None:
    report, _ = run(MLP(), hidden(), options=Options.parse({"fusions": {"norm_gated_mlp": False}}, None))
    assert all_fused(report) == {"linear_residual": 1, "rms_norm": 1}


@pytest.mark.parametrize("precision", ["match", "high"])
def test_the_precision_is_an_argument_of_every_op(precision: str) -> None:
    norm, stack = Norm(), Stack()
    _, gm = run(lambda x: norm(stack(x)), hidden(), options=Options.parse({"precision": precision}, None))
    flags = [call.args[11] for call in calls(gm, "norm_gated_mlp")] + [call.args[3] for call in calls(gm, "rms_norm")]
    assert flags == [precision == "high"] * 3


# --- a fusion of one's own ---

SWISH = """
    import torch
    from fusepass.fusion import Fusion, Match, Refused
    from fusepass.graph import operands, value

    class SwishFusion(Fusion[Match]):
        name = "swish"
        summary = "x * sigmoid(x)"
        order = 5

        def match(self, node):
            for x, gate in operands(node, "mul"):
                if getattr(gate, "target", None) == "sigmoid" and gate.args[0] is x:
                    return Match(node, x, (), (), (gate, node), (node,))

        def check(self, match):
            if value(match.activation).dim() != 3:
                raise Refused("shape", "expected three dimensions")

        def rewrite(self, match, high):
            return OP, (match.activation,)
"""


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Add the toy fusion, with the op that it names and other changes, as a file in `patterns/`."""

    def add(op: str, changes: dict[str, str] | None = None) -> None:
        text = textwrap.dedent(SWISH)
        for old, new in {**(changes or {}), "OP": op}.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "swish.py").write_text(text)
        monkeypatch.setattr(patterns, "__path__", [*patterns.__path__, str(tmp_path)])
        fusepass.fusions.cache_clear()

    monkeypatch.delitem(sys.modules, "fusepass.patterns.swish", raising=False)
    yield add
    sys.modules.pop("fusepass.patterns.swish", None)
    vars(patterns).pop("swish", None)
    fusepass.fusions.cache_clear()


def test_one_file_with_match_check_and_rewrite_is_a_fusion(register: Callable[..., None]) -> None:
    register("torch.ops.aten.silu.default")

    def net(x: Tensor) -> Tensor:
        return x.sigmoid() * x

    report, gm = run(net, hidden())
    assert all_fused(report) == {"swish": 1}
    assert "aten.silu" in gm.code
    refusal(run(net, hidden()[0])[0], "swish", "shape", "expected three dimensions")
    assert run(net, hidden(), options=Options.parse({"fusions": {"swish": False}}, None))[0].sites == []


@pytest.mark.parametrize(
    ("op", "code", "words"),
    [
        ("torch.ops.aten.sum.default", "shape", r"\(3, 5, 20\), the op gives torch.Size\(\[\]\)"),
        ("torch.ops.aten.isnan.default", "shape", "is torch.float32"),
        ("torch.ops.aten.mT.default", "shape", r"\(3, 5, 20\)"),
    ],
)
def test_an_op_with_another_result_is_refused(op: str, code: str, words: str, register: Callable[..., None]) -> None:
    register(op)
    refusal(run(lambda x: x.sigmoid() * x, hidden())[0], "swish", code, words)


def test_an_op_with_other_strides_is_refused_but_not_where_they_mean_nothing(register: Callable[..., None]) -> None:
    register("torch.ops.aten.contiguous.default")
    x = hidden().transpose(0, 1)
    refusal(run(lambda x: x.sigmoid() * x, x)[0], "swish", "strides", r"strides \(20, 100, 1\)")


def test_a_check_that_asks_for_a_size_that_only_the_data_decides_refuses_its_site_and_no_other(
    register: Callable[..., None],
) -> None:
    """With anything else that a check may raise, the whole graph stays as it was."""
    register("torch.ops.aten.silu.default", {".dim() != 3": ".shape[0] > 9"})
    x = hidden()
    torch._dynamo.decorators.mark_unbacked(x, 0)
    report, _ = run(lambda x, y: (x.sigmoid() * x, y.sigmoid() * y), x, hidden())
    sites = [(site.fused, site.code, site.reason) for site in report.sites]
    assert sites == [
        (False, "shape", "whether the op fits hangs on a size that only the data decides: u0 > 9"),
        (True, None, None),
    ]


@pytest.mark.parametrize(("net", "shapes"), [(MLP(), ()), (Attention(), ((1, 1, 5, 8),) * 2)], ids=["mlp", "attention"])
def test_a_number_of_tokens_that_only_the_data_decides_is_fused(net: nn.Module, shapes: tuple[Any, ...]) -> None:
    args = [hidden(), *map(torch.randn, shapes)]
    for x, dim in zip(args, (1, 2, 2)):
        torch._dynamo.decorators.mark_unbacked(x, dim)
    assert sum(all_fused(run(net, *args)[0]).values()) == 1


def test_functorch_is_named() -> None:
    norm = Norm()
    report, _ = run(lambda x: torch.vmap(norm)(x), hidden())
    refusal(report, "rms_norm", "tensor-subclass", r"is a wrapper of functorch \(vmap, grad, jvp\), not a plain tensor")


def test_a_region_that_writes_its_own_input_is_refused(register: Callable[..., None]) -> None:
    """The op would not."""
    in_place = {
        'for x, gate in operands(node, "mul"):': 'for x, gate in [node.args[:2]] if node.target == "mul_" else []:'
    }
    register("torch.ops.aten.silu.default", in_place)
    report, _ = run(lambda x: x.mul_(x.sigmoid()), hidden())
    refusal(report, "swish", "mutation", "'mul_' writes in place what the region reads")


def test_an_op_may_take_a_number_first(register: Callable[..., None]) -> None:
    register(
        "torch.ops.aten.pow.Scalar",
        {
            "(match.activation,)": "(2, match.activation)",
            'for x, gate in operands(node, "mul"):': "for x, gate in [(node.args[0], node)] if node.args else []:",
            '"target", None) == "sigmoid"': '"target", None) == "exp2"',
            "(gate, node), (node,)": "(node,), (node,)",
        },
    )
    report, gm = run(lambda x: x.exp2(), hidden())
    assert all_fused(report) == {"swish": 1}
    assert "aten.pow" in gm.code


def test_a_module_of_the_graph_that_is_no_graph_stays() -> None:
    (gm,) = capture(Norm(), hidden())
    gm.extra = nn.Linear(HIDDEN, HIDDEN)
    assert all_fused(fuse(gm, Options())) == {"rms_norm": 1}
    assert isinstance(gm.extra, nn.Linear)
