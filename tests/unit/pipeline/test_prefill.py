"""References of pictures: keys, reports, where they are placed."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from PIL import Image
from tests.support.tiny import picture

from limner import InvalidRequest, Pipeline, ReferencePolicy, ReferenceStore
from limner.images import prepare_reference
from limner.pipeline.check import check_given
from limner.pipeline.networks import Networks

RGBA = Image.new("RGBA", (64, 64), (255, 0, 0, 128))


def test_a_hit_reports_the_pictures_that_were_given(pipe: Pipeline) -> None:
    """A picture that was cut, and one that is what was left of it: the same reference, not the same report."""
    large = picture(100, 70)
    small = Image.fromarray(prepare_reference(large, policy=ReferencePolicy()).pixels.permute(1, 2, 0).numpy())
    reports = [pipe("a dog", image=image).references[0] for image in (large, small)]
    assert [report.original_size for report in reports] == [(100, 70), (96, 64)]
    assert [report.cut for report in reports] == [(2, 3, 2, 3), (0, 0, 0, 0)]
    assert pipe.store.stats().misses == 1
    assert pipe.prefill(small).reports[0] == reports[1]
    assert pipe.prefill(large).reports[0] == reports[0]


def test_given_references_stay_where_the_store_leaves_them(pipe: Pipeline) -> None:
    """Over the budget of the device they are brought layer by layer, as those that `image=` finds."""

    class There(Networks):
        device = torch.device("meta")  # type: ignore[assignment]

    refs = pipe.prefill(picture(64, 64))
    there = There(**{field.name: getattr(pipe.networks, field.name) for field in fields(Networks)})
    admission = replace(pipe._admission, networks=there)
    for budget, place in ((0, "cpu"), (refs.nbytes, "meta")):
        prefiller = replace(pipe._prefiller, store=ReferenceStore(device_bytes=budget), admission=admission)
        assert check_given(refs, prefiller).device.type == place


def test_background_flattens_transparency(tiny_folder: Any) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(background="#0000ff"))
    flat = Image.new("RGB", (64, 64), (128, 0, 127))
    assert pipe.prefill(RGBA).key == pipe.prefill(flat).key
    with pytest.raises(InvalidRequest, match="background: 'puce-ish' is not a colour"):
        Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(background="puce-ish")).prefill(RGBA)


def test_the_key_of_pictures_is_that_of_their_references(pipe: Pipeline) -> None:
    a, b = (prepare_reference(picture(64, 64, seed=seed), policy=pipe.reference_policy) for seed in (1, 2))
    key = pipe.key_of([a, b])
    assert key not in pipe.store
    assert pipe.prefill([a, b]).key == key
    assert pipe.key_of([b, a]) != key
