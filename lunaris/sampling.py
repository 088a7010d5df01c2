"""Sampling texts from a run's checkpoint: several prompts at a time, seeds, stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.root import Config
from lunaris.data.tokenizer import TextTokenizer
from lunaris.distributed import session
from lunaris.errors import UserError
from lunaris.inference import load_trained, tokenizer_of
from lunaris.model.generate import stream_rows
from lunaris.model.speculative import stream_ahead
from lunaris.model.transformer import Transformer
from lunaris.runs.run_dir import RunDir


@dataclass(frozen=True)
class Request:
    """A text to sample: the prompt that it continues, and the seed of its random numbers."""

    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How texts are sampled; the fields are the flags of `lunaris generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    speculative: bool = False
    batch_size: int = 16


@dataclass(frozen=True)
class Piece:
    """The next piece of the continuation of request `index`.

    With the last piece of a text, `tokens` is how many were sampled, and `ended` why no more were:
    `eot`, `stop` or `length`.
    """

    index: int
    text: str
    ended: str | None = None
    tokens: int = 0


@dataclass
class _Continuation:
    """The text of sampled tokens, as far as it cannot change any more."""

    tokenizer: TextTokenizer
    stop: tuple[str, ...]
    ended: str | None = None
    tokens: list[int] = field(default_factory=list)
    _shown: int = 0
    _held: str = ""

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Take a token and return the text that it settles; set `ended` at a stop string.

        A character is settled when all of its bytes are there, and text that a stop string may
        begin with when it is known whether the string follows.
        """
        self.tokens.append(token)
        data = self.tokenizer.decode_bytes(self.tokens)
        self._held += self._decoder.decode(data[self._shown :])
        self._shown = len(data)
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        if found:
            self.ended = "stop"
            settled, self._held = self._held[: min(found)], ""
            return settled
        kept = max((_overlap(self._held, text) for text in self.stop), default=0)
        settled, self._held = self._held[: len(self._held) - kept], self._held[-kept:] * bool(kept)
        return settled

    def rest(self) -> str:
        """Return what was held back, at the end of the text."""
        return self._held + self._decoder.decode(b"", True)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def sample_texts(
    cfg: Config,
    run_dir: RunDir,
    requests: Sequence[Request],
    settings: Settings,
    *,
    step: int | None = None,
) -> Iterator[Piece]:
    """Yield the pieces of the requests' continuations, those of one batch in turn.

    Batches are made of requests in order. A text does not depend on the batch that it is in, but
    for rounding. Raises UserError, before the first piece, when the run has no tokenizer,
    checkpoint or depths to draft with, or a prompt is empty.
    """
    tokenizer = tokenizer_of(run_dir)
    encoded = [ids.tolist() for ids in tokenizer.encode([r.prompt.encode() for r in requests])]
    if not all(encoded):
        raise UserError("--prompt: must hold at least one character")
    with session.join(cfg.trainer.device, cfg.launch.collective_timeout_s):
        model, _ = load_trained(cfg, run_dir, step, predictors=settings.speculative)
        if settings.speculative:
            _check_drafts(model)
        head = instantiate_component("objective", cfg.objective).logits
        device = next(model.parameters()).device
        size = 1 if settings.speculative else settings.batch_size
        for first in range(0, len(requests), size):
            rows = [
                (torch.tensor(encoded[i], device=device), requests[i].seed)
                for i in range(first, min(first + size, len(requests)))
            ]
            for piece in _batch(model, rows, tokenizer, settings, head):
                yield Piece(first + piece.index, piece.text, piece.ended, piece.tokens)


def _batch(
    model: Transformer,
    rows: Sequence[tuple[Tensor, int]],
    tokenizer: TextTokenizer,
    settings: Settings,
    head: Any,
) -> Iterator[Piece]:
    """Yield the pieces of one batch, whose rows are prompts ([P] int64) with seeds."""
    texts = [_Continuation(tokenizer, settings.stop) for _ in rows]
    ended: set[int] = set()
    for found in _tokens(model, rows, tokenizer.eot_id, settings, head, ended):
        for row, token in found.items():
            text = texts[row]
            settled = text.add(token)
            if text.ended:
                ended.add(row)
            if settled:
                yield Piece(row, settled)
        if len(ended) == len(rows):
            break
    for row, text in enumerate(texts):
        full = len(text.tokens) == settings.max_new_tokens
        why = text.ended or ("length" if full else "eot")
        yield Piece(row, "" if text.ended else text.rest(), why, len(text.tokens))


def _tokens(
    model: Transformer,
    rows: Sequence[tuple[Tensor, int]],
    eot_id: int,
    settings: Settings,
    head: Any,
    ended: set[int],
) -> Iterable[dict[int, int]]:
    keys = {
        "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
        "eot_id": eot_id, "head": head,
    }  # fmt: skip
    if settings.speculative:
        ((prompt, seed),) = rows
        ahead = stream_ahead(model, prompt[None], settings.max_new_tokens, seed=seed, **keys)
        return ({0: int(token)} for token in ahead)
    generators = [torch.Generator(prompt.device).manual_seed(seed) for prompt, seed in rows]
    prompts = [prompt for prompt, _ in rows]
    return stream_rows(
        model, prompts, settings.max_new_tokens, generators=generators, ended=ended, **keys
    )


def _check_drafts(model: Transformer) -> None:
    """Raise UserError unless `stream_ahead` can draft with this model."""
    if not model.predictors:
        raise UserError(
            "--speculative: this run has no depths that draft; train with objective=multi_token"
        )
    caches = [model.new_cache(1), *model.new_caches_ahead(1)]
    layers = [layer for cache in caches for layer in cache.layers]
    if not all(hasattr(layer, "truncate") for layer in layers):
        raise UserError(
            "--speculative: the cache of this run's attention has no method truncate(length), by "
            "which drafts are taken back"
        )
