"""Compares what a written folder computes in transformers with what the run's model computes.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lunaris.config.schema.root import Config
from lunaris.data.tokenizer import TextTokenizer
from lunaris.distributed import session
from lunaris.errors import RunFailed, UserError, need
from lunaris.export.weights import Weight
from lunaris.inference import load_trained
from lunaris.runs.run_dir import RunDir

# Of the largest logit: float32 sums in another order differ by 1e-5 of it, and a wrong field by
# more than a tenth.
_TOLERANCE = 1e-3
_SEQUENCES = 4
_POSITIONS = 256


@dataclass(frozen=True)
class Difference:
    """How far the folder's logits are from the run's, on the same tokens, both in float32.

    largest: of the logits, the weights of both rounded to the folder's dtype; scale: the largest
    absolute logit; rounding: the largest difference to the weights of the run as they are.
    """

    largest: float
    scale: float
    rounding: float
    tokens: int

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest / self.scale


def sample_tokens(
    tokenizer: TextTokenizer | None, text: bytes | None, *, vocab_size: int, length: int
) -> Tensor:
    """Return tokens to compare on ([B, L] int64): of a text, or random ones without a tokenizer.

    text: None is the source text of Python's `argparse`. length: of the model. Raises UserError
    for a text that is too short to give two tokens.
    """
    length = min(length, _POSITIONS)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (_SEQUENCES, length), generator=generator)
    if text is None:
        text = Path(argparse.__file__).read_bytes()
    ids = tokenizer.encode([text[: 16 * _SEQUENCES * length]])[0].tolist()
    if len(ids) < 2:
        raise UserError("--text: must give at least two tokens")
    rows = max(1, min(_SEQUENCES, len(ids) // length))
    length = min(length, len(ids) // rows)
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def run_logits(
    cfg: Config, run_dir: RunDir, step: int, tokens: Tensor, weights: tuple[Weight, ...], dtype: Any
) -> tuple[Tensor, Tensor]:
    """Return the run's logits ([B, L, V] float32): of its weights, and of these in `dtype`."""
    with session.join("cpu", cfg.launch.collective_timeout_s):
        model, _ = load_trained(cfg, run_dir, step)
        exact = model.logits(tokens)
        if dtype == torch.float32:
            return exact, exact
        named = dict(model.named_parameters())
        for name in {weight.source for weight in weights if not weight.float32} & named.keys():
            named[name].copy_(named[name].to(dtype))
        return exact, model.logits(tokens)


@torch.no_grad()
def folder_logits(folder: Path, tokens: Tensor, *, own_code: bool) -> Tensor:
    """Return the logits ([B, L, V] float32) of the model that transformers loads from a folder.

    Raises RunFailed when it reports weights that are missing, left over or of another shape.
    """
    transformers = need("transformers", "lunaris export", extra="export")
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        # Of shared experts of width 0 (`lunaris.export.dots1`).
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=own_code
        )
    wrong = {kind: sorted(map(str, found)) for kind, found in report.items() if found}
    if wrong:
        raise RunFailed(
            f"transformers {transformers.__version__} does not load all weights: {wrong}"
        )
    try:
        logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    except RuntimeError as error:
        # Its products of grouped experts need rows of 16 bytes, DeepSeek-V2 even widths of a head.
        raise RunFailed(
            f"transformers {transformers.__version__} cannot compute this model; widths that are "
            f"multiples of 8 can be: {str(error).splitlines()[0]}. Nothing is kept of it"
        ) from error
    return logits.float()


def compare(exact: Tensor, rounded: Tensor, loaded: Tensor) -> Difference:
    """Return how two models differ. Raises RunFailed where that is more than sums can explain."""
    found = Difference(
        largest=(rounded - loaded).abs().max().item(),
        scale=rounded.abs().max().item() or 1.0,
        rounding=(exact - rounded).abs().max().item(),
        tokens=exact.size(0) * exact.size(1),
    )
    if not found.relative <= _TOLERANCE:
        raise RunFailed(
            f"the logits of the written folder differ from the run's by {found.largest:.3g}, "
            f"{found.relative:.1e} of the largest logit; at most {_TOLERANCE:g} is allowed. "
            "Nothing is kept of it"
        )
    return found


def check_tokenizer_files(folder: Path, tokenizer: TextTokenizer, text: str) -> None:
    """Raise RunFailed when transformers reads the folder's tokenizer as another one."""
    transformers = need("transformers", "lunaris export", extra="export")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.encode([text.encode()])[0].tolist()
    if loaded(text)["input_ids"] != expected or loaded.eos_token_id != tokenizer.eot_id:
        raise RunFailed(f"transformers {transformers.__version__} reads another tokenizer")
