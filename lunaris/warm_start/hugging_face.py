"""Reads the weights of a Hugging Face folder under the names that they have in the model.

It reads the classes whose computation `model.norm=pre` shares: Qwen3, Qwen3-MoE and Dots1. Rows of
query, key and value are stacked, gate and up rows too, and those of the experts are transposed.

Shapes: D model width, H hidden width, E experts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lunaris.atomic_files import read_json
from lunaris.config.schema.moe import MoEConfig, SigmoidRouterConfig
from lunaris.config.schema.root import Config
from lunaris.errors import UserError, did_you_mean
from lunaris.model.init import copy_to_shard, fill_experts
from lunaris.warm_start.fit import Shapes

_CLASSES = ("qwen3", "qwen3_moe", "dots1")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000
# Of one layer: the end of a name there, and the names here that it belongs to. A part of a stacked
# tensor has its place in it.
_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "self_attn.o_proj.weight": "attention.out.weight",
    "mlp.gate.weight": "feed_forward.router.weight",
    "mlp.gate.e_score_correction_bias": "feed_forward.router.balance_bias",
    "mlp.down_proj.weight": "feed_forward.swiglu.down.weight",
    "mlp.shared_experts.down_proj.weight": "feed_forward.shared.down.weight",
}
_STACKED = {
    "attention.qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "feed_forward.swiglu.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "feed_forward.shared.gate_up.weight": [
        f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up")
    ],
}
_WHOLE = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a safetensors file; begin, end: bytes of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Tensor:
        """Return the tensor, mapped from the file: what is not read takes no memory."""
        raw = np.memmap(self.path, mode="c", offset=self.begin, shape=(self.end - self.begin,))
        return torch.from_numpy(raw).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Built:
    """A tensor of the model. matrix: of stacked experts, builds the one of an expert."""

    shape: tuple[int, ...]
    whole: Callable[[], Tensor]
    matrix: Callable[[int], Tensor] | None = None


class HuggingFaceFolder:
    """The tensors of a Hugging Face folder, by the names that they have in the model."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for an unknown class, a damaged file, and tensors without a place."""
        self._said = f"init_from={folder}"
        self.config = read_json(folder / "config.json")
        kind = str(self.config.get("model_type"))
        if kind not in _CLASSES:
            raise UserError(
                f"{self._said}: config.json names model_type={kind}; what can be read are "
                f"{', '.join(_CLASSES)}{did_you_mean(kind, _CLASSES)}"
            )
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{self._said}: holds no *.safetensors file")
        self._stored: dict[str, _Stored] = {}
        for file in files:
            self._stored |= _header(file, self._said)
        self._built = self._build()
        self.shapes: Shapes = {name: built.shape for name, built in self._built.items()}

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Copy this process's shards of tensors of the same shapes into `targets`, in place."""
        for name, target in targets.items():
            built = self._built[name]
            if built.matrix is not None:
                fill_experts(target, built.matrix)
            else:
                copy_to_shard(target, built.whole())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return complete tensors on the CPU, float32."""
        return {name: self._built[name].whole().float() for name in names}

    def other_keys(self, cfg: Config) -> list[str]:
        """Return a line for each key with which `cfg` would compute something else."""
        found, model = self.config, cfg.model
        rope = found.get("rope_parameters") or {}
        pairs: list[tuple[str, Any, str, Any]] = [
            ("hidden_act", found.get("hidden_act"), "model.activation",
             {"swiglu": "silu"}.get(model.activation, model.activation)),
            ("the class", "pre", "model.norm", model.norm),
            ("num_attention_heads", found.get("num_attention_heads"), "model.n_heads",
             model.n_heads),
            ("num_key_value_heads", found.get("num_key_value_heads"), "model.n_kv_heads",
             model.n_kv_heads),
            ("rope_theta", rope.get("rope_theta", found.get("rope_theta")), "model.rope_theta",
             model.rope_theta),
        ]  # fmt: skip
        if isinstance(cfg.moe, MoEConfig) and found["model_type"] != "qwen3":
            pairs += self._of_experts(cfg.moe)
        return [
            f"{there}={a} there, {here}={b} here"
            for there, a, here, b in pairs
            if a is not None and a != b
        ]

    def _of_experts(self, moe: MoEConfig) -> list[tuple[str, Any, str, Any]]:
        found, sigmoid = self.config, isinstance(moe.router, SigmoidRouterConfig)
        scores = "sigmoid" if found["model_type"] == "dots1" else "softmax"
        pairs: list[tuple[str, Any, str, Any]] = [
            ("num_experts_per_tok", found.get("num_experts_per_tok"), "moe.n_experts_per_token",
             moe.n_experts_per_token),
            ("norm_topk_prob", found.get("norm_topk_prob"), "moe.normalize_gates",
             moe.normalize_gates),
            ("the router", scores, "moe/router", "sigmoid" if sigmoid else "softmax"),
        ]  # fmt: skip
        if isinstance(moe.router, SigmoidRouterConfig):
            scale = found.get("routed_scaling_factor")
            pairs.append(("routed_scaling_factor", scale, "moe.router.route_scale",
                          moe.router.route_scale))  # fmt: skip
        return pairs

    def _build(self) -> dict[str, _Built]:
        """Return the tensors of the model; raise UserError for stored ones that have no place."""
        built: dict[str, _Built] = {}
        layers: dict[str, dict[str, _Stored]] = {}
        unknown = []
        for name, stored in self._stored.items():
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            if match:
                layers.setdefault(match[1], {})[match[2]] = stored
            elif name in _WHOLE:
                built[_WHOLE[name]] = _Built(stored.shape, stored.read)
            else:
                unknown.append(name)
        for number, tensors in layers.items():
            made, left = self._layer(tensors)
            built |= {f"blocks.{number}.{name}": value for name, value in made.items()}
            unknown += [f"model.layers.{number}.{name}" for name in left]
        if unknown:
            raise UserError(f"{self._said}: holds {unknown[0]}, which has no place in the model")
        return built

    def _layer(self, tensors: dict[str, _Stored]) -> tuple[dict[str, _Built], list[str]]:
        made: dict[str, _Built] = {}
        left = dict(tensors)
        for name in [name for name in tensors if name in _LAYER]:
            stored = left.pop(name)
            made[_LAYER[name]] = _Built(stored.shape, stored.read)
        for name, parts in _STACKED.items():
            if all(part in left for part in parts):
                made[name] = _stacked([left.pop(part) for part in parts])
        experts: dict[int, dict[str, _Stored]] = {}
        for name in [name for name in left if _EXPERT.fullmatch(name)]:
            number, part = _EXPERT.fullmatch(name).groups()  # type: ignore[union-attr]
            experts.setdefault(int(number), {})[part] = left.pop(name)
        if experts:
            complete = sorted(experts) == list(range(len(experts)))
            if not complete or any(len(parts) < 3 for parts in experts.values()):
                raise UserError(f"{self._said}: lacks a part of an expert")
            made |= _experts(experts)
        return made, list(left)


def _stacked(parts: list[_Stored]) -> _Built:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return _Built(shape, lambda: torch.cat([part.read() for part in parts]))


def _experts(experts: dict[int, dict[str, _Stored]]) -> dict[str, _Built]:
    """Return the stacked weights of a layer's experts: [E, D, 2H] and [E, H, D]."""

    def gate_up(expert: int) -> Tensor:
        return torch.cat([experts[expert][part].read() for part in ("gate", "up")]).mT

    def down(expert: int) -> Tensor:
        return experts[expert]["down"].read().mT

    width, hidden = experts[0]["down"].shape
    made = {}
    for name, matrix, shape in (
        ("gate_up", gate_up, (len(experts), width, 2 * hidden)),
        ("down", down, (len(experts), hidden, width)),
    ):
        whole = lambda matrix=matrix: torch.stack([matrix(e) for e in range(len(experts))])  # noqa: E731
        made[f"feed_forward.experts.{name}"] = _Built(shape, whole, matrix)
    return made


def _header(path: Path, said: str) -> dict[str, _Stored]:
    """Return what a safetensors file says of its tensors. Raises UserError for a damaged file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError("its header has an impossible length")
            header = json.loads(file.read(length))
        size = path.stat().st_size
        header.pop("__metadata__", None)
        found = {}
        for name, row in header.items():
            begin, end = (8 + length + offset for offset in row["data_offsets"])
            dtype, shape = _DTYPES.get(row["dtype"]), tuple(row["shape"])
            if dtype is None:
                raise UserError(f"{said}: {path.name}: {name} has the dtype {row['dtype']}")
            if not 8 + length <= begin <= end <= size:
                raise ValueError(f"{name} lies outside of the file")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has another size than its shape")
            found[name] = _Stored(path, dtype, shape, begin, end)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{said}: {path.name} is damaged: {reason}") from error
    return found
