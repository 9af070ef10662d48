"""Plans: what a call takes, and the cheapest setting that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limner import CapacityError
from limner.config import MODELS
from limner.memory import Formats, Workload, cheapest, make_plan
from limner.memory.components import num_matrix_weights, text_layer_weights, tile_space

GIB = 2**30


EDIT = Workload(size=(256, 256), references=((256, 256), (256, 256)))


def test_plan_of_a_large_model() -> None:
    """The sizes that the model's card and files give: 9.08 G parameters, 0.5 MiB of K/V a token."""
    plan = make_plan(MODELS["klein-9b"], EDIT, formats=Formats())
    assert plan.components["transformer weights"] == pytest.approx(2 * 9.08e9, rel=0.005)
    assert plan.components["K/V of references"] == 512 * 2**19
    assert [phase.name for phase in plan.phases] == ["encode text", "encode references", "prefill", "denoise", "decode"]
    assert [p.name for p in make_plan(MODELS["klein-9b"], Workload(size=(256, 256)), formats=Formats()).phases] == [
        "encode text",
        "denoise",
        "decode",
    ]
    without = make_plan(MODELS["klein-9b"], Workload(size=(256, 256)), formats=Formats())
    for name in ("denoise", "decode"):  # K/V stay until the end
        with_kv, none = (next(p for p in x.phases if p.name == name) for x in (plan, without))
        assert with_kv.anonymous - none.anonymous == plan.components["K/V of references"]
    parts = make_plan(MODELS["klein-9b"], EDIT, formats=Formats(), staging="parts")
    assert plan.peak - parts.peak > plan.components["text_encoder weights"]
    assert parts.peak < 20 * GIB
    assert parts.peak_anonymous < 2 * GIB
    int8 = make_plan(MODELS["klein-9b"], EDIT, formats=Formats(quantize="int8"), staging="parts")
    assert int8.peak < 14 * GIB
    assert int8.peak_anonymous > int8.components["int8 weights as packed for this CPU"]
    every = frozenset({"text_encoder", "transformer", "autoencoder"})
    converted = make_plan(MODELS["klein-9b"], EDIT, formats=Formats(anonymous=every), staging="layers", limit=GIB)
    assert converted.peak_anonymous > 28e9  # nothing leaves that has no file behind it
    here = make_plan(
        MODELS["klein-9b"],
        EDIT,
        formats=Formats(quantize="int8", anonymous=frozenset({"transformer"})),
        staging="parts",
    )
    assert here.peak - int8.peak > 7 * GIB


def test_plan_grows_with_the_request() -> None:
    geometry, base = MODELS["klein-4b"], make_plan(MODELS["klein-4b"], EDIT, formats=Formats()).peak
    for larger in (
        replace(EDIT, size=(1024, 1024)),
        replace(EDIT, batch=64),
        replace(EDIT, references=((1024, 1024),) * 4),
    ):
        assert make_plan(geometry, larger, formats=Formats()).peak > base
    big = Workload(size=(4096, 4096))
    whole = make_plan(geometry, big, formats=Formats(), whole_pixels=2**30)
    assert make_plan(geometry, big, formats=Formats()).peak < 0.6 * whole.peak


@pytest.mark.parametrize(
    ("limit", "staging", "quantize"),
    [(40, "whole", None), (20, "parts", None), (12, "parts", "int8"), (5, "layers", None)],
)
def test_the_cheapest_setting_that_fits(limit: int, staging: str, quantize: str | None) -> None:
    plan = cheapest(MODELS["klein-9b"], EDIT, formats=Formats(), limit=limit * GIB)
    assert (plan.staging, plan.formats.quantize) == (staging, quantize)
    assert plan.peak <= limit * GIB


def test_a_text_encoder_in_int8() -> None:
    """8 G weights of an 8B, 27 of 36 layers read: 5.2 GB instead of 10.4, and as much again where they are packed."""
    geometry, layers = MODELS["klein-9b"], 27 * text_layer_weights(MODELS["klein-9b"].text_encoder)
    for packed in (False, True):
        wide, narrow = (
            make_plan(geometry, EDIT, formats=Formats(quantize_text=on, packed=packed)) for on in (False, True)
        )
        less = wide.components["text_encoder weights"] - narrow.components["text_encoder weights"]
        assert less == pytest.approx(layers, rel=0.002)  # without scales
        copies = narrow.components.get("int8 weights as packed for this CPU", 0)
        assert copies == (layers if packed else 0)
        for before, after in zip(wide.phases, narrow.phases, strict=True):
            widened = 4096 * 12288 * 10 if after.name == "encode text" and not packed else 0
            assert after.anonymous - before.anonymous == copies + widened
            assert before.file_backed - after.file_backed == less
    # under a limit copies of one layer are there, while it runs
    wide, narrow = (
        make_plan(geometry, EDIT, formats=Formats(quantize_text=on), staging="parts") for on in (False, True)
    )
    more = {b.name: a.anonymous - b.anonymous for b, a in zip(wide.phases, narrow.phases, strict=True)}
    assert more == {name: layers // 27 if name == "encode text" else 0 for name in more}
    assert narrow.phases[0].total < wide.phases[0].total - 4 * GIB


def test_int8_products_that_read_weights_as_they_are_stored() -> None:
    """With AMX tiles: no second copy, nothing widened; working space, which grows with threads."""
    geometry = MODELS["klein-9b"]
    config, text = geometry.transformer, geometry.text_encoder
    how = {"quantize": "int8", "quantize_text": True}
    copies, wide = make_plan(geometry, EDIT, formats=Formats(**how)), make_plan(geometry, EDIT, formats=Formats())
    few, many = (make_plan(geometry, EDIT, formats=Formats(**how, packed=False, tile_threads=n)) for n in (2, 16))
    widened = make_plan(geometry, EDIT, formats=Formats(**how, packed=False))
    assert "int8 weights as packed for this CPU" not in few.components
    packed = copies.components["int8 weights as packed for this CPU"]
    assert packed == num_matrix_weights(config) + 27 * text_layer_weights(text)
    joined = config.width + config.mlp_width
    products = {"encode text": (EDIT.num_text, text.mlp_width)}
    products |= {"prefill": (EDIT.num_ref, joined), "denoise": (EDIT.batch * EDIT.num_own, joined)}
    for one, other, two, plain, large in zip(
        few.phases, many.phases, copies.phases, wide.phases, widened.phases, strict=True
    ):
        rows, width = products.get(one.name, (0, 0))
        # the input in int8, its copy in the layout of tiles, and what each thread has
        more = rows * width + tile_space(rows, width, threads=2) if rows else 0
        assert one.anonymous - plain.anonymous == more
        assert other.anonymous - one.anonymous == (14 * 384 * (4 * 384 + width) if rows else 0)
        assert one.anonymous <= two.anonymous
        assert one.anonymous <= large.anonymous
    assert few.peak < copies.peak - 8 * GIB
    halves = make_plan(geometry, EDIT, formats=Formats(packed=False, tile_threads=16))  # products in bfloat16
    for one, plain in zip(halves.phases, wide.phases, strict=True):
        rows, width = products.get(one.name, (0, 0)) if one.name != "encode text" else (0, 0)
        more = tile_space(rows, width, threads=16, itemsize=2) if rows else 0
        assert one.anonymous - plain.anonymous == more
    whole = Formats(itemsize=4, packed=False, tile_threads=16)  # float32 has none
    assert (
        make_plan(geometry, EDIT, formats=whole).phases == make_plan(geometry, EDIT, formats=Formats(itemsize=4)).phases
    )


def test_a_text_encoder_in_int8_on_a_gpu() -> None:
    """Where it is the larger part, int8 for it too fits into less."""
    geometry = replace(MODELS["klein-9b"], transformer=MODELS["klein-4b"].transformer)
    plan = cheapest(geometry, EDIT, formats=Formats(packed=False), limit=8 * GIB, device="cuda")
    assert (plan.staging, plan.formats.quantize, plan.formats.quantize_text) == ("parts", "int8", True)
    assert plan.as_json()["quantize_text"] is True


def test_what_fits_nowhere_is_told_with_numbers() -> None:
    with pytest.raises(
        CapacityError, match=r"memory_limit: 1\.00 GiB are too little; the least is [2-4]\.\d+ GiB, while"
    ):
        cheapest(MODELS["klein-9b"], EDIT, formats=Formats(), limit=GIB)
    geometry = MODELS["klein-9b"]
    with pytest.raises(CapacityError, match="staging layers"):
        cheapest(geometry, EDIT, formats=Formats(packed=False), limit=2 * GIB, device="cuda")


@pytest.mark.parametrize(
    ("limit", "staging", "quantize"),
    [(48, "whole", None), (24, "parts", None), (16, "parts", "int8"), (8, "layers", None)],
)
def test_a_gpu_has_networks_by_turns_too(limit: int, staging: str, quantize: str | None) -> None:
    geometry, formats = MODELS["klein-9b"], Formats(packed=False)
    card = cheapest(geometry, EDIT, formats=formats, limit=limit * GIB, device="cuda")
    assert (card.staging, card.formats.quantize, card.phases[0].file_backed) == (staging, quantize, 0)
    assert card.peak <= limit * GIB
    weights = sum(nbytes for name, nbytes in card.components.items() if "weights" in name)
    assert (card.host > weights) == (staging != "whole")
