"""Steps that are recorded: which, when, and what runs where they are not. A CUDA graph is played by a stand-in here."""

import contextlib
import functools
import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, Qwen3ForCausalLM, StaticCache
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import fusepass
from fusepass.decoding.step import Recorder, has_hooks, python_state, same, without_cuda_graphs
from tests.models import small_qwen3


class Tape(TorchDispatchMode):
    """Notes the operators that run."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Under other modes Dynamo compiles nothing, and never again."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class StandIn(Recorder):
    """Records on a CPU: a replay runs the operators again, on the same memory, and nothing of Python."""

    made: list["StandIn"]
    fault: Exception | None = None

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.usable = True
        self.recorded = self.replayed = 0
        self.made.append(self)

    def record(self, work: Callable[[], Any]) -> Any:
        if self.fault:
            raise self.fault
        self.recorded += 1
        with Tape() as self.tape:
            results = work()
        self.fresh = True  # the first replay has run already
        return results

    def replay(self) -> None:
        self.replayed += 1
        if not self.fresh:
            for func, args, kwargs, result in self.tape.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.fresh = False


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    StandIn.made = []
    monkeypatch.setattr("fusepass.decoding.step.Recorder", StandIn)
    monkeypatch.setattr(StandIn, "fault", None)
    return StandIn.made


def compile_config(**settings: Any) -> CompileConfig:
    settings = {"mode": None, "options": {"remainder": "eager", "mode": "reduce-overhead"}, **settings}
    config = CompileConfig(backend="fusepass", **settings)
    config._compile_all_devices = True
    return config


def both_ways(model: Any, loop: Any, config: CompileConfig | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """What Hugging Face's loop gives uncompiled, and what ours does."""
    inputs = {"inputs": torch.randint(1, 152, (2, 5)), "max_new_tokens": 18, "cache_implementation": "static"}
    inputs |= {"pad_token_id": 0, "eos_token_id": 151, **settings}
    sequences = []
    for way in ({"disable_compile": True}, {"custom_generate": loop, "compile_config": config or compile_config()}):
        torch.manual_seed(5)
        sequences.append(model.generate(**inputs, **way))
    return sequences[0], sequences[1]


WAYS: list[dict[str, Any]] = [
    {},
    {"inputs": torch.tensor([[3, 1, 4]])},
    {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])},
    {"do_sample": True, "top_k": 20},
    {"do_sample": True, "top_p": 0.9, "top_k": 0},
    {"do_sample": True, "repetition_penalty": 3.0},  # looks at the tokens so far: the choice is not recorded
]


@pytest.mark.parametrize("settings", WAYS)
def test_a_step_is_recorded_once_nothing_is_compiled_and_replayed_in_this_and_the_next_calls(
    settings: dict[str, Any], recorders: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=2)
    for ordinary in (2, 1, 1):  # the first step compiles, and the first of every call asks Dynamo
        plain, ours = both_ways(model, loop, eos_token_id=None, **settings)
        assert torch.equal(ours, plain)
        (recorder,) = recorders
        assert recorder.recorded == 1
        assert recorder.replayed == 17 - ordinary
        recorder.replayed = 0
    (report,) = fusepass.reports()
    assert report.counts()["attention"] == 1
    assert not [record for record in caplog.records if record.name.startswith("fusepass") and record.levelno > 20]


def test_other_prompts_settings_weights_and_models_are_not_replayed_as_the_last(recorders: list[StandIn]) -> None:
    models, loop = (small_qwen3(1), small_qwen3(1)), fusepass.decode_loop(run_ahead=2, cache_length=64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    prompt = torch.randint(1, 152, (2, 5))
    usual = models[0].generate(prompt, max_new_tokens=18, eos_token_id=None, pad_token_id=0, disable_compile=True)
    # Other ends would leave it to chance whether there is a second step, which is what is recorded.
    never = [token for token in range(152) if token not in usual][:34]
    recorded = []
    for model, settings in (
        (models[0], {"do_sample": True, "top_k": 20}),
        (models[0], {"do_sample": True, "top_k": 20}),
        (models[0], {"do_sample": True, "top_k": 3}),
        (models[0], {"eos_token_id": None}),
        (models[0], {"inputs": prompt, "eos_token_id": never[::2]}),
        (models[0], {"inputs": prompt, "eos_token_id": never[1::2]}),
        (models[0], {"inputs": prompt, "eos_token_id": never[1::2], "pad_token_id": 7}),
        (models[0], {"attention_mask": mask}),
        (models[0], {"attention_mask": mask.flip(0)}),
        (models[1], {"attention_mask": mask}),
        (models[1], {"attention_mask": mask, "inputs": torch.randint(1, 152, (2, 5))}),
    ):
        plain, ours = both_ways(model, loop, **settings)
        assert torch.equal(ours, plain)
        recorded.append(recorders[0].recorded)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(9, 0), requires_grad=False)
    plain, ours = both_ways(model, loop, **settings)
    assert torch.equal(ours, plain)
    assert recorders[0].recorded > recorded[-1] == recorded[-2], "the new weight lies elsewhere"
    assert recorded[:3] == [1, 1, 2]
    assert recorded[4] == recorded[5] == recorded[6], "only what was copied differs"


def test_rows_that_end_are_padded_by_replays_too(recorders: list[StandIn]) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=2)
    lengths = set()
    for first in range(8):
        plain, ours = both_ways(model, loop, eos_token_id=list(range(first, 152, 12)))
        assert torch.equal(ours, plain)
        lengths |= set((plain[:, 5:] != 0).sum(1).tolist())
    assert len(lengths) > 4
    assert recorders[0].replayed > 8


def test_a_tie_of_many_tokens_is_chosen_from_again_and_the_wider_choice_recorded(
    recorders: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=2)
    model.lm_head.weight.data[20:] = 0.0  # these tie, and the choice looks at 66 of them and the others
    model.lm_head.weight.data[:20] *= 5.0
    plain, ours = both_ways(model, loop, eos_token_id=None, do_sample=True, top_k=1)
    assert torch.equal(ours, plain)
    plain, ours = both_ways(model, loop, eos_token_id=None, do_sample=True, top_k=15)
    assert torch.equal(ours, plain)
    assert recorders[0].recorded > 2, "no token tied"
    assert recorders[0].replayed


class Leaving(Qwen3RMSNorm):
    """A norm that leaves something behind in Python, which no replay would do."""

    calls: int
    log: list[int]
    state: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.leave()
        return super().forward(x)  # type: ignore[no-any-return]

    def leave(self) -> None:
        raise NotImplementedError

    def left(self) -> int:
        """How often, since the last time."""
        calls = self.calls + len(self.log) + int(self.state)
        self.calls, self.log, self.state = 0, [], torch.zeros(())
        return calls


class CountingUp(Leaving):
    def leave(self) -> None:
        self.calls += 1


class Noting(Leaving):
    def leave(self) -> None:
        self.log.append(1)


class Replacing(Leaving):
    """And the next step reads it."""

    def leave(self) -> None:
        self.state = self.state + 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.where(self.state % 2 == 0, 1.0, -1.0)


@pytest.mark.parametrize("kind", [CountingUp, Noting, Replacing])
def test_a_forward_that_changes_the_model_in_python_runs_in_every_step(
    kind: type[Leaving], recorders: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=0)
    norm = model.model.norm
    norm.__class__ = kind
    norm.calls, norm.log = 0, []
    norm.register_buffer("state", torch.zeros(()))
    for _ in range(2):
        inputs = {"inputs": torch.tensor([[3, 1, 4]]), "max_new_tokens": 12, "cache_implementation": "static"}
        inputs |= {"pad_token_id": 0, "eos_token_id": None}
        plain = model.generate(**inputs, disable_compile=True)
        assert norm.left() == 12
        ours = model.generate(**inputs, custom_generate=loop, compile_config=compile_config())
        assert torch.equal(ours, plain)
        assert norm.left() == 12
    assert recorders[0].recorded == 0
    messages = [record.getMessage() for record in caplog.records if record.name == "fusepass.decoding.step"]
    assert len(messages) == 1
    # A number that counts on compiles anew until Dynamo gives up.
    assert "changes attributes" in messages[0] or "0 compiled graphs" in messages[0]


NOTED: list[int] = []


@torch.compiler.disable
def note() -> int:
    NOTED.append(1)
    return len(NOTED)


class NotingFirst(Qwen3ForCausalLM):
    """Dynamo breaks the graph: what is before and behind the break runs in Python."""

    @functools.wraps(Qwen3ForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sign = 1 - 2 * (note() % 2)
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * sign
        return outputs


class NotingLast(Qwen3ForCausalLM):
    @functools.wraps(Qwen3ForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        note()
        return outputs


@pytest.mark.parametrize("kind", [NotingFirst, NotingLast])
def test_a_forward_with_a_graph_break_runs_in_every_step(
    kind: type[Qwen3ForCausalLM], recorders: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=0)
    model.__class__ = kind
    for _ in range(2):
        NOTED.clear()
        plain, ours = both_ways(model, loop, eos_token_id=None)
        assert torch.equal(ours, plain)
        assert len(NOTED) == 2 * 18
    assert not recorders[0].recorded
    messages = [record.getMessage() for record in caplog.records if record.name == "fusepass.decoding.step"]
    assert len(messages) == 1
    assert kind.__name__ in messages[0]


def test_a_call_with_torch_compile_switched_off_says_nothing_about_the_model(recorders: list[StandIn]) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop()
    with torch.compiler.set_stance("force_eager"):
        plain, ours = both_ways(model, loop)
        assert torch.equal(ours, plain)
    assert not recorders[0].recorded
    plain, ours = both_ways(model, loop)
    assert torch.equal(ours, plain)
    assert recorders[0].recorded


def test_what_can_not_be_recorded_is_said_once_and_runs_in_inductors_graphs(
    recorders: list[StandIn], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop()
    monkeypatch.setattr(StandIn, "fault", RuntimeError("operation not permitted when stream is capturing\nand more"))
    given: list[CompileConfig] = []
    compiled = model.get_compiled_call
    monkeypatch.setattr(model, "get_compiled_call", lambda config: given.append(config) or compiled(config))
    for one in (loop, loop, fusepass.decode_loop()):
        plain, ours = both_ways(model, one)
        assert torch.equal(ours, plain)
    assert recorders[0].graph is None
    assert [config.options["mode"] for config in given].count(None) == 2  # the first token, the steps
    assert given[-1].options["mode"] == "reduce-overhead"
    assert [record.getMessage() for record in caplog.records if record.name == "fusepass.decoding.step"] == [
        "decode_loop: the step of Qwen3ForCausalLM is not recorded by the loop: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]


def test_functions_of_the_user_in_the_forward_are_called_in_every_step(
    recorders: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=0)
    norm, seen = model.model.norm, []
    assert not has_hooks(model)
    with caplog.at_level("INFO", "fusepass"), norm.register_forward_hook(lambda *_: seen.append(1)):
        assert has_hooks(model)
        both_ways(model, loop, eos_token_id=None, max_new_tokens=6)
    assert len(seen) == 2 * 6
    assert "Qwen3ForCausalLM has hooks" in caplog.text
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        assert has_hooks(model)
    seen.clear()
    original = norm.forward
    norm.forward = lambda x: seen.append(1) or original(x)
    assert has_hooks(model)
    for _ in range(2):
        both_ways(model, loop, eos_token_id=None, max_new_tokens=6)
    assert len(seen) == 4 * 6
    assert not recorders[0].recorded


def test_what_a_forward_may_leave_behind_is_seen() -> None:
    model = small_qwen3(1)
    cache = StaticCache(config=model.config, max_cache_len=8)
    norm = model.model.norm
    norm.stats, norm.seen, norm.last = {"calls": 0}, [None], deque([1], maxlen=1)
    norm.count, norm.rate = torch.zeros(1), 0.5
    state = functools.partial(python_state, model, cache, torch.device("cuda"))
    before = state()
    model._compiled_call = lambda: None  # another thread's generate
    norm.rate = float("0.5")
    assert same(before, state())
    changes: list[Callable[[], Any]] = [
        lambda: norm.stats.update(calls=1),
        lambda: norm.seen.__setitem__(0, model),
        lambda: norm.last.append(2),
        lambda: norm.count.add_(1),
        lambda: setattr(norm, "eps", 0.1),
        lambda: setattr(model, "new", None),
        lambda: setattr(cache.layers[0], "calls", 1),
        lambda: norm.register_buffer("state", torch.zeros(1)),
        lambda: setattr(norm, "state", torch.zeros(1)),
    ]
    for change in changes:
        before = state()
        assert same(before, state())
        change()
        assert not same(before, state())


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, None),
        ({"mode": "max-autotune"}, "max-autotune-no-cudagraphs"),
        ({"fullgraph": True, "dynamic": False}, None),
        ({"mode": None, "options": {"mode": "reduce-overhead", "precision": "high"}}, None),
    ],
)
def test_the_loop_brings_its_own_graph_where_cuda_graphs_are_asked_for(given: dict[str, Any], mode: str | None) -> None:
    config = CompileConfig(backend="fusepass", **given)
    before = config.to_dict()
    plain = without_cuda_graphs(torch.nn.Identity(), config)
    assert plain is not None
    assert config.to_dict() == before
    options = {**given["options"], "mode": mode} if "options" in given else None
    assert plain.to_dict() == {**before, "fullgraph": True, "mode": None if options else mode, "options": options}


@pytest.mark.parametrize(
    "given",
    [
        {"backend": "inductor"},
        {"mode": None},
        {"mode": "default"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"mode": None, "options": {"mode": "reduce-overhead", "verify": True}},
        {"mode": None, "options": {"mode": "reduce-overhead", "inductor": {"triton.cudagraphs": True}}},
        {"mode": None, "options": {"mode": "max-autotune", "inductor": {"triton.cudagraphs": False}}},
    ],
)
def test_other_configs_are_left_as_they_are(given: dict[str, Any]) -> None:
    assert without_cuda_graphs(torch.nn.Identity(), CompileConfig(**{"backend": "fusepass", **given})) is None


def test_between_calls_the_loop_holds_no_model_and_a_copy_nothing(recorders: list[StandIn]) -> None:
    loop, model = fusepass.decode_loop(), small_qwen3(1)
    both_ways(model, loop)
    assert loop.__getstate__()["_step"] is None
    gone = weakref.ref(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert gone() is None


def test_calls_compile_no_more_wrappers_of_the_model(recorders: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    loop, model, made = fusepass.decode_loop(), small_qwen3(1), []
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: made.append(1) or compiling(*args, **kwargs))
    inputs = {"inputs": torch.tensor([[3, 1, 4]]), "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    for _ in range(3):
        config = compile_config()
        model.generate(**inputs, cache_implementation="static", custom_generate=loop, compile_config=config)
    assert len(made) == 1


class Graph:
    """A CUDA graph whose captures go as `faults` says."""

    begun: list[Any]
    faults: tuple[str, ...] = ()

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        self.begun.append(pool)
        if "begin" in self.faults and len(self.begun) > 1:
            raise RuntimeError("no capture can begin")

    def capture_end(self) -> None:
        if "end" in self.faults:
            raise RuntimeError("the capture failed before")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    Graph.begun, Graph.faults = [], ()
    handles = itertools.count()
    stand_ins: dict[str, Any] = {
        "CUDAGraph": Graph,
        "Stream": mock.MagicMock(),
        "current_stream": mock.MagicMock(),
        "stream": lambda _: contextlib.nullcontext(),
        "graph_pool_handle": lambda: next(handles),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    monkeypatch.setattr("fusepass.decoding.step._streams", {})
    return Graph


@pytest.mark.parametrize("faults", [(), ("end",), ("end", "begin")], ids=str)
def test_a_recording_that_is_interrupted_raises_the_interruption(faults: tuple[str, ...], graphs: type[Graph]) -> None:
    graphs.faults = faults

    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recorder(torch.device("cuda", 0)).record(work)


def test_graphs_share_a_pool_only_with_one_that_lives(graphs: type[Graph]) -> None:
    recorder = Recorder(torch.device("cuda", 0))
    for _ in range(2):
        recorder.record(lambda: None)
    recorder.graph = None
    recorder.record(lambda: None)
    assert graphs.begun == [0, 0, 1]
