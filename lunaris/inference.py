"""What a finished or stopped run is good for: evaluating and sampling its checkpoints."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lunaris.checkpoint_reader import load_weights, saved_vocab_size
from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.root import Config
from lunaris.data.prepare.build import make_ready
from lunaris.data.tokenizer import TextTokenizer
from lunaris.distributed import session
from lunaris.errors import UserError
from lunaris.model.generate import stream
from lunaris.model.speculative import stream_ahead
from lunaris.model.transformer import Transformer
from lunaris.parallelism.base import unwrap
from lunaris.parallelism.single import Single
from lunaris.precision import Precision
from lunaris.run import bare_model, evaluator_of
from lunaris.runs.checkpoint_files import newest
from lunaris.runs.data_fingerprint import check_tokenizer, intact_tokenizer
from lunaris.runs.facts import newest_facts
from lunaris.runs.run_dir import RunDir


def evaluate_checkpoint(
    cfg: Config, run_dir: RunDir, *, step: int | None, most: int | None
) -> dict[str, float]:
    """Return the `val/` metrics of a checkpoint on `cfg.data`, and its `step`.

    most: sequences of each source, None for all. Raises UserError when there is no checkpoint or
    no validation part, or the data's ids do not fit the model's vocabulary.
    """
    with session.join(cfg.trainer.device, cfg.launch.collective_timeout_s):
        data = instantiate_component("data", cfg.data)
        make_ready(data)
        check_tokenizer(data.tokenizer_path, run_dir)
        model, at = load_trained(cfg, run_dir, step)
        if data.vocab_size > model.vocab_size:
            raise UserError(
                f"data.dir={getattr(cfg.data, 'dir', None)}: its vocabulary of {data.vocab_size} "
                f"is larger than the model's {model.vocab_size}"
            )
        single = Single()
        with Precision(cfg.trainer.precision, single.device).autocast():
            row = evaluator_of(cfg, data, single, most)(model)
    if not row:
        raise UserError(
            f"{run_dir.path}: its data has no validation part; name shards with data.dir=FOLDER"
        )
    return {"step": at} | row


def sample_texts(
    cfg: Config,
    run_dir: RunDir,
    prompt: str,
    *,
    seeds: Iterable[int],
    step: int | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    speculative: bool = False,
) -> Iterator[Iterator[str]]:
    """Yield for each seed the pieces of a continuation of `prompt`, sampled as they are asked for.

    Each ends at end-of-text or `max_new_tokens`, and is to be read before the next is taken.
    speculative: draft by the depths of multi-token prediction, which gives the same text. Raises
    UserError, before the first piece, when the run has no tokenizer, checkpoint or depths.
    """
    facts = newest_facts(run_dir.checkpoints)
    eot_id = run_dir.noted("eot_id") if facts is None else facts.eot_id
    tokenizer = TextTokenizer(intact_tokenizer(run_dir), eot_id)
    ids = tokenizer.encode([prompt.encode()])[0].tolist()
    if not ids:
        raise UserError("--prompt: must hold at least one character")
    with session.join(cfg.trainer.device, cfg.launch.collective_timeout_s):
        model, _ = load_trained(cfg, run_dir, step, predictors=speculative)
        if speculative:
            _check_drafts(model)
        objective = instantiate_component("objective", cfg.objective)
        prompt_ids = torch.tensor([ids], device=next(model.parameters()).device)
        for seed in seeds:
            tokens = (stream_ahead if speculative else stream)(
                model,
                prompt_ids,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                eot_id=tokenizer.eot_id,
                head=objective.logits,
            )
            yield _text(tokenizer, tokens)


def _check_drafts(model: Transformer) -> None:
    """Raise UserError unless `stream_ahead` can draft with this model."""
    if not model.predictors:
        raise UserError(
            "--speculative: this run has no depths that draft; train with objective=multi_token"
        )
    caches = [model.new_cache(1), *model.new_caches_ahead(1)]
    layers = [layer for cache in caches for layer in cache.layers]
    if not all(hasattr(layer, "truncate") for layer in layers):
        raise UserError(
            "--speculative: the cache of this run's attention has no method truncate(length), by "
            "which drafts are taken back"
        )


def _text(tokenizer: TextTokenizer, tokens: Iterable[Any]) -> Iterator[str]:
    """Yield the text of tokens as they come, a character once all of its bytes are there."""
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    new: list[int] = []
    shown = 0
    for token in tokens:
        new.append(int(token))
        data = tokenizer.decode_bytes(new)
        yield text.decode(data[shown:])
        shown = len(data)


def load_trained(
    cfg: Config, run_dir: RunDir, step: int | None, *, predictors: bool = False
) -> tuple[Transformer, int]:
    """Return a run's model with the weights of a checkpoint, in eval mode, and its step.

    predictors: with the further modules of its objective. One process. Raises UserError when there
    is no such checkpoint.
    """
    path = newest(run_dir.checkpoints, step)
    single = Single()
    model = single.wrap(
        bare_model(cfg, saved_vocab_size(path), predictors=predictors),
        precision=Precision(cfg.trainer.precision, single.device),
        seed=cfg.seed,
        compile=False,
    )
    load_weights(path, model)
    model.eval()
    return unwrap(model), int(path.name.removeprefix("step_"))
