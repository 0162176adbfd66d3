"""`options={"verify": ...}`: what is wrong is found, named and survived; what is right is left as it is."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusepass
from fusepass import ops, verify
from fusepass.patterns.norm_gated_mlp import NormGatedMLPFusion
from fusepass.verify import VerificationError
from tests.models import small_qwen3, static_cache

LAYERS = 2
DRAWS = int(os.environ.get("FUSEPASS_DRAWS", "3"))
"""For each of three families and three dtypes; 23 make more than 200, and take ten minutes on two CPU cores."""
DTYPES = [torch.float16, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of these tests are about verifying, not kernels: the ops run their references."""
    monkeypatch.setenv("FUSEPASS_CPU", "reference")


def ids(batch: int = 1, length: int = 5) -> Tensor:
    return torch.randint(152, (batch, length))


def compiled(model: Any, verify: bool | str = True, dynamic: bool | None = False, **options: Any) -> Any:
    options = {"remainder": "eager", "verify": verify, **options}
    return torch.compile(model, backend="fusepass", dynamic=dynamic, options=options)


def faults() -> list[str]:
    return [fault for report in fusepass.reports() for fault in report.faults]


class Planted:
    """A fault in what one op gives, from the time when `active` is set."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        self.change, self.active, self.calls = change, True, 0


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Planted]]:
    """`plant(op, change)`: from now on `change(result)` is made to what the op's CPU kernel gives."""
    with torch.library._scoped_library("fusepass", "IMPL") as library:

        def plant(name: str, change: Callable[[Tensor], Any]) -> Planted:
            planted, op = Planted(change), ops.OPS[name]

            def wrong(*args: Any) -> Any:
                planted.calls += 1
                result = op.reference(*args)
                if planted.active:
                    planted.change(result[0] if isinstance(result, tuple) else result)
                return result

            library.impl(name, wrong, "CPU", allow_override=True)
            return planted

        yield plant


def decode(model: Any, run: Any, steps: Tensor, prompt: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Logits of each step after a prompt, and the tensors of the static cache at the end."""
    cache = static_cache(model, steps.shape[0], steps.shape[1] + 4)
    logits = []
    for tokens in (steps[:, :prompt], *steps[:, prompt:].split(1, 1)):
        torch.compiler.cudagraph_mark_step_begin()
        logits.append(run(tokens, past_key_values=cache, use_cache=True).logits[:, -1].clone())
    return torch.stack(logits), [t for layer in cache.layers for t in (layer.keys, layer.values)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_model_passes_and_its_cache_and_logits_are_the_bits_of_an_unverified_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FUSEPASS_CPU", "interpret")
    model, steps = small_qwen3(LAYERS, dtype), ids(1, 7)
    results = []
    for on in (True, False):
        torch._dynamo.reset()
        results.append(decode(model, compiled(model, verify=on), steps))
    (logits, cache), (plain_logits, plain_cache) = results
    assert torch.equal(logits, plain_logits)
    assert all(map(torch.equal, cache, plain_cache))
    assert faults() == []
    assert "could not be verified" not in caplog.text


def _one_row(out: Tensor) -> None:
    out[..., -1, :] *= 1.1


def _bias(out: Tensor) -> None:
    out += 0.05 * out.square().mean().sqrt()


def _nan(out: Tensor) -> None:
    out[..., -1, 3] = torch.nan


@torch.no_grad()
@pytest.mark.parametrize("change", [_one_row, _bias, _nan])
@pytest.mark.parametrize("op", ["norm_gated_mlp", "linear_residual", "norm_linear", "norm_qkv_rope", "rms_norm"])
def test_a_fault_in_an_op_is_named_and_survived(
    op: str, change: Callable[[Tensor], None], plant: Callable[..., Planted], caplog: pytest.LogCaptureFixture
) -> None:
    planted = plant(op, change)
    model, tokens = small_qwen3(LAYERS, torch.float16), ids(2)
    fusions = {"norm_gated_mlp": False, "norm_qkv_rope": False, "norm_linear": False} if op == "rms_norm" else {}
    run = compiled(model, fusions=fusions)
    plain = model(tokens, use_cache=False).logits
    for _ in range(2):
        assert torch.equal(run(tokens, use_cache=False).logits, plain)
    (report,) = fusepass.reports()
    sites = [site for site in report.sites if site.op == op]
    named = [fault for fault in report.faults if " at " in fault]
    assert all(f"{op} at {site.path} ({site.source}" in fault for site, fault in zip(sites, named, strict=True))
    if change is _nan:
        assert report.faults[0] == "output 0: error inf, the limit is 0"
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert all(fault in record.getMessage() for fault in report.faults)
    before = planted.calls
    run(tokens, use_cache=False)
    assert planted.calls == before  # the original runs now


@torch.no_grad()
def test_a_fault_from_the_third_call_on_is_found_there_and_the_cache_is_eagers(plant: Callable[..., Planted]) -> None:
    model, steps = small_qwen3(LAYERS, torch.float32), ids(1, 8)
    model.compile(backend="fusepass", options={"remainder": "eager", "verify": True})
    planted = plant("self_attention", _bias)
    planted.active = False
    caches, seen = [static_cache(model, 1, 16) for _ in range(2)], []
    for i in range(8):
        step = steps[:, i : i + 1]
        planted.active = i >= 2
        ours = model(step, past_key_values=caches[0], use_cache=True).logits
        plain = model.forward(step, past_key_values=caches[1], use_cache=True).logits
        assert torch.equal(ours, plain)
        seen.append(len(faults()))
    assert seen[:2] == [0, 0]
    assert seen[2:] == [seen[2]] * 6
    assert seen[2] >= LAYERS
    assert any("norm_qkv_rope at model.layers.0.self_attn (" in fault for fault in faults())
    assert any(" and attention at model.layers.0.self_attn (" in fault for fault in faults())
    for ours, plain in zip(*(cache.layers for cache in caches)):
        assert torch.equal(ours.keys, plain.keys)
        assert torch.equal(ours.values, plain.values)


@torch.no_grad()
def test_an_op_put_where_the_graph_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = NormGatedMLPFusion.rewrite

    def swapped(self: NormGatedMLPFusion, match: Any, high: bool) -> Any:
        overload, arguments = rewrite(self, match, high)
        names = [argument.name for argument in overload._schema.arguments]
        gate, up = names.index("gate"), names.index("up")
        arguments = list(arguments)
        arguments[gate], arguments[up] = arguments[up], arguments[gate]
        return overload, tuple(arguments)

    monkeypatch.setattr(NormGatedMLPFusion, "rewrite", swapped)
    model, tokens = small_qwen3(LAYERS), ids()
    assert torch.equal(
        compiled(model)(tokens, use_cache=False).logits,
        model(tokens, use_cache=False).logits,
    )
    outputs, site = faults()
    assert outputs.startswith("output 0: error")
    assert site.startswith("norm_gated_mlp at model.layers.0")
    assert "not what the graph computes there" in site


@torch.no_grad()
def test_raise_raises_and_leaves_nothing_written(plant: Callable[..., Planted]) -> None:
    plant("self_attention", _bias)
    model, tokens = small_qwen3(1), ids(1, 1)
    cache = static_cache(model, 1, 8)
    with pytest.raises(
        VerificationError, match=r"(?s)graph 0/0 does not compute .*\n  norm_qkv_rope at model.layers.0"
    ):
        compiled(model, verify="raise")(tokens, past_key_values=cache, use_cache=True)
    assert not cache.layers[0].keys.any()
    assert not cache.layers[0].cumulative_length.any()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Noisy(nn.Module):
    """Draws random numbers, writes a view of an input, and returns a view of it and an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        y = x + self.linear(x) + torch.rand_like(x)
        state[1:].add_(y.sum(0))
        return y, None, state[0], y.argmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_random_numbers_are_those_of_a_call_without_verifying(remainder: str) -> None:
    model, x = Noisy(), torch.randn(5, 24)
    outcomes = []
    for run in (compiled(model, remainder=remainder), model):
        torch.manual_seed(17)
        state = torch.zeros(3, 24)
        outcomes.append([*run(x, state)[::3], state, torch.rand(3)])
        outcomes[-1] += [*run(x, state)[::3], state.clone()]
    assert fusepass.reports()[0].counts() == {"linear_residual": 1}
    assert faults() == []
    for ours, plain in zip(*outcomes):
        torch.testing.assert_close(ours, plain)


@torch.no_grad()
def test_after_a_fault_outputs_are_views_of_the_users_own_tensors(plant: Callable[..., Planted]) -> None:
    plant("linear_residual", _bias)
    x, state = torch.randn(5, 24), torch.zeros(3, 24)
    _, nothing, row, _ = compiled(Noisy())(x, state)
    assert faults()[0].startswith("output 0: error")  # which other random numbers would hide
    assert nothing is None
    row.fill_(3)
    assert (state[0] == 3).all()
    assert state[1:].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_each_new_shape_is_verified_at_its_first_and_third_call(
    mode: Callable[[], Any], plant: Callable[..., Planted]
) -> None:
    planted = plant("linear_residual", lambda out: None)
    with mode():
        run, counts = compiled(Residual(), dynamic=True), []
        for rows in (5, 5, 5, 5, 6, 6, 6, 5):
            before = planted.calls
            run(torch.randn(rows, 24))
            counts.append(planted.calls - before)
    assert counts == [2, 1, 2, 1, 2, 1, 2, 1]
    assert len(fusepass.reports()) == 1
    assert faults() == []


@torch.no_grad()
def test_each_graph_of_a_broken_model_is_verified_by_itself(plant: Callable[..., Planted]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Residual(), Residual()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x * 2)

    plant("linear_residual", lambda out: out.mul_(1.01) if out.abs().max() > 100 else out)
    model, x = Broken(), torch.full((4, 24), 100.0)
    model.first.linear.weight.zero_()
    model.first.linear.bias.fill_(-40)
    assert torch.equal(compiled(model)(x), model(x))
    assert [len(report.faults) > 0 for report in fusepass.reports()] == [False, True]
    assert any(fault.startswith("linear_residual at second") for fault in faults())


@torch.no_grad()
def test_a_graph_that_can_not_be_verified_runs_as_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(verify, "compare", broken)
    model, x = Residual(), torch.randn(3, 24)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert "could not be verified" in caplog.text
    assert "planted" in caplog.text


@torch.no_grad()
def test_without_it_the_graph_is_handed_over_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "pristine", None)
    x = torch.randn(3, 24)
    compiled(Residual(), verify=False)(x)
    assert fusepass.reports()[0].counts() == {"linear_residual": 1}


def _compare(got: list[float], rounded: list[float], want: list[float]) -> bool:
    """Whether `got` passes."""
    error, limit = verify.compare(*(torch.tensor(got),), [torch.tensor(rounded)], torch.tensor(want))
    return error <= limit


def test_nan_and_infinity_must_be_where_they_belong_unless_rounding_decides() -> None:
    inf, nan = torch.inf, torch.nan
    assert _compare([1, nan, inf], [1, nan, inf], [1, nan, inf])
    assert not _compare([1, nan, 2], [1, 2, 2], [1, 2, 2])
    assert not _compare([1, 2, 2], [1, nan, 2], [1, nan, 2])
    assert not _compare([1, 2, -inf], [1, 2, inf], [1, 2, inf])
    assert _compare([1, inf, 2], [1, inf, 2], [1, 7e4, 2])


def test_integers_must_be_equal_unless_rounding_decides() -> None:
    want = torch.tensor([3, 4])
    assert verify.compare(want, [want], want) == (0, 0)
    assert verify.compare(torch.tensor([3, 5]), [want], want) == (torch.inf, 0)
    assert verify.compare(torch.tensor([3, 5]), [want, torch.tensor([3, 6])], want) == (0, 0)


def test_one_wrong_channel_is_seen_beside_an_outlier() -> None:
    want = torch.randn(64, 32, dtype=torch.float64)
    want[:, 7] *= 100
    rounded = [want.bfloat16() for _ in range(2)]
    wrong = rounded[0].clone()
    wrong[:, 3] *= 1.2
    (error, limit), (right, _) = (verify.compare(got, rounded, want) for got in (wrong, rounded[0]))
    assert right <= limit < error


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_no_false_alarm_in_fresh_draws(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights and inputs, each verified, kernels and all; printed is how near to its limit the worst came."""
    monkeypatch.setenv("FUSEPASS_CPU", "interpret")
    monkeypatch.setattr(verify, "CALLS", range(1000))
    worst, compare = [0.0], verify.compare

    def recorded(*args: Any) -> tuple[float, float]:
        worst.append(verify._excess(result := compare(*args)))
        return result

    monkeypatch.setattr(verify, "compare", recorded)
    for dtype in DTYPES:
        torch._dynamo.reset()
        model = small_qwen3(1, dtype, family, num_attention_heads=4)
        run = compiled(model)
        for _ in range(DRAWS):
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.3, 3.0)
                elif parameter.dim() == 2:
                    parameter.normal_(0, parameter.shape[1] ** -0.5)
            run(ids(1, 2), use_cache=False)
    print(f"{family}: {len(faults())} alarms in {3 * DRAWS} draws; the worst at {max(worst):.2f} of its limit")
    assert faults() == []
    assert len(worst) > 5 * 3 * DRAWS


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replays_of_cuda_graphs_are_verified(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and caches are the bits of an unverified run, and what is replayed at the third step is judged."""
    model = small_qwen3(LAYERS, dtype).cuda()
    steps, results = ids(1, 10).cuda(), []
    for on in (True, False):
        torch._dynamo.reset()
        run = torch.compile(model, backend="fusepass", options={"mode": "reduce-overhead", "verify": on})
        results.append(decode(model, run, steps, prompt=1))
    (logits, cache), (plain_logits, plain_cache) = results
    assert faults() == []
    assert torch.equal(logits, plain_logits)
    assert all(map(torch.equal, cache, plain_cache))
