"""How a token is chosen: as `_sample` of transformers does, by its processors and with its random numbers, but without
making the host wait, and without sorting the whole vocabulary where top-k leaves little of it."""

import logging
import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusepass.kernels import KernelUnavailable

log = logging.getLogger(__name__)

OF_LOGITS_ALONE = {TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper}
"""Processors that do the same in every step, so that a CUDA graph may hold them."""


def _split(processors: list[Any]) -> tuple[list[Any], list[Any]]:
    """The processors before top-k, and those from it on, if these leave of the likeliest tokens what they leave of all.

    Top-p and min-p do: they look at probabilities, which are the same without the tokens that have none. A min-p that
    keeps several tokens does not: which of those that tie are kept hangs on how `torch.topk` goes through the row.
    """
    kinds = [type(processor) for processor in processors]
    top_k = kinds.index(TopKLogitsWarper) if TopKLogitsWarper in kinds else len(kinds)
    few = processors[top_k:]
    if (
        set(kinds[top_k + 1 :]) <= {TopPLogitsWarper, MinPLogitsWarper}
        and all(processor.filter_value == -math.inf for processor in few)
        and all(processor.min_tokens_to_keep == 1 for processor in few if type(processor) is MinPLogitsWarper)
    ):
        return processors[:top_k], few
    return processors, []


def _settings(whole: list[Any], few: list[Any]) -> dict[str, Any] | None:
    """What `sample` takes, if the processors of a split are what it computes: top-k, perhaps with a temperature before
    and top-p and min-p behind it, in this order."""
    processors = whole + few
    order = [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]
    found: dict[type, Any] = {type(processor): processor for processor in processors}
    if not few or list(map(type, processors)) != [kind for kind in order if kind in found]:
        return None
    temperature, _, top_p, min_p = (found.get(kind) for kind in order)
    return {
        "temperature": temperature.temperature if temperature else 1.0,
        "top_k": found[TopKLogitsWarper].top_k,
        "top_p": (top_p.top_p, top_p.min_tokens_to_keep) if top_p else None,
        "min_p": min_p.min_p if min_p else None,
    }


class Choice:
    """The choice of the next token of each row from logits [B, V], by the processors that `generate` prepared.

    Top-k and the processors behind it see the likeliest tokens only: some more than k, since top-k keeps all that tie
    with the last. The result tells when even more tie; `widen` then lets the processors see more, in the end all.

    On a GPU the usual processors, temperature, top-k, top-p and min-p, are three kernels of ours instead of some forty.
    `recordable`: a CUDA graph of one choice does for all.
    """

    def __init__(self, processors: LogitsProcessorList, sample: bool) -> None:
        self.sample = sample
        self.whole, self.few = _split(list(processors)) if sample else (list(processors), [])
        self.recordable = {type(processor) for processor in processors} <= OF_LOGITS_ALONE
        self.settings = _settings(self.whole, self.few)

    def widen(self) -> None:
        if self.settings:  # our kernels have room for fewer ties than torch takes
            self.settings = None
        else:
            self.whole, self.few = self.whole + self.few, []

    def __call__(self, logits: Tensor, tokens: Tensor, out: Tensor) -> Tensor | None:
        """Write the tokens, [B] int64, to `out`. `tokens` [N, B] are those before them.

        Returns, in sampling, [B] f32 that is nan where `torch.multinomial` would have raised, and infinite where more
        tokens tie than the processors saw: that row may be wrong.
        """
        if self.sample:
            chosen, alarm = self._sampled(logits, tokens)
            out.copy_(chosen)
            return alarm
        if self.whole or logits.dtype == torch.float64:  # what differs in f64 may tie in f32
            logits = logits.to(torch.float32, copy=True)
        for processor in self.whole:
            logits = processor(tokens.t(), logits)
        torch.argmax(logits, -1, out=out)
        return None

    def _by_kernels(self, logits: Tensor, noise: Tensor, top_k: int, **settings: Any) -> tuple[Tensor, Tensor] | None:
        """What our kernels choose; None, from now on, if they can not."""
        try:
            if logits.is_cuda:
                from fusepass.kernels.sample import fits, sample  # not before: Triton may be missing

                if fits(len(logits), logits.shape[1], top_k):
                    return sample(logits.contiguous(), noise, top_k=top_k, **settings)
        except (ImportError, KernelUnavailable) as fault:
            log.warning("decode_loop: tokens are chosen in plain torch: %s", fault)
        self.settings = None
        return None

    def _sampled(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and alarms, each [B]. Nothing here makes the host wait."""
        # `torch.multinomial` draws one token just so, but makes the host wait to check the probabilities. A row that is
        # nan anywhere is nan everywhere after softmax.
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        if self.settings and (sampled := self._by_kernels(logits, noise, **self.settings)):
            return sampled
        logits = logits.to(torch.float32, copy=True)
        for processor in self.whole:
            logits = processor(tokens.t(), logits)
        # On a CPU, `torch.sort` leaves it open which of the tokens that tie top-p drops: it must see the same row.
        unstable = not logits.is_cuda and any(type(processor) is TopPLogitsWarper for processor in self.few)
        if unstable or not self.few or logits.shape[1] <= (room := 2 * self.few[0].top_k + 64):
            for processor in self.few:
                logits = processor(tokens.t(), logits)
            probs = torch.softmax(logits, -1)
            return torch.argmax(probs / noise, -1), probs[:, 0]
        likely, indices = logits.topk(room)
        tied = likely[:, self.few[0].top_k - 1] - likely[:, -1] == 0  # not so for two -inf
        indices, _ = indices.sort()  # so that top-p drops, of tokens that tie, those that it drops of the whole
        likely = logits.gather(1, indices)
        for processor in self.few:
            likely = processor(tokens.t(), likely)
        probs = torch.softmax(likely, -1)
        place = torch.argmax(probs / noise.gather(1, indices), -1, keepdim=True)
        return indices.gather(1, place).squeeze(1), torch.where(tied, math.inf, probs[:, 0])
