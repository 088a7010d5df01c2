"""Multi-head latent attention (arXiv 2405.04434, section 2.1 and appendix C).

Shapes: B sequences, L new positions, S positions in all, D model width, H heads; widths of a head:
N part of queries and keys without positions, R rotary part, V value; C latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lunaris.config.widths import latent_widths
from lunaris.model.attention.base import Attention, Positions
from lunaris.model.attention.gqa import RotaryInputs, rotary_inputs
from lunaris.model.attention.heads import OutputGate, attend
from lunaris.model.attention.rotary import rotate
from lunaris.model.cache import LatentCache
from lunaris.model.layers import ModelShape, RMSNorm
from lunaris.model.roles import Role


class MLAFactory:
    """The same multi-head latent attention in every layer."""

    def __init__(
        self,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int | None,
        qk_nope_head_dim: int | None,
        qk_rope_head_dim: int | None,
        v_head_dim: int | None,
        output_gate: bool = False,
        sinks: bool = False,
        ranges: str = "auto",
    ) -> None:
        """Widths as of `MultiHeadLatentAttention`.

        None takes what `lunaris.config.widths.latent_widths` says.
        """
        self._q_lora_rank = q_lora_rank
        self._kv_lora_rank = kv_lora_rank
        self._nope, self._rope, self._value = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self._keys = {"output_gate": output_gate, "sinks": sinks, "masked": ranges == "masked"}

    def __call__(self, layer: int, shape: ModelShape) -> MultiHeadLatentAttention:
        widths = latent_widths(
            shape.d_model // shape.n_heads,
            latent=self._kv_lora_rank,
            nope=self._nope,
            rope=self._rope,
            value=self._value,
        )
        return MultiHeadLatentAttention(
            shape,
            q_lora_rank=self._q_lora_rank,
            kv_lora_rank=widths.latent,
            qk_nope_head_dim=widths.nope,
            qk_rope_head_dim=widths.rope,
            v_head_dim=widths.value,
            **self._keys,
        )


class MultiHeadLatentAttention(Attention):
    """Causal attention whose keys and values are computed from one latent a position.

    It is that of DeepSeek-V2 and V3, parameter by parameter: the latents of queries and keys are
    normalised (RMSNorm, eps 1e-6), queries and keys are not; the rotary part of the keys is one for
    all heads; scores are scaled by (N + R)^-1/2. The cache holds the latent and the rotary key of a
    position, C + R numbers, for any number of heads. Shape.n_kv_heads and norm are not read:
    `attention=mla` needs model.n_kv_heads = model.n_heads and model.norm=pre.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        output_gate: bool = False,
        sinks: bool = False,
        masked: bool = False,
    ) -> None:
        """q_lora_rank: width of the queries' latent; None: queries are a plain projection.

        kv_lora_rank: C. qk_nope_head_dim, qk_rope_head_dim, v_head_dim: N, R (even) and V.
        output_gate, sinks, masked: as for `GroupedQueryAttention`.
        """
        super().__init__()
        self.shape = shape
        self.n_heads = shape.n_heads
        self.masked = masked
        self.nope, self.rope, self.value = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.latent = kv_lora_rank
        self.scale = shape.factors.scores / math.sqrt(self.nope + self.rope)
        # Of more new positions the products of `_absorbed` outweigh what `_expanded` computes once.
        once, each = self.latent * (self.nope + self.value), 2 * (self.latent + self.rope)
        self.absorb_up_to = max(1, once // each)
        queries = self.n_heads * (self.nope + self.rope)
        rank = q_lora_rank
        self.q_a = nn.Linear(shape.d_model, rank, bias=False) if rank else nn.Identity()
        self.q_norm = RMSNorm(rank) if rank else nn.Identity()
        self.q_b = nn.Linear(rank or shape.d_model, queries, bias=False)
        self.kv_a = nn.Linear(shape.d_model, self.latent + self.rope, bias=False)
        self.kv_norm = RMSNorm(self.latent)
        keys_and_values = self.n_heads * (self.nope + self.value)
        self.kv_b = nn.Linear(self.latent, keys_and_values, bias=False)
        self.out = nn.Linear(self.n_heads * self.value, shape.d_model, bias=False)
        self.gate = OutputGate(shape.d_model, shape.n_heads) if output_gate else None
        self.sinks = nn.Parameter(torch.empty(shape.n_heads)) if sinks else None

    def prepare(self, positions: Positions) -> RotaryInputs:
        """Return the rotary tables and the mask of these positions."""
        masked = self.masked or (self.training and self.shape.dropout > 0)
        widest = max(self.nope + self.rope, self.value)
        return rotary_inputs(positions, self.shape, self.rope, head_width=widest, masked=masked)

    def forward(
        self, x: Tensor, prepared: RotaryInputs, cache: LatentCache | None = None
    ) -> Tensor:
        """Return [B, L, D] for [B, L, D]; see `Attention.forward`."""
        cos, sin, *_ = prepared
        q = self.q_b(self.q_norm(self.q_a(x))).unflatten(-1, (self.n_heads, self.nope + self.rope))
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        q_rope = rotate(q_rope, cos, sin)
        latent, k_rope = self.kv_a(x).split([self.latent, self.rope], dim=-1)
        k_rope = rotate(k_rope[:, :, None], cos, sin).squeeze(2)
        seen = torch.cat((self.kv_norm(latent), k_rope), dim=-1)
        if cache is not None:
            seen = cache.extend(seen)
        absorb = cache is not None and x.size(1) <= self.absorb_up_to
        heads = self._absorbed if absorb else self._expanded
        y = heads(q_nope, q_rope, seen, prepared)
        if self.gate is not None:
            y = self.gate(x, y)
        return self.out(y.transpose(1, 2).flatten(2))

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, seen: Tensor, prepared: RotaryInputs
    ) -> Tensor:
        """Return the heads' outputs ([B, H, L, V]) from the keys and values of every head.

        q_nope: [B, L, H, N]; q_rope: [B, L, H, R], rotated; seen: [B, S, C + R], the normalised
        latents and the rotated keys.
        """
        latents, k_rope = seen.split([self.latent, self.rope], dim=-1)
        keys_and_values = self.kv_b(latents).unflatten(-1, (self.n_heads, self.nope + self.value))
        k_nope, v = keys_and_values.split([self.nope, self.value], dim=-1)
        k_rope = k_rope[:, :, None].expand(-1, -1, self.n_heads, -1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
        dropout = self.shape.dropout if self.training else 0.0
        heads = (q, k, v.transpose(1, 2), prepared.mask)
        return attend(
            *heads, first=prepared.first, scale=self.scale, sinks=self.sinks, dropout=dropout
        )

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, seen: Tensor, prepared: RotaryInputs
    ) -> Tensor:
        """Return what `_expanded` does for few new positions, without any head's keys and values.

        The projection of the latents to keys is absorbed in the query, and that to values in the
        output: all heads attend to the latents themselves, as to one key-value head.
        """
        weights = self.kv_b.weight.unflatten(0, (self.n_heads, self.nope + self.value))
        to_keys, to_values = weights.split([self.nope, self.value], dim=1)
        q = torch.einsum("blhn,hnc->blhc", q_nope, to_keys)
        q = torch.cat((q, q_rope), dim=-1).transpose(1, 2)
        # The rotary columns of the values are computed in vain: a slice would be copied every time.
        heads = (q, seen[:, None], seen[:, None], prepared.mask)
        y = attend(*heads, first=prepared.first, scale=self.scale, sinks=self.sinks)
        return torch.einsum("bhlc,hvc->bhlv", y[..., : self.latent], to_values)

    def new_cache(
        self, batch: int, max_len: int, *, device: torch.device, dtype: torch.dtype
    ) -> LatentCache:
        """Return an empty cache of latents and rotary keys."""
        shape = (batch, max_len, self.latent + self.rope)
        return LatentCache(torch.empty(shape, device=device, dtype=dtype))

    def flops_per_token(self, seq_len: int) -> float:
        """Return 6 · H · (N + R + V) · L: the scores and the weighted values, as in training."""
        return 6.0 * self.n_heads * (self.nope + self.rope + self.value) * seq_len

    def parameter_roles(self) -> dict[str, Role]:
        """Return the roles of the projections and the sinks; norms and gate declare theirs."""
        matrices = ("q_a", "q_b", "kv_a", "kv_b")
        return {f"{name}.weight": Role.MATRIX for name in matrices} | {
            "out.weight": Role.MATRIX | Role.RESIDUAL_OUTPUT,
            "sinks": Role.BIAS,
        }
