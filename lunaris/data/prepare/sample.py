"""A sample of the sources' text, for training a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lunaris.data.prepare.chunks import Source
from lunaris.data.prepare.readers import Problem, Reader
from lunaris.data.text_split import split_bytes


def sample_texts(sources: Sequence[Source], weights: list[float], budget: int) -> Iterator[str]:
    """Yield about `budget` bytes of text, of each source in proportion to its weight.

    What is not UTF-8 is replaced; documents that cannot be read are left to the preparation.
    """
    from tqdm import tqdm

    with tqdm(desc="tokenizer: reading", unit="B", unit_scale=True, leave=False) as bar:
        for source, weight in zip(sources, weights, strict=True):
            left = int(budget * weight / sum(weights))
            for text in _texts(source, left):
                for piece in split_bytes(text[:left]):
                    yield piece.decode("utf-8", "replace")
                left -= len(text)
                bar.update(len(text))
                if left <= 0:
                    break
        bar.set_description("tokenizer: training")
        bar.refresh()


def _texts(source: Source, budget: int) -> Iterator[bytes]:
    for unit in source.sample(budget):
        for document in Reader(unit, source.text_key):
            if not isinstance(document, Problem):
                yield document.text
