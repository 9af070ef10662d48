"""Plans: what a call takes, and the cheapest setting that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limner import CapacityError
from limner.config import MODELS
from limner.memory import Formats, Workload, cheapest, make_plan

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
