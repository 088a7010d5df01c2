"""Sampling from a model with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lunaris.model.transformer import Head, Transformer, vocabulary_logits


@torch.no_grad()
def stream_rows(
    model: Transformer,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eot_id: int | None = None,
    head: Head = vocabulary_logits,
    ended: set[int] | None = None,
) -> Iterator[dict[int, int]]:
    """Yield the next token of each row that has one, until every row has ended.

    A row ends at `eot_id`, which is not yielded, after `max_new_tokens`, or when the caller adds it
    to `ended`. The rows begin at one position without padding, and a row whose prompt is longer
    reads the rest of it while the others are sampled. So, but for rounding, a row's tokens are
    those that it has alone. Past the model's length, the model reads the later half of the context
    again.

    model: in eval mode. prompts: [P] int64 each, P ≥ 1. generators: one a row. temperature: 0 takes
    the likeliest token. head: what gives the `logits` (`Objective.logits`).
    """
    assert not model.training, "generation needs model.eval()"
    ended = set() if ended is None else ended
    given = [prompt[-model.max_seq_len :].tolist() for prompt in prompts]
    counts, position = [0] * len(given), min(map(len, given))
    device = prompts[0].device
    new = context = torch.tensor([ids[:position] for ids in given], device=device)
    cache = model.new_cache(len(given))
    while len(ended) < len(given):
        if cache.length + new.size(1) > model.max_seq_len:
            cache = model.new_cache(len(given))
            new = context = context[:, -max(1, model.max_seq_len // 2) :]
        logits = model.logits(new, head=head, cache=cache)[:, -1]
        sampling = [i for i, ids in enumerate(given) if position >= len(ids) and i not in ended]
        tokens = [
            sample(logits[i : i + 1], temperature, top_k, top_p, generators[i]) for i in sampling
        ]
        drawn = dict(zip(sampling, torch.cat(tokens).tolist() if tokens else [], strict=True))
        ended |= {row for row, token in drawn.items() if token == eot_id}
        found = {row: token for row, token in drawn.items() if token != eot_id}
        for row in found:
            counts[row] += 1
        ended |= {row for row in found if counts[row] == max_new_tokens}
        if found:
            yield found
        following = [
            ids[position] if position < len(ids) else found.get(row, ids[-1])
            for row, ids in enumerate(given)
        ]
        new = torch.tensor(following, device=device)[:, None]
        context = torch.cat((context, new), dim=1)[:, -model.max_seq_len :]
        position += 1


def stream(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    seed: int = 0,
    eot_id: int | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence ([B] int64), up to `max_new_tokens` times.

    prompt: [B, P] int64; the other arguments are those of `stream_rows`. The sequences share one
    generator. After `eot_id` a sequence repeats it.
    """
    generator = torch.Generator(prompt.device).manual_seed(seed)
    rows = stream_rows(
        model, list(prompt), max_new_tokens, eot_id=eot_id,
        generators=[generator] * len(prompt), **sampling,
    )  # fmt: skip
    for found in rows:
        yield torch.tensor([found.get(row, eot_id) for row in range(len(prompt))]).to(prompt.device)


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
