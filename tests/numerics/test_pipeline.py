"""Whole pipelines: the same folder loaded by diffusers and by Limner, the same seeds, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import MAX_TOKENS, TEXT_LAYERS, generators, picture, relative_error

from limner import Cancelled, InvalidRequest, Pipeline, ReferenceStore

# pictures in [0, 1]; float32 rounding through 4 steps and the decoder: seen about 1e-7
TOLERANCE = 2e-5
REFERENCES = [picture(96, 64), picture(70, 101, seed=1), picture(160, 81, seed=2)]

CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "text to image": lambda: {"prompt": "a cat on a beach", "height": 96, "width": 96, "generator": generators(3)[0]},
    "one reference": lambda: {"prompt": "make it bigger", "image": REFERENCES[0], "generator": generators(1)[0]},
    "three references of different sizes": lambda: {
        "prompt": "put all together",
        "image": REFERENCES,
        "height": 80,
        "width": 112,
        "generator": generators(2)[0],
    },
    "prompt list": lambda: {
        "prompt": ["a dog", "a dog and a very long description of the place where it stands"],
        "image": REFERENCES[:2],
        "generator": generators(5, 6),
    },
    "several images a prompt, a generator each": lambda: {
        "prompt": ["a dog", "a fox"],
        "image": REFERENCES[1],
        "num_images_per_prompt": 2,
        "generator": generators(1, 2, 3, 4),
    },
    "one generator for a batch": lambda: {
        "prompt": ["a dog", "a fox"],
        "height": 64,
        "width": 64,
        "generator": generators(9)[0],
    },
    "custom sigmas": lambda: {
        "prompt": "a dog",
        "image": REFERENCES[0],
        "sigmas": [1.0, 0.6, 0.2],
        "generator": generators(7)[0],
    },
    "other steps": lambda: {
        "prompt": "a dog",
        "height": 64,
        "width": 128,
        "num_inference_steps": 7,
        "generator": generators(8)[0],
    },
    "given latents": lambda: {
        "prompt": "a dog",
        "height": 64,
        "width": 96,
        "latents": torch.randn(1, 16, 4, 6, generator=generators(0)[0]),
    },
    "given prompt tokens": lambda: {
        "prompt_embeds": torch.randn(2, 9, 48, generator=generators(0)[0]),
        "height": 64,
        "width": 64,
        "generator": generators(8)[0],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_same_pictures_as_diffusers(case: str, pipe: Pipeline, oracle: Any) -> None:
    expected = oracle(
        **CASES[case](), max_sequence_length=MAX_TOKENS, text_encoder_out_layers=TEXT_LAYERS, output_type="np"
    ).images
    out = pipe(**CASES[case](), max_sequence_length=MAX_TOKENS, output_type="np")
    assert out.images.shape == expected.shape
    assert np.std(expected) > 0.02  # not a flat picture, where everything agrees
    assert np.abs(out.images - expected).mean() <= TOLERANCE


def test_text_layers_up_to_the_last(oracle: Any, tiny_folder: Any) -> None:
    """The very last hidden state is the one after the norm, in diffusers as here."""
    layers = (1, 2, 4)
    pipe = Pipeline.from_pretrained(tiny_folder, text_encoder_out_layers=layers)
    tokenized = pipe.text_encoder.tokenize("a dog on a hill", max_sequence_length=MAX_TOKENS)
    expected = oracle.encode_prompt("a dog on a hill", max_sequence_length=MAX_TOKENS, text_encoder_out_layers=layers)[
        0
    ]
    assert relative_error(pipe.text_encoder([tokenized]), expected) <= 1e-5


def test_output_types_agree(pipe: Pipeline, oracle: Any) -> None:
    arguments = {"prompt": "a dog", "height": 64, "width": 64}
    array = pipe(**arguments, generator=generators(1)[0], output_type="np").images
    tensor = pipe(**arguments, generator=generators(1)[0], output_type="pt").images
    pil = pipe(**arguments, generator=generators(1)[0]).images[0]
    assert tensor.shape == (1, 3, 64, 64)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype(np.uint8))
    arguments["max_sequence_length"] = MAX_TOKENS
    latents = pipe(**arguments, generator=generators(1)[0], output_type="latent").images
    settings = {"text_encoder_out_layers": TEXT_LAYERS, "output_type": "latent"}
    theirs = oracle(**arguments, generator=generators(1)[0], **settings).images
    torch.testing.assert_close(latents, theirs, atol=2e-5, rtol=0)


def test_diffusers_noise_in_bfloat16(tiny_folder: Any) -> None:
    """Seeds agree in bfloat16 too: the noise is drawn in that dtype."""
    pipe = Pipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    first = []

    def keep(pipe: Pipeline, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first.append(tensors["latents"])
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        pipe("a dog", height=64, width=64, generator=generators(4)[0], callback_on_step_end=keep)
    noise = torch.randn(1, 16, 4, 4, generator=generators(4)[0], dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    moved = (first[0].transpose(1, 2).reshape(1, 16, 4, 4) - noise.float()).abs().mean()
    other = torch.randn(1, 16, 4, 4, generator=generators(5)[0], dtype=torch.bfloat16)
    assert moved < 0.5 * (noise.float() - other.float()).abs().mean()


def test_references_depend_on_pictures_and_weights_alone(pipe: Pipeline, tiny_folder: Any) -> None:
    """Prompt, seed, size and batch leave them bit-identical; so does computing them again in another pipeline."""
    refs = pipe.prefill(REFERENCES)
    saved = [(k.clone(), v.clone()) for k, v in refs.layers]
    pipe("a dog", references=refs, generator=generators(1)[0], height=64, width=64)
    pipe(
        ["a fox", "a tree on a hill"],
        references=refs,
        num_images_per_prompt=2,
        height=96,
        width=64,
        num_inference_steps=2,
    )
    for settings in ({"prompt": "one", "height": 64, "width": 64}, {"prompt": ["a", "b"], "num_inference_steps": 2}):
        fresh = Pipeline.from_pretrained(tiny_folder)
        assert fresh(image=REFERENCES, **settings).reference_cache == "miss"
        again = fresh.prefill(REFERENCES)
        assert again.key == refs.key
        for (k, v), (k_saved, v_saved), (k_now, v_now) in zip(again.layers, saved, refs.layers, strict=True):
            assert torch.equal(k, k_saved)
            assert torch.equal(v, v_saved)
            assert torch.equal(k_now, k_saved)
            assert torch.equal(v_now, v_saved)


def test_kept_references_give_the_same_picture(pipe: Pipeline) -> None:
    def run(**how: Any) -> Any:
        return pipe("a dog", generator=generators(1)[0], height=64, width=64, output_type="np", **how)

    refs = pipe.prefill(REFERENCES)
    given, kept = run(references=refs), run(image=REFERENCES)
    assert (given.reference_cache, kept.reference_cache) == ("given", "memory")
    pipe.store = ReferenceStore(memory_bytes=0)
    computed = run(image=REFERENCES)
    assert computed.reference_cache == "miss"
    assert np.array_equal(given.images, computed.images)
    assert np.array_equal(kept.images, computed.images)


def test_one_corrupted_key_changes_the_picture(pipe: Pipeline) -> None:
    refs = pipe.prefill(REFERENCES[0])
    before = pipe("a dog", references=refs, generator=generators(1)[0], output_type="np").images
    refs.layers[1].k[0, 5, 0] += 4
    after = pipe("a dog", references=refs, generator=generators(1)[0], output_type="np").images
    assert np.abs(after - before).max() > 1e-4


@pytest.mark.parametrize(
    "change",
    [lambda images: images[::-1], lambda images: images[:2], lambda images: [images[0].transpose(0), *images[1:]]],
    ids=["order", "number", "pixels"],
)
def test_other_references_are_never_a_hit(change: Callable[[list[Any]], list[Any]], pipe: Pipeline) -> None:
    pipe.prefill(REFERENCES)
    assert pipe("a dog", image=change(REFERENCES), height=64, width=64).reference_cache == "miss"
    assert pipe("a dog", image=REFERENCES, height=64, width=64).reference_cache == "memory"


@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_changed_weights_are_never_a_hit(part: str, pipe: Pipeline) -> None:
    refs = pipe.prefill(REFERENCES[0])
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).mul_(1.01)
    assert pipe("a dog", image=REFERENCES[0], height=64, width=64).reference_cache == "miss"
    with pytest.raises(InvalidRequest, match=refs.weights[:16]):
        pipe("a dog", references=refs, height=64, width=64)


def test_a_picture_does_not_depend_on_its_batch(pipe: Pipeline) -> None:
    """The drawn seed of an image in a batch makes it alone."""
    out = pipe(["a dog", "a fox"], image=REFERENCES[0], num_images_per_prompt=2, output_type="np")
    for i, prompt in enumerate(["a dog", "a dog", "a fox", "a fox"]):
        seed = out.seeds[i]
        assert seed is not None
        alone = pipe(prompt, image=REFERENCES[0], generator=generators(seed)[0], output_type="np")
        assert np.abs(alone.images[0] - out.images[i]).mean() <= TOLERANCE


def test_the_batch_shares_references(pipe: Pipeline) -> None:
    """Four images need no more K/V than one."""
    out = pipe("a dog", image=REFERENCES, num_images_per_prompt=4, height=64, width=64)
    assert len(out.images) == 4
    refs = pipe.prefill(REFERENCES)
    assert all(k.shape[0] == v.shape[0] == 1 for k, v in refs.layers)
    config = pipe.transformer.config
    assert refs.num_tokens == sum((w // 16) * (h // 16) for w, h in refs.sizes)
    assert refs.nbytes == refs.num_tokens * config.num_layers * 2 * config.width * 4
    assert refs.nbytes == sum(x.untyped_storage().nbytes() for layer in refs.layers for x in layer)  # no hidden views
