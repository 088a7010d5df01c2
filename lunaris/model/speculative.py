"""Sampling with drafts: the depths of multi-token prediction guess, one forward checks them all.

Shapes: L new positions, S positions so far, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lunaris.model.generate import sample
from lunaris.model.transformer import Head, Transformer, vocabulary_logits


@torch.no_grad()
def stream_ahead(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eot_id: int | None = None,
    head: Head = vocabulary_logits,
) -> Iterator[Tensor]:
    """Yield the tokens that `lunaris.model.generate.stream` yields, with fewer forwards.

    The arguments are those of `stream`; prompt: [1, P]. model: one with predictors, whose caches
    have `truncate`. The drafts are the likeliest token of each depth. The model reads them in one
    forward and samples at each position as without them, until a sample differs from the draft;
    that sample is the next token. So every token is drawn from the model's own distribution and,
    but for rounding, by the same random numbers: a draft is kept with the probability that the
    model gives it, as in speculative sampling from a certain draft (arXiv 2211.17192, section 2.3).
    """
    assert not model.training and model.predictors and len(prompt) == 1
    generator = torch.Generator(prompt.device).manual_seed(seed)
    new = context = prompt[:, -model.max_seq_len :]
    drafter = Drafter(model, head)
    drafts = prompt[:, :0]
    left = max_new_tokens
    while left > 0:
        if drafter.length + new.size(1) > model.max_seq_len:
            drafter, drafts = Drafter(model, head), prompt[:, :0]
            new = context = context[:, -max(1, model.max_seq_len // 2) :]
        logits = drafter.read(new, drafts)
        accepted: list[Tensor] = []
        for at in range(drafts.size(1) + 1):
            token = sample(logits[:, at], temperature, top_k, top_p, generator)
            if eot_id is not None and token == eot_id:
                return
            yield token
            accepted.append(token)
            left -= 1
            if left == 0:
                return
            if at < drafts.size(1) and token != drafts[:, at]:
                break
        taken = torch.stack(accepted, dim=1)
        new = taken[:, -1:]
        context = torch.cat((context, taken), dim=1)[:, -model.max_seq_len :]
        drafts = drafter.draft(taken, left - 1)


class Drafter:
    """A text, and what the model and its depths computed of it so far.

    The model holds states and a cache of all tokens but the last. Depth k reads, at position i, the
    state of depth k − 1 and the token i + k; where that token is a draft, its state is provisional
    until the draft is accepted.
    """

    def __init__(self, model: Transformer, head: Head) -> None:
        self._model = model
        self._head = head
        self._cache = model.new_cache(1)
        self._ahead = model.new_caches_ahead(1)
        weight = model.embedding.weight
        self._tokens = torch.empty(1, 0, dtype=torch.int64, device=weight.device)
        # Of the model and of each depth: [1, S, D].
        self._states: list[Tensor | None] = [None] * (1 + len(self._ahead))

    @property
    def length(self) -> int:
        """How many positions the cache holds."""
        return self._cache.length

    def read(self, new: Tensor, drafts: Tensor) -> Tensor:
        """Read new tokens ([1, L]) and then drafts ([1, N]).

        Return the logits ([1, 1 + N, V]) at the last new token and at each draft.
        """
        if not self._tokens.size(1):
            self._tokens = new
        begin = self.length

        def both(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return {"states": hidden} | self._head(hidden[:, new.size(1) - 1 :], weight)

        out = self._model(torch.cat((new, drafts), dim=1), head=both, cache=self._cache).outputs
        self._append(0, begin, out["states"])
        return out["logits"]

    def draft(self, taken: Tensor, most: int) -> Tensor:
        """Take the tokens [1, N] sampled after the last `read`; return up to `most` drafts [1, M].

        The last of the tokens is new; those before it are the drafts that were right.
        """
        known = self._tokens.size(1) + taken.size(1)
        self._tokens = torch.cat((self._tokens, taken), dim=1)
        self._cache.truncate(known - 1)
        room = self._model.max_seq_len - known
        drafts = taken[:, :0]
        for depth, cache in enumerate(self._ahead[: max(0, min(most, room))], 1):
            # Computed with tokens that are known by now: the last one was no draft.
            cache.truncate(min(cache.length, max(0, known - 1 - depth)))
            begin, seen = cache.length, known - 1
            later = torch.cat((self._tokens, drafts), dim=1)[:, begin + depth : seen + depth]
            before = self._states[depth - 1]
            assert before is not None
            states = self._model.look_ahead(depth, before[:, begin:seen], later, cache)
            self._append(depth, begin, states)
            weight = self._model.vocabulary_weight
            logits = self._head(states[:, -1:], weight)["logits"]
            drafts = torch.cat((drafts, logits.argmax(-1)), dim=1)
        return drafts

    def _append(self, depth: int, begin: int, states: Tensor) -> None:
        """Replace the states of a depth from position `begin` on."""
        before = self._states[depth]
        if before is not None:
            states = torch.cat((before[:, :begin], states), dim=1)
        self._states[depth] = states
