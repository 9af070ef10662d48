"""The only owner of token order: patches, packing, position ids, and the places of text and image in a sequence.

Shapes: latents (B, C, h, w) on the latent grid; tokens (B, S, C); ids (S, 4) with axes (t, h, w, l). Diffusers
orders them [txt, ref, img] where references are isolated: here these are present only as cached keys and values, and a
denoising sequence is [txt, img]; attention does not depend on the order of keys. Joint references are tokens of the
sequence, [txt, img, ref]. Knows nothing of models or pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "PATCH",
    "REFERENCE_STRIDE",
    "TokenLayout",
    "image_ids",
    "pack",
    "patchify",
    "reference_ids",
    "text_ids",
    "unpack",
    "unpatchify",
]

PATCH = 2
"""Side of the patch of latents that becomes one token."""
REFERENCE_STRIDE = 10
"""Reference i, counted from 0, is at t = 10 + 10 i (diffusers 0.42.1, `_prepare_image_ids`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The places of tokens in a denoising sequence [txt, img, ref]; `num_ref` is 0 unless references are joint."""

    num_txt: int
    num_img: int
    num_ref: int = 0

    @property
    def txt(self) -> slice:
        return slice(0, self.num_txt)

    @property
    def img(self) -> slice:
        return slice(self.num_txt, self.num_txt + self.num_img)

    @property
    def ref(self) -> slice:
        start = self.num_txt + self.num_img
        return slice(start, start + self.num_ref)

    @staticmethod
    def join(txt: Tensor, img: Tensor) -> Tensor:
        """(B, S_txt, ...) and the picture's tokens (B, S_img + S_ref, ...) to the sequence."""
        return torch.cat([txt, img], dim=1)

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence to (B, S_txt, ...) and (B, S_img + S_ref, ...); the inverse of `join`."""
        txt, img = torch.split(sequence, [self.num_txt, self.num_img + self.num_ref], dim=1)
        return txt, img


def patchify(latents: Tensor) -> Tensor:
    """(B, C, h, w) to (B, 4 C, h/2, w/2): channel c, row r and column s of a patch become channel 4 c + 2 r + s."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(b, c * PATCH * PATCH, h // PATCH, w // PATCH)


def unpatchify(latents: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c // PATCH**2, PATCH, PATCH, h, w).permute(0, 1, 4, 2, 5, 3)
    return patches.reshape(b, c // PATCH**2, h * PATCH, w * PATCH)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to tokens (B, h w, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h w, C) to latents (B, C, h, w) for `grid` = (h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def text_ids(num_tokens: int) -> Tensor:
    """(S_txt, 4): (0, 0, 0, l)."""
    ids = torch.zeros(num_tokens, 4, dtype=torch.int64)
    ids[:, 3] = torch.arange(num_tokens)
    return ids


def image_ids(grid: tuple[int, int], *, t: int = 0, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """(h w, 4): (t, h, w, 0), row by row from `origin` = (h, w) on; `grid` = (h, w) counts tokens."""
    h, w = grid
    ids = torch.zeros(h, w, 4, dtype=torch.int64)
    ids[..., 0] = t
    ids[..., 1] = torch.arange(h)[:, None] + origin[0]
    ids[..., 2] = torch.arange(w) + origin[1]
    return ids.reshape(h * w, 4)


def reference_ids(grids: Sequence[tuple[int, int]], origins: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """(S_ref, 4) of the references in order; reference i has t = 10 + 10 i.

    `origins` (h, w) say where each one's first token is in the picture that is drawn; None: at its corner.
    """
    places = zip(grids, origins or [(0, 0)] * len(grids), strict=True)
    return torch.cat(
        [image_ids(grid, t=REFERENCE_STRIDE * (i + 1), origin=origin) for i, (grid, origin) in enumerate(places)]
    )
