"""Loading the model and the tokenizer of a run, and its loss on validation shards."""

from __future__ import annotations

from lunaris.checkpoint_reader import load_weights, saved_vocab_size
from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.root import Config
from lunaris.data.prepare.build import make_ready
from lunaris.data.tokenizer import TextTokenizer
from lunaris.distributed import session
from lunaris.errors import UserError
from lunaris.model.transformer import Transformer
from lunaris.parallelism.base import unwrap
from lunaris.parallelism.single import Single
from lunaris.precision import Precision
from lunaris.run import bare_model, evaluator_of
from lunaris.runs.checkpoint_files import newest
from lunaris.runs.data_fingerprint import check_tokenizer, intact_tokenizer
from lunaris.runs.facts import newest_facts, step_of
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


def tokenizer_of(run_dir: RunDir) -> TextTokenizer:
    """Return the tokenizer that a run was trained with. Raises UserError when it has none."""
    facts = newest_facts(run_dir.checkpoints)
    eot_id = run_dir.noted("eot_id") if facts is None else facts.eot_id
    return TextTokenizer(intact_tokenizer(run_dir), eot_id)


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
        seed=None,
        compile=False,
    )
    load_weights(path, model)
    model.eval()
    return unwrap(model), step_of(path)
