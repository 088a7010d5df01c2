"""How much the routing of the same tokens changes between evaluations."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lunaris.metrics.records import Row

# The choices that are compared, of all layers together at most: a checkpoint holds them in its
# train_state.json, two bytes each. And the tokens of one layer.
_MOST_CHOICES = 2**17
_MOST_TOKENS = 1024


class RoutingChurn:
    """Compares the experts chosen for the first validation sequence with the evaluation before.

    That sequence is the same whatever the parallelism and the size of a batch. The process of rank
    0 has one, since only its rows are logged. A checkpoint holds the choices: a resumed run logs
    the numbers of one that never stopped.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        """saved: what `state_dict` returned; empty in checkpoints of older versions."""
        self._before = [_decoded(layer) for layer in (saved or {}).get("layers", [])]
        self._now: list[np.ndarray | None] = []

    def watch(self, experts: Sequence[Tensor | None]) -> None:
        """Take the choices in an evaluation's first batch, of each routed layer ([B, L, k])."""
        widths = [0 if layer is None else layer.size(-1) for layer in experts]
        most = max(1, min(_MOST_TOKENS, _MOST_CHOICES // max(1, sum(widths))))
        self._now = [None if layer is None else _choices(layer[0, :most]) for layer in experts]

    def row(self, layers: Sequence[int]) -> Row:
        """Return `moe/layer_NN/churn` of each layer that an earlier evaluation had.

        It is the share of the choices that changed: 0 when every token keeps its experts. Called
        once an evaluation is complete.
        """
        row: Row = {}
        for layer, before, now in zip(layers, self._before, self._now, strict=False):
            if before is not None and now is not None and before.shape == now.shape:
                kept = (before[:, :, None] == now[:, None, :]).any(axis=2).mean()
                row[f"moe/layer_{layer:02d}/churn"] = 1.0 - float(kept)
        self._before = self._now
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the choices of the last evaluation, for a checkpoint."""
        return {"layers": [_encoded(layer) for layer in self._before]} if self._before else {}


def _choices(experts: Tensor) -> np.ndarray:
    """Return the choices ([tokens, k] uint16) of experts ([tokens, k] int64)."""
    return np.asarray(experts.cpu().numpy(), dtype="<u2")


def _encoded(choices: np.ndarray | None) -> dict[str, Any] | None:
    if choices is None:
        return None
    content = base64.b64encode(choices.tobytes()).decode("ascii")
    return {"k": choices.shape[1], "experts": content}


def _decoded(saved: dict[str, Any] | None) -> np.ndarray | None:
    if saved is None:
        return None
    content = np.frombuffer(base64.b64decode(saved["experts"]), dtype="<u2")
    return content.reshape(-1, saved["k"])
