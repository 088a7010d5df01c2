"""The tokenizer of a folder: loaded from a file or the Hub, or trained on a sample of the text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lunaris.atomic_files import write_durably
from lunaris.data import manifest as manifests
from lunaris.data.prepare.readers import Problem, Reader
from lunaris.data.prepare.spec import PrepareSpec, tokenizer_file
from lunaris.data.text_split import split_bytes
from lunaris.data.tokenizer import EOT, TextTokenizer
from lunaris.errors import UserError

# A text with what tokenizers lose: case, spaces, line breaks, accents, rare characters.
_PROBE = "A  b\n\tc\u00e9 \u6f22 \U0001f600"


def folder_tokenizer(spec: PrepareSpec) -> TextTokenizer:
    """Return the folder's tokenizer; load or train it first when there is none.

    Raises UserError when `data.tokenizer` names none, or none with an end of text.
    """
    path = spec.folder / manifests.TOKENIZER
    if not path.is_file():
        candidate = spec.folder / manifests.UNFINISHED / manifests.TOKENIZER
        if spec.keys.tokenizer is not None:
            load_tokenizer(spec.keys.tokenizer, candidate)
        else:
            train_bpe(_sample_texts(spec), spec.keys.vocab_size, candidate)
        _check(candidate, spec)  # before it reaches the folder
        write_durably(path, candidate.read_bytes())
    return TextTokenizer(path, spec.keys.eot)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train byte-level BPE on texts and write it to `path`; the end of a text is id 0.

    All 256 bytes are in the vocabulary, so that nothing is ever unknown.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # The library's stubs declare these attributes read-only.
    setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))  # noqa: B010
    setattr(tokenizer, "decoder", decoders.ByteLevel())  # noqa: B010
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def load_tokenizer(name: str, path: Path) -> None:
    """Write the tokenizer that `data.tokenizer` names to `path`.

    name: a tokenizer.json, a folder that holds one, or a name on the Hub. Raises UserError when
    there is none.
    """
    from tokenizers import Tokenizer

    local = tokenizer_file(name)
    if local is not None:
        path.write_bytes(local.read_bytes())
        return
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        raise UserError(f"data.tokenizer={name}: no such file")
    try:
        Tokenizer.from_pretrained(name).save(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"data.tokenizer={name}: neither a file nor a tokenizer on the Hub ({error})"
        ) from error


def _check(path: Path, spec: PrepareSpec) -> None:
    """Raise UserError for a tokenizer that cannot be used; print a note for one that loses text."""
    given = f"data.tokenizer={spec.keys.tokenizer or 'null'}"
    try:
        tokenizer = TextTokenizer(path, spec.keys.eot)
    except UserError as error:
        raise UserError(str(error).replace(str(path), given)) from error
    back = tokenizer.decode_bytes(tokenizer.encode([_PROBE.encode()])[0]).decode("utf-8", "replace")
    if back != _PROBE:
        print(
            f"note: {given} does not preserve every text: {_PROBE!r} becomes {back!r}",
            file=sys.stderr,
        )


def _sample_texts(spec: PrepareSpec) -> Iterator[str]:
    """Yield about `sample_mb` of text, from each source in proportion to its weight.

    Bytes that are not UTF-8 are replaced. Documents that cannot be read are skipped here; the
    preparation reports them.
    """
    from tqdm import tqdm

    budget = spec.keys.sample_mb * 2**20
    with tqdm(desc="tokenizer: reading", unit="B", unit_scale=True, leave=False) as bar:
        for source, weight in zip(spec.sources, spec.weights, strict=True):
            left = int(budget * weight / sum(spec.weights))
            texts = (
                document.text
                for chunk in source.sample(left)
                for document in Reader(chunk, source.text_key)
                if not isinstance(document, Problem)
            )
            for text in texts:
                for piece in split_bytes(text[:left]):
                    yield piece.decode("utf-8", "replace")
                left -= len(text)
                bar.update(len(text))
                if left <= 0:
                    break
        bar.set_description("tokenizer: training")
        bar.refresh()
