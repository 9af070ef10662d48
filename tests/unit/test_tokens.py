"""Token order and positions, against the facts of the family."""

from __future__ import annotations

import torch
from diffusers import Flux2KleinKVPipeline

from limner.tokens import TokenLayout, image_ids, pack, patchify, reference_ids, text_ids, unpack, unpatchify


def test_positions() -> None:
    assert text_ids(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert image_ids((2, 2)).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert reference_ids([(1, 2), (2, 1)]).tolist() == [[10, 0, 0, 0], [10, 0, 1, 0], [20, 0, 0, 0], [20, 1, 0, 0]]
    assert reference_ids([(1, 2)], [(3, 4)]).tolist() == [[10, 3, 4, 0], [10, 3, 5, 0]]


def test_positions_are_those_of_diffusers() -> None:
    latents = [torch.zeros(1, 4, 3, 5), torch.zeros(1, 4, 2, 7)]
    assert torch.equal(reference_ids([(3, 5), (2, 7)]), Flux2KleinKVPipeline._prepare_image_ids(latents)[0])
    assert torch.equal(image_ids((3, 5)), Flux2KleinKVPipeline._prepare_latent_ids(latents[0])[0])
    assert torch.equal(text_ids(6), Flux2KleinKVPipeline._prepare_text_ids(torch.zeros(1, 6, 2))[0])


def test_patches_and_packing() -> None:
    latents = torch.randn(2, 3, 6, 10)
    assert torch.equal(patchify(latents), Flux2KleinKVPipeline._patchify_latents(latents))
    assert torch.equal(unpatchify(patchify(latents)), latents)
    patches = patchify(latents)
    assert torch.equal(pack(patches), Flux2KleinKVPipeline._pack_latents(patches))
    assert torch.equal(unpack(pack(patches), grid=(3, 5)), patches)


def test_layout() -> None:
    layout = TokenLayout(num_txt=2, num_img=3)
    joined = layout.join(torch.zeros(1, 2, 4), torch.ones(1, 3, 4))
    assert joined[:, layout.txt].sum() == 0
    assert joined[:, layout.img].sum() == 12
