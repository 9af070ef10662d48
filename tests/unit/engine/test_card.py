"""What is known of a model without having it is what the pipeline says of itself."""

from __future__ import annotations

import pickle

import pytest
from tests.support.tiny import picture

from limner import Pipeline
from limner.engine import ModelCard, ModelView, PipelineView
from limner.images import prepare_reference


@pytest.fixture
def card(pipe: Pipeline) -> ModelCard:
    return ModelCard.of(pipe, memory_bytes=1 << 30)


def test_view_and_card_say_the_same(pipe: Pipeline, card: ModelCard) -> None:
    views: list[ModelView] = [PipelineView(pipe), card]
    tokens = {"num_ref": 40, "num_own": 60, "batch": 2}
    view, other = (
        (v.default_size, v.sizes, v.reference_policy, v.text_length, v.previews, v.digest, v.memory_needed(**tokens))
        for v in views
    )
    assert view == other
    assert card.memory_needed(**tokens) == pipe.memory_needed(**tokens)


def test_a_card_gives_the_keys_of_its_pipeline(pipe: Pipeline, card: ModelCard) -> None:
    references = [prepare_reference(picture(80, 64, seed=i), policy=pipe.reference_policy) for i in range(2)]
    assert card.key_of(references) == pipe.key_of(references)
    assert card.key_of(references[::-1]) != card.key_of(references)


def test_a_view_follows_its_pipeline_and_a_card_does_not(pipe: Pipeline, card: ModelCard) -> None:
    view, before = PipelineView(pipe), card.digest
    assert view.digest == before
    next(iter(pipe.transformer.parameters())).data.add_(1)
    assert view.digest != before
    assert card.digest == before


def test_cards_reach_other_processes(card: ModelCard) -> None:
    assert pickle.loads(pickle.dumps(card)) == card
