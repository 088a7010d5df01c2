"""The modules of multi-token prediction (arXiv 2412.19437, section 2.2).

Shapes: B sequences, L positions, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lunaris.model.attention.base import Attention
from lunaris.model.block import Block
from lunaris.model.feed_forward import RoutingStats
from lunaris.model.layers import ModelShape, RMSNorm
from lunaris.model.recompute import Run, keep_all
from lunaris.model.roles import Role


class Predictor(nn.Module):
    """Depth k: from the states of depth k − 1 and the tokens k places later to its own states.

    h'ᵢ = M [RMSNorm(hᵢ of depth k − 1); RMSNorm(Emb(tᵢ₊ₖ))] (eq. 21), then one transformer block
    (eq. 22) and a norm before the shared vocabulary projection (eq. 23). The states of every depth,
    and those of the main model, are the ones after their norm.
    """

    def __init__(self, block: Block, shape: ModelShape) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(shape.d_model)
        self.embedding_norm = RMSNorm(shape.d_model)
        self.project = nn.Linear(2 * shape.d_model, shape.d_model, bias=False)
        self.block = block
        self.norm = RMSNorm(shape.d_model, factor=shape.factors.logits)
        self.run: Run = keep_all

    @property
    def attention(self) -> Attention:
        """The attention of its block."""
        return self.block.attention

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        prepared: Any,
        cache: Any = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """Return the states ([B, L, D]) and the routing statistics of the block.

        hidden, embedded: [B, L, D] states of the depth before and the later tokens' embeddings. The
        other arguments are those of `Block.forward`.
        """
        run = self.run if cache is None else keep_all
        return run(self._compute, hidden, embedded, prepared, cache, documents)

    def _compute(
        self,
        hidden: Tensor,
        embedded: Tensor,
        prepared: Any,
        cache: Any,
        documents: Tensor | None,
    ) -> tuple[Tensor, RoutingStats | None]:
        parts = (self.hidden_norm(hidden), self.embedding_norm(embedded))
        x, stats = self.block(self.project(torch.cat(parts, dim=-1)), prepared, cache, documents)
        return self.norm(x), stats

    def parameter_roles(self) -> dict[str, Role]:
        """Return the role of the projection; norms and the block declare their own."""
        return {"project.weight": Role.MATRIX}
