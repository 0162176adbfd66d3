"""Compile what the ops launch, for a GPU that need not be present; print what each kernel takes as JSON.

    python -m tests.kernels.compile_kernels sm_90 [--full]

Nothing here knows a kernel's arguments. The ops' own launchers run, on meta tensors, under a Triton driver that only
names the target, and `JITFunction.run` stops short of the launch. So each kernel is compiled with the launch config
and the specialisation it would run with (a meta tensor's address is 0, and thus a multiple of 16). Triton's interpreter
compiles nothing: TRITON_INTERPRET must not be set.
"""

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fusepass import kernels, tuning
from fusepass.kernels import gemv, skinny
from fusepass.kernels.launch import next_power_of_2
from fusepass.kernels.sample import sample
from fusepass.ops import OPS, force_strategy
from fusepass.ops.library import ROWS_LIMIT, SKINNY_LIMIT, Strategy


@dataclass(frozen=True)
class Model:
    """The sizes of one decoder layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    qk_norm: bool = True
    qkv_bias: bool = False
    activation: str = "silu"


MODELS = {
    "Qwen3-0.6B": Model(1024, 16, 8, 128, 3072),
    "Qwen3-4B": Model(2560, 32, 8, 128, 9728),
    "Qwen3-8B": Model(4096, 32, 8, 128, 12288),
    "Llama-3-70B": Model(8192, 64, 8, 128, 28672, qk_norm=False),
    "Qwen2.5-0.5B": Model(896, 14, 2, 64, 4864, qk_norm=False, qkv_bias=True),
    "Phi-3-mini": Model(3072, 32, 32, 96, 8192, qk_norm=False),
    "Gemma-3-1B": Model(1152, 4, 1, 256, 6912, activation="gelu_tanh"),
}


@dataclass(frozen=True)
class Case:
    """One step of one model: `batch` sequences of `seq` tokens, run by one strategy."""

    model: str
    dtype: torch.dtype
    strategy: Strategy
    batch: int
    seq: int
    high: bool = False


def quick_cases() -> Iterator[Case]:
    """The extremes: fewest and most rows of each strategy, small, large and awkward sizes, each dtype and precision."""
    steps: list[tuple[Strategy, int, int]] = [
        ("rows", 1, 1), ("rows", ROWS_LIMIT, 1), ("skinny", 16, 1), ("skinny", SKINNY_LIMIT, 1), ("library", 1, 128),
    ]  # fmt: skip
    kinds = [
        ("Qwen3-0.6B", torch.bfloat16, False),
        ("Qwen3-8B", torch.bfloat16, False),
        ("Qwen3-8B", torch.float32, False),
        ("Qwen2.5-0.5B", torch.float16, False),
        ("Gemma-3-1B", torch.bfloat16, True),
    ]
    for (model, dtype, high), step in itertools.product(kinds, steps):
        yield Case(model, dtype, *step, high)
    yield Case("Phi-3-mini", torch.float16, "library", 1, 128)  # for its heads of 96
    for batch in (1, 2):
        yield Case("Llama-3-70B", torch.bfloat16, "rows", batch, 1)  # a long K


def all_cases() -> Iterator[Case]:
    """Every model, dtype and precision; as many rows from a decoded batch as from one prompt."""
    rows: list[tuple[Strategy, int]] = [("rows", m) for m in range(1, ROWS_LIMIT + 1)]
    rows += [("skinny", m) for m in (ROWS_LIMIT + 1, 16, 32, 33, SKINNY_LIMIT)] + [("library", 128)]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for model, dtype, high, (strategy, m) in itertools.product(MODELS, dtypes, (False, True), rows):
        for batch, seq in {(m, 1), (1, m)}:
            yield Case(model, dtype, strategy, batch, seq, high)


def op_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
    """The arguments that each op gets in a layer of the model. A new op needs its line here."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=case.dtype, device="meta")

    model, eps, high = MODELS[case.model], 1e-6, case.high
    hidden, inner, head_dim = model.hidden, model.intermediate, model.head_dim
    q_size, kv_size = model.heads * head_dim, model.kv_heads * head_dim
    x, norm = empty(case.batch, case.seq, hidden), empty(hidden)
    biases = [empty(size) if model.qkv_bias else None for size in (q_size, kv_size, kv_size)]
    head_norm = (empty(head_dim) if model.qk_norm else None, eps)
    table = empty(case.batch, 1, case.seq, head_dim)
    cache = empty(case.batch, model.kv_heads, 1024, head_dim)
    visible = torch.empty(case.batch, 1, case.seq, 1024, dtype=torch.bool, device="meta")
    projection = (
        x, norm, eps, empty(q_size, hidden), empty(kv_size, hidden), empty(kv_size, hidden), *biases,
        *head_norm, *head_norm, table, table, head_dim,
    )  # fmt: skip
    position = torch.empty(case.seq, dtype=torch.int64, device="meta")
    return {
        "attention": (empty(case.batch, case.seq, model.heads, head_dim).transpose(1, 2), cache, cache, visible, 1.0),
        "rms_norm": (x, norm, eps, high),
        "norm_qkv_rope": (*projection, high),
        "self_attention": (*projection, cache, cache, position, visible, 1.0, high),
        "linear_residual": (empty(case.batch, case.seq, q_size), empty(hidden, q_size), None, x, high),
        "norm_linear": (x, norm, eps, empty(151936, hidden), None, 0, high),  # Qwen3's vocabulary
        "norm_gated_mlp": (
            x, norm, eps, empty(inner, hidden), empty(inner, hidden), empty(hidden, inner), None, None, None,
            x, model.activation, high,
        ),
    }  # fmt: skip


@contextmanager
def compile_only(target: GPUTarget) -> Iterator[list[CompiledKernel]]:
    """While inside, a kernel launch compiles for `target` and launches nothing; the list collects the kernels."""
    launched: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_for_launch(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(run(self, *args, warmup=True, **kwargs))

    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    )
    with mock.patch.object(JITFunction, "run", compile_for_launch):
        yield launched


def compile_case(case: Case, target: GPUTarget) -> list[CompiledKernel]:
    """The kernels that the ops launch in this case."""
    with compile_only(target) as launched, force_strategy(case.strategy):
        arguments = op_arguments(case)
        for name, op in OPS.items():
            op.overload(*arguments[name])  # on meta tensors, this only checks the arguments
            op.launch(*arguments[name])
        if case.strategy == "rows":  # no op's: the choice of a token, for vocabularies of two kinds of chunks
            for vocabulary, least in ((50_257, None), (300_000, 0.1)):
                logits = torch.empty(case.batch, vocabulary, device="meta")
                sample(logits, logits, 0.7, 20, least and (0.95, 1), least)
        # What only tables ask for.
        if case.strategy == "skinny":
            for pipeline in ({"AHEAD": 0, "PREFETCH": 1}, {"AHEAD": 1}):
                launch_pipeline(arguments, pipeline)
        one = case.strategy == "rows" and case.batch * case.seq == 1
        if one and case.dtype != torch.float32 and not case.high and target.backend == "cuda":
            launch_on_tensor_cores(arguments)
    return launched


def launch_pipeline(arguments: dict[str, tuple[Any, ...]], settings: tuning.Config) -> None:
    """The o_proj, and gate and up, through a pipeline."""
    pipeline = {"BLOCK_N": 16, "SLICES": 1, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2, **settings}
    x, weight = arguments["linear_residual"][:2]
    gate = arguments["norm_gated_mlp"][3]
    x = x.reshape(-1, x.shape[-1])
    rows, dtype = x.shape[0], x.dtype
    block_m = next_power_of_2(max(8, rows))
    hidden = x.new_empty(rows, gate.shape[1])
    keys = [
        tuning.key("skinny linears", block_m, *weight.shape, dtype),
        tuning.key("skinny gated", block_m, *gate.shape, dtype),
    ]
    with tuning.override(dict.fromkeys(keys, pipeline)):
        out = x.new_empty(rows, weight.shape[0])
        skinny.linears(x, None, 0.0, [weight], [None], [out], out, False, True)
        out = x.new_empty(rows, gate.shape[0])
        skinny.gated(hidden, None, 0.0, gate, gate, None, None, out, "silu", False, True)


def launch_on_tensor_cores(arguments: dict[str, tuple[Any, ...]]) -> None:
    """One row's q, k and v with the norm, o_proj with the residual, gate and up, by the kernels of `gemv_mma`."""
    x, norm, eps, q, k, v, *biases = arguments["norm_qkv_rope"][:9]
    attended, o, _, residual = arguments["linear_residual"][:4]
    gate, up = arguments["norm_gated_mlp"][3:5]
    x, attended, residual = (t.reshape(1, t.shape[-1]) for t in (x, attended, residual))
    config = {"BLOCK_N": 4, "CHUNKS": 2, "AHEAD": 2, "num_warps": 4}
    sizes = q.shape[0] + k.shape[0] + v.shape[0]
    keys = [("linears", sizes, q.shape[1]), ("linears", *o.shape), ("gated", *gate.shape)]
    with tuning.override({tuning.key(name, 1, *size, x.dtype): config for name, *size in keys}):
        outs = [x.new_empty(1, w.shape[0]) for w in (q, k, v)]
        gemv.linears(x, norm, eps, [q, k, v], biases, outs, None, False, True)
        gemv.linears(attended, None, 0.0, [o], [None], [x.new_empty(1, o.shape[0])], residual, False, True)
        gemv.gated(x, norm, eps, gate, up, None, None, x.new_empty(1, gate.shape[0]), "silu", False, True)


def kernel_names() -> set[str]:
    """Every kernel of the package; by convention a jitted function that is launched is called `..._kernel`."""
    modules = [importlib.import_module(f"fusepass.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    jitted = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {function.__name__ for function in jitted if function.__name__.endswith("_kernel")}


def describe(kernel: CompiledKernel) -> str:
    """`kernel(CONSTEXPR=value, ..., num_warps=4)`."""
    source = kernel.src
    values = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    shown = {param.name: values[param.name] for param in source.fn.params if param.is_constexpr}
    shown |= {"num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}
    return f"{kernel.name}({', '.join(f'{name}={value}' for name, value in shown.items())})"


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers and bytes of local memory (where registers spill to) of a thread, bytes of shared memory of a block,
    16-bit products that are added before they are rounded; before the wait, loads, and copies to shared memory. Of
    loads that read weights, and nothing else, with `evict_first`: how many, how many before the wait, and bits of the
    narrowest."""
    if "cubin" in kernel.asm:
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage"]
        usage = subprocess.check_output([*command, kernel.metadata_group[f"{kernel.name}.cubin"]], text=True)
        registers, local = r"REG:(\d+)", r"STACK:(\d+)"
    else:
        usage = kernel.asm["amdgcn"]
        registers, local = r"\.vgpr_count: *(\d+)", r"\.private_segment_fixed_size: *(\d+)"
    taken = {
        "registers": int(re.findall(registers, usage)[0]),
        "local_bytes": int(re.findall(local, usage)[0]),
        "shared_bytes": kernel.metadata.shared,
    }
    ptx = kernel.asm.get("ptx", "")
    narrow = r"\bfma\.rn(?:\.ftz)?\.b?f16|v_(?:pk_)?fmac?_f16"
    taken["narrow_fmas"] = len(re.findall(narrow, ptx or kernel.asm["amdgcn"]))
    loads = re.findall(r"ld\.global\S*evict_first\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    early = ptx.partition("griddepcontrol.wait")[0]
    taken["early_loads"] = early.count("ld.global")
    taken["early_copies"] = early.count("cp.async.cg")
    if "bulk.prefetch" in ptx:
        taken["prefetched_early"] = ptx.rindex("bulk.prefetch") < ptx.index("griddepcontrol.wait")
    if loads:
        taken["weight_load_bits"] = min(int(lanes or 1) * int(bits) for lanes, bits in loads)
        taken["weight_loads"] = len(loads)
        taken["early_weight_loads"] = early.count("L1::evict_first")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_90, sm_100, gfx942, ...")
    parser.add_argument("--full", action="store_true", help="every model, dtype and row count: minutes")
    options = parser.parse_args()
    arch = options.target
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)

    compiled: dict[str, dict[str, Any]] = {}
    for case in all_cases() if options.full else quick_cases():
        try:
            launched = compile_case(case, target)
        except Exception as error:
            raise RuntimeError(f"{case} does not compile for {arch}") from error
        for kernel in launched:
            if kernel.hash not in compiled:
                compiled[kernel.hash] = {"kernel": describe(kernel), "case": str(case), **resources(kernel)}
    ours = {name for name in kernel_names() if target.backend == "cuda" or "_mma_" not in name}
    if missing := ours - {row["kernel"].split("(")[0] for row in compiled.values()}:
        raise RuntimeError(f"no case launches {', '.join(sorted(missing))}")
    print(json.dumps(list(compiled.values()), indent=1))


if __name__ == "__main__":
    main()
