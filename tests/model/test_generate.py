"""Sampling: greedy, filtered, seeded, ended, and beyond the model's length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lunaris.model.generate import generate, sample, stream, stream_rows
from lunaris.model.transformer import Transformer
from lunaris.model.transformer import vocabulary_logits as plain
from lunaris.objective.next_token import NextToken

Make = Callable[..., Transformer]


@pytest.fixture
def model(make_model: Make) -> Transformer:
    return make_model({"capacity_factor": 0.5}).eval()


def test_greedy_takes_the_likeliest_token_of_the_full_forward(model: Transformer) -> None:
    prompt = torch.tensor([[1, 2, 3], [7, 8, 9]])
    out = generate(model, prompt, 10, temperature=0)
    want = prompt
    for _ in range(10):
        want = torch.cat((want, model.logits(want)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, want)


def test_a_seed_gives_the_same_text_and_another_seed_another(model: Transformer) -> None:
    prompt = torch.tensor([[1, 2, 3]])
    one, again = (generate(model, prompt, 15, seed=4) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, generate(model, prompt, 15, seed=5))


def test_the_head_gives_the_logits_that_are_sampled(model: Transformer) -> None:
    """A small cap flattens the distribution."""
    capped = NextToken(logit_soft_cap=0.1).logits
    rows = torch.tensor([[1, 2, 3]]).expand(400, -1)
    drawn = [generate(model, rows, 1, head=head)[:, -1].bincount() for head in (capped, plain)]
    assert drawn[0].max() < 25 < drawn[1].max(), drawn


def test_generation_goes_on_beyond_the_models_length(model: Transformer) -> None:
    prompt = torch.arange(30)[None]  # longer than the 24 positions
    assert generate(model, prompt, 40, temperature=0).shape == (1, 70)


def drawn(logits: list[float], **filters: float | None) -> set[int]:
    keys = {"temperature": 1.0, "top_k": None, "top_p": None} | filters
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(logits).expand(400, -1)
    return set(sample(rows, generator=generator, **keys).tolist())  # type: ignore[arg-type]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert drawn([0.0, 1.0, 0.5, -1.0], top_k=2) == {1, 2}
    assert drawn([0.0, 1.0, 0.5, -1.0], top_k=9) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_the_mass() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().tolist()
    assert drawn(logits, top_p=0.49) == {1}
    assert drawn(logits, top_p=0.6) == {1, 2}
    assert drawn(logits, top_p=1.0) == {0, 1, 2, 3}


def test_temperature_sharpens() -> None:
    assert drawn([0.0, 1.0, 0.5], temperature=0.01) == {1}
    assert drawn([0.0, 1.0, 0.5], temperature=5.0) == {0, 1, 2}


def test_it_ends_at_end_of_text(model: Transformer) -> None:
    prompt = torch.tensor([[1, 2, 3]])
    free = generate(model, prompt, 12, seed=2)[0, 3:].tolist()
    eot = free[5]
    out = generate(model, prompt, 12, seed=2, eot_id=eot)[0, 3:].tolist()
    assert out == free[: free.index(eot)]


def test_an_ended_sequence_waits_for_the_others(model: Transformer) -> None:
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = generate(model, prompt, 12, seed=2)[:, 3:]
    eot = int(free[0, 2])
    rows = torch.stack(list(stream(model, prompt, 12, seed=2, eot_id=eot)), dim=1)
    begin = free[0].tolist().index(eot)
    assert (rows[0, begin:] == eot).all()
    assert rows.size(1) > begin


def rows_of(model: Transformer, prompts: list[list[int]], seeds: list[int], **keys: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found: list[list[int]] = [[] for _ in prompts]
    tensors = [torch.tensor(prompt) for prompt in prompts]
    for step in stream_rows(model, tensors, 30, generators=generators, **keys):
        for row, token in step.items():
            found[row].append(token)
    return found


@pytest.mark.parametrize("keys", [{"temperature": 0}, {"top_k": 9}, {"temperature": 2.0}])
def test_a_row_is_the_text_that_it_is_alone(model: Transformer, keys: dict[str, Any]) -> None:
    """Prompts of other lengths, one beyond the model's, do not change it; nor its place."""
    prompts = [[1, 2, 3], [7], list(range(30)), [9] * 20, [7]]
    seeds = [3, 4, 5, 6, 9]
    alone = [rows_of(model, [p], [s], **keys)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert rows_of(model, prompts, seeds, **keys) == alone
    assert rows_of(model, prompts[::-1], seeds[::-1], **keys) == alone[::-1]
    assert [len(text) for text in alone] == [30] * 5
    assert keys == {"temperature": 0} or alone[1] != alone[4]


def test_a_row_that_ended_leaves_the_others_as_they_are(model: Transformer) -> None:
    prompts, seeds = [[1, 2, 3], [7, 8], [9]], [3, 4, 5]
    free = rows_of(model, prompts, seeds)
    eot = free[0][7]
    cut = [text[: text.index(eot)] if eot in text else text for text in free]
    assert rows_of(model, prompts, seeds, eot_id=eot) == cut
    ended, found = {1}, [[], [], []]  # type: ignore[var-annotated]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tensors = [torch.tensor(prompt) for prompt in prompts]
    for step in stream_rows(model, tensors, 30, generators=generators, ended=ended):
        for row, token in step.items():
            found[row].append(token)
        if len(found[0]) == 4:
            ended.add(0)
    assert found == [free[0][:4], [], free[2]]


def test_a_model_in_training_is_refused(model: Transformer) -> None:
    with pytest.raises(AssertionError, match="eval"):
        next(stream(model.train(), torch.tensor([[1]]), 1))
