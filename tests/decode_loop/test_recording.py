"""Steps that are recorded: which, when, and what runs where they are not. A CUDA graph is played by a stand-in here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import fusepass
from fusepass.decoding.step import Recorder, has_hooks, without_cuda_graphs
from tests.models import small_qwen3


class StandIn(Recorder):
    """Records on a CPU: what a replay computes is there behind it, and not before the first."""

    made: list["StandIn"]
    fault: Exception | None = None

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model, device)
        self.usable = True
        self.recorded = self.replayed = 0
        self.made.append(self)

    def record(self, work: Callable[[], Any]) -> Any:
        if self.fault:
            raise self.fault
        self.recorded += 1
        self.work, self.fresh, self.results = work, True, work()  # Python runs once, and the first replay nothing
        return self.results

    def replay(self) -> None:
        self.replayed += 1
        if not self.fresh:
            for old, new in zip(self.results, self.work()):
                if old is not None:
                    old.copy_(new)
        self.fresh = False


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    monkeypatch.setenv("FUSEPASS_CPU", "reference")
    StandIn.made = []
    monkeypatch.setattr("fusepass.decoding.loop.Recorder", StandIn)
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
def test_a_step_is_recorded_behind_one_that_compiled_nothing_and_replayed_from_then_on(
    settings: dict[str, Any], recorders: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=2)
    for call, before in ((1, 2), (2, 1)):
        plain, ours = both_ways(model, loop, eos_token_id=None, **settings)
        assert torch.equal(ours, plain)
        (recorder,) = recorders
        assert recorder.recorded == call
        assert recorder.replayed == 17 - before
        recorder.replayed = 0
    (report,) = fusepass.reports()
    assert report.counts()["attention"] == 1
    assert not [record for record in caplog.records if record.name.startswith("fusepass") and record.levelno > 20]


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
    def leave(self) -> None:
        self.state = self.state + 1


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
    assert recorders[0].recorded == 1
    messages = [record.getMessage() for record in caplog.records if record.name == "fusepass.decoding.step"]
    assert len(messages) == 1
    assert "changes attributes" in messages[0]


def test_what_can_not_be_recorded_is_said_once_and_runs_in_inductors_graphs(
    recorders: list[StandIn], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop()
    monkeypatch.setattr(StandIn, "fault", RuntimeError("operation not permitted when stream is capturing\nand more"))
    given: list[CompileConfig] = []
    compiled = model.get_compiled_call
    monkeypatch.setattr(model, "get_compiled_call", lambda config: given.append(config) or compiled(config))
    for _ in range(2):
        plain, ours = both_ways(model, loop)
        assert torch.equal(ours, plain)
    assert [config.options["mode"] for config in given].count(None) == 1
    assert given[-1].options["mode"] == "reduce-overhead"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "decode_loop: no step of Qwen3ForCausalLM is recorded by the loop: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]


def test_hooks_are_called_in_every_step(recorders: list[StandIn]) -> None:
    model, loop = small_qwen3(1), fusepass.decode_loop(run_ahead=0)
    assert not has_hooks(model)
    seen: list[int] = []
    with model.model.norm.register_forward_hook(lambda *_: seen.append(1)):
        assert has_hooks(model)
        both_ways(model, loop, eos_token_id=None)
    assert len(seen) == 2 * 18
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        assert has_hooks(model)
    assert not recorders[0].recorded


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
    plain = without_cuda_graphs(config)
    assert plain is not None
    assert config.to_dict() == before
    options = {**given["options"], "mode": mode} if "options" in given else None
    assert plain.to_dict() == {**before, "mode": None if options else mode, "options": options}


@pytest.mark.parametrize(
    "given",
    [
        {"backend": "inductor"},
        {"mode": None},
        {"mode": "default"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"mode": None, "options": {"mode": "reduce-overhead", "verify": True}},
        {"mode": None, "options": {"mode": "reduce-overhead", "inductor": {"triton.cudagraphs": True}}},
    ],
)
def test_other_configs_are_left_as_they_are(given: dict[str, Any]) -> None:
    assert without_cuda_graphs(CompileConfig(**{"backend": "fusepass", **given})) is None


def test_a_recorder_is_of_one_model_and_a_copy_of_the_loop_has_its_own(recorders: list[StandIn]) -> None:
    loop, models = fusepass.decode_loop(), (small_qwen3(1), small_qwen3(1))
    for model in (models[0], models[0], models[1]):
        both_ways(model, loop)
    assert [recorder.of[0]() for recorder in recorders] == list(models)
    assert loop._recorder is recorders[1]
    assert loop.__getstate__()["_recorder"] is None
