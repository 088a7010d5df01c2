"""The schema of the decoder. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.checks import above_zero, one_of, within
from lunaris.errors import UserError


@dataclass
class ModelConfig:
    """The decoder. `vocab_size: null` takes the vocabulary of the data's manifest."""

    vocab_size: int | None = None
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    max_seq_len: int = 256
    rope_theta: float = 10000.0
    dropout: float = 0.0
    # Hidden width of a SwiGLU: 2/3 · multiplier · d_model, rounded up to `multiple_of`.
    ffn_hidden_multiplier: float = 4.0
    multiple_of: int = 32
    tie_embeddings: bool = True
    norm: str = "qk_reorder"

    def __post_init__(self) -> None:
        for key in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
            within(f"model.{key}", getattr(self, key), low=1)
        within("model.multiple_of", self.multiple_of, low=1)
        within("model.dropout", self.dropout, 0.0, 0.99)
        above_zero("model.rope_theta", self.rope_theta)
        above_zero("model.ffn_hidden_multiplier", self.ffn_hidden_multiplier)
        one_of("model.norm", self.norm, ("qk_reorder", "pre"))
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
