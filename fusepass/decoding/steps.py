"""The steps of the loop, and when the host looks at their tokens."""

import math
from collections import deque
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CompileConfig, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria

from fusepass.decoding.handback import prompt_length
from fusepass.decoding.step import Step


def decode(
    model: Any,
    step: Step,
    prepared: dict[str, Any],
    model_kwargs: dict[str, Any],
    given: CompileConfig | None,
    run_ahead: int,
    streamer: Any,
) -> Tensor:
    """Sequences [B, N] int64: the prompts and what follows, until every sequence has ended.

    `prepared` is what `generate` gives its loops (input_ids [B, S], processors, criteria, config), `model_kwargs` what
    it gives the model, with a static cache. The cache then holds every token but the last, as `_sample` leaves it.
    `given`: see `Step.start`.
    """
    config, cache = prepared["generation_config"], model_kwargs["past_key_values"]
    # Hugging Face's own loop, for one token: it knows prompts in chunks and caches continued, each release in its way.
    one = StoppingCriteriaList([MaxLengthCriteria(prepared["input_ids"].shape[1] + 1)])
    first = model._sample(**{**prepared, "stopping_criteria": one}, **model_kwargs)
    (batch, start), held = first.shape, cast(int, prompt_length(config, model_kwargs))

    ends = [
        part.eos_token_id.view(-1).to(first.device)
        for part in prepared["stopping_criteria"]
        if hasattr(part, "eos_token_id")
    ]
    eos = torch.cat(ends) if ends else None
    # A row for each position: what a step reads and what it writes are contiguous.
    tokens = first.new_empty(config.max_length, batch)
    tokens[:start] = first.t()
    step.start(model, first[:, -1], prepared, model_kwargs, given, held, eos)
    results = Results(first[:, -1], eos, run_ahead, streamer, config.do_sample)
    length, surplus = start, 0
    with getattr(model, "_optimize_model_for_decode", nullcontext)():
        while True:
            stopped: str | None = "failed"  # as when the streamer raises
            try:
                stopped = results.read(run_ahead if length < config.max_length else 0)
            finally:
                if stopped and (surplus := results.undo()):
                    length -= surplus
                    _crop(cache, held + length - start)
            if stopped == "tied":
                step.rewind(surplus, tokens[length - 1], results.alive)
            elif stopped or length == config.max_length:
                return tokens[:length].t().contiguous()
            alarm = step(tokens[:length])
            tokens[length].copy_(step.token)
            results.send(step.token, alarm)
            length += 1


class Results:
    """Tokens on their way to the host, which reads them in order, some steps late."""

    def __init__(self, first: Tensor, eos: Tensor | None, run_ahead: int, streamer: Any, sample: bool) -> None:
        slots, cuda = run_ahead + 1, first.is_cuda
        self.tokens = torch.empty(slots, len(first), dtype=torch.long, device="cpu", pin_memory=cuda)
        self.alarms = torch.zeros(slots, len(first), dtype=torch.float, device="cpu", pin_memory=cuda)
        self.events = [torch.cuda.Event() for _ in range(slots)] if cuda else []
        self.eos = frozenset(() if eos is None else eos.tolist())
        self.alive = [True] * len(first)
        self.streamer = streamer
        self.generator: torch.Generator | None = None
        if sample:
            self.generator = torch.cuda.default_generators[first.device.index] if cuda else torch.default_generator
        self.sent = 0
        self.pending: deque[tuple[int, Any]] = deque()
        self.state: Any = None
        self.send(first)

    def send(self, token: Tensor, alarm: Tensor | None = None) -> None:
        """Start the way of `token` [B] to the host, with what `Choice` returned for it."""
        slot = self.sent % len(self.tokens)
        self.sent += 1
        self.tokens[slot].copy_(token, non_blocking=True)
        if alarm is not None:
            self.alarms[slot].copy_(alarm, non_blocking=True)
        if self.events:
            self.events[slot].record()
        self.pending.append((slot, self.generator.get_state() if self.generator else None))

    def read(self, pending: int) -> str | None:
        """Read on until no more than `pending` tokens are on their way, or until no more are wanted: "ended" if every
        sequence has, "tied" if the next token must be chosen again. Raises RuntimeError as `torch.multinomial` does."""
        while any(self.alive) and len(self.pending) > pending:
            slot, state = self.pending[0]
            if self.events:
                self.events[slot].synchronize()
            alarm = self.alarms[slot].max().item() if self.generator else 0.0
            if math.isnan(alarm):
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            if math.isinf(alarm):
                return "tied"
            self.state = state
            self.pending.popleft()
            tokens = self.tokens[slot].tolist()
            self.alive = [alive and token not in self.eos for alive, token in zip(self.alive, tokens)]
            if self.streamer is not None:
                self.streamer.put(self.tokens[slot].clone())
        return None if any(self.alive) else "ended"

    def undo(self) -> int:
        """Forget the tokens on their way, and the random numbers drawn for them; how many these are."""
        if self.pending and self.generator and self.state is not None:
            self.generator.set_state(self.state)
        surplus = len(self.pending)
        self.pending.clear()
        return surplus


def _crop(cache: Any, length: int) -> None:
    """Forget what the cache holds beyond `length` tokens, in place. transformers 4 counts what is not zero."""
    for layer in cache.layers:
        if layer.keys is None:  # the model has fewer layers than its config
            continue
        layer.keys[:, :, length:] = 0
        layer.values[:, :, length:] = 0
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)
