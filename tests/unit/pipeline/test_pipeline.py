"""The pipeline's own behaviour: defaults, reports, callbacks, what it refuses."""

from __future__ import annotations

import logging
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tests.support.tiny import generators, picture

import limner
from limner import Cancelled, CapacityError, InvalidRequest, NumericalError, Pipeline, ReferencePolicy, ReferenceStore
from limner.images import prepare_reference
from limner.pipeline.networks import Networks


def test_default_size_is_that_of_the_first_reference(pipe: Pipeline) -> None:
    out = pipe("a dog", image=[picture(100, 70), picture(64, 64)])
    assert out.images[0].size == (96, 64)
    assert [r.cut for r in out.references] == [(2, 3, 2, 3), (0, 0, 0, 0)]
    assert pipe("a dog", image=picture(100, 70), width=64).images[0].size == (64, 64)
    assert pipe.default_size == (1024, 1024)


def test_reports_prompts_that_are_cut(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "limner"):
        out = pipe("a dog " * 60 + "zebra", height=64, width=64)
    (report,) = out.prompts
    assert report.num_tokens > report.limit == pipe.text_encoder.max_length
    assert report.cut.count("dog") >= 20
    assert report.cut.endswith("zebra")
    assert report.cut in caplog.text
    assert pipe("a dog", height=64, width=64).prompts[0].cut == ""


def test_drawn_seeds_differ_and_given_ones_are_told(pipe: Pipeline) -> None:
    out = pipe("a dog", height=64, width=64, num_images_per_prompt=3)
    assert len(set(out.seeds)) == 3
    assert pipe("a dog", height=64, width=64, generator=generators(42)[0]).seeds == (42,)
    assert pipe("a dog", latents=torch.randn(1, 16, 4, 4)).seeds == (None,)
    used = generators(42)[0]
    torch.randn(1, generator=used)
    assert pipe("a dog", height=64, width=64, generator=used).seeds == (None,)
    shared = pipe("a dog", height=64, width=64, generator=generators(42)[0], num_images_per_prompt=2)
    assert shared.seeds == (42, None)


def test_callback_sees_and_changes_tensors(pipe: Pipeline) -> None:
    seen = []

    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert owner is pipe
        seen.append((i, round(float(t), 1), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else {}

    out = pipe(
        "a dog",
        height=64,
        width=64,
        callback_on_step_end=callback,
        output_type="latent",
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert seen[0] == (0, 1000.0, {"latents", "prompt_embeds"})
    zero = pipe.autoencoder.denormalise(torch.zeros(1, 16, 4, 4))
    assert torch.equal(out.images, zero)


def test_callback_stops_the_run(pipe: Pipeline) -> None:
    steps = []

    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        steps.append(i)
        if i == 1:
            raise Cancelled("the user stopped it")

    with pytest.raises(Cancelled, match="the user stopped it"):
        pipe("a dog", height=64, width=64, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert pipe("a dog", height=64, width=64).images


def test_diffusers_way_to_stop(pipe: Pipeline) -> None:
    steps = []

    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(i)
        owner._interrupt = i == 1
        return tensors

    assert len(pipe("a dog", height=64, width=64, callback_on_step_end=callback).timings.steps) == 2
    assert steps == [0, 1]
    assert len(pipe("a dog", height=64, width=64).timings.steps) == 4


def test_refuses_what_a_callback_gives_back(pipe: Pipeline) -> None:
    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.zeros(1, 3, 48)}

    with pytest.raises(InvalidRequest, match="callback_on_step_end: gave back prompt_embeds that are not"):
        pipe("a dog", height=64, width=64, callback_on_step_end=callback)


def test_values_that_are_not_finite_are_an_error(pipe: Pipeline) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite in torch.float32: the weights are damaged"):
        pipe("a dog", height=64, width=64)


@pytest.mark.parametrize("part", ["transformer", "autoencoder", "text_encoder"])
def test_writes_that_leave_no_version_are_seen(part: str, pipe: Pipeline) -> None:
    """As many LoRA mergers write: through `.data`."""
    before, refs = pipe.digest, pipe.prefill(picture(64, 64))
    pipe("a dog", height=64, width=64)
    tokens = next(iter(pipe._prompts._cache.values()))[0]
    for p in getattr(pipe, part).parameters():
        p.data.mul_(1.5)
    assert pipe.digest != before
    assert (pipe.prefill(picture(64, 64)).key == refs.key) == (part == "text_encoder")
    pipe("a dog", height=64, width=64)
    changed = not torch.equal(list(pipe._prompts._cache.values())[-1][0], tokens)
    assert changed == (part == "text_encoder")


def test_writes_to_some_rows_are_seen(pipe: Pipeline) -> None:
    """A LoRA of the queries changes a part of a fused matrix, `.data` leaves no version."""
    matrix = pipe.transformer.single_transformer_blocks[1].attn.to_qkv_mlp_proj.weight
    seen = {pipe.reference_weights}
    for rows in (slice(0, 32), slice(32, 33), slice(-1, None)):
        matrix.data[rows] *= 3
        seen.add(pipe.reference_weights)
    matrix.data[:, 5] *= 3
    assert len(seen | {pipe.reference_weights}) == 5


@pytest.mark.parametrize("change", [{"rope_theta": 3000.0}, {"eps": 1e-5}, {"rope_axes": (2, 2, 4, 8)}], ids=str)
def test_the_key_covers_the_geometry_of_the_transformer(change: dict[str, Any], pipe: Pipeline) -> None:
    refs = pipe.prefill(picture(64, 64))
    pipe.transformer.config = replace(pipe.transformer.config, **change)
    assert pipe.prefill(picture(64, 64)).key != refs.key
    with pytest.raises(InvalidRequest, match="they were made with weights"):
        pipe("a dog", references=refs)


@pytest.mark.parametrize("change", [{"norm_num_groups": 4}, {"batch_norm_eps": 1e-3}], ids=str)
def test_the_key_covers_the_geometry_of_the_autoencoder(change: dict[str, Any], pipe: Pipeline) -> None:
    before = pipe.reference_weights
    pipe.autoencoder.network.register_to_config(**change)
    assert pipe.reference_weights != before


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
    there = There(**{field.name: getattr(pipe._networks, field.name) for field in fields(Networks)})
    admission = replace(pipe._admission, networks=there)
    for budget, place in ((0, "cpu"), (refs.nbytes, "meta")):
        prefiller = replace(pipe._prefiller, store=ReferenceStore(device_bytes=budget), admission=admission)
        assert prefiller.check_given(refs).device.type == place


def test_kept_references_are_not_admitted_again(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their K/V are in memory already, and no activations of theirs are to come."""
    pictures = [picture(256, 256, seed=i) for i in range(4)]
    refs = pipe.prefill(pictures)
    free = 12 << 20
    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert pipe("a dog", references=refs, width=64, height=64).reference_cache == "given"
    assert pipe("a dog", image=pictures, width=64, height=64).reference_cache == "memory"
    pipe.store = ReferenceStore(memory_bytes=0)
    with pytest.raises(CapacityError, match=re.escape("1024 reference tokens")):
        pipe("a dog", image=pictures, width=64, height=64)


def test_progress_covers_every_part(pipe: Pipeline) -> None:
    heard: list[tuple[str, int, int]] = []
    pipe("a dog", image=picture(64, 64), progress=lambda *what: heard.append(what))
    assert [what for what in heard if what[1] == what[2]] == [
        ("text", 1, 1),
        ("references", 1, 1),
        ("step", 4, 4),
        ("decode", 1, 1),
    ]


def test_prompts_are_encoded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = pipe.text_encoder.forward
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *a, **k: calls.append(a) or original(*a, **k))
    for prompt in ("a dog", "a fox", "a dog"):
        pipe(prompt, height=64, width=64, num_inference_steps=1)
    assert len(calls) == 2
    for i in range(20):
        pipe(f"dog {i}", height=64, width=64, num_inference_steps=1)
    assert len(pipe._prompts._cache) == 16


def test_text_encoder_has_no_layer_that_nobody_reads(pipe: Pipeline) -> None:
    assert len(pipe.text_encoder.network.layers) == 3  # of 4
    assert not any("lm_head" in name for name, _ in pipe.text_encoder.named_parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the memory map of Linux")
def test_weights_stay_mapped_from_the_file(pipe: Pipeline, tiny_folder: Path) -> None:
    """No second copy: the memory of every large parameter is the file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tiny_folder) in line:
            start, _, end = line.split()[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    for part in (pipe.transformer, pipe.autoencoder, pipe.text_encoder):
        for name, p in part.named_parameters():
            assert any(start <= p.data_ptr() < end for start, end in ranges), name


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


RGBA = Image.new("RGBA", (64, 64), (255, 0, 0, 128))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt: give either prompt or prompt_embeds"),
        ({"prompt": ""}, "prompt: '' is empty"),
        ({"prompt": "  \n"}, "is empty; say what"),
        ({"prompt": []}, "prompt: an empty list"),
        ({"prompt": ["a", 3]}, "prompt: int is not a text"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 48)}, "not both"),
        (
            {"prompt_embeds": torch.zeros(1, 2, 47)},
            r"prompt_embeds: have shape \[1, 2, 47\]; allowed: \(B, S_txt, 48\)",
        ),
        ({"prompt": "a", "height": 500}, "height: 500 is not a multiple of 16 of at least 64; use 496 or 512"),
        ({"prompt": "a", "width": 48}, "width: 48 is not a multiple of 16 of at least 64; use 64"),
        ({"prompt": "a", "width": -16}, "width: -16"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps: 0 is not a whole number of at least 1"),
        ({"prompt": "a", "num_inference_steps": 4.0}, "num_inference_steps: 4.0"),
        ({"prompt": "a", "num_inference_steps": 10**9}, "num_inference_steps: 1000000000 is not within 1 to 1000"),
        ({"prompt": "a", "width": 64.0}, "width: 64.0 is not a whole number"),
        ({"prompt": "a", "width": "64"}, "width: '64'"),
        ({"prompt": "a", "image": 5}, "image: int is not a picture"),
        ({"prompt": 5}, "prompt: int is not a text"),
        ({"prompt": "a \udcff"}, "prompt: is not valid Unicode at character 2"),
        ({"prompt": "a", "generator": 42}, "generator: 42 is not a torch.Generator"),
        ({"prompt": "a", "latents": [[1]]}, "latents: have to be a tensor"),
        ({"prompt": "a", "latents": torch.full((1, 16, 4, 4), float("nan"))}, "latents: have to be a tensor of finite"),
        ({"prompt": "a", "sigmas": ["a"]}, "sigmas: .* is not a list of numbers"),
        ({"prompt": "a", "references": "pack"}, "references: str is not limner.References"),
        ({"prompt": "a", "text_encoder_out_layers": 3}, "text_encoder_out_layers: 3 is not a list"),
        ({"prompt_embeds": torch.full((1, 2, 48), float("inf"))}, "prompt_embeds: hold values that are not finite"),
        ({"prompt_embeds": torch.zeros(0, 2, 48)}, "prompt_embeds: have shape"),
        ({"prompt_embeds": torch.zeros(1, 2, 48, dtype=torch.int64)}, "prompt_embeds: have to be"),
        ({"prompt": "a", "sigmas": [0.5, 1.0]}, r"sigmas: \[0.5, 1.0\] has to fall"),
        ({"prompt": "a", "sigmas": []}, "sigmas"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt: 0"),
        ({"prompt": "a", "generator": generators(1, 2)}, "generator: a list of 2 for 1 images"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type: 'jpg' is not one of pil, np, pt, latent"),
        ({"prompt": "a", "latents": torch.zeros(1, 3, 4, 4)}, "latents: have shape"),
        ({"prompt": "a", "latents": torch.zeros(1, 16, 4, 4), "height": 128}, "latents: are for height 64, height=128"),
        ({"prompt": "a", "latents": torch.zeros(2, 16, 4, 4)}, "latents: have batch 2"),
        ({"prompt": "a", "image": []}, "image: an empty list"),
        ({"prompt": "a", "image": [picture(64, 64), 7]}, "image 2: int is not a picture"),
        ({"prompt": "a", "image": picture(63, 64)}, "image 1: 63x64 is too small; each side has to be at least 64"),
        ({"prompt": "a", "image": picture(64, 576)}, "image 1: 64x576 is too long"),
        ({"prompt": "a", "image": RGBA}, "image 1: it is transparent"),
        (
            {"prompt": "a", "text_encoder_out_layers": [1, 2, 4]},
            "text_encoder_out_layers: .* has to name layers 0 to 3",
        ),
        ({"prompt": "a", "text_encoder_out_layers": [1, 2]}, "gives tokens of width 32, the transformer reads 48"),
        ({"prompt": "a", "max_sequence_length": 0}, "max_sequence_length: 0"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str, pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipe(**arguments)
    assert len(pipe.store) == 0


def test_refuses_image_and_references_together(pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="image and references are both given"):
        pipe("a", image=picture(64, 64), references=pipe.prefill(picture(64, 64)))


def test_refuses_what_does_not_fit_in_memory(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1 << 19

    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: Memory)
    with pytest.raises(CapacityError, match=re.escape("0.00 GiB are free; use fewer or smaller references")):
        pipe.prefill([picture(1024, 1024)] * 3)
    assert len(pipe.store) == 0
    assert pipe.prefill(picture(64, 64)).num_tokens == 16
    with pytest.raises(CapacityError, match=r"^size: 1 x \d+ own tokens need .* use a smaller output"):
        pipe("a dog", image=picture(64, 64), width=1024, height=1024)


def test_background_flattens_transparency(tiny_folder: Any) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(background="#0000ff"))
    flat = Image.new("RGB", (64, 64), (128, 0, 127))
    assert pipe.prefill(RGBA).key == pipe.prefill(flat).key
    with pytest.raises(InvalidRequest, match="background: 'puce-ish' is not a colour"):
        Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(background="puce-ish")).prefill(RGBA)


def test_public_names() -> None:
    for name in limner.__all__:
        assert getattr(limner, name) is not None
    assert limner.Flux2KleinKVPipeline is limner.Pipeline
    with pytest.raises(AttributeError, match="nothing_here"):
        limner.nothing_here  # noqa: B018


@pytest.mark.parametrize("device", ["cuda", "abacus"])
def test_refuses_devices_that_are_not_there(device: str, pipe: Pipeline) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InvalidRequest, match=device):
        pipe.to(device)


def test_a_callback_may_drop_images_of_a_batch(pipe: Pipeline) -> None:
    def drop(pipe: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"rows": [0, 2]} if step == 1 else {}

    options: dict[str, Any] = {"image": picture(64, 64), "output_type": "pt", "num_images_per_prompt": 3}
    whole = pipe("a dog", generator=generators(1, 2, 3), **options)
    kept = pipe("a dog", generator=generators(1, 2, 3), callback_on_step_end=drop, **options)
    assert kept.seeds == (1, 3)
    assert (kept.images - whole.images[[0, 2]]).abs().max() < 1e-5  # another batch, other roundings
    for bad in ([], [2, 0], [0, 3], [1, 1]):
        with pytest.raises(InvalidRequest, match="rows"):
            pipe(
                "a dog",
                generator=generators(1, 2, 3),
                callback_on_step_end=lambda *a, bad=bad: {"rows": bad},
                **options,
            )


def test_output_says_what_a_hit_saved(pipe: Pipeline) -> None:
    first, second = (pipe("a dog", image=picture(64, 64)) for _ in range(2))
    assert (first.reference_cache, first.seconds_saved) == ("miss", 0.0)
    references, source = pipe.prefill_from(picture(64, 64))
    assert (second.reference_cache, source) == ("memory", "memory")
    assert second.seconds_saved == references.prefill_seconds > 0
    assert first.reference_key == second.reference_key == references.key
    assert pipe("a dog", width=64, height=64).reference_key is None


def test_the_key_of_pictures_is_that_of_their_references(pipe: Pipeline) -> None:
    a, b = (prepare_reference(picture(64, 64, seed=seed), policy=pipe.reference_policy) for seed in (1, 2))
    key = pipe.key_of([a, b])
    assert key not in pipe.store
    assert pipe.prefill([a, b]).key == key
    assert pipe.key_of([b, a]) != key
