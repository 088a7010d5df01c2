"""The schema of the decoder. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Schema, changeable, key
from lunaris.config.widths import WidthFactors, width_factors
from lunaris.errors import UserError


@dataclass
class ModelConfig(Schema):
    """The decoder. `vocab_size: null` takes the vocabulary of the data's manifest."""

    _group_ = "model"
    # Null: the vocabulary of the data.
    vocab_size: int | None = key(None, low=1, high=2**32)
    # Width of the residual stream.
    d_model: int = key(128, low=1, at_most=2**20)
    # Blocks of attention and feed-forward.
    n_layers: int = key(4, low=1, at_most=2**16)
    # Query heads.
    n_heads: int = key(4, low=1)
    # Heads of keys and values; each serves n_heads / n_kv_heads query heads.
    n_kv_heads: int = key(2, low=1)
    # Tokens of a training sequence.
    max_seq_len: int = key(256, low=1)
    # Base of the rotary frequencies (arXiv 2104.09864).
    rope_theta: float = key(10000.0, above=0)
    # Of attention weights and feed-forward outputs, while training.
    dropout: float = changeable(0.0, low=0.0, high=0.99)
    # Of every feed-forward, experts too: swiglu, geglu, or relu2 (squared ReLU, without a gate).
    activation: str = key("swiglu", allowed=("swiglu", "geglu", "relu2"))
    # Hidden width with a gate: 2/3 · multiplier · d_model, rounded up to `multiple_of`; without one
    # 3/2 of that, which has as many parameters.
    ffn_hidden_multiplier: float = key(4.0, above=0, at_most=2**10)
    # Feed-forward widths are rounded up to a multiple of this.
    multiple_of: int = key(32, low=1, at_most=2**20)
    # One matrix for the embedding and the output.
    tie_embeddings: bool = True
    # Where norms stand: qk_reorder normalises each sublayer's output, queries and keys; pre its
    # input.
    norm: str = key("qk_reorder", allowed=("qk_reorder", "pre"))
    # mup: initial weights and learning rates follow the width, so that a rate that is good at one
    # width is good at others (docs/scaling.md).
    parametrization: str = key("standard", allowed=("standard", "mup"))
    # Of mup: a model of this width is as in the standard parametrization.
    mup_base_width: int = key(128, low=1, at_most=2**20)
    # Of mup: the width of a head there; null: the model of the base width has as many heads.
    mup_base_head_width: int | None = key(None, low=1, at_most=2**20)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise UserError(
                f"model.d_model={self.d_model}: must be divisible by model.n_heads={self.n_heads}"
            )
        if (self.d_model // self.n_heads) % 2:
            raise UserError(
                f"model.d_model={self.d_model}: d_model / n_heads = "
                f"{self.d_model // self.n_heads} must be even for rotary embeddings"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_kv_heads={self.n_kv_heads}: must divide model.n_heads={self.n_heads}"
            )

    def width_factors(self) -> WidthFactors:
        """Return what the parametrization makes of the width."""
        return width_factors(
            self.parametrization,
            self.d_model,
            self.n_heads,
            self.mup_base_width,
            self.mup_base_head_width,
        )
