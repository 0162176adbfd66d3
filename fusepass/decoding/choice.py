"""How a token is chosen: as `_sample` of transformers does, by its processors and with its random numbers, but without
making the host wait, and without sorting the whole vocabulary where top-k leaves little of it."""

import math

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


class Choice:
    """The choice of the next token of each row from logits [B, V], by the processors that `generate` prepared.

    Top-k and the processors behind it see the likeliest tokens only: some more than k, since top-k keeps all that tie
    with the last. The result tells when even more tie; `widen` then lets every processor see the whole vocabulary.
    """

    def __init__(self, processors: LogitsProcessorList, sample: bool) -> None:
        self.sample = sample
        self.whole, self.few = list(processors), []
        kinds = [type(processor) for processor in processors]
        if sample and TopKLogitsWarper in kinds:
            top_k = kinds.index(TopKLogitsWarper)
            # These look at probabilities, which are the same without the tokens that have none.
            drops = all(getattr(processor, "filter_value", None) == -math.inf for processor in processors[top_k:])
            if drops and set(kinds[top_k + 1 :]) <= {TopPLogitsWarper, MinPLogitsWarper}:
                self.whole, self.few = self.whole[:top_k], self.whole[top_k:]

    def widen(self) -> None:
        self.whole, self.few = self.whole + self.few, []

    def __call__(self, logits: Tensor, tokens: Tensor, out: Tensor) -> Tensor | None:
        """Write the tokens, [B] int64, to `out`. `tokens` [N, B] are those before them.

        Returns, in sampling, [B] f32 that is nan where `torch.multinomial` would have raised, and infinite where more
        tokens tie than the processors saw: that row may be wrong.
        """
        if self.sample or self.whole:
            logits = logits.to(torch.float32, copy=True)
        for processor in self.whole:
            logits = processor(tokens.t(), logits)
        if not self.sample:
            torch.argmax(logits, -1, out=out)
            return None
        # `torch.multinomial` draws one token just so, but makes the host wait to check the probabilities. A row that is
        # nan anywhere is nan everywhere after softmax.
        noise = torch.empty_like(logits).exponential_()
        if not self.few or logits.shape[1] <= (room := 2 * self.few[0].top_k + 64):
            for processor in self.few:
                logits = processor(tokens.t(), logits)
            probs = torch.softmax(logits, -1)
            torch.argmax(probs / noise, -1, out=out)
            return probs[:, 0]
        likely, indices = logits.topk(room)
        tied = likely[:, self.few[0].top_k - 1] - likely[:, -1] == 0  # not so for two -inf
        indices, _ = indices.sort()  # so that top-p drops, of tokens that tie, those that it drops of the whole
        likely = logits.gather(1, indices)
        for processor in self.few:
            likely = processor(tokens.t(), likely)
        probs = torch.softmax(likely, -1)
        place = torch.argmax(probs / noise.gather(1, indices), -1, keepdim=True)
        torch.gather(indices, 1, place, out=out.unsqueeze(1))
        return torch.where(tied, math.inf, probs[:, 0])
