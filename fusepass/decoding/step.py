"""One step after another: the forward of the last token and the choice of the next, on a GPU as one CUDA graph."""

import copy
import inspect
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

from fusepass.decoding.choice import Choice
from fusepass.inductor import uses_cuda_graphs

log = logging.getLogger(__name__)

WITHOUT_CUDA_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


class Recorder:
    """Records CUDA graphs of a model's steps, each in the memory of the one before, which it replaces."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.of = weakref.ref(model), device
        self.usable = device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.usable:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, which `replay` computes: nothing is computed here. Raises what `work` raises, or CUDA
        about work that can not be recorded."""
        # Not `torch.cuda.graph`, which waits for the device and gives the allocator's memory back.
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(Exception):
                    self._end(graph)
                raise
            self._end(graph)
        here.wait_stream(self.stream)
        self.graph = graph
        return result

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except Exception:  # then it leaves allocator and random state as if it still recorded (pytorch issue 171263)
            device = self.stream.device_index
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
            raise

    def replay(self) -> None:
        assert self.graph is not None
        self.graph.replay()


class Step:
    """Feeds `token` [B] int64 to the model, and writes the next one to it.

    What Inductor's CUDA graphs leave to the host, Dynamo's guards and checks of some 300 addresses, takes a slow one
    longer than a small model takes an H200: 0.75 ms a token where the device needs 0.56. So with the backend fusepass
    the loop compiles without them and records a graph of its own, which holds the choice too. It does so in every call
    of `generate`, behind a step in which nothing was compiled: what the guards looked at can not change before the end.

    prepared, model_kwargs: what `generate` gives its loops and the model; `held`: how many tokens the cache holds.
    """

    def __init__(
        self,
        model: Any,
        prepared: dict[str, Any],
        model_kwargs: dict[str, Any],
        token: Tensor,
        held: int,
        eos: Tensor | None,
        recorder: Recorder,
    ) -> None:
        config: GenerationConfig = prepared["generation_config"]
        self.model, self.cache, self.token, self.recorder = model, model_kwargs["past_key_values"], token, recorder
        self.select = Choice(prepared["logits_processor"], config.do_sample)
        self.eos = eos if len(token) > 1 else None
        self.pad: Any = config._pad_token_tensor
        self.unfinished = torch.ones_like(token, dtype=torch.bool)
        fixed, self.moving = _inputs(model, model_kwargs, held)
        self.inputs = {"input_ids": token.unsqueeze(1), **fixed, **self.moving, "return_dict": True}

        self.config = config.compile_config
        self.recorded: tuple[Tensor, Tensor | None] | None = None
        self.recordable = self.quiet = False
        if not model._valid_auto_compile_criteria(model_kwargs, config):
            log.info("decode_loop: the forward of %s is not compiled on %s", type(model).__name__, token.device)
            self.call = model.__call__
            return
        plain = without_cuda_graphs(self.config) if recorder.usable else None
        self.recordable = plain is not None and not has_hooks(model)
        self.call = model.get_compiled_call(plain if self.recordable else self.config)

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """Take a step. `tokens` [N, B] are those so far. Returns what `Choice` does."""
        if self.recordable and self.quiet and self.recorded is None:
            self._record(tokens)
        if self.recorded is not None:
            self.recorder.replay()
            logits, alarm = self.recorded
            return alarm if self.select.recordable else self._choose(logits, tokens)
        compiled = counters["frames"]["total"]
        alarm = self._choose(self._forward(), tokens)
        self.quiet = compiled == counters["frames"]["total"]
        return alarm

    def rewind(self, steps: int, token: Tensor, unfinished: list[bool]) -> None:
        """Feed `token` [B], that of so many steps ago, once more, and let the choice look at more tokens."""
        self.select.widen()
        self.token.copy_(token)
        self.unfinished.copy_(torch.tensor(unfinished))
        torch._foreach_sub_(list(self.moving.values()), steps)
        self.recorded, self.quiet = None, False

    def _forward(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = self.call(**self.inputs).logits[:, -1]
        return logits

    def _choose(self, logits: Tensor, tokens: Tensor) -> Tensor | None:
        if self.eos is not None:
            self.unfinished &= (self.token.unsqueeze(1) != self.eos).all(1)
        alarm = self.select(logits, tokens, self.token)
        if self.eos is not None:
            torch.where(self.unfinished, self.token, self.pad, out=self.token)
        if self.moving:
            torch._foreach_add_(list(self.moving.values()), 1)
        return alarm

    def _record(self, tokens: Tensor) -> None:
        def work() -> tuple[Tensor, Tensor | None]:
            logits = self._forward()
            return logits, self._choose(logits, tokens) if self.select.recordable else None

        before = python_state(self.model, self.cache)
        try:
            self.recorded = self.recorder.record(work)
        except Exception as fault:
            self._leave_it_to_inductor(f"{type(fault).__name__}: {str(fault).partition(chr(10))[0]}")
        else:  # what Python does in the step has been done, once: the replay that follows does the rest of that step
            if not same(before, python_state(self.model, self.cache)):
                self._leave_it_to_inductor("its forward changes attributes of modules or of the cache")

    def _leave_it_to_inductor(self, reason: str) -> None:
        log.warning("decode_loop: no step of %s is recorded by the loop: %s", type(self.model).__name__, reason)
        self.recordable = self.recorder.usable = False
        self.call = self.model.get_compiled_call(self.config)


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


def without_cuda_graphs(config: CompileConfig) -> CompileConfig | None:
    """The same without Inductor's CUDA graphs; None where the loop is not to bring its own: other back ends, modes
    without them, and `verify`, which compares on the host."""
    options = dict(config.options or {})
    mode = config.mode or options.get("mode")
    if config.backend != "fusepass" or mode not in WITHOUT_CUDA_GRAPHS or options.get("verify"):
        return None
    mode = WITHOUT_CUDA_GRAPHS[mode]
    if uses_cuda_graphs(mode, options.get("inductor", {})):
        return None
    plain = copy.copy(config)
    plain.mode, plain.options = (None, {**options, "mode": mode}) if options else (mode, None)  # type: ignore[assignment]
    return plain


def has_hooks(model: nn.Module) -> bool:
    """Whether functions of the user run in the forward: a replay does not call them."""
    hooks = nn.modules.module
    return hooks._has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def python_state(model: nn.Module, cache: Any) -> list[tuple[Any, int]]:
    """What a forward can change on the host: the attributes of modules and of the cache, and how long they are."""
    owners = [*model.modules(), cache, *cache.layers]
    values = [*model.buffers(), *(value for owner in owners for value in vars(owner).values())]
    return [(value, len(value) if isinstance(value, (list, dict, set)) else 0) for value in values]


def same(before: list[tuple[Any, int]], after: list[tuple[Any, int]]) -> bool:
    return len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in zip(before, after))
