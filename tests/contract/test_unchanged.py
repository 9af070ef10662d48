"""The layout may change; latents, keys, packs, public names and options may not (`tests/support/unchanged.py`).

The fixture was made at the commit before the layout of 2026-11-29. A release that means to change one of these makes it
anew, and says so in the changelog.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support import unchanged

import limner

KEPT: dict[str, Any] = json.loads(unchanged.FIXTURE.read_text())


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    any_size = limner.ReferencePolicy(sizes=())  # then references were not yet brought to the model's sizes
    pipe = limner.Pipeline.from_pretrained(reference_policy=any_size)
    return {"digest": pipe.digest, **{name: (x, key) for name, x, key in unchanged.drawn(pipe)}}


@pytest.mark.parametrize("name", KEPT["latents"])
def test_latents_and_keys(name: str, drawn: dict[str, Any]) -> None:
    latents, key = drawn[name]
    shape, values = KEPT["latents"][name]
    assert list(latents.shape) == shape
    # Six digits are kept, and sums have another order on another CPU: at most 9e-5 was seen, from SSE to AMX.
    assert latents.flatten()[::7].tolist() == pytest.approx(values, abs=3e-4)
    assert key == KEPT["keys"][name]


def test_digest_of_the_bundled_weights(drawn: dict[str, Any]) -> None:
    assert drawn["digest"] == KEPT["digest"]


def test_packs_are_byte_for_byte() -> None:
    assert {
        "whole": unchanged.pack(),
        "shard": unchanged.pack(shard=(1, 2)),
        "int8": unchanged.pack(quantization="int8"),
    } == KEPT["packs"]


def test_public_names_take_what_they_took() -> None:
    found = unchanged.signatures()
    assert {name: found.get(name) for name in KEPT["names"]} == KEPT["names"]


def test_commands_have_the_options_they_had() -> None:
    found = unchanged.options()
    assert {name: found.get(name) for name in KEPT["options"]} == KEPT["options"]


def test_http_document_is_that_of_then() -> None:
    """`test_schema.py` holds that the document is what the service says."""
    assert unchanged.digest(unchanged.OPENAPI.read_bytes()) == KEPT["openapi"]
