"""What fails around the kernels: Triton, its compiler, its cache, tables of launch configs, memory."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch
from torch import Tensor
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources

import fusepass
from fusepass import tuning
from fusepass.kernels import launch, replay
from fusepass.ops import OPS, library, norm_gated_mlp
from fusepass.ops.library import force_strategy, forget_launches
from fusepass.tuning import tune
from tests.models import small_qwen3, static_cache
from tests.surroundings.common import compiled, ids

ROOT = Path(__file__).parents[2]
FAULTS = [
    CompilationError(None, None, "BLOCK_N must be a power of two"),
    OutOfResources(557056, 232448, "shared memory"),
    RuntimeError("PassManager::run failed"),
    PermissionError(13, "Permission denied", "/home/me/.triton"),
]


class Broken:
    """A kernel that fails at one stage: when the op allocates, when it is compiled, loaded or launched."""

    __name__ = "broken_kernel"
    arg_names = ("x_ptr", "out_ptr")

    def __init__(self, stage: str, fault: Exception) -> None:
        self.stage, self.fault = stage, fault
        self.tried = self.launched = 0

    def fail(self, stage: str) -> None:
        if stage == self.stage:
            self.tried += 1
            raise self.fault

    def run(self, *args: Any, grid: Any, warmup: bool) -> Any:
        self.fail("compile")
        return SimpleNamespace(name=self.__name__, _init_handles=lambda: self.fail("load"))

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*args: Any) -> None:
            self.fail("launch")
            self.launched += 1

        return start


@pytest.fixture
def cuda_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    """The way a call takes on a GPU, for CPU tensors: an op that launches `kernel` to double its argument."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU tensor's device
    monkeypatch.setattr(replay, "past_jit", lambda: True)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "past_jit", lambda: False)

    def op(kernel: Any) -> Callable[[Tensor], Tensor]:
        def start(x: Tensor) -> Tensor:
            if kernel.stage not in ("compile", "load"):
                x = x + 0  # what computes outside of our kernels is not recorded
            kernel.fail("allocate")
            out = torch.empty_like(x)
            launch.run(kernel, (1,), x, out)
            return out

        return library._cuda("toy", lambda x: None, start, lambda x: 2 * x, {})

    return op


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("stage", ["compile", "load", "launch"])
def test_where_a_kernel_can_not_be_made_the_reference_runs_and_one_warning_says_so(
    stage: str, fault: Exception, cuda_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Broken(stage, fault)
    call = cuda_path(kernel)
    for x in (torch.randn(4), torch.randn(4), torch.randn(5)):
        assert torch.equal(call(x), 2 * x)
    assert kernel.tried == 2, "once for each kind of arguments"
    (warning,) = caplog.messages
    assert "fusepass::toy runs in plain torch" in warning
    assert str(fault) in warning
    assert list(library.STOOD_IN) == ["toy"]
    library.STOOD_IN.clear()


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("allocate", torch.OutOfMemoryError("CUDA out of memory")),
        ("launch", RuntimeError("Triton Error [CUDA]: out of memory")),
    ],
)
def test_out_of_memory_is_the_callers_error_and_the_next_call_runs_the_kernel(
    stage: str, fault: Exception, cuda_path: Any
) -> None:
    kernel = Broken(stage, fault)
    call = cuda_path(kernel)
    with pytest.raises(type(fault), match="out of memory"):
        call(torch.randn(4))
    kernel.stage = "none"
    call(torch.randn(4))
    assert kernel.launched == 1
    assert library.STOOD_IN == {}


@torch.no_grad()
def test_a_model_that_ran_out_of_memory_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small_qwen3(2), ids(1, 6)
    fast, caches = compiled(model), [static_cache(model, 1, 8) for _ in range(2)]

    def step(run: Any, cache: Any) -> Tensor:
        return run(tokens, past_key_values=cache, use_cache=True).logits

    step(fast, static_cache(model, 1, 8))
    with monkeypatch.context() as patch:
        reached: list[int] = []

        def full(*_: Any, **__: Any) -> Any:
            reached.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(norm_gated_mlp, "F", SimpleNamespace(silu=full, linear=torch.nn.functional.linear))
        with pytest.raises(torch.OutOfMemoryError):
            step(fast, caches[0])
        assert reached
    for cache in caches:
        cache.reset()
    torch.testing.assert_close(step(fast, caches[0]), step(model, caches[1]), rtol=1e-4, atol=1e-4)
    assert len(fusepass.reports()) == 1, "nothing was compiled again"


def real_compiler(config: dict[str, int], **environment: str) -> tuple[dict[str, str], int]:
    """What `unavailable` prints, in a process of its own: this one may have Triton's interpreter on."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "tests.surroundings.unavailable", json.dumps(config)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("runs in plain torch") == 1
    return tuple(json.loads(done.stdout))


def test_what_triton_can_not_compile_runs_in_plain_torch() -> None:
    stood_in, right = real_compiler({"BLOCK_N": 3, "BLOCK_K": 64, "num_warps": 1})
    assert right == 2
    assert "power of 2" in stood_in["linear_residual"]


def test_a_triton_cache_that_can_not_be_written_leaves_the_op_to_plain_torch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = {"BLOCK_N": 2, "BLOCK_K": 64, "num_warps": 1}
    stood_in, right = real_compiler(config, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert right == 2
    assert "Not a directory" in stood_in["linear_residual"]


PROGRAM = """
import sys
sys.modules["triton"] = None
import torch, transformers
import fusepass
from tests.models import small_qwen3
model, tokens = small_qwen3(1), torch.arange(5)[None]
with torch.no_grad():
    out = torch.compile(model, backend="fusepass", options={"remainder": "eager"})(tokens, use_cache=False).logits
    assert torch.equal(out, model(tokens, use_cache=False).logits)
(report,) = fusepass.reports()
print(report.untouched, len(report.sites))
"""


@pytest.mark.parametrize(
    ("cpu", "printed"),
    [("interpret", "Triton, which compiles the kernels, is not installed 0"), ("reference", "None 5")],
)
def test_without_triton_the_graph_is_left_as_it_is_and_one_warning_says_so(cpu: str, printed: str) -> None:
    env = {**os.environ, "FUSEPASS_CPU": cpu, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed
    assert done.stderr.count("got no fusion: Triton") == (cpu == "interpret")


# --- tables of launch configs ---

NAME = "linears m1 n40 k64 float32"
FINE = {"BLOCK_N": 2, "BLOCK_K": 64, "num_warps": 1}
MMA = {"BLOCK_N": 2, "CHUNKS": 2, "num_warps": 1}


@pytest.fixture
def user_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table of a user with an H200 would be."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr(tuning, "slug", lambda: "nvidia-h200")
    path = tuning.user_table()
    path.parent.mkdir(parents=True)
    tuning.table.cache_clear()
    yield path
    tuning.table.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "{", "", "[]", "3", "\xff", "[" * 100_000, json.dumps({NAME: [1]}), json.dumps({NAME: {**FINE, "BLOCK_N": 0}}),
        json.dumps({NAME: {**FINE, "BLOCK_N": "2"}}), json.dumps({NAME: {**FINE, "BLOCK_K": 1.5}}),
        json.dumps({NAME: {"BLOCK_N": 2}}), json.dumps({"no launch": FINE}), json.dumps({"skinny " + NAME: FINE}),
        json.dumps({NAME: {**FINE, "UNROLL": 4}}), json.dumps({NAME: {**FINE, "num_stages": 3}}),
        json.dumps({NAME: {**FINE, "AHEAD": 0}}), json.dumps({"skinny " + NAME: {**FINE, "SLICES": 1, "AHEAD": -1}}),
        json.dumps({"linears m1 n8 k9000 float32": {**FINE, "BLOCK_K": 128}}),
        json.dumps({"skinny linears m64 n8 k8 float32": {**FINE, "SLICES": 1, "BLOCK_M": 8}}),
        json.dumps({NAME: MMA}), json.dumps({"gated m2 n8 k8 bfloat16": MMA}),
        json.dumps({"linears m1 n8 k8 bfloat16": {**MMA, "BLOCK_N": 3}}),
        json.dumps({"linears m1 n8 k8 bfloat16": {**MMA, "CHUNKS": 1}}),
        json.dumps({"linears m1 n8 k8 bfloat16": {**MMA, "BLOCK_K": 64}}),
        json.dumps({"linears m1 n8 k8320 bfloat16": MMA}), json.dumps({"skinny linears m8 n8 k8 bfloat16": MMA}),
    ],
)  # fmt: skip
def test_a_corrupt_table_of_the_user_is_ignored_with_one_warning(
    text: str, user_table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user_table.write_text(text, encoding="latin-1")
    shipped = json.loads((Path(tuning.__file__).parent / "nvidia-h200.json").read_text())
    for _ in range(2):
        assert tuning.table() == shipped != {}
    (warning,) = caplog.messages
    one_entry = text.startswith('{"')
    what = (
        "1 launch configs are ignored, which no kernel takes" if one_entry else "this user's launch configs are ignored"
    )
    assert what in warning
    assert str(user_table) in warning


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("linears m1 n8 k8192 float16", MMA), ("linears m1 n8 k8 bfloat16", {**MMA, "AHEAD": 3}),
        ("gated m1 n8 k8 bfloat16", {**MMA, "BLOCK_N": 1}),
    ],
)  # fmt: skip
def test_a_users_table_may_have_one_row_run_on_tensor_cores(
    name: str, config: dict[str, int], user_table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user_table.write_text(json.dumps({name: config}))
    assert tuning.table()[name] == config
    assert not caplog.messages


def test_one_strange_entry_leaves_the_others_of_a_users_table(
    user_table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a release that had another setting."""
    user_table.write_text(json.dumps({NAME: FINE, NAME.replace("n40", "n48"): {**FINE, "UNROLL": 4}}))
    assert tuning.lookup("linears", 1, 40, 64, torch.float32) == FINE
    assert tuning.lookup("linears", 1, 48, 64, torch.float32) is None
    (warning,) = caplog.messages
    assert "1 launch configs are ignored, which no kernel takes" in warning
    assert "UNROLL" in warning


def test_a_table_that_can_not_be_read_is_ignored_with_one_warning(
    user_table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user_table.mkdir()
    assert tuning.table()
    assert [str(user_table) in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("path", Path(tuning.__file__).parent.glob("*.json"), ids=lambda path: path.stem)
def test_the_shipped_tables_can_be_read(path: Path) -> None:
    assert tuning.read(path) == json.loads(path.read_text()) != {}


def test_a_table_of_the_user_goes_before_the_shipped_one(user_table: Path, caplog: pytest.LogCaptureFixture) -> None:
    user_table.write_text(json.dumps({NAME: FINE}))
    assert tuning.lookup("linears", 1, 40, 64, torch.float32) == FINE
    assert not caplog.messages


@pytest.mark.parametrize("text", [None, "{"])
def test_the_tuner_says_at_once_that_its_table_can_not_be_written(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file" / "gpu.json" if text is None else tmp_path / "gpu.json"
    (tmp_path / "file").touch()
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "compile_ahead", lambda *_: pytest.fail("it began to measure"))
    monkeypatch.setattr(sys, "argv", ["tune", "--model", "Qwen3-0.6B", "--out", str(path)])
    with pytest.raises(SystemExit) as end:
        tune.main()
    assert end.value.code == 2
    assert str(path.parent) in capsys.readouterr().err
    assert text is None or path.read_text() == text


# --- the same on a GPU ---


def projection(rows: int, n: int = 640, k: int = 1024) -> tuple[Any, ...]:
    x, weight, residual = (torch.randn(size, device="cuda").bfloat16() for size in ((rows, k), (n, k), (rows, n)))
    return x, weight * k**-0.5, None, residual, False


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_on_a_gpu_a_config_that_can_not_run_leaves_the_op_to_plain_torch(
    rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fusepass")
    op, args = OPS["linear_residual"], projection(rows)
    # 512 KB of weights in flight, where a block of an H200 has 227 KB; and a tile of weights that is none.
    large = {"BLOCK_N": 128, "SLICES": 1, "BLOCK_K": 512, "num_warps": 8, "num_stages": 4}
    tile = large if rows > 1 else {"BLOCK_N": 3, "BLOCK_K": 64, "num_warps": 1}
    name = tuning.key("linears" if rows == 1 else "skinny linears", rows, 640, 1024, torch.bfloat16)
    forget_launches()
    with tuning.override({name: tile}):
        results = [op.overload(*args) for _ in range(2)]
    forget_launches()
    assert all(torch.equal(result, op.reference(*args)) for result in results)
    assert len(caplog.messages) == 1
    assert library.STOOD_IN.keys() == {"linear_residual"}
    library.STOOD_IN.clear()
    torch.testing.assert_close(op.overload(*args), op.reference(*args), rtol=2e-2, atol=2e-2)
    assert library.STOOD_IN == {}


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["rows", "library"])
def test_on_a_gpu_out_of_memory_is_torchs_error_and_the_next_call_works(strategy: Any) -> None:
    op, args = OPS["linear_residual"], projection(1 if strategy == "rows" else 512, n=1 << 17)
    with force_strategy(strategy):
        want = op.overload(*args)
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        try:
            with pytest.raises(torch.OutOfMemoryError):
                _ = [op.overload(*args) for _ in range(1 << 20)]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.equal(op.overload(*args), want)
