"""The whole path of a graph: options -> collect and rewrite sites -> report -> hand over."""

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._triton import has_triton_package

from fusepass import inductor
from fusepass.graph import argument, called, is_opaque_rms_norm, mutated
from fusepass.options import Options, cpu_mode, disabled
from fusepass.report import GraphReport, Report, record

log = logging.getLogger(__name__)
_logged: set[str] = set()
_here = threading.local()


class NothingFused(RuntimeError):
    """`strict`: a graph that has RMSNorms got no fusion."""


def fusepass(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="fusepass")` calls for each graph Dynamo captured.

    `mode` means for Inductor what it means in torch.compile; `options` are the fields of `Options`. Raises ValueError
    or TypeError for options that do not exist, and `NothingFused` if `strict` asks for it. A fault of our own is
    logged and leaves the graph as it was.
    """
    return _watchable(_compile(gm, example_inputs, mode, options))


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[Any, ...]]]:
    """The compiled graphs that this thread runs meanwhile, each with the addresses and numbers that it is given."""
    ran: list[tuple[Any, ...]] = []
    _here.ran = ran
    try:
        yield ran
    finally:
        _here.ran = None


def _watchable(compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiled)  # ahead-of-time compilation asks for its attributes
    def run(*args: Any) -> Any:
        if (ran := getattr(_here, "ran", None)) is not None:
            ran.append((weakref.ref(run), *(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)))
        return compiled(*args)

    return run


def _compile(
    gm: GraphModule, example_inputs: list[Any], mode: str | None, options: Mapping[str, Any] | None
) -> Callable[..., Any]:
    parsed = Options.parse(options, mode)
    if disabled():
        _once(log.info, "FUSEPASS_DISABLE=1: graphs go to Inductor as they are")
        return inductor.compile_with_inductor(gm, example_inputs, parsed.mode, parsed.inductor, fused=False)

    original = None
    if parsed.verify:
        from fusepass import verify

        original = verify.pristine(gm)
    report = _fuse(gm, example_inputs, parsed)
    record(report, _attempt())
    _trace(report)
    log.info("%s", report.summary())
    fused = bool(report.counts())
    if not fused and (norms := _rms_norms(gm)):
        _complain(report, norms, parsed)

    if original is None or not fused:
        return _hand_over(gm, example_inputs, parsed, fused)
    after = verify.pristine(gm)  # Inductor may change `gm`
    compiled = _hand_over(gm, example_inputs, parsed, fused)
    return verify.Verified(original, after, compiled, report, raises=parsed.verify == "raise")


def _attempt() -> object:
    """Equal for the graphs of one of Dynamo's attempts to compile a frame: compile ids begin anew after a reset."""
    context = torch._guards.CompileContext.try_get()
    return (weakref.ref(context), context.attempt) if context is not None else object()


def _hand_over(gm: GraphModule, example_inputs: list[Any], options: Options, fused: bool) -> Callable[..., Any]:
    """What runs the remainder."""
    if options.remainder == "eager":
        for name, given in (("mode", options.mode), ("inductor", options.inductor)):
            if given not in (None, "default", {}):
                _once(log.warning, f"{name}={given!r} has no effect with remainder='eager'")
        return gm.forward
    # Inductor's own random numbers are others than the original graph's.
    patches = {"fallback_random": True, **options.inductor} if options.verify else options.inductor
    if inductor.uses_cuda_graphs(options.mode, patches):
        _warn_about_caches(gm)
    return inductor.compile_with_inductor(gm, example_inputs, options.mode, patches, fused)


fusepass.reset = inductor.reset  # type: ignore[attr-defined]


def _fuse(gm: GraphModule, example_inputs: list[Any], options: Options) -> GraphReport:
    """Rewrite `gm` in place, or say in the report why not."""
    context = torch._guards.CompileContext.try_get()
    compile_id = str(context.compile_id) if context is not None and context.compile_id else "?"
    on_cpu = not any(isinstance(item, Tensor) and item.device.type == "cuda" for item in example_inputs)
    if on_cpu and cpu_mode() == "off":
        return GraphReport(compile_id, untouched="it runs on a CPU (FUSEPASS_CPU=interpret runs the kernels there)")
    if not (on_cpu and cpu_mode() == "reference") and not has_triton_package():
        return GraphReport(compile_id, untouched="Triton, which compiles the kernels, is not installed")
    return rewritten(gm, options, compile_id, keep_code=log.isEnabledFor(logging.DEBUG) or _traced())


def rewritten(gm: GraphModule, options: Options, compile_id: str, keep_code: bool) -> GraphReport:
    """The report of `fuse(gm)`. A fault of ours leaves `gm` as it was, and is logged and reported."""
    try:
        from fusepass.rewrite import fuse

        return fuse(gm, options, compile_id, keep_code)
    except Exception as fault:
        if (key := f"{type(fault).__name__}: {fault}") not in _logged:
            _logged.add(key)
            log.exception("fusepass failed on graph %s, which is compiled unmodified; please report this", compile_id)
        return GraphReport(compile_id, untouched=f"a fault in fusepass: {key}")


def _traced() -> bool:
    """Whether TORCH_TRACE is on: where it is not, the handler has taken itself away at Dynamo's first record."""
    internal = torch._logging._internal
    return internal.LOG_TRACE_HANDLER in internal.trace_log.handlers


def _trace(report: GraphReport) -> None:
    """Hand the report and both graphs to tlparse."""
    if not _traced():
        return
    texts = {"before": report.before, "after": report.after, "report": Report([report]).to_json()}
    for name, text in texts.items():
        encoding = "json" if name == "report" else "string"
        torch._logging.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"fusepass_{name}", "encoding": encoding},  # noqa: B023
            payload_fn=lambda: text,  # noqa: B023
        )


def _rms_norms(gm: GraphModule) -> int:
    graphs = (module.graph for module in gm.modules() if isinstance(module, GraphModule))
    return sum(_is_rms_norm(node) for graph in graphs for node in graph.nodes)


def _is_rms_norm(node: Node) -> bool:
    """Whether `node` is 1/rms of the last dimension (or rms, and something is divided by it), or an RMSNorm in one
    operator: of torch or aten, in more spellings than any fusion matches."""
    if is_opaque_rms_norm(node):
        return True
    divides = called(node) == "sqrt" and any("div" in called(user) for user in node.users)
    inverts = called(node) == "rsqrt" or (called(node) == "pow" and node.args[1:] == (-0.5,))
    if not (divides or inverts):
        return False
    means = [mean for total in node.all_input_nodes for mean in (total, *total.all_input_nodes)]  # epsilon or none
    return any(
        called(mean) == "mean" and argument(mean, 1, "dim") in (-1, [-1], (-1,)) and _squares(mean.all_input_nodes[0])
        for mean in means
    )


def _squares(node: Node) -> bool:
    return called(node) in ("pow", "square", "mul") and node.args[1:] in ((), (2,), node.args[:1])


def _complain(report: GraphReport, norms: int, options: Options) -> None:
    reasons = list(dict.fromkeys(site.reason for site in report.sites if site.reason))[:3] or ["no fusion matched"]
    if off := [name for name, on in options.fusions.items() if not on]:
        reasons.append(f"switched off: {', '.join(off)}")
    cause = report.untouched or "; ".join(reasons)
    message = f"graph {report.compile_id} has {norms} RMSNorms and got no fusion: {cause}"
    if options.strict:
        raise NothingFused(message)
    if report.untouched and "CPU" in report.untouched:
        return  # the INFO line says so already, and it is what the user asked for
    log.warning("%s (what to do: docs/nothing-fused.md)", message)


def _warn_about_caches(gm: GraphModule) -> None:
    """Inductor drops CUDA graphs in silence when a graph writes an input that is not marked static."""
    for node in gm.graph.nodes:
        for written in mutated(node):
            marks = written.meta.get("tensor_dict", {})
            if written.op == "placeholder" and not marks.get("_dynamo_static_input_type"):
                _once(
                    log.warning,
                    f"the graph writes '{written.name}', which is not marked static, so Inductor will not use CUDA "
                    "graphs: initialise the cache before compiling (StaticCache.early_initialization), or let "
                    "generate() compile",
                )
                return


def _once(say: Callable[..., None], message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        say("%s", message)
