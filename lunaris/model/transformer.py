"""The decoder-only transformer.

Shapes: B sequences, L positions, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from lunaris.model.attention.base import Attention, AttentionFactory, Positions
from lunaris.model.block import Block
from lunaris.model.cache import KVCache
from lunaris.model.feed_forward import FeedForwardFactory, RoutedFeedForward, RoutingStats
from lunaris.model.init import init_weights
from lunaris.model.layers import ModelShape, RMSNorm, compute_dtype
from lunaris.model.lookahead import Predictor
from lunaris.model.recompute import run_of
from lunaris.model.roles import Role


class Head(Protocol):
    """Computes from the last hidden states what a caller wants of a forward."""

    def __call__(self, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return named tensors; hidden: [B, L, D]; weight: [V, D], the vocabulary projection."""


class AheadHead(Protocol):
    """Computes what a caller wants of the states of one depth of multi-token prediction."""

    def __call__(self, depth: int, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return named tensors; depth: from 1; hidden: [B, L − depth, D]; weight: [V, D]."""


class ModelOutput(NamedTuple):
    """What a forward returns.

    outputs: the results of its heads. aux_loss: [] float32, weighted routing losses, summed over
    layers. load: [n_moe_layers, E] tokens sent to each expert; dropped: [n_moe_layers] assignments
    that capacity dropped; confidence: [n_moe_layers] mean over tokens of the largest gate, NaN
    where a layer has none; all float32 without a gradient. experts: of each such layer, in
    evaluation, the choices ([B, L, k] int64).
    """

    outputs: dict[str, Tensor]
    aux_loss: Tensor
    load: Tensor
    dropped: Tensor
    confidence: Tensor
    experts: tuple[Tensor | None, ...] = ()


class ParameterCount(NamedTuple):
    """Parameters in all, and those that one token passes through."""

    total: int
    active: int


def vocabulary_logits(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return `logits` ([B, L, V] float32); the product runs in the dtype of hidden."""
    return {"logits": (hidden @ weight.to(hidden.dtype).mT).float()}


class Transformer(nn.Module):
    """Token embedding, blocks, a final norm and a (tied) vocabulary projection."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        vocab_size: int,
        tie_embeddings: bool,
        attention: AttentionFactory,
        feed_forward: FeedForwardFactory,
        predictors: Sequence[Predictor] = (),
        activation_checkpointing: str = "none",
    ) -> None:
        """Build the model; attention and feed_forward build those parts of each layer.

        predictors: the depths of multi-token prediction, which belong to the model like its blocks.
        activation_checkpointing: `none`, `selective` or `full` (`lunaris.model.recompute`).

        Its parameters hold values after `init_weights`; on the meta device, `to_empty` comes first.
        """
        super().__init__()
        self.shape = shape
        self.vocab_size = vocab_size
        self.max_seq_len = shape.max_seq_len
        self.embedding = nn.Embedding(vocab_size, shape.d_model)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(
            Block(attention(layer, shape), feed_forward(layer, shape), shape)
            for layer in range(shape.n_layers)
        )
        # Whatever multiplies the states by the vocabulary gets the logits' factor with them.
        self.norm = RMSNorm(shape.d_model, factor=shape.factors.logits)
        self.predictors = nn.ModuleList(predictors)
        self.head = None if tie_embeddings else nn.Linear(shape.d_model, vocab_size, bias=False)
        run = run_of(activation_checkpointing, draws=shape.dropout > 0)
        for unit in self.units():
            unit.run = run  # type: ignore[assignment]

    def forward(
        self,
        tokens: Tensor,
        *,
        head: Head = vocabulary_logits,
        ahead: AheadHead | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> ModelOutput:
        """Run the blocks and then `head`, which may read the parameters: FSDP gathers them here.

        tokens: [B, L] int64. ahead: called with the states of each predictor; without it they do
        not run. documents: [B, L] int64, the document of each position; attention stays within one.
        cache: the earlier positions, to which this call adds these.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.size(1)
        assert end <= self.max_seq_len, f"{end} positions, made for {self.max_seq_len}"
        positions = Positions(start, end, tokens.device, documents)
        x = self.dropout(self.embedding(tokens))
        stats = []
        for layer, block in enumerate(self._layers()):
            remembered = None if cache is None else cache.layers[layer]
            x, routing = self._run(block, (x,), positions, remembered)
            stats.append(routing)
        if cache is not None:
            cache.length = end
        x = self.norm(x)
        weight = self.vocabulary_weight
        outputs = head(x, weight)
        if ahead is not None:
            for depth, (hidden, routing) in enumerate(self._look_ahead(x, tokens, documents), 1):
                outputs |= ahead(depth, hidden, weight)
                stats.append(routing)
        return _output(outputs, [each for each in stats if each is not None])

    def _look_ahead(
        self, hidden: Tensor, tokens: Tensor, documents: Tensor | None
    ) -> Iterator[tuple[Tensor, RoutingStats | None]]:
        """Yield each predictor's states ([B, L − depth, D]) and routing statistics.

        hidden: [B, L, D] the states of the main model. The last positions have no later token.
        """
        for depth in range(1, len(self.predictors) + 1):
            length = tokens.size(1) - depth
            within = None if documents is None else documents[:, :length]
            positions = Positions(0, length, tokens.device, within)
            hidden, routing = self._predict(depth, hidden[:, :length], tokens[:, depth:], positions)
            yield hidden, routing

    def _predict(
        self, depth: int, hidden: Tensor, later: Tensor, positions: Positions, cache: Any = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """Run a predictor on states of the depth before and the tokens `depth` places later."""
        inputs = (hidden, self.dropout(self.embedding(later)))
        return self._run(cast("Predictor", self.predictors[depth - 1]), inputs, positions, cache)

    def look_ahead(self, depth: int, hidden: Tensor, later: Tensor, cache: KVCache) -> Tensor:
        """Return the states ([B, L, D]) of one depth, from 1, at the positions after its cache's.

        hidden: [B, L, D] the states of the depth before there (0: of the main model); later: [B, L]
        int64, the tokens `depth` places later; cache: one of `new_caches_ahead`.
        """
        end = cache.length + later.size(1)
        positions = Positions(cache.length, end, later.device)
        states, _ = self._predict(depth, hidden, later, positions, cache.layers[0])
        cache.length = end
        return states

    def logits(
        self,
        tokens: Tensor,
        *,
        head: Head = vocabulary_logits,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the logits ([B, L, V] float32) of the next tokens; arguments as of `forward`."""
        out: ModelOutput = self(tokens, head=head, documents=documents, cache=cache)
        return out.outputs["logits"]

    def _run(
        self,
        block: Block | Predictor,
        inputs: tuple[Tensor, ...],
        positions: Positions,
        cache: Any,
    ) -> tuple[Tensor, RoutingStats | None]:
        prepared = block.attention.prepare(positions)
        result: tuple[Tensor, RoutingStats | None] = block(
            *inputs, prepared, cache, positions.documents
        )
        return result

    def _layers(self) -> Iterator[Block]:
        return cast("Iterator[Block]", iter(self.blocks))

    def _all_blocks(self) -> list[Block]:
        """Return the blocks of the layers and then those of the predictors."""
        return [*self._layers(), *(cast("Predictor", p).block for p in self.predictors)]

    def units(self) -> list[nn.Module]:
        """Return the modules that hold most parameters, each of which is sharded by itself."""
        return [*self.blocks, *self.predictors]

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for `batch` sequences of up to `max_seq_len` positions.

        Its dtype is that of the matrix products: autocast's, where autocast is on.
        """
        return self._new_cache([block.attention for block in self._layers()], batch)

    def new_caches_ahead(self, batch: int) -> list[KVCache]:
        """Return an empty cache of each depth, as `new_cache` does of the layers."""
        return [
            self._new_cache([cast("Predictor", each).attention], batch) for each in self.predictors
        ]

    def _new_cache(self, attentions: list[Attention], batch: int) -> KVCache:
        weight = self.embedding.weight
        device, dtype = weight.device, compute_dtype(weight)
        return KVCache(
            [
                attention.new_cache(batch, self.max_seq_len, device=device, dtype=dtype)
                for attention in attentions
            ]
        )

    @property
    def vocabulary_weight(self) -> Tensor:
        """The vocabulary projection ([V, D]): the head's, or the embedding that it is tied to."""
        return self.embedding.weight if self.head is None else self.head.weight

    def init_weights(self, seed: int, *, without: Collection[str] = ()) -> None:
        """Draw the parameters but those named in `without`, and reset every buffer.

        The numbers are the same wherever it runs.
        """
        width = self.shape.factors.width
        init_weights(self, seed, self.shape.n_layers, width=width, without=without)

    def parameter_roles(self) -> dict[str, Role]:
        """Return the roles of the embedding and of an untied head."""
        return {"embedding.weight": Role.EMBEDDING, "head.weight": Role.EMBEDDING}

    def moe_layers(self) -> list[int]:
        """Return the indices of the layers that route, in the order of `ModelOutput.load`.

        The predictors count on after the last layer.
        """
        return [i for i, _ in self._routed()]

    def _routed(self) -> Iterator[tuple[int, RoutedFeedForward]]:
        for layer, block in enumerate(self._all_blocks()):
            if isinstance(block.feed_forward, RoutedFeedForward):
                yield layer, block.feed_forward

    def update_balance(self, load: Tensor) -> None:
        """Let every routed layer balance its experts, once an optimizer step.

        load: [n_moe_layers, E], tokens of the step over all micro-steps and processes.
        """
        for (_, feed_forward), row in zip(self._routed(), load, strict=True):
            feed_forward.update_balance(row)

    def routing_numbers(self) -> list[dict[str, Tensor]]:
        """Return what each routed layer logs besides its `ModelOutput`, [] each, by name."""
        return [feed_forward.routing_numbers() for _, feed_forward in self._routed()]

    def balance_buffers(self) -> list[Tensor]:
        """Return the buffers of the routed layers, which `update_balance` may change."""
        return [buffer for _, feed_forward in self._routed() for buffer in feed_forward.buffers()]

    def count_parameters(self) -> ParameterCount:
        """Return how many parameters there are, and how many one token uses."""
        total = sum(p.numel() for p in self.parameters())
        idle = sum(feed_forward.idle_parameters() for _, feed_forward in self._routed())
        return ParameterCount(total, total - idle)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward a token (arXiv 2204.02311, appendix B).

        6 for each parameter that multiplies it, without the embedding's look-up, plus what
        attention computes without parameters.
        """
        active = self.count_parameters().active
        if self.head is not None:
            active -= self.embedding.weight.numel()
        # Each depth multiplies by the vocabulary projection again.
        active += len(self.predictors) * self.embedding.weight.numel()
        attention = sum(block.attention.flops_per_token(seq_len) for block in self._all_blocks())
        return 6.0 * active + attention


def _output(outputs: dict[str, Tensor], stats: list[RoutingStats]) -> ModelOutput:
    if not stats:
        zero = torch.zeros((), device=next(iter(outputs.values())).device)
        none = zero.new_zeros(0)
        return ModelOutput(outputs, zero, zero.new_zeros(0, 0), none, none)
    return ModelOutput(
        outputs,
        aux_loss=torch.stack([s.loss for s in stats]).sum(),
        load=torch.stack([s.load for s in stats]),
        dropped=torch.stack([s.dropped for s in stats]),
        confidence=torch.stack(
            [
                s.loss.new_full((), torch.nan) if s.confidence is None else s.confidence
                for s in stats
            ]
        ),
        experts=tuple(s.experts for s in stats),
    )
