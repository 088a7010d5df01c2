"""What a frozen config says about the exported model, and what no exported class has. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.attention import GQAConfig, MLAConfig, SlidingWindowConfig
from lunaris.config.schema.moe import (
    MoEConfig,
    NoMoEConfig,
    SigmoidRouterConfig,
    SoftmaxRouterConfig,
)
from lunaris.config.schema.objective import MultiTokenConfig, NextTokenConfig
from lunaris.config.schema.root import Config
from lunaris.config.widths import LatentWidths, hidden_width, latent_widths
from lunaris.errors import UserError

_KNOWN = {
    "attention": (GQAConfig, SlidingWindowConfig, MLAConfig),
    "moe": (NoMoEConfig, MoEConfig),
    "moe.router": (SoftmaxRouterConfig, SigmoidRouterConfig),
    "objective": (NextTokenConfig, MultiTokenConfig),
}
# The names in transformers of the activations with a gate.
_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}


@dataclass(frozen=True)
class Settings:
    """A run's config, read once for all families. vocab_size: that of the checkpoint."""

    cfg: Config
    vocab_size: int
    eot_id: int | None

    @property
    def moe(self) -> MoEConfig | None:
        """The experts' keys; None for a dense model."""
        return self.cfg.moe if isinstance(self.cfg.moe, MoEConfig) else None

    @property
    def sigmoid(self) -> SigmoidRouterConfig | None:
        """The keys of a sigmoid router; None for any other."""
        router = self.moe and self.moe.router
        return router if isinstance(router, SigmoidRouterConfig) else None

    @property
    def mla(self) -> MLAConfig | None:
        """The keys of multi-head latent attention; None for any other."""
        return self.cfg.attention if isinstance(self.cfg.attention, MLAConfig) else None

    @property
    def n_layers(self) -> int:
        return self.cfg.model.n_layers

    @property
    def head_dim(self) -> int:
        return self.cfg.model.d_model // self.cfg.model.n_heads

    @property
    def kv_rows(self) -> int:
        """The rows of all keys, and of all values, in the fused projection."""
        return self.cfg.model.n_kv_heads * self.head_dim

    @property
    def first_dense(self) -> int:
        """How many layers at the start have a dense feed-forward: all of a dense model's."""
        return min(self.moe.first_dense_layers, self.n_layers) if self.moe else self.n_layers

    @property
    def dense_hidden(self) -> int:
        """The hidden width of a dense feed-forward."""
        model = self.cfg.model
        return hidden_width(True, model.d_model, model.ffn_hidden_multiplier, model.multiple_of)

    @property
    def expert_hidden(self) -> int:
        """The hidden width of one expert; of a dense model, that of its feed-forward."""
        return self.moe.expert_width(self.cfg.model) if self.moe else self.dense_hidden

    @property
    def latent(self) -> LatentWidths:
        """The widths of multi-head latent attention."""
        assert self.mla is not None
        return latent_widths(
            self.head_dim,
            latent=self.mla.kv_lora_rank,
            nope=self.mla.qk_nope_head_dim,
            rope=self.mla.qk_rope_head_dim,
            value=self.mla.v_head_dim,
        )

    @property
    def windows(self) -> list[int | None]:
        """The attention window of each layer; None: all positions."""
        attention = self.cfg.attention
        if not isinstance(attention, SlidingWindowConfig):
            return [None] * self.n_layers
        every = attention.full_every
        return [
            None if every is not None and (layer + 1) % every == 0 else attention.window
            for layer in range(self.n_layers)
        ]

    @property
    def activation(self) -> str:
        """The name of the activation in transformers."""
        return _ACTIVATIONS[self.cfg.model.activation]

    def common(self) -> dict[str, object]:
        """Return the fields of `config.json` that every family shares."""
        model = self.cfg.model
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": self.dense_hidden,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": model.n_heads,
            "num_key_value_heads": model.n_kv_heads,
            "hidden_act": self.activation,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": model.max_seq_len,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "bos_token_id": None,
            "eos_token_id": self.eot_id,
            "pad_token_id": None,
            "use_cache": True,
        }


def check_exportable(cfg: Config) -> None:
    """Raise UserError for what no exported class computes, naming its key and the remedy."""
    parts = {"attention": cfg.attention, "moe": cfg.moe, "objective": cfg.objective}
    if isinstance(cfg.moe, MoEConfig):
        parts["moe.router"] = cfg.moe.router
    for key, part in parts.items():
        targets = {kind._target_ for kind in _KNOWN[key]}
        if type(part) not in _KNOWN[key] or part._target_ not in targets:
            raise UserError(
                f"{key}._target_={part._target_}: a custom class has no counterpart in "
                "transformers; only the options of this package can be exported"
            )
    cap = cfg.objective.logit_soft_cap if isinstance(cfg.objective, NextTokenConfig) else None
    if cap is not None:
        raise UserError(
            f"objective.logit_soft_cap={cap}: no class that this exports "
            "to caps its logits; train with objective.logit_soft_cap=null"
        )
    if cfg.model.activation not in _ACTIVATIONS:
        raise UserError(
            f"model.activation={cfg.model.activation}: the classes that this exports to have a "
            f"gate; train with model.activation={' or '.join(_ACTIVATIONS)}"
        )
    for name in ("output_gate", "sinks"):
        if getattr(cfg.attention, name):
            raise UserError(
                f"attention.{name}=true: no class that this exports to has it; train with "
                f"attention.{name}=false"
            )
