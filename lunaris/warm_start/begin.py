"""Starts a model from the weights that `init_from` names, and says what fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.moe import NoMoEConfig
from lunaris.config.schema.root import Config
from lunaris.data.tokenizer import check_same_ids
from lunaris.distributed import collectives, session
from lunaris.errors import RunFailed, UserError
from lunaris.model.init import copy_to_shard
from lunaris.parallelism.base import Parallelism, unwrap
from lunaris.precision import Precision
from lunaris.warm_start.fit import DENSE, Fit, Shapes, fit, require_fit
from lunaris.warm_start.source import Place, Source, find, open_source
from lunaris.warm_start.upcycle import Recipe, fill_layer, recipe_of

# Of a logit, relative to the largest one, between an upcycled model and the dense one.
_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}


@dataclass
class Start:
    """Where a model's weights came from, and what was checked of it."""

    place: Place
    found: Fit
    recipe: Recipe | None
    notes: list[str] = field(default_factory=list)

    @property
    def parent(self) -> dict[str, Any]:
        """What provenance.json keeps of it."""
        kind = "upcycled from" if self.recipe else "continued from"
        where = self.place.run if self.place.run is not None else self.place.path
        return {"kind": kind, "dir": str(where), "step": self.place.step}

    def __str__(self) -> str:
        step, found = self.place.step, self.found
        where = self.parent["dir"] + (f", step {step}" if step else "")
        counts = [(len(found.same), "as they are"), (len(found.resized), "resized")]
        said = ", ".join(f"{n} tensors {how}" for n, how in counts if n)
        lines = [f"weights    from {where}: {said or 'none as they are'}"]
        if self.recipe is not None:
            parts = f", cut into {self.recipe.parts} parts" if self.recipe.parts > 1 else ""
            lines.append(
                f"upcycled   the feed-forward of {len(found.upcycled)} layers{parts}; routers fresh"
            )
        lines += [f"no fit     {line}" for line in found.faults()]
        return "\n".join([*lines, *self.notes])


def plan_start(cfg: Config, place: Place, model: Shapes, data: Any) -> tuple[Source, Start]:
    """Return the opened source and what of it fits the tensors of a model; read none of them.

    data: the prepared data component. Raises UserError for what does not fit, also where the
    tokenizers give other texts to the same ids.
    """
    source = open_source(place)
    found = fit(model, source.shapes, resize=cfg.init_from_resize)
    require_fit(found, str(cfg.init_from), strict=cfg.init_from_strict)
    before, now = place.tokenizer(), data.tokenizer_path
    if cfg.init_from_strict and before is not None and now is not None:
        check_same_ids(before, now, f"init_from={cfg.init_from}")
    others = source.other_keys(cfg)
    if cfg.init_from_strict and others and place.run is None:
        raise UserError(
            f"init_from={cfg.init_from}: its config.json is that of another model; "
            "init_from_strict=false takes the weights all the same\n  " + "\n  ".join(others)
        )
    recipe = recipe_of(cfg, found, model, source.shapes)
    return source, Start(place, found, recipe, [f"note       {line}" for line in others])


def start_from(
    cfg: Config, model: nn.Module, data: Any, bare_model: Callable[..., nn.Module]
) -> Start:
    """Fill a model's shards from `cfg.init_from` and draw the rest; every process calls this.

    bare_model: as in `lunaris.run`; an upcycled model is compared with the dense one, sharded in
    the same way, before the first step. Raises UserError for what does not fit, and RunFailed
    where an upcycled model computes something else although it should not.
    """
    place = collectives.from_rank_0(collectives.on_rank_0(lambda: find(str(cfg.init_from))))
    assert place is not None
    source, start = plan_start(cfg, place, shapes_of(get_model_state_dict(model)), data)
    _fill(model, source, start, cfg.seed)
    if start.recipe is not None:
        start.notes.append(_compare(cfg, model, source, start, data, bare_model))
    return start


def shapes_of(state: dict[str, Any]) -> Shapes:
    """Return the shape of each tensor of a state dict."""
    return {name: tuple(value.shape) for name, value in state.items()}


@torch.no_grad()
def _fill(model: nn.Module, source: Source, start: Start, seed: int) -> None:
    unwrap(model).init_weights(seed, without=set(start.found.read()))
    state: dict[str, Any] = get_model_state_dict(model)
    source.fill({name: state[name] for name in start.found.same})
    for name in start.found.resized:
        rows = source.read([name])[name]
        copy_to_shard(state[name], rows[: state[name].size(0)])
    for prefix in start.found.upcycled:
        assert start.recipe is not None
        names = {part: f"{prefix}{DENSE}{part}.weight" for part in ("gate_up", "down")}
        # One layer at a time: no process holds more of the dense model than that.
        read = source.read(names.values())
        dense = {part: read[name] for part, name in names.items()}
        fill_layer(prefix, state, dense, start.recipe)
    set_model_state_dict(model, state)


@torch.no_grad()
def _compare(
    cfg: Config,
    model: nn.Module,
    source: Source,
    start: Start,
    data: Any,
    bare_model: Callable[..., nn.Module],
) -> str:
    """Return how the first forward differs from that of the dense model, on a sequence of data."""
    before = start.place.config()
    shape = cfg.model
    if before is not None:
        same = ("ffn_hidden_multiplier", "multiple_of", "activation")
        shape = replace(shape, **{key: getattr(before.model, key) for key in same})
    as_dense = replace(cfg, moe=NoMoEConfig(), model=shape)
    # Another instance: one of them knows the gradients of the model that it wrapped.
    parallelism: Parallelism = instantiate_component("parallelism", cfg.parallelism)
    dense = parallelism.wrap(
        bare_model(as_dense, data.vocab_size, predictors=False),
        precision=Precision(cfg.trainer.precision, parallelism.device),
        seed=None,
        compile=False,
    )
    found = fit(shapes_of(get_model_state_dict(dense)), source.shapes, resize=cfg.init_from_resize)
    if found.missing or found.unfit:
        return "first      forward not compared: the dense model cannot be rebuilt from this config"
    # Rows of the vocabulary that the source lacks are drawn alike in both.
    _fill(dense, source, Start(start.place, found, None), cfg.seed)
    tokens = _first_sequence(cfg, data, next(model.parameters()).device)
    with torch.autocast(
        tokens.device.type,
        dtype=torch.float16 if cfg.trainer.precision == "fp16" else torch.bfloat16,
        enabled=cfg.trainer.precision != "fp32",
    ):
        expected, found_logits = (_logits(each, tokens) for each in (dense, model))
    gap = (expected - found_logits).abs().max().item()
    largest = max(1.0, expected.abs().max().item())
    gap = max(collectives.gather_objects(gap))
    losses = [F.cross_entropy(x[0, :-1], tokens[0, 1:]).item() for x in (expected, found_logits)]
    said = (
        f"first      forward: the largest difference of a logit is {gap:.2g}; loss {losses[0]:.4f} "
        f"of the dense model, {losses[1]:.4f} now"
    )
    if gap <= _TOLERANCE[cfg.trainer.precision] * largest:
        return said
    assert start.recipe is not None
    reasons = [start.recipe.inexact] if start.recipe.inexact else start.notes
    if reasons:
        return "\n".join([said, *(f"           {reason.strip()}" for reason in reasons[:1])])
    raise RunFailed(f"init_from={cfg.init_from}: the upcycled model is not the dense one: {said}")


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    training = model.training
    model.eval()
    logits: Tensor = model(tokens).outputs["logits"].float()
    model.train(training)
    return logits


def _first_sequence(cfg: Config, data: Any, device: torch.device) -> Tensor:
    """Return a training sequence ([1, L] int64), another one in each process."""
    sequences = data.train(cfg.model.max_seq_len, cfg.seed)
    rows = np.empty((1, sequences.seq_len + 1), dtype=np.int64)
    sequences.gather(np.array([session.rank()]), rows)
    rows ^= rows >> 63  # A token that carries no loss is written as a negative number.
    return torch.from_numpy(rows[:, :-1]).to(device)
