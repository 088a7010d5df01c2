"""A `tokenizer.json` that encodes any bytes so that they decode to the same bytes."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lunaris.data.text_split import split_bytes
from lunaris.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOT = "<|endoftext|>"
# Known names for the end of a text, in the order in which they are looked for.
_EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|end|>", "[SEP]")
# Bytes of text passed to the library at once: its encodings take many times as much memory.
_BATCH_BYTES = 2**20
_INVALID = re.compile("([\udc80-\udcff]+)")


def check_same_ids(old: Path, new: Path, said: str) -> None:
    """Raise UserError unless the ids that two tokenizers share mean the same.

    So the larger vocabulary must begin with the smaller one. said: how the message begins.
    """
    from tokenizers import Tokenizer

    texts = []
    for path in (old, new):
        try:
            vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json ({error})") from error
        texts.append({number: text for text, number in vocabulary.items()})
    both = sorted(texts[0].keys() & texts[1])
    first = next((n for n in both if texts[0][n] != texts[1][n]), None)
    if first is not None:
        raise UserError(
            f"{said}: was trained with another tokenizer: the id {first} is {texts[0][first]!r} in "
            f"{old} and {texts[1][first]!r} in {new}; init_from_strict=false takes the weights all "
            "the same"
        )


class TextTokenizer:
    """A tokenizer with its end-of-text id, which encodes and decodes bytes."""

    def __init__(self, path: Path, eot: str | int | None = None) -> None:
        """eot: the end-of-text token or its id; None: the first known name that the tokenizer has.

        Raises UserError when the file is not a tokenizer or has no end of text.
        """
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json ({error})") from error
        # "<|endoftext|>" within a text is plain text, not the end of a document.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps, so that their count can be smaller than the largest.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.eot_id = eot if isinstance(eot, int) else self._find_eot(path, eot)
        of_bytes = [self._tokenizer.token_to_id(char) for char in byte_alphabet()]
        byte_level = "ByteLevel" in self._tokenizer.to_str() and None not in of_bytes
        # The id of each byte if the tokenizer is byte-level; others cannot encode broken UTF-8.
        self._byte_ids = np.array(of_bytes, dtype=self.dtype) if byte_level else None

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids in shards: uint16 up to 65,536 ids, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Return each document's ids ([tokens] of `dtype`), without an end of text."""
        ids = [[np.empty(0, dtype=self.dtype)] for _ in documents]
        batch: list[tuple[int, str]] = []
        size = 0
        for i, document in enumerate(documents):
            for piece in split_bytes(document):
                batch += [(i, text) for text in self._texts(piece)]
                size += len(piece)
                if size >= _BATCH_BYTES:
                    self._encode_batch(batch, ids)
                    batch, size = [], 0
        self._encode_batch(batch, ids)
        return [np.concatenate(parts) for parts in ids]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of ids ([tokens]); an end of text has none."""
        if self._byte_ids is None:
            return self._tokenizer.decode(list(map(int, ids))).encode()
        table = self._token_bytes
        return b"".join([table[i] for i in np.asarray(ids).tolist()])

    def _texts(self, piece: bytes) -> list[str]:
        """Return a piece as text, and bytes that are not UTF-8 as a text of lone surrogates."""
        try:
            return [piece.decode("utf-8")]
        except UnicodeDecodeError:
            if self._byte_ids is None:
                return [piece.decode("utf-8", "replace")]
            parts = _INVALID.split(piece.decode("utf-8", "surrogateescape"))
            return [part for part in parts if part]

    def _encode_batch(self, batch: list[tuple[int, str]], ids: list[list[np.ndarray]]) -> None:
        """Append the ids of texts to those of their documents, whose indices come before them."""
        texts = [text for _, text in batch if not _is_escaped(text)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for i, text in batch:
            if _is_escaped(text):
                assert self._byte_ids is not None
                raw = np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)
                ids[i].append(self._byte_ids[raw])
            else:
                ids[i].append(np.array(next(encoded).ids, dtype=self.dtype))

    def _find_eot(self, path: Path, eot: str | None) -> int:
        names = _EOT_NAMES if eot is None else (eot,)
        for name in names:
            found = self._tokenizer.token_to_id(name)
            if found is not None:
                return found
        raise UserError(
            f"{path}: has no token {' or '.join(names)} for the end of a text; "
            "set data.eot to the one that it has"
        )

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of every id, in order."""
        of_char = {char: bytes([i]) for i, char in enumerate(byte_alphabet())}
        table = []
        added = self._tokenizer.get_added_tokens_decoder()
        for i in range(self.vocab_size):
            token = self._tokenizer.id_to_token(i)
            if token is None or i == self.eot_id:
                table.append(b"")
            elif i in added:
                table.append(token.encode())
            else:
                table.append(b"".join(of_char.get(char, char.encode()) for char in token))
        return table


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """Return the character that stands for each byte in byte-level BPE (GPT-2's table).

    Printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    beyond = itertools.count(0x100)
    return tuple(chr(byte if byte in printable else next(beyond)) for byte in range(256))


def _is_escaped(piece: str) -> bool:
    return "\udc80" <= piece[:1] <= "\udcff"
