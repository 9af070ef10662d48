"""Standard and base klein: the same folder loaded by diffusers and by Limner, the same seeds, float32; and an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.parallel_work import lora
from tests.support.tiny import MAX_TOKENS, TEXT_LAYERS, generators, picture, relative_error

from limner import EditRequest, Engine, InvalidRequest, Pipeline, References, ReferenceStore
from limner.kinds import ModelKind
from limner.store.read_cost import ReadCost
from limner.tokens import image_ids, reference_ids, text_ids

# pictures in [0, 1]; float32 rounding through the steps and the decoder: seen about 1e-7
TOLERANCE = 2e-5
REFERENCES = [picture(96, 64), picture(70, 101, seed=1), picture(160, 81, seed=2)]


def embeds(num: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(num, length, 48, generator=generators(seed)[0])


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "text to image": lambda: {"prompt": "a cat", "height": 64, "width": 96, "generator": generators(3)[0]},
    "one reference": lambda: {"prompt": "bigger", "image": REFERENCES[:1], "generator": generators(1)[0]},
    "three references": lambda: {
        "prompt": "all together",
        "image": REFERENCES,
        "height": 80,
        "width": 112,
        "generator": generators(2)[0],
    },
    "prompt list, several images a prompt": lambda: {
        "prompt": ["a dog", "a dog and a very long description of the place where it stands"],
        "image": REFERENCES[:2],
        "num_images_per_prompt": 2,
        "generator": generators(5, 6, 7, 8),
    },
    "custom sigmas": lambda: {
        "prompt": "a dog",
        "image": REFERENCES[:1],
        "sigmas": [1.0, 0.6, 0.2],
        "generator": generators(7)[0],
    },
    "given prompt tokens": lambda: {
        "prompt_embeds": embeds(2, 9, 8),
        "image": REFERENCES[:1],
        "generator": generators(8)[0],
    },
}
GUIDED: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"guidance {scale}": lambda scale=scale: {"guidance_scale": scale} for scale in (1.0, 3.5, 4.0)},
    "negative tokens": lambda: {"guidance_scale": 2.0, "negative_prompt_embeds": embeds(1, MAX_TOKENS, 5)},
    "negative tokens of another length": lambda: {"guidance_scale": 2.0, "negative_prompt_embeds": embeds(1, 7, 5)},
}


def diffusers_pipe(folder: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def standard(standard_folder: Path) -> Any:
    return diffusers_pipe(standard_folder)


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Any:
    return diffusers_pipe(base_folder)


def theirs(oracle: Any, **arguments: Any) -> np.ndarray:
    settings = {"num_inference_steps": 4, "max_sequence_length": MAX_TOKENS, "text_encoder_out_layers": TEXT_LAYERS}
    images: np.ndarray = oracle(**{**settings, **arguments}, output_type="np").images
    assert np.std(images) > 0.02  # not a flat picture, where everything agrees
    return images


def assert_same(ours: Any, expected: np.ndarray) -> None:
    assert ours.images.shape == expected.shape
    assert np.abs(ours.images - expected).mean() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_standard_klein(case: str, standard_folder: Path, standard: Any) -> None:
    pipe = Pipeline.from_pretrained(standard_folder)
    assert pipe.kind == ModelKind(references="joint", distilled=True)
    out = pipe(**CASES[case](), max_sequence_length=MAX_TOKENS, output_type="np")
    assert_same(out, theirs(standard, **CASES[case]()))
    if "image" in CASES[case]():
        isolated = Pipeline.from_pretrained(standard_folder, references="isolated")
        other = isolated(**CASES[case](), max_sequence_length=MAX_TOKENS, output_type="np")
        assert np.abs(other.images - out.images).mean() > 100 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_base_klein(case: str, base_folder: Path, base: Any) -> None:
    """Nothing in the folder says `is_distilled`: guidance 4 as in diffusers."""
    pipe = Pipeline.from_pretrained(base_folder)
    arguments = CASES[case]()
    if "prompt_embeds" in arguments:  # diffusers makes one negative prompt for two, and fails
        arguments["negative_prompt_embeds"] = embeds(2, 9, 4)
    expected = theirs(base, **{**arguments, **CASES[case](), "generator": CASES[case]()["generator"]})
    out = pipe(**{**CASES[case](), **_without(arguments, "generator")}, num_inference_steps=4,
               max_sequence_length=MAX_TOKENS, output_type="np")  # fmt: skip
    assert_same(out, expected)
    assert out.metadata["guidance_scale"] == 4.0


def _without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}


@pytest.mark.parametrize("case", GUIDED)
@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two"])
def test_guidance(case: str, together: bool, base_folder: Path, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not together:
        monkeypatch.setattr("limner.pipeline.admission.Admission.is_free", lambda *_: False)
    pipe = Pipeline.from_pretrained(base_folder)
    settings = {"prompt": "a dog", "image": REFERENCES[:2], "num_images_per_prompt": 2, **GUIDED[case]()}
    if case.startswith("negative"):
        settings["num_images_per_prompt"] = 1
    seeds = range(3, 3 + settings["num_images_per_prompt"])
    expected = theirs(base, **settings, generator=generators(*seeds))
    forwards = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    out = pipe(
        **settings,
        num_inference_steps=4,
        generator=generators(*seeds),
        max_sequence_length=MAX_TOKENS,
        output_type="np",
    )
    assert_same(out, expected)
    two = not together or case == "negative tokens of another length"
    assert len(forwards) == (8 if two and case != "guidance 1.0" else 4)


def test_defaults_of_base_models(base_folder: Path, base: Any) -> None:
    """50 steps and guidance 4 are diffusers' defaults of the class; a reference of the tiny model has few tokens."""
    arguments = {"prompt": "a dog", "image": REFERENCES[:1]}
    seen = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        if step == 1:
            pipe._interrupt = True
        return {}

    base(**arguments, generator=generators(1)[0], callback_on_step_end=stop, max_sequence_length=MAX_TOKENS,
         text_encoder_out_layers=TEXT_LAYERS, output_type="latent")  # fmt: skip
    pipe = Pipeline.from_pretrained(base_folder)
    out = pipe(
        **arguments,
        generator=generators(1)[0],
        callback_on_step_end=stop,
        max_sequence_length=MAX_TOKENS,
        output_type="latent",
    )
    assert out.metadata["num_inference_steps"] == 50
    for expected, ours in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_negative_prompts_are_words(base_folder: Path) -> None:
    """A negative prompt does what its tokens do; one serves all prompts."""
    pipe = Pipeline.from_pretrained(base_folder)

    def run(**how: Any) -> Any:
        return pipe(
            ["a dog", "a fox"],
            height=64,
            width=64,
            num_inference_steps=2,
            max_sequence_length=MAX_TOKENS,
            generator=generators(1, 2),
            output_type="np",
            **how,
        ).images

    tokens = pipe.text_encoder([pipe.text_encoder.tokenize("rain", max_sequence_length=MAX_TOKENS)])
    asked = run(negative_prompt="rain")
    assert np.array_equal(asked, run(negative_prompt=["rain", "rain"]))
    assert np.array_equal(asked, run(negative_prompt_embeds=tokens))
    assert np.abs(asked - run()).mean() > 100 * TOLERANCE
    with pytest.raises(InvalidRequest, match="negative_prompt: there are 3 for 2 prompts"):
        run(negative_prompt=["a", "b", "c"])


def test_guidance_has_no_effect_on_distilled_models(standard_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipeline.from_pretrained(standard_folder)
    arguments = {"prompt": "a dog", "height": 64, "width": 64, "output_type": "np"}
    plain = pipe(**arguments, generator=generators(1)[0]).images
    pipe.draw([EditRequest(prompt="a dog", seeds=(1,), width=64, height=64)])
    assert "no effect" not in caplog.text
    asked = pipe(**arguments, generator=generators(1)[0], guidance_scale=4.0)
    assert np.array_equal(plain, asked.images)
    assert "no effect" in caplog.text
    assert "guidance_scale" not in asked.metadata


def test_isolated_references_are_shared_by_both_sides_of_guidance(tiny_copy: Path) -> None:
    """A base model with isolated references: one prefill, and v_neg + s (v - v_neg) by hand."""
    (tiny_copy / "limner.json").write_text('{"is_distilled": false}')
    pipe = Pipeline.from_pretrained(tiny_copy)
    assert pipe.kind == ModelKind(references="isolated", distilled=False)
    refs = pipe.prefill(REFERENCES[:2])
    noise = torch.randn(1, 16, 4, 4, generator=generators(0)[0])
    txt, negative = embeds(1, 9, 1), embeds(1, 9, 2)
    out = pipe(
        prompt_embeds=txt,
        negative_prompt_embeds=negative,
        references=refs,
        latents=noise,
        guidance_scale=3.0,
        sigmas=[1.0],
        num_inference_steps=1,
        output_type="latent",
    )
    tokens = noise.flatten(2).transpose(1, 2)
    ids = {"img_ids": image_ids((4, 4)), "txt_ids": text_ids(9)}
    with torch.no_grad():
        v, v_neg = (pipe.transformer(tokens, x, 1.0, references=refs, **ids) for x in (txt, negative))
    clean = (tokens - (v_neg + 3.0 * (v - v_neg))).transpose(1, 2).reshape(1, 16, 4, 4)
    torch.testing.assert_close(out.images, pipe.autoencoder.denormalise(clean), atol=2e-5, rtol=0)


def test_oracle_in_float64(standard_folder: Path) -> None:
    """One dense softmax over [txt, img, ref], all at the step's noise level, written here from the definition."""
    pipe = Pipeline.from_pretrained(standard_folder, torch_dtype=torch.float64)
    net = pipe.transformer
    ref = torch.randn(1, 10, 16, generator=generators(1)[0], dtype=torch.float64)
    img = torch.randn(2, 6, 16, generator=generators(2)[0], dtype=torch.float64)
    txt = torch.randn(2, 5, 48, generator=generators(3)[0], dtype=torch.float64)
    ref_ids, img_ids, txt_ids = reference_ids([(2, 3), (2, 2)]), image_ids((2, 3)), text_ids(5)
    sigma = 0.7
    with torch.no_grad():
        ours = net(img, txt, sigma, img_ids=img_ids, txt_ids=txt_ids, ref_tokens=ref, ref_ids=ref_ids)
        expected = _dense(net, img, txt, ref.expand(2, -1, -1), sigma, torch.cat([txt_ids, img_ids, ref_ids]))
        moved = net(img, txt, sigma, img_ids=img_ids, txt_ids=txt_ids, ref_tokens=ref + 0.1, ref_ids=ref_ids)
    assert relative_error(ours, expected) < 1e-6  # the time embedding is float32 in both
    assert relative_error(moved, ours) > 1e-3


def _dense(
    net: Any, img: torch.Tensor, txt: torch.Tensor, ref: torch.Tensor, sigma: float, ids: torch.Tensor
) -> torch.Tensor:
    c = net.config
    num_txt, num_img = txt.shape[1], img.shape[1]

    def rms(x: torch.Tensor, norm: Any) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    def ln(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + c.eps).sqrt() * (1 + scale) + shift

    def rotate(x: torch.Tensor) -> torch.Tensor:
        angles = torch.cat(
            [
                ids[:, a, None].double() * c.rope_theta ** -(torch.arange(0, size, 2).double() / size)
                for a, size in enumerate(c.rope_axes)
            ],
            -1,
        )[:, None]
        cos, sin = angles.cos().float().double(), angles.sin().float().double()
        even, odd = x[..., 0::2].float().double(), x[..., 1::2].float().double()
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, c.head_dim))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = rotate(q), rotate(k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(c.head_dim)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    def mlp(x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * value

    embedding = net.time_guidance_embed(torch.tensor([sigma]))
    act = torch.nn.functional.silu(embedding)
    mod_img = net.double_stream_modulation_img.linear(act)[:, None].chunk(6, -1)
    mod_txt = net.double_stream_modulation_txt.linear(act)[:, None].chunk(6, -1)
    mod = net.single_stream_modulation.linear(act)[:, None].chunk(3, -1)
    x, t = net.x_embedder(torch.cat([img, ref], 1)), net.context_embedder(txt)
    for block in net.transformer_blocks:
        a, nx, nt = block.attn, ln(x, *mod_img[:2]), ln(t, *mod_txt[:2])
        q = torch.cat([rms(heads(a.add_q_proj(nt)), a.norm_added_q), rms(heads(a.to_q(nx)), a.norm_q)], 1)
        k = torch.cat([rms(heads(a.add_k_proj(nt)), a.norm_added_k), rms(heads(a.to_k(nx)), a.norm_k)], 1)
        v = torch.cat([heads(a.add_v_proj(nt)), heads(a.to_v(nx))], 1)
        out = attention(q, k, v)
        x, t = x + mod_img[2] * a.to_out[0](out[:, num_txt:]), t + mod_txt[2] * a.to_add_out(out[:, :num_txt])
        x = x + mod_img[5] * block.ff.linear_out(mlp(block.ff.linear_in(ln(x, *mod_img[3:5]))))
        t = t + mod_txt[5] * block.ff_context.linear_out(mlp(block.ff_context.linear_in(ln(t, *mod_txt[3:5]))))
    x = torch.cat([t, x], 1)
    for block in net.single_transformer_blocks:
        a, width = block.attn, c.width
        q, k, v, rest = a.to_qkv_mlp_proj(ln(x, *mod[:2])).split([width] * 3 + [2 * c.mlp_width], -1)
        out = attention(rms(heads(q), a.norm_q), rms(heads(k), a.norm_k), heads(v))
        x = x + mod[2] * a.to_out(torch.cat([out, mlp(rest)], -1))
    scale, shift = net.norm_out.linear(act)[:, None].chunk(2, -1)
    velocity: torch.Tensor = net.proj_out(ln(x[:, num_txt : num_txt + num_img], shift, scale))
    return velocity


# what is kept of joint references


def test_tokens_are_kept(standard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second edit encodes no picture; packs, tiers and handles hold the tokens; the pictures are equal bit for bit."""
    monkeypatch.setattr(ReadCost, "slower_than_prefill", lambda *_: False)  # encoding tiny pictures takes no time
    monkeypatch.setattr(ReadCost, "check", lambda *_: None)
    pipe = Pipeline.from_pretrained(standard_folder, store=ReferenceStore(disk_path=tmp_path / "store"))

    def run(pipe: Pipeline, **how: Any) -> Any:
        return pipe("a dog", generator=generators(1)[0], height=64, width=64, output_type="np", **how)

    first = run(pipe, image=REFERENCES[:2])
    second = run(pipe, image=REFERENCES[:2])
    assert (first.reference_cache, second.reference_cache) == ("miss", "memory")
    assert second.seconds_saved > 0
    refs = pipe.prefill(REFERENCES[:2])
    assert refs.tokens is not None
    assert refs.nbytes == refs.num_tokens * 16 * 4
    refs.save(tmp_path / "pack.safetensors")
    again = References.load(tmp_path / "pack.safetensors")
    given = run(pipe, references=again)
    pipe.store.flush()
    fresh = Pipeline.from_pretrained(standard_folder, store=ReferenceStore(disk_path=tmp_path / "store"))
    third = run(fresh, image=REFERENCES[:2])
    assert third.reference_cache == "disk"
    for other in (second, third, given):
        assert np.array_equal(other.images, first.images)


def test_tokens_and_kv_are_never_mistaken(standard_folder: Path, tiny_folder: Path) -> None:
    joint, isolated = Pipeline.from_pretrained(standard_folder), Pipeline.from_pretrained(tiny_folder)
    tokens, kv = joint.prefill(REFERENCES[0]), isolated.prefill(REFERENCES[0])
    assert tokens.key != kv.key
    with pytest.raises(InvalidRequest, match="tokens|weights"):
        isolated("a dog", references=tokens, height=64, width=64)
    with pytest.raises(InvalidRequest, match="K/V|weights"):
        joint("a dog", references=kv, height=64, width=64)


def test_damaged_tokens_change_the_picture(standard_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(standard_folder)
    refs = pipe.prefill(REFERENCES[0])
    before = pipe("a dog", references=refs, generator=generators(1)[0], output_type="np").images
    assert refs.tokens is not None
    refs.tokens[0, 5] += 4
    after = pipe("a dog", references=refs, generator=generators(1)[0], output_type="np").images
    assert np.abs(after - before).max() > 1e-4


# approximate reuse


def test_reuse_of_step0(standard_folder: Path) -> None:
    """The first step is exact; the others differ, and say so."""
    pipe = Pipeline.from_pretrained(standard_folder)

    def run(**how: Any) -> tuple[Any, list[torch.Tensor]]:
        seen = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"])
            return {}

        out = pipe(
            ["a dog", "a fox"],
            image=REFERENCES[:2],
            height=64,
            width=64,
            generator=generators(1, 2),
            callback_on_step_end=keep,
            output_type="np",
            **how,
        )
        return out, seen

    exact, exact_steps = run()
    reused, steps = run(reuse="step0")
    assert torch.equal(steps[0], exact_steps[0])
    assert 1e-4 < np.abs(reused.images - exact.images).mean() < 0.2
    assert reused.metadata["reuse"] == "step0"
    assert "reuse" not in exact.metadata

    def drop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"rows": [1]} if step == 1 else {}

    left = pipe(
        ["a dog", "a fox"],
        image=REFERENCES[:2],
        height=64,
        width=64,
        generator=generators(1, 2),
        reuse="step0",
        callback_on_step_end=drop,
        output_type="np",
    )
    assert np.abs(left.images[0] - reused.images[1]).mean() <= TOLERANCE


def test_reuse_is_for_joint_references(pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="reuse: is for models with joint references"):
        pipe("a dog", image=REFERENCES[0], reuse="step0")
    with pytest.raises(InvalidRequest, match="reuse: 'all' is not one of"):
        pipe("a dog", image=REFERENCES[0], reuse="all")


@pytest.mark.parametrize("how", [{"torch_dtype": torch.bfloat16}, {"quantize": "int8"}], ids=str)
def test_other_arithmetic(how: dict[str, Any], standard_folder: Path) -> None:
    """int8 and bfloat16 with the kernels of this machine stay near float32."""
    exact, other = Pipeline.from_pretrained(standard_folder), Pipeline.from_pretrained(standard_folder, **how)
    arguments = {"prompt": "a dog", "image": REFERENCES[:2], "height": 64, "width": 64, "output_type": "latent"}
    a, b = (pipe(**arguments, generator=generators(1)[0]).images.float() for pipe in (exact, other))
    assert 0 < relative_error(b, a) < 0.15


def test_loras_leave_kept_tokens_as_they_are(standard_folder: Path) -> None:
    """Tokens do not depend on the transformer: a LoRA changes the picture, and no reference is encoded again."""
    pipe = Pipeline.from_pretrained(standard_folder)
    arguments = {"prompt": "a dog", "image": REFERENCES[:1], "height": 64, "width": 64, "output_type": "np"}
    before = pipe(**arguments, generator=generators(1)[0])
    pipe.load_lora_weights(lora(pipe.transformer))
    after = pipe(**arguments, generator=generators(1)[0])
    assert after.reference_cache == "memory"
    assert after.reference_key == before.reference_key
    assert np.abs(after.images - before.images).mean() > 100 * TOLERANCE
    fresh = Pipeline.from_pretrained(standard_folder)
    fresh.load_lora_weights(lora(fresh.transformer))
    assert np.array_equal(fresh(**arguments, generator=generators(1)[0]).images, after.images)
    assert pipe.digest != Pipeline.from_pretrained(standard_folder).digest
    with torch.no_grad():
        next(pipe.autoencoder.parameters()).mul_(1.01)
    assert pipe(**arguments, generator=generators(1)[0]).reference_cache == "miss"


def test_requests_of_an_engine(base_folder: Path) -> None:
    """Requests of equal guidance are drawn together, each with its negative prompt; others by themselves."""
    pipe = Pipeline.from_pretrained(base_folder)
    picture = pipe._prefiller.prepare(REFERENCES[:1])
    requests = [
        EditRequest(
            prompt=prompt,
            seeds=(seed,),
            references=picture,
            width=64,
            height=64,
            num_inference_steps=2,
            negative_prompt=negative,
            guidance_scale=scale,
        )
        for prompt, seed, negative, scale in (
            ("a dog", 1, "rain", 3.0),
            ("a fox", 2, None, 3.0),
            ("a cat", 3, None, 1.0),
        )
    ]
    out = pipe.draw(requests[:2], output_type="np")
    for image, request in zip(out.images, requests, strict=False):
        assert np.abs(pipe.draw([request], output_type="np").images[0] - image).mean() <= TOLERANCE
    with pytest.raises(InvalidRequest, match=r"guidance_scale: .* cannot be drawn together"):
        pipe.draw(requests)
    engine = Engine(pipe)
    try:
        for request in requests:
            engine.check(request)
        with pytest.raises(InvalidRequest, match="guidance_scale: -1 is not a number of at least 0"):
            engine.check(replace(requests[0], guidance_scale=-1))
    finally:
        engine.close()


def test_memory_of_a_call(standard_folder: Path) -> None:
    """Joint references are tokens of every image of a batch; what is kept of them is small."""
    joint, isolated = (
        Pipeline.from_pretrained(standard_folder),
        Pipeline.from_pretrained(standard_folder, references="isolated"),
    )
    tokens = {"num_ref": 4096, "num_own": 4608, "batch": 4}
    assert joint.kv_bytes(1000) * 10 < isolated.kv_bytes(1000)
    assert joint.memory_needed(**tokens) > isolated.memory_needed(**tokens) - isolated.kv_bytes(4096)
    assert joint.memory_needed(**tokens | {"num_ref": 0}) < joint.memory_needed(**tokens)


def test_memory_limit_changes_no_bit(standard_folder: Path) -> None:
    arguments = {"prompt": "a dog", "image": REFERENCES[:2], "height": 64, "width": 64, "output_type": "np"}
    limited = Pipeline.from_pretrained(standard_folder, memory_limit="64GiB")
    expected = Pipeline.from_pretrained(standard_folder)(**arguments, generator=generators(1)[0]).images
    assert np.array_equal(limited(**arguments, generator=generators(1)[0]).images, expected)
