"""Reads the weights of a Hugging Face folder under the names that they have in the model.

It reads the classes that `lunaris export` writes: Qwen3, Qwen3-MoE, Dots1, DeepSeek-V2 and V3, and
the one of this package. Rows of query, key and value are stacked, gate and up rows too, and those
of the experts are transposed.

Shapes: D model width, H hidden width, E experts; widths of a latent head: N part without
positions, R rotary part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lunaris.atomic_files import read_json
from lunaris.config.schema.attention import MLAConfig, SlidingWindowConfig
from lunaris.config.schema.model import ModelConfig
from lunaris.config.schema.moe import MoEConfig, SigmoidRouterConfig
from lunaris.config.schema.root import Config
from lunaris.config.widths import WidthFactors, latent_widths
from lunaris.errors import UserError, did_you_mean
from lunaris.model.init import copy_to_shard, fill_experts
from lunaris.warm_start.fit import Shapes
from lunaris.warm_start.safetensors_file import StoredTensor, read_header

_CLASSES = ("qwen3", "qwen3_moe", "dots1", "deepseek_v2", "deepseek_v3", "lunaris_codex")
_SIGMOID = ("dots1", "deepseek_v3")
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
    "self_attn.q_a_proj.weight": "attention.q_a.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.kv_b.weight",
}
# Projections of latent attention with rotary rows, and whether these belong to every head.
_ROTARY = {
    "self_attn.q_proj.weight": ("attention.q_b.weight", True),
    "self_attn.q_b_proj.weight": ("attention.q_b.weight", True),
    "self_attn.kv_a_proj_with_mqa.weight": ("attention.kv_a.weight", False),
}
# Experts that are stored as one tensor.
_STACKED_EXPERTS = {
    "mlp.experts.gate_up_proj": "feed_forward.experts.gate_up",
    "mlp.experts.down_proj": "feed_forward.experts.down",
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
        if not self.config:
            raise UserError(f"{self._said}: config.json is empty or not JSON")
        kind = str(self.config.get("model_type"))
        if kind not in _CLASSES:
            raise UserError(
                f"{self._said}: config.json names model_type={kind}; what can be read are "
                f"{', '.join(_CLASSES)}{did_you_mean(kind, _CLASSES)}"
            )
        self._stored: dict[str, StoredTensor] = {}
        for file in self._files(folder):
            self._stored |= read_header(file, self._said)
        # The shared experts of a class that always has some, where there are none.
        self._stored = {n: stored for n, stored in self._stored.items() if 0 not in stored.shape}
        self._built = self._build()
        self.shapes: Shapes = {name: built.shape for name, built in self._built.items()}

    def _files(self, folder: Path) -> list[Path]:
        """Return the files that hold the weights: those of the index, where there is one."""
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                raise UserError(f"{self._said}: holds no *.safetensors file")
            return files
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{self._said}: {index.name} has no weight_map")
        names = sorted({str(name) for name in places.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{self._said}: {index.name} names {name}, which is not there")
        return [folder / name for name in names]

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
             {"swiglu": "silu", "geglu": "gelu"}.get(model.activation, model.activation)),
            ("rms_norm_eps", found.get("rms_norm_eps"), "the epsilon of norms", 1e-6),
            ("the norm", found.get("norm_placement", "pre"), "model.norm", model.norm),
            ("num_attention_heads", found.get("num_attention_heads"), "model.n_heads",
             model.n_heads),
            ("num_key_value_heads", found.get("num_key_value_heads"), "model.n_kv_heads",
             model.n_kv_heads),
            ("rope_theta", rope.get("rope_theta", found.get("rope_theta")), "model.rope_theta",
             model.rope_theta),
            ("rope_type", rope.get("rope_type"), "the type", "default"),
            ("rope_interleave", found.get("rope_interleave"), "its place", True),
            ("the parametrization", "standard", "model.parametrization",
             "standard" if model.width_factors() == WidthFactors() else model.parametrization),
        ]  # fmt: skip
        if not isinstance(cfg.attention, MLAConfig):
            here: list[Any] = [None] * model.n_layers
            if isinstance(cfg.attention, SlidingWindowConfig):
                every, window = cfg.attention.full_every, cfg.attention.window
                here = [
                    None if every is not None and (layer + 1) % every == 0 else window
                    for layer in range(model.n_layers)
                ]
            there = self._windows(model.n_layers)
            pairs.append(("the window of each layer", there, "attention", here))
        if isinstance(cfg.moe, MoEConfig) and found["model_type"] != "qwen3":
            pairs += self._of_experts(cfg.moe)
        if isinstance(cfg.attention, MLAConfig):
            pairs += [
                (there, found.get(there), f"attention.{there}", here)
                for there, here in _latent_fields(cfg.attention, model).items()
            ]
        return [
            f"{there}={a} there, {here}={b} here"
            for there, a, here, b in pairs
            if a is not None and a != b
        ]

    def _windows(self, n_layers: int) -> list[Any]:
        """Return the attention window of each layer; None: all positions."""
        found = self.config
        by_class = not str(found["model_type"]).startswith("qwen3")
        window = found.get("sliding_window") if found.get("use_sliding_window", by_class) else None
        types = found.get("layer_types")
        if not isinstance(types, list):
            return [window] * n_layers
        return [window if each == "sliding_attention" else None for each in types]

    def _of_experts(self, moe: MoEConfig) -> list[tuple[str, Any, str, Any]]:
        found, sigmoid = self.config, isinstance(moe.router, SigmoidRouterConfig)
        by_class = "sigmoid" if found["model_type"] in _SIGMOID else "softmax"
        scores = found.get("router_scores", by_class)
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
            grouped = moe.router.topk_groups < moe.router.n_groups
            for there in ("n_group", "topk_group"):
                here = {"n_group": "n_groups", "topk_group": "topk_groups"}[there]
                value = getattr(moe.router, here) if grouped else 1
                pairs.append((there, found.get(there), f"moe.router.{here}", value))
        return pairs

    def _build(self) -> dict[str, _Built]:
        """Return the tensors of the model; raise UserError for stored ones that have no place."""
        built: dict[str, _Built] = {}
        layers: dict[str, dict[str, StoredTensor]] = {}
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

    def _half_split(self, stored: StoredTensor, every_head: bool) -> _Built:
        """Return a projection whose rotary rows are neighbouring pairs there and half-split here.

        every_head: its rows are those of all heads, the last R of each rotary; otherwise only the
        last R of all rows are.
        """
        rope: Any = self.config.get("qk_rope_head_dim")
        n_heads: Any = self.config.get("num_attention_heads")
        heads = n_heads if every_head else 1
        fits = all(isinstance(n, int) and n > 0 for n in (rope, heads))
        if not fits or stored.shape[0] % heads or rope % 2 or stored.shape[0] // heads < rope:
            raise UserError(
                f"{self._said}: config.json: qk_rope_head_dim={rope} and "
                f"num_attention_heads={n_heads} do not fit a matrix of {stored.shape[0]} rows"
            )

        def whole() -> Tensor:
            rows = stored.read().unflatten(0, (heads, -1))
            still, rotary = rows[:, :-rope], rows[:, -rope:]
            return torch.cat((still, rotary[:, ::2], rotary[:, 1::2]), dim=1).flatten(0, 1)

        return _Built(stored.shape, whole)

    def _layer(self, tensors: dict[str, StoredTensor]) -> tuple[dict[str, _Built], list[str]]:
        made: dict[str, _Built] = {}
        left = dict(tensors)
        for name in [name for name in tensors if name in _LAYER]:
            stored = left.pop(name)
            made[_LAYER[name]] = _Built(stored.shape, stored.read)
        for name, parts in _STACKED.items():
            if all(part in left for part in parts):
                made[name] = _stacked([left.pop(part) for part in parts])
        for name in [name for name in left if name in _ROTARY]:
            ours, every_head = _ROTARY[name]
            made[ours] = self._half_split(left.pop(name), every_head)
        for name in [name for name in left if name in _STACKED_EXPERTS]:
            made[_STACKED_EXPERTS[name]] = _transposed(left.pop(name))
        experts: dict[int, dict[str, StoredTensor]] = {}
        for name in [name for name in left if _EXPERT.fullmatch(name)]:
            number, part = _EXPERT.fullmatch(name).groups()  # type: ignore[union-attr]
            experts.setdefault(int(number), {})[part] = left.pop(name)
        if experts:
            complete = sorted(experts) == list(range(len(experts)))
            if not complete or any(len(parts) < 3 for parts in experts.values()):
                raise UserError(f"{self._said}: lacks a part of an expert")
            made |= _experts(experts)
        return made, list(left)


def _latent_fields(attention: MLAConfig, model: ModelConfig) -> dict[str, int | None]:
    """Return the widths of latent attention under the names of Hugging Face."""
    widths = latent_widths(
        model.d_model // model.n_heads, latent=attention.kv_lora_rank,
        nope=attention.qk_nope_head_dim, rope=attention.qk_rope_head_dim,
        value=attention.v_head_dim,
    )  # fmt: skip
    return {
        "kv_lora_rank": widths.latent, "qk_nope_head_dim": widths.nope,
        "qk_rope_head_dim": widths.rope, "v_head_dim": widths.value,
    }  # fmt: skip


def _transposed(stored: StoredTensor) -> _Built:
    """Return the stacked experts of a tensor whose matrices are stored transposed."""
    n_experts, rows, columns = stored.shape
    return _Built(
        (n_experts, columns, rows),
        lambda: stored.read().mT,
        lambda expert: stored.read()[expert].mT,
    )


def _stacked(parts: list[StoredTensor]) -> _Built:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return _Built(shape, lambda: torch.cat([part.read() for part in parts]))


def _experts(experts: dict[int, dict[str, StoredTensor]]) -> dict[str, _Built]:
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
