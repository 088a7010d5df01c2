"""How likely a run's model finds text files, and the choices of questions."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.root import Config
from lunaris.errors import UserError
from lunaris.inference import load_trained, tokenizer_of
from lunaris.parallelism.single import Single
from lunaris.precision import Precision
from lunaris.runs.run_dir import RunDir

# Logits of one batch: at most so many float32 numbers (256 MiB).
_MOST_LOGITS = 2**26


@dataclass(frozen=True)
class TextScore:
    """The summed loss of a text in nats, the number of its tokens and of its bytes."""

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(
            self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes
        )

    def row(self) -> dict[str, float]:
        """Return tokens, bytes, `loss` (nats a token), perplexity and bits per byte."""
        loss = self.nats / self.tokens
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
        }


@dataclass(frozen=True)
class Question:
    """A context, the texts that may follow it, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


class Scorer:
    """The model and the tokenizer of a run's checkpoint."""

    def __init__(self, cfg: Config, run_dir: RunDir, step: int | None) -> None:
        """Load the checkpoint of step `step`, None for the newest; inside of `session.join`.

        Raises UserError when the run has no tokenizer or no such checkpoint.
        """
        self._tokenizer = tokenizer_of(run_dir)
        self._model, self.step = load_trained(cfg, run_dir, step)
        self._head = instantiate_component("objective", cfg.objective).logits
        single = Single()
        self._precision = Precision(cfg.trainer.precision, single.device)
        self._device = single.device

    def text(self, content: bytes, stride: int | None = None) -> TextScore:
        """Return the loss of a text: every token is predicted once, the first from end-of-text.

        The model reads windows of its length, which advance by `stride` tokens (None: by their
        length). The tokens of a window that an earlier one has predicted are its context; the
        smaller the stride, the more context each token has, and the more windows are read.
        """
        length = self._model.max_seq_len
        stride = length if stride is None else min(stride, length)
        encoded = torch.from_numpy(self._tokenizer.encode([content])[0].astype("int64"))
        ids = torch.cat([torch.tensor([self._tokenizer.eot_id]), encoded])
        n_targets = len(ids) - 1
        starts = [0]
        while starts[-1] + length < n_targets:
            starts.append(starts[-1] + stride)
        windows, seen = [], 0
        for start in starts:
            end = min(start + length, n_targets)
            windows.append((ids[start : end + 1], seen - start))
            seen = end
        return TextScore(sum(self._nats(windows)), n_targets, len(content))

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return the log-likelihood (nats) of each choice of each question, after its context.

        A context and a choice are encoded together, after an end of text; the tokens past those of
        the context, without the spaces at its end, are the choice's. What exceeds the model's
        length is cut off at the beginning.
        """
        pairs = [(q.context, choice) for q in questions for choice in q.choices]
        windows = [self._window(context, choice) for context, choice in pairs]
        nats = iter(self._nats(windows))
        return [[-next(nats) for _ in q.choices] for q in questions]

    def _window(self, context: str, choice: str) -> tuple[Tensor, int]:
        # Most tokenizers join a space with the word after it.
        stripped = context.rstrip()
        both, alone = self._tokenizer.encode([(context + choice).encode(), stripped.encode()])
        ids = [self._tokenizer.eot_id, *both.tolist()]
        # A choice has one token of its own at least, also where it merges with the context.
        first = min(len(alone), len(both) - 1)
        cut = max(0, len(ids) - self._model.max_seq_len - 1)
        return torch.tensor(ids[cut:]), max(0, first - cut)

    @torch.no_grad()
    def _nats(self, windows: Sequence[tuple[Tensor, int]]) -> list[float]:
        """Return the summed loss of each window.

        A window is its ids ([n + 1] int64), of which the last n are targets, and how many of these
        do not count. Windows of one length are read together.
        """
        from tqdm import tqdm

        found = [0.0] * len(windows)
        order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
        with tqdm(total=len(windows), unit="windows", disable=not sys.stderr.isatty()) as bar:
            while order:
                length = len(windows[order[0]][0])
                most = max(1, _MOST_LOGITS // (length * self._model.vocab_size))
                batch = [i for i in order[:most] if len(windows[i][0]) == length]
                del order[: len(batch)]
                ids = torch.stack([windows[i][0] for i in batch]).to(self._device)
                with self._precision.autocast():
                    logits = self._model.logits(ids[:, :-1], head=self._head)
                nats = F.cross_entropy(
                    logits.transpose(1, 2).float(), ids[:, 1:], reduction="none"
                ).double()
                for i, row in zip(batch, nats.cpu(), strict=True):
                    found[i] = float(row[windows[i][1] :].sum())
                bar.update(len(batch))
        return found


def accuracies(questions: Sequence[Question], likelihoods: Iterable[list[float]]) -> dict[str, Any]:
    """Return the share of questions whose right choice is the likeliest.

    `accuracy` compares log-likelihoods, `accuracy_per_byte` log-likelihoods divided by the bytes of
    the choice, so that a long choice has no disadvantage (lm-evaluation-harness' acc and acc_norm,
    arXiv 2405.14782). The first of equal choices counts.
    """
    right, right_per_byte = 0, 0
    for question, found in zip(questions, likelihoods, strict=True):
        per_byte = [
            nats / len(text.encode()) for nats, text in zip(found, question.choices, strict=True)
        ]
        right += found.index(max(found)) == question.answer
        right_per_byte += per_byte.index(max(per_byte)) == question.answer
    n = len(questions)
    return {"questions": n, "accuracy": right / n, "accuracy_per_byte": right_per_byte / n}


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a JSONL file, `{"context", "choices", "answer"}` a line.

    Raises UserError naming the file, the line and what is wrong with it.
    """
    questions = []
    for number, line in enumerate(read_text(path).decode().split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:  # Python limits digits and nesting.
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        fault = _fault(found)
        if fault:
            raise UserError(f"{path}, line {number}: {fault}")
        questions.append(Question(found["context"], tuple(found["choices"]), found["answer"]))
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions


def _fault(found: Any) -> str | None:
    if not isinstance(found, dict):
        return 'must be {"context": TEXT, "choices": [TEXT, …], "answer": INDEX}'
    missing = {"context", "choices", "answer"} - found.keys()
    if missing:
        return f"lacks {', '.join(sorted(missing))}"
    context, choices, answer = found["context"], found["choices"], found["answer"]
    if not isinstance(context, str):
        return f"context={context!r}: must be a text"
    if not isinstance(choices, list) or len(choices) < 2:
        return "choices: must be a list of at least two texts"
    empty = [choice for choice in choices if not isinstance(choice, str) or not choice]
    if empty:
        return f"choices: holds {empty[0]!r}; each must be a text that is not empty"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"answer={answer!r}: must be an index of choices, 0 to {len(choices) - 1}"
    try:
        "".join([context, *choices]).encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no text"
    return None


def read_text(path: Path) -> bytes:
    """Return the bytes of a file of text. Raises UserError unless they are UTF-8, and some."""
    try:
        content = path.read_bytes()
        content.decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (byte {error.start:,})") from error
    if not content:
        raise UserError(f"{path}: is empty")
    return content
