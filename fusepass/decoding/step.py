"""One step after another: the forward of the last token and the choice of the next, on a GPU as one CUDA graph."""

import copy
import inspect
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

from fusepass.backend import watched
from fusepass.decoding.choice import Choice
from fusepass.inductor import uses_cuda_graphs
from fusepass.report import one_line

log = logging.getLogger(__name__)

WITHOUT_CUDA_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
_UNRECORDED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose steps turned out not to be recordable."""
_ALONE = threading.RLock()
"""Before torch 2.13 no graph may be replayed and no number drawn on a device while another thread captures there."""
_streams: dict[torch.device, torch.cuda.Stream] = {}
"""Where graphs are recorded."""


class Recorder:
    """Records CUDA graphs, each in the memory of the one before, which it replaces."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.usable = device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pool: Any = None

    def record(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, which `replay` computes: nothing is computed here. Raises what `work` raises, or CUDA
        about work that can not be recorded."""
        # Not `torch.cuda.graph`, which waits for the device and gives the allocator's memory back.
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if self.graph is None:  # a pool whose last graph is gone may not be used again
            self.pool = torch.cuda.graph_pool_handle()
        with _ALONE:
            if self.device not in _streams:
                _streams[self.device] = torch.cuda.Stream(self.device)
            stream = _streams[self.device]
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                torch._C._cuda_clearCublasWorkspaces()  # each graph has its own, in its own memory
                try:
                    graph.capture_begin(self.pool, capture_error_mode="thread_local")
                    result = work()
                    graph.capture_end()
                except BaseException:
                    with suppress(Exception):
                        self._abandon(graph)
                    raise
                torch._C._cuda_clearCublasWorkspaces()
            before.wait_stream(stream)
        self.graph = graph
        return result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave memory and random numbers as they were before a capture that failed."""
        try:
            graph.capture_end()
        except Exception:  # allocator and generator still believe in the capture (pytorch issue 171263)
            with suppress(Exception):  # they raise where it did not even begin
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                torch._C._cuda_releasePool(self.device.index, self.pool)
            empty = torch.cuda.CUDAGraph()
            empty.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)  # one that holds nothing warns
            empty.capture_end()

    def replay(self) -> None:
        assert self.graph is not None
        with _ALONE:
            self.graph.replay()


class Step:
    """Feeds `token` [B] int64 to the model, and writes the next one to it. `start` begins a call of `generate`.

    What Inductor's CUDA graphs leave to the host, Dynamo's guards and checks of some 300 addresses, takes a slow one
    longer than a small model takes an H200: 0.75 ms a token where the device needs 0.56. So with the backend fusepass
    the loop compiles without them, and without graph breaks, and records a graph of its own, which holds the choice
    too. The first step of every call runs as it would without: Dynamo checks its guards, and what was recorded is
    replayed only if that step was one compiled graph, the same one as in the step before, of the same addresses.
    """

    def __init__(self, device: torch.device) -> None:
        self.recorder = Recorder(device)
        self.stream = here(device)
        self.like: tuple[Any, ...] | None = None
        self.tensors: dict[str, Tensor] = {}
        self.recorded: tuple[Tensor, Tensor | None] | None = None
        self.ran: list[Any] = []
        """What the last step that was not replayed ran, and so what `recorded` is of."""

    def start(
        self,
        model: Any,
        token: Tensor,
        prepared: dict[str, Any],
        model_kwargs: dict[str, Any],
        given: CompileConfig | None,
        held: int,
        eos: Tensor | None,
    ) -> None:
        """Begin with `token` [B] behind `held` in the cache. prepared, model_kwargs: what `generate` gives its loops
        and the model; `given`: its compile_config, where `prepared` has one without CUDA graphs in its place."""
        config: GenerationConfig = prepared["generation_config"]
        self.model, self.cache, self.given = model, model_kwargs["past_key_values"], given
        self.select = Choice(prepared["logits_processor"], config.do_sample)
        fixed, counting = _inputs(model, model_kwargs, held)
        pad: Any = config._pad_token_tensor
        ends = eos is not None and len(token) > 1
        new: dict[str, Any] = {"token": token, "unfinished": torch.ones_like(token, dtype=torch.bool), **counting}
        new |= {name: item for name, item in fixed.items() if isinstance(item, Tensor)}
        new |= {"eos": eos, "pad": pad} if ends else {}
        rest = {name: item for name, item in fixed.items() if name not in (*new, "past_key_values")}
        settings = [(type(one), vars(one)) for one in prepared["logits_processor"]] if self.select.recordable else None
        shapes = [(name, item.shape, item.dtype) for name, item in new.items()]
        like = torch.is_inference_mode_enabled(), config.do_sample, settings, shapes, rest
        if like == self.like:
            for name, item in new.items():
                self.tensors[name].copy_(item)
        else:
            self.like, self.recorded = like, None
            self.tensors = {name: item.clone(memory_format=torch.contiguous_format) for name, item in new.items()}
        self.token, self.unfinished = self.tensors["token"], self.tensors["unfinished"]
        self.eos = self.tensors.get("eos")
        self.moving = [self.tensors[name] for name in counting]
        inputs = {name: self.tensors.get(name, item) for name, item in (fixed | counting).items()}
        self.inputs = {"input_ids": self.token.unsqueeze(1), **inputs, "return_dict": True}
        self.checked, self.recordable = False, given is not None
        if model._valid_auto_compile_criteria(model_kwargs, config):
            self.call = model.get_compiled_call(config.compile_config)
        else:
            log.info("decode_loop: the forward of %s is not compiled on %s", type(model).__name__, token.device)
            self.call, self.recordable = model.__call__, False

    def stop(self) -> None:
        """Hold neither model nor cache until the next `start`."""
        self.model = self.cache = self.call = None
        self.inputs = {}

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """Take a step. `tokens` [N, B] are those so far. Returns what `Choice` does."""
        if self.checked and self.recorded is None:
            self._record(tokens)
        if self.checked and self.recorded is not None:
            self.recorder.replay()
            logits, alarm = self.recorded
            return alarm if self.select.recordable else self._choose(logits, tokens)
        return self._run(tokens)

    def rewind(self, steps: int, token: Tensor, unfinished: list[bool]) -> None:
        """Feed `token` [B], that of so many steps ago, once more, and let the choice look at more tokens."""
        self.select.widen()
        self.token.copy_(token)
        self.unfinished.copy_(torch.tensor(unfinished, device="cpu"))
        for count in self.moving:
            count.sub_(steps)
        self.like = self.recorded = None  # the next call begins with the narrow choice
        self.checked = False

    def _run(self, tokens: Tensor) -> Tensor | None:
        """Take a step that is not replayed, and find out whether the next one may be."""
        if not self.recordable:
            return self._choose(self._forward(), tokens)
        frames = counters["frames"]["total"]  # that Dynamo has compiled
        state = partial(python_state, self.model, self.cache, self.recorder.device)
        before = state() if self.recorded is None else None
        try:
            with watched() as ran:
                logits = self._forward()
        except (TorchDynamoException, FailOnRecompileLimitHit) as fault:
            self._leave_it_to_inductor(one_line(fault))
            logits = self._forward()
        else:
            quiet, known = frames == counters["frames"]["total"], ran == self.ran
            if not ran:
                log.info("decode_loop: torch.compile is switched off, or has given up")
                self.recordable = False
            elif len(ran) > 1:
                self._leave_it_to_inductor(f"it runs as {len(ran)} compiled graphs, not as one")
            elif before is not None and quiet and not same(before, state()):
                self._leave_it_to_inductor("it changes attributes of modules or of the cache")
            else:
                self.checked = known and quiet
                self.recorded = self.recorded if known else None
                self.ran = ran
        return self._choose(logits, tokens)

    def _forward(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = self.call(**self.inputs).logits[:, -1]
        return logits

    def _choose(self, logits: Tensor, tokens: Tensor) -> Tensor | None:
        if self.eos is not None:
            self.unfinished &= (self.token.unsqueeze(1) != self.eos).all(1)
        with _ALONE:
            alarm = self.select(logits, tokens, self.token)
        if self.eos is not None:
            torch.where(self.unfinished, self.token, self.tensors["pad"], out=self.token)
        for count in self.moving:
            count.add_(1)
        return alarm

    def _record(self, tokens: Tensor) -> None:
        def work() -> tuple[Tensor, Tensor | None]:
            logits = self._forward()
            return logits, self._choose(logits, tokens) if self.select.recordable else None

        try:
            self.recorded = self.recorder.record(work)
        except Exception as fault:
            self._leave_it_to_inductor(one_line(fault))

    def _leave_it_to_inductor(self, reason: str) -> None:
        log.warning("decode_loop: the step of %s is not recorded by the loop: %s", type(self.model).__name__, reason)
        _UNRECORDED.add(self.model)
        self.recordable = self.checked = False
        self.recorded = self.recorder.graph = None
        self.call = self.model.get_compiled_call(self.given)


def here(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream: what it holds may still run when a call of `generate` has returned."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _inputs(model: Any, model_kwargs: dict[str, Any], held: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a step feeds the forward besides the token, after `held` in the cache: what stays, and what counts on."""
    accepted = inspect.signature(model.forward).parameters
    mask: Any = model_kwargs.get("attention_mask")
    positions = model_kwargs.get("position_ids")
    fixed = {name: item for name, item in model_kwargs.items() if name not in ("attention_mask", "position_ids")}
    if mask is not None and not mask.all():
        # One mask for all steps: the future is hidden by causality. Without padding the graph makes it from nothing.
        fixed["attention_mask"] = mask.new_ones(len(mask), model_kwargs["past_key_values"].layers[0].max_cache_len)
        fixed["attention_mask"][:, :held] = mask
    counting = {}
    if "position_ids" in accepted:
        # transformers 4 makes them of the mask in every step.
        counting["position_ids"] = mask.long().sum(1, keepdim=True) if positions is None else positions[..., -1:] + 1
    if "cache_position" in accepted:  # there, the cache does not count
        counting["cache_position"] = torch.full((1,), held, device=model.device)
    return fixed, counting


def without_cuda_graphs(model: nn.Module, config: CompileConfig) -> CompileConfig | None:
    """The same without Inductor's CUDA graphs and without graph breaks; None where the loop is not to bring its own:
    other back ends, modes without them, `verify`, which compares on the host, and models with functions of the user in
    their forward."""
    options = dict(config.options or {})
    mode, inductor = config.mode or options.get("mode"), options.get("inductor") or {}
    if config.backend != "fusepass" or mode not in WITHOUT_CUDA_GRAPHS or options.get("verify"):
        return None
    without = WITHOUT_CUDA_GRAPHS[mode]
    if not uses_cuda_graphs(mode, inductor) or uses_cuda_graphs(without, inductor) or model in _UNRECORDED:
        return None
    if has_hooks(model):
        log.info("decode_loop: %s has hooks, which a recorded step would not call", type(model).__name__)
        return None
    plain: Any = copy.copy(config)
    plain.fullgraph = True
    plain.mode, plain.options = (None, {**options, "mode": without}) if options else (without, None)
    return plain


def has_hooks(model: nn.Module) -> bool:
    """Whether functions of the user may run in the forward: a replay does not call them."""
    return nn.modules.module._has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


def python_state(model: nn.Module, cache: Any, device: torch.device) -> list[Any]:
    """What a forward can change elsewhere than on the device: the attributes of modules and of the cache, and what
    these contain."""
    own = {"_compiled_call", "_last_compile_config"}  # of transformers: the same for every thread that generates
    state: list[Any] = []
    for owner in (*model.modules(), cache, *cache.layers):
        for name, value in vars(owner).items():
            if name in own:
                continue
            state.append(value)
            if isinstance(value, dict):
                state += value.values()
            elif isinstance(value, (list, tuple, set, deque)):
                state += value
            elif isinstance(value, Tensor) and value.device != device and not value.is_inference():
                state.append(value._version)
    return state


def same(before: list[Any], after: list[Any]) -> bool:
    """Whether two states hold the same objects, or equal numbers and strings."""
    return len(before) == len(after) and all(
        a is b or (isinstance(a, (int, float, str)) and a == b) for a, b in zip(before, after)
    )
