"""`DecodeLoop`: what the user sets, what `generate` calls, and the cache that is kept between calls."""

import copy
import inspect
import logging
import math
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.utils import GENERATION_MODES_MAPPING

from fusepass.decoding.handback import is_ours_to_choose, obstacle
from fusepass.decoding.step import Step, here, without_cuda_graphs
from fusepass.decoding.steps import decode

log = logging.getLogger(__name__)


class DecodeLoop:
    """`model.generate(**inputs, custom_generate=decode_loop())`: greedy decoding and sampling without waiting.

    The tokens are those of Hugging Face's loop, in sampling for the same seed too: it draws the same random numbers for
    the same logits. Unless the user gives a cache, has it returned or names one that is not static, the loop brings a
    static one, and keeps it for the next call of the same model and batch size; it is freed with the loop.

    streamer: an object with `put` and `end`. Give it here, not to `generate`, which does not hand it on.
    run_ahead: how many tokens may be on their way when the host reads one, and so how many surplus steps are taken (and
        undone) after the last sequence has ended. Default: 4 on a GPU, 0 on a CPU.
    cache_length: for how many tokens that static cache has room. Default, and where a call needs more: what the call
        needs, rounded up to a power of two (a new length compiles anew), but never less than before.

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(self, streamer: Any = None, run_ahead: int | None = None, cache_length: int | None = None) -> None:
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise TypeError(f"decode_loop: streamer is {streamer!r}; expected an object with put and end, or None")
        for name, number, least in (("run_ahead", run_ahead, 0), ("cache_length", cache_length, 1)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise TypeError(f"decode_loop: {name} is {number!r}; expected an int or None")
            if number is not None and number < least:
                raise ValueError(f"decode_loop: {name} is {number}; expected at least {least}")
        self.streamer = streamer
        self.run_ahead = run_ahead
        self.cache_length = cache_length
        self._kept: tuple[Any, Any] | None = None
        self._step: Step | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        inputs_tensor: Tensor | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Called by `generate` with what it has prepared. Returns what its own loop would: sequences [B, N] int64, or
        an output object if `return_dict_in_generate` asks for one."""
        prepared = {
            "input_ids": input_ids,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
        }
        if reason := obstacle(model, prepared, model_kwargs):
            return self._hand_back(reason, model, prepared, inputs_tensor, model_kwargs)

        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        config = prepared["generation_config"] = copy.copy(generation_config)
        config.max_length = math.ceil(config.max_length)  # Hugging Face's loop takes any number
        ours = is_ours_to_choose(model_kwargs["past_key_values"], config)
        if ours:
            kept = self._take_cache(model, input_ids.shape[0], config)
            model_kwargs["past_key_values"] = kept[1]
        config.return_dict_in_generate = False
        if input_ids.is_cuda and config.compile_config is None:
            config.compile_config = CompileConfig(backend="fusepass")
        run_ahead = self.run_ahead if self.run_ahead is not None else 4 * input_ids.is_cuda
        step, self._step = self._step, None  # no two threads share it
        if step is None or (step.recorder.device, step.stream) != (input_ids.device, here(input_ids.device)):
            step = Step(input_ids.device)
        given = config.compile_config
        if step.recorder.usable and given is not None and (plain := without_cuda_graphs(model, given)):
            config.compile_config = plain
        else:
            given = None
        with torch.cuda.device_of(input_ids):
            sequences = decode(model, step, prepared, model_kwargs, given, run_ahead, self.streamer)
        step.stop()
        self._step = step

        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            output: Any = {"sequences": sequences, "past_key_values": model_kwargs["past_key_values"]}
            return GenerateDecoderOnlyOutput(**output)
        if ours:
            self._kept = kept
        return sequences

    def _hand_back(
        self,
        reason: str,
        model: Any,
        prepared: dict[str, Any],
        inputs_tensor: Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """Call the loop that `generate` would have called, with what it would have given it."""
        config = prepared["generation_config"]
        mode = config.get_generation_mode()
        own = model._extract_generation_mode_kwargs(None, {}, None, None, self.streamer)
        model._validate_generation_mode(mode, config, own)
        model._get_deprecated_gen_repo(mode, False)  # raises for a mode whose loop is a repository of code on the hub
        loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        log.info("decode_loop: handed back to %s.%s: %s", type(model).__name__, loop.__name__, reason)
        if self.streamer is not None:
            self.streamer.put(prepared["input_ids"].cpu())
        if "inputs_tensor" in inspect.signature(loop).parameters:
            own["inputs_tensor"] = inputs_tensor
        return loop(model, **prepared, **own, **model_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the settings, and will have a cache and CUDA graphs of its own."""
        return {**self.__dict__, "_kept": None, "_step": None}

    def _take_cache(self, model: Any, batch: int, generation_config: GenerationConfig) -> tuple[Any, Any]:
        """The kept cache, emptied, or else a new one; and what calls it fits. Until the call has ended it is not kept:
        no two threads share it. CUDA graphs belong to its address: with another, they are recorded anew."""
        config = model.config.get_text_config(decoder=True)
        modes = model.device, here(model.device), model.dtype, torch.is_inference_mode_enabled()
        key = weakref.ref(model), config.num_hidden_layers, batch, *modes
        need = generation_config.max_length - 1
        if generation_config.cache_implementation == "static":  # as `generate` sizes its own
            need = max(need, getattr(generation_config, "max_cache_len", None) or 0)
        kept, self._kept = self._kept, None
        length = max(self.cache_length or 256, kept[1].layers[0].max_cache_len if kept else 0)
        if kept is not None and kept[0] == key and need <= length:
            kept[1].reset()
            return kept
        del kept  # so that its memory is free for the new one
        length = length if need <= length else 1 << (need - 1).bit_length()
        return key, StaticCache(config=config, max_cache_len=length)
