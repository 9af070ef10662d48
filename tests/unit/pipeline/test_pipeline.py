"""Calls as a whole: defaults, progress, what a result says, moving to other devices and dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.tiny import generators, picture

import limner
from limner import InvalidRequest, Pipeline


def test_default_size_is_that_of_the_first_reference(pipe: Pipeline) -> None:
    out = pipe("a dog", image=[picture(100, 70), picture(64, 64)])
    assert out.images[0].size == (96, 64)
    assert [r.cut for r in out.references] == [(2, 3, 2, 3), (0, 0, 0, 0)]
    assert pipe("a dog", image=picture(100, 70), width=64).images[0].size == (64, 64)
    assert pipe.default_size == (1024, 1024)


def test_progress_covers_every_part(pipe: Pipeline) -> None:
    heard: list[tuple[str, int, int]] = []
    pipe("a dog", image=picture(64, 64), progress=lambda *what: heard.append(what))
    assert [what for what in heard if what[1] == what[2]] == [
        ("text", 1, 1),
        ("references", 1, 1),
        ("step", 4, 4),
        ("decode", 1, 1),
    ]


def test_to_casts_and_keeps_working(pipe: Pipeline) -> None:
    refs = pipe.prefill(picture(64, 64))
    assert pipe.to(torch.bfloat16) is pipe
    with pytest.raises(InvalidRequest, match="weights|dtype"):
        pipe("a dog", references=refs)
    assert pipe.to("cpu")("a dog", image=picture(64, 64)).reference_cache == "miss"


def test_to_a_dtype_is_loading_in_it(pipe: Pipeline, tiny_folder: Path) -> None:
    """The rotary frequencies of the text encoder stay in float32 both ways."""
    loaded = Pipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    pipe.to(torch.bfloat16)
    first, second = (
        p("a dog", height=64, width=64, generator=generators(1)[0], output_type="pt") for p in (pipe, loaded)
    )
    assert torch.equal(first.images, second.images)
    assert pipe.digest == loaded.digest


def test_public_names() -> None:
    for name in limner.__all__:
        assert getattr(limner, name) is not None
    assert issubclass(limner.Flux2KleinKVPipeline, limner.Pipeline)
    with pytest.raises(AttributeError, match="nothing_here"):
        limner.nothing_here  # noqa: B018


@pytest.mark.parametrize("device", ["cuda", "abacus"])
def test_refuses_devices_that_are_not_there(device: str, pipe: Pipeline) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InvalidRequest, match=device):
        pipe.to(device)


def test_output_says_what_a_hit_saved(pipe: Pipeline) -> None:
    first, second = (pipe("a dog", image=picture(64, 64)) for _ in range(2))
    assert (first.reference_cache, first.seconds_saved) == ("miss", 0.0)
    references, source = pipe.prefill_from(picture(64, 64))
    assert (second.reference_cache, source) == ("memory", "memory")
    assert second.seconds_saved == references.prefill_seconds > 0
    assert first.reference_key == second.reference_key == references.key
    assert pipe("a dog", width=64, height=64).reference_key is None
