"""Where the noise of a call comes from: given latents, generators, or seeds that are drawn. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limner.errors import InvalidRequest
from limner.model.shards import Ranks

__all__ = ["NoiseSource", "draw_seeds", "short_digest"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class NoiseSource:
    """Given `latents`, or a generator for each image, or one for the batch.

    `seeds` has for each image the seed that reproduces it by itself, or None where there is none. `digests` are equal
    where the noise is equal; noise itself may differ between machines. They are made for several processes only.
    """

    latents: Tensor | None
    generators: list[torch.Generator] | torch.Generator
    seeds: tuple[int | None, ...]
    digests: tuple[str, ...]

    @classmethod
    def check(
        cls,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        *,
        latents: Tensor | None,
        batch: int,
        ranks: Ranks,
    ) -> NoiseSource:
        """Check generators for `batch` images; None draws seeds, the same in all processes. Raises `InvalidRequest`."""
        ranks.check_same({"generator": type(generator).__name__, "latents": latents is not None})
        if latents is not None:
            digests = () if ranks.alone else (short_digest(latents),)
            return cls(latents=latents, generators=[], seeds=(None,) * batch, digests=digests)
        if generator is None:
            generator = [torch.Generator().manual_seed(seed) for seed in draw_seeds(batch, ranks=ranks)]
        shared = isinstance(generator, torch.Generator)
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generators):
            raise InvalidRequest("generator", f"{generator!r} is not a torch.Generator or a list of them")
        if not shared and len(generators) != batch:
            raise InvalidRequest(
                "generator",
                f"a list of {len(generators)} for {batch} images (prompts x num_images_per_prompt); give one for each, or "
                "one generator for all",
            )
        seeds = tuple(_seed_of(g) for g in generators)
        return cls(
            latents=None,
            generators=generator if isinstance(generator, torch.Generator) else list(generators),
            seeds=(seeds[0], *(None,) * (batch - 1)) if shared else seeds,
            digests=() if ranks.alone else tuple(short_digest(g.get_state()) for g in generators),
        )

    def draw(self, shape: tuple[int, int, int, int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return noise (B, 4 C, h, w) in float32, drawn in `dtype` as diffusers' `randn_tensor` does, so that seeds agree.

        Raises `InvalidRequest` for a generator of a device that is neither the CPU nor `device`.
        """
        if self.latents is not None:
            noise = self.latents.to(device, dtype)
        elif isinstance(self.generators, torch.Generator):
            noise = _noise(self.generators, shape, device=device, dtype=dtype)
        else:
            noise = torch.cat([_noise(one, (1, *shape[1:]), device=device, dtype=dtype) for one in self.generators])
        return noise.float()


def _noise(generator: torch.Generator, shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw on the CPU for a generator of the CPU, whatever the device."""
    if generator.device.type not in ("cpu", device.type):
        raise InvalidRequest(
            "generator", f"is of {generator.device.type}, the pipeline on {device}; use torch.Generator('cpu')"
        )
    place = device if generator.device.type == device.type else generator.device
    return torch.randn(shape, generator=generator, device=place, dtype=dtype).to(device)


def draw_seeds(num_images: int, *, ranks: Ranks) -> list[int]:
    """Return random seeds in [0, 2**31), the same in all processes of a model."""
    generator = torch.Generator()
    generator.seed()
    seeds: list[int] = torch.randint(0, 2**31, (num_images,), generator=generator).tolist()
    return ranks.broadcast(seeds)


def short_digest(x: Tensor) -> str:
    """Return 16 hexadecimal digits that differ for different tensors, for messages."""
    return hashlib.sha256(x.detach().double().cpu().numpy().tobytes()).hexdigest()[:16]


def _seed_of(generator: torch.Generator) -> int | None:
    """Return the seed that gives what this generator would give now; None if it was used already."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None
