"""Sampling from a model with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lunaris.model.transformer import Head, Transformer, vocabulary_logits


@torch.no_grad()
def stream(
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
    """Yield the next token of each sequence ([B] int64), up to `max_new_tokens` times.

    model: in eval mode. prompt: [B, P] int64, P ≥ 1. temperature: 0 takes the likeliest token.
    After `eot_id` a sequence repeats it; the iterator ends once all sequences have, without a row
    of `eot_id` only. head: what gives the `logits` (`Objective.logits`). Past the model's length,
    the model reads the later half of the context again.
    """
    assert not model.training, "generation needs model.eval()"
    generator = torch.Generator(prompt.device).manual_seed(seed)
    context = prompt[:, -model.max_seq_len :]
    cache = model.new_cache(prompt.size(0))
    new = context
    done = torch.zeros(prompt.size(0), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        if cache.length + new.size(1) > model.max_seq_len:
            cache = model.new_cache(prompt.size(0))
            new = context = context[:, -max(1, model.max_seq_len // 2) :]
        logits = model.logits(new, head=head, cache=cache)[:, -1]
        token = sample(logits, temperature, top_k, top_p, generator)
        if eot_id is not None:
            token = token.masked_fill(done, eot_id)
            done |= token == eot_id
            if done.all():
                return
        yield token
        new = token[:, None]
        context = torch.cat((context, new), dim=1)[:, -model.max_seq_len :]


def generate(model: Transformer, prompt: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
    """Return the prompt with its continuation ([B, P + new] int64); arguments as of `stream`."""
    new = [token[:, None] for token in stream(model, prompt, max_new_tokens, **sampling)]
    return torch.cat((prompt, *new), dim=1)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Sample one token for each row of logits ([B, V] float32); return [B] int64.

    top_k: among the k likeliest; top_p: among the fewest whose mass reaches p (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # Remove the tokens after the mass is reached; the likeliest always remains.
        beyond = probs.cumsum(dim=-1) - probs >= top_p
        logits = logits.masked_fill(beyond.gather(1, index.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
