"""The command that a YAML file of the earlier Lunaris Codex amounts to. No torch, no Hydra.

Its keys and defaults are those of `TrainConfig` and `LunarisCodexConfig` in its train_moe.py,
train_moe_fsdp.py and model_moe.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lunaris.config.messages import shown
from lunaris.config.overrides import quoted
from lunaris.errors import UserError, did_you_mean

# Keys that keep their meaning: the earlier name -> the key today, its default then.
_MODEL = {
    "d_model": ("model.d_model", 768),
    "n_layers": ("model.n_layers", 12),
    "n_heads": ("model.n_heads", 12),
    "n_kv_heads": ("model.n_kv_heads", 12),
    "vocab_size": ("model.vocab_size", 50257),
    "multiple_of": ("model.multiple_of", 256),
    "ffn_hidden_multiplier": ("model.ffn_hidden_multiplier", 4.0),
    "max_seq_len": ("model.max_seq_len", 1024),
    "rope_theta": ("model.rope_theta", 10000.0),
    "dropout": ("model.dropout", 0.0),
}
_EXPERTS = {
    "n_experts": ("moe.n_experts", 8),
    "n_experts_per_token": ("moe.n_experts_per_token", 1),
    "aux_loss_weight": ("moe.aux_loss_weight", 1e-2),
    "capacity_factor": ("moe.capacity_factor", 1.25),
    "router_z_loss_weight": ("moe.router_z_loss_weight", 1e-3),
    # Each expert was as wide as the dense feed-forward.
    "ffn_hidden_multiplier": ("moe.expert_hidden_multiplier", 4.0),
}
_TRAINING = {
    "data_dir": ("data.dir", "data/"),
    "learning_rate": ("optimizer.learning_rate", 3e-4),
    "weight_decay": ("optimizer.weight_decay", 0.1),
    "warmup_steps": ("schedule.warmup_steps", 2000),
    "max_steps": ("trainer.max_steps", 600000),
    "batch_size": ("trainer.batch_size", 16),
    "gradient_accumulation_steps": ("trainer.gradient_accumulation_steps", 1),
    "grad_clip": ("trainer.grad_clip", 1.0),
    "compile_model": ("trainer.compile_model", True),
    "log_interval": ("trainer.log_interval", 20),
    "save_interval": ("checkpoint.save_interval", 1000),
    "out_dir": ("out_dir", "checkpoints"),
}
# Keys that become something else, with their defaults then.
_FURTHER = {
    "beta1": 0.9, "beta2": 0.95, "device": "cuda", "wandb_project": "lunaris-codex-moe",
    "wandb_entity": None, "wandb_run_name": None, "backend": None,
}  # fmt: skip
_DROPPED = {
    "num_epochs": "training ends after trainer.max_steps, through as many epochs as that takes",
    "save_latest_always": "a run always continues from its newest complete checkpoint",
    "num_workers": "sequences are read by a thread",
    "pin_memory": "batches are always pinned for a GPU",
    "persistent_workers": "sequences are read by a thread",
    "prefetch_factor": "sequences are read by a thread",
}
_DIFFERENT = (
    "the gate scales the expert's output, so the router learns from the loss of the tokens too",
    "moe.capacity_factor counts the tokens of each document or sequence, not of the micro-batch",
    "the order of the sequences is another one, and there is a validation loss",
    "activations are kept; trainer.activation_checkpointing=full computes them again, as before",
)


class Imported(NamedTuple):
    """Overrides of `lunaris train`, and what to know about them, a sentence each."""

    overrides: list[str]
    notes: list[str]


def import_config(path: Path) -> Imported:
    """Return the command line that an earlier YAML file amounts to.

    Defaults of the earlier program are written out, since today's are others. Raises UserError for
    a file that cannot be read and for a key that the earlier program did not have.
    """
    given = _read(path)
    model = given.pop("model", None) or {}
    if not isinstance(model, dict):
        raise UserError(f"{path}: model: must be a map of keys")
    _refuse_unknown(path, "model.", model, [*_MODEL, *_EXPERTS])
    _refuse_unknown(path, "", given, [*_TRAINING, *_FURTHER, *_DROPPED])
    further = _FURTHER | {key: given[key] for key in _FURTHER if key in given}
    dense = not model.get("n_experts", 8)
    overrides = ["moe=none" if dense else "moe=switch", "data=shards", "optimizer=adamw"]
    overrides += ["schedule=cosine", "schedule.min_lr_ratio=0.01", *_values(_MODEL, model)]
    overrides += [] if dense else _values(_EXPERTS, model)
    overrides += _values(_TRAINING, given)
    overrides.append(f"optimizer.betas=[{further['beta1']},{further['beta2']}]")
    overrides.append("checkpoint.keep_last=null")
    overrides += _device(str(further["device"]), further["backend"]) + _loggers(further)
    notes = [f"{key}: left out; {_DROPPED[key]}" for key in given if key in _DROPPED]
    return Imported(overrides, [*notes, *_DIFFERENT[2 if dense else 0 :]])


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a map of keys, as the earlier train_moe.py reads it")
    return tree


def _refuse_unknown(path: Path, start: str, given: dict[str, Any], known: list[str]) -> None:
    for key, value in given.items():
        if key not in known:
            near = did_you_mean(str(key), known)
            raise UserError(f"{path}: {start}{key}: no key of the earlier Lunaris Codex{near}")
        if value is not None and not isinstance(value, str | int | float | bool):
            raise UserError(f"{path}: {start}{key}={value}: must be one value")


def _values(table: dict[str, tuple[str, Any]], given: dict[str, Any]) -> list[str]:
    """Return the overrides of a table; null stood for the default."""
    found = ((key, usual if given.get(old) is None else given[old])
             for old, (key, usual) in table.items())  # fmt: skip
    return [f"{key}={_text(value)}" for key, value in found]


def _device(device: str, backend: Any) -> list[str]:
    kind = "cuda" if "cuda" in device else "cpu"
    made = [f"trainer.device={kind}", f"trainer.precision={'bf16' if kind == 'cuda' else 'fp32'}"]
    return made + ([] if backend is None else [f"parallelism={backend}"])


def _loggers(further: dict[str, Any]) -> list[str]:
    if not further["wandb_project"]:
        return []
    made = ["logger=[local,wandb]", f"logger.wandb.project={_text(further['wandb_project'])}"]
    if further["wandb_entity"]:
        made.append(f"logger.wandb.entity={_text(further['wandb_entity'])}")
    if further["wandb_run_name"]:
        made.append(f"name={re.sub('[^A-Za-z0-9._=+,@-]+', '-', str(further['wandb_run_name']))}")
    return made


def _text(value: Any) -> str:
    """Return a value as an override gives it."""
    text = shown(value)
    return text if re.fullmatch(r"[\w./+-]+", text) else quoted(text)
