"""The schemas of attention. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component, free, key
from lunaris.errors import UserError


@dataclass
class AttentionConfig(Component):
    """What builds the attention of each layer."""

    _group_ = "attention"


@dataclass
class GQAConfig(AttentionConfig):
    """Grouped-query attention (arXiv 2305.13245); heads and rotary base are keys of `model`."""

    _target_: str = "lunaris.model.attention.gqa.GQAFactory"
    # Scale each head's output by a sigmoid of the layer's input (arXiv 2505.06708).
    output_gate: bool = False
    # Give each head a learned logit in the sum below its softmax, as in gpt-oss (arXiv 2508.10925).
    sinks: bool = False
    # How documents (data.document_masking) and windows are computed: auto, by a kernel that needs
    # no mask in memory; masked, by a mask of all pairs of positions.
    ranges: str = free("auto", allowed=("auto", "masked"))


@dataclass
class SlidingWindowConfig(GQAConfig):
    """Grouped-query attention to the last `window` positions (arXiv 2004.05150)."""

    _target_: str = "lunaris.model.attention.sliding_window.SlidingWindowFactory"
    # Positions that each attends to, itself included.
    window: int = key(128, low=1)
    # Every n-th layer attends to all positions: of 8 layers, with 4, those at 3 and 7. Null: none.
    full_every: int | None = key(4, low=2)


@dataclass
class MLAConfig(AttentionConfig):
    """Multi-head latent attention (arXiv 2405.04434); the widths have Hugging Face's names.

    Null takes a width from d = model.d_model / model.n_heads.
    """

    _target_: str = "lunaris.model.attention.mla.MLAFactory"
    # The latent of the queries; null: a plain projection.
    q_lora_rank: int | None = key(None, low=1, at_most=2**20)
    # The latent of keys and values; null: 2d.
    kv_lora_rank: int | None = key(None, low=1, at_most=2**20)
    # The part of a head's queries and keys without positions; null: d.
    qk_nope_head_dim: int | None = key(None, low=1, at_most=2**20)
    # The rotary part, of which the key is one for all heads; null: d/2, rounded up to even.
    qk_rope_head_dim: int | None = key(None, low=1, at_most=2**20)
    # The value of a head; null: d.
    v_head_dim: int | None = key(None, low=1, at_most=2**20)
    # Scale each head's output by a sigmoid of the layer's input (arXiv 2505.06708).
    output_gate: bool = False
    # Give each head a learned logit in the sum below its softmax, as in gpt-oss (arXiv 2508.10925).
    sinks: bool = False
    # How documents (data.document_masking) and windows are computed: auto, by a kernel that needs
    # no mask in memory; masked, by a mask of all pairs of positions.
    ranges: str = free("auto", allowed=("auto", "masked"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_rope_head_dim is not None and self.qk_rope_head_dim % 2:
            raise UserError(
                f"attention.qk_rope_head_dim={self.qk_rope_head_dim}: must be even for rotary "
                "embeddings"
            )

    def widths(self) -> dict[str, int | None]:
        """Return the keys of the widths and their values."""
        return {
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
        }
