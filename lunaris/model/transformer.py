"""The decoder-only transformer.

Shapes: B sequences, L positions, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lunaris.model.attention import Attention, rope_tables
from lunaris.model.block import Block
from lunaris.model.cache import KVCache
from lunaris.model.init import init_weights
from lunaris.model.layers import ModelShape, RMSNorm, compute_dtype
from lunaris.model.loss import linear_cross_entropy
from lunaris.model.roles import Role


class FeedForwardFactory(Protocol):
    """Builds the feed-forward of each layer; what `moe` chooses."""

    def __call__(self, layer: int, shape: ModelShape) -> nn.Module:
        """Return a module from [B, L, D] to ([B, L, D], routing statistics or None)."""


class ModelOutput(NamedTuple):
    """What a training forward returns.

    loss: [] main_loss + aux_loss. main_loss: [] mean cross-entropy (nats a target). aux_loss: []
    weighted routing losses, summed over layers. load: [n_moe_layers, E] tokens sent to each expert;
    dropped: [n_moe_layers] assignments that capacity dropped; both float32 without a gradient.
    """

    loss: Tensor
    main_loss: Tensor
    aux_loss: Tensor
    load: Tensor
    dropped: Tensor


class ParameterCount(NamedTuple):
    """Parameters in all, and those that one token passes through."""

    total: int
    active: int


class Transformer(nn.Module):
    """Token embedding, blocks, a final norm and a (tied) vocabulary projection."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int,
        max_seq_len: int,
        rope_theta: float,
        dropout: float,
        ffn_hidden_multiplier: float,
        multiple_of: int,
        tie_embeddings: bool,
        norm: str,
        feed_forward: FeedForwardFactory,
        activation_checkpointing: bool = False,
    ) -> None:
        """Keys as in the `model` group; feed_forward: builds each layer's feed-forward.

        It takes `init_weights` before use; made on the meta device, `to_empty` before that.
        """
        super().__init__()
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.rope_theta = rope_theta
        self.n_layers, self.d_model, self.n_kv_heads = n_layers, d_model, n_kv_heads
        self.head_dim = d_model // n_heads
        self.activation_checkpointing = activation_checkpointing
        shape = ModelShape(d_model, n_layers, ffn_hidden_multiplier, multiple_of, dropout)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                Attention(d_model, n_heads, n_kv_heads, norm=norm, dropout=dropout),
                feed_forward(layer, shape),
                d_model,
                norm,
                dropout,
            )
            for layer in range(n_layers)
        )
        self.norm = RMSNorm(d_model)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
        for name in ("rope_cos", "rope_sin"):
            self.register_buffer(
                name, torch.empty(max_seq_len, self.head_dim // 2), persistent=False
            )

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> ModelOutput | Tensor:
        """Return the losses with targets, else logits ([B, L, V] float32).

        tokens: [B, L] int64. targets: [B, L] int64, negative where there is none. documents: [B, L]
        int, the document of each position; attention stays within one. cache: earlier positions;
        extended by these.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.size(1)
        assert end <= self.max_seq_len, f"{end} positions, made for {self.max_seq_len}"
        cos, sin = self.rope_cos[start:end], self.rope_sin[start:end]
        mask = attention_mask(start, end, documents, tokens.device)
        x = self.dropout(self.embedding(tokens))
        stats = []
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for layer, block in enumerate(self.blocks):
            if recompute:
                x, routing = checkpoint(
                    block,
                    x,
                    cos,
                    sin,
                    mask,
                    use_reentrant=False,
                    preserve_rng_state=self.dropout.p > 0,
                )
            else:
                x, routing = block(x, cos, sin, mask, cache.layers[layer] if cache else None)
            if routing is not None:
                stats.append(routing)
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if targets is None:
            return (x @ weight.to(x.dtype).mT).float()
        return _output(linear_cross_entropy(x, weight, targets), stats)

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for `batch` sequences of up to `max_seq_len` positions.

        Its dtype is what the projections give: autocast's, made where autocast is on.
        """
        return KVCache(
            self.n_layers,
            batch,
            self.n_kv_heads,
            self.max_seq_len,
            self.head_dim,
            device=self.rope_cos.device,
            dtype=compute_dtype(self.embedding.weight),
        )

    def init_weights(self, seed: int) -> None:
        """Draw every parameter and fill every buffer; the same numbers wherever it runs."""
        init_weights(self, seed, self.n_layers)

    def reset_buffers(self) -> None:
        """Fill the rotary tables."""
        cos, sin = rope_tables(self.max_seq_len, self.head_dim, self.rope_theta)
        self.rope_cos.copy_(cos)
        self.rope_sin.copy_(sin)

    def parameter_roles(self) -> dict[str, Role]:
        """Return the roles of the embedding and of an untied head."""
        return {"embedding.weight": Role.EMBEDDING, "head.weight": Role.EMBEDDING}

    def moe_layers(self) -> list[int]:
        """Return the indices of the layers that route, in the order of `ModelOutput.load`."""
        return [i for i, block in enumerate(self.blocks) if hasattr(block.feed_forward, "router")]

    def _moe(self) -> list[Any]:
        return [self.blocks[layer].feed_forward for layer in self.moe_layers()]

    def update_balance(self, load: Tensor) -> None:
        """Move the routers' balance biases, once an optimizer step.

        load: [n_moe_layers, E], tokens of the whole step over all processes.
        """
        for feed_forward, row in zip(self._moe(), load, strict=True):
            feed_forward.router.update_balance(row)

    def count_parameters(self) -> ParameterCount:
        """Return how many parameters there are, and how many one token uses."""
        total = sum(p.numel() for p in self.parameters())
        idle = sum(feed_forward.idle_parameters() for feed_forward in self._moe())
        return ParameterCount(total, total - idle)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward a token (arXiv 2204.02311, appendix B).

        6 a parameter that multiplies it, the embedding's look-up not counted, plus 12 · layers ·
        D · L for attention.
        """
        active = self.count_parameters().active
        if self.head is not None:
            active -= self.embedding.weight.numel()
        return 6.0 * active + 12.0 * self.n_layers * self.d_model * seq_len


def attention_mask(
    start: int, end: int, documents: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return which positions are attended (bool, broadcastable to [B, H, L, S]).

    None where plain causal attention (or that of one new position to all) says it.
    """
    new = end - start
    if documents is None and (start == 0 or new == 1):
        return None
    mask = torch.ones(new, end, dtype=torch.bool, device=device).tril(start)
    if documents is not None:
        assert start == 0, "documents go with whole sequences"
        mask = mask & (documents[:, :, None] == documents[:, None, :])
        return mask[:, None]
    return mask


def _output(main_loss: Tensor, stats: list[Any]) -> ModelOutput:
    zero = torch.zeros((), device=main_loss.device)
    if not stats:
        return ModelOutput(main_loss, main_loss, zero, zero.new_zeros(0, 0), zero.new_zeros(0))
    aux_loss = torch.stack([s.loss for s in stats]).sum()
    return ModelOutput(
        loss=main_loss + aux_loss,
        main_loss=main_loss,
        aux_loss=aux_loss,
        load=torch.stack([s.load for s in stats]),
        dropped=torch.stack([s.dropped for s in stats]),
    )
