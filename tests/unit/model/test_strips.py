"""The autoencoder in strips against the whole network: the same numbers, less memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.tiny import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limner import Pipeline
from limner.model import strips
from limner.model.autoencoder import Autoencoder


def network(**changes: Any) -> Any:
    from diffusers import AutoencoderKLFlux2

    config = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4}
    model = AutoencoderKLFlux2(**(config | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() < 2 else p.normal_(std=p[0].numel() ** -0.5)
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a few rows, whose number divides nothing."""
    monkeypatch.setattr(strips, "_PIXELS", 1)
    monkeypatch.setattr(strips, "_LEAST", 7)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 1, "mid_block_add_attention": False},
        {"decoder_block_out_channels": (12, 12, 20, 20), "use_quant_conv": False, "use_post_quant_conv": False},
    ],
    ids=["two resnets", "one resnet, no attention", "other decoder, no quant convolutions"],
)
@torch.no_grad()
def test_strips_are_the_whole_picture(changes: dict[str, Any]) -> None:
    """float32: sums in another order, over values of one size."""
    model = network(**changes)
    pixels, latents = torch.rand(2, 3, 80, 112) * 2 - 1, torch.randn(2, 4, 10, 14)
    before = pixels.clone(), latents.clone()
    moments = model._encode(pixels)
    assert relative_error(strips.encode(model, pixels), moments) < 2e-6
    assert relative_error(strips.decode(model, latents), model.decode(latents).sample) < 2e-6
    assert torch.equal(pixels, before[0])
    assert torch.equal(latents, before[1])


@pytest.mark.usefixtures("narrow")
@torch.no_grad()
def test_no_seam_where_a_picture_is_bright_on_one_side() -> None:
    """Statistics of a strip alone would shift its colours: here the strips have other means and spreads."""
    model = network()
    ramp = torch.linspace(-1, 1, 96).pow(3)[:, None].expand(96, 64)
    pixels = (ramp + 0.1 * torch.randn(1, 3, 96, 64)).clamp(-1, 1)
    assert relative_error(strips.encode(model, pixels), model._encode(pixels)) < 2e-6
    latents = ramp[::8, ::8].expand(1, 4, 12, 8) * 3 + torch.randn(1, 4, 12, 8)
    difference = (strips.decode(model, latents) - model.decode(latents).sample).abs()
    assert difference.max() < 2e-5
    assert difference.mean(dim=(0, 1, 3)).max() < 4e-6  # no row stands out


@pytest.mark.usefixtures("narrow")
@torch.no_grad()
def test_half_precision_is_nearer_to_the_truth() -> None:
    """A norm and its activation are rounded once instead of twice."""
    model, latents = network(), torch.randn(1, 4, 10, 14)
    exact = model.decode(latents).sample
    half = network().to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    found, plain = strips.decode(half, latents.bfloat16()), half.decode(latents.bfloat16()).sample
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact) < 1.1 * relative_error(plain, exact) < 0.1


class Live(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                if key not in self._users:
                    self._users[key] = 0
                    self._now += size
                self._users[key] += 1
                weakref.finalize(tensor, self._gone, key, size)
        self.peak = max(self.peak, self._now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._now -= size


def live(call: Callable[[], object]) -> int:
    with Live() as mode:
        call()
    return mode.peak


@torch.no_grad()
def test_strips_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In maps of the widest stage at full resolution: what `limner.memory` counts with."""
    monkeypatch.setattr(strips, "_PIXELS", 8 * 256)
    model = network()
    pixels, latents = torch.rand(1, 3, 256, 256), torch.randn(1, 4, 32, 32)
    narrow, wide = 8 * 256 * 256 * 4, 16 * 256 * 256 * 4
    assert live(lambda: strips.encode(model, pixels)) < 2.6 * narrow < 0.8 * live(lambda: model._encode(pixels))
    assert live(lambda: strips.decode(model, latents)) < 2.2 * wide < 0.8 * live(lambda: model.decode(latents))


def test_large_pictures_go_in_strips(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("encode", "decode"):
        original = getattr(strips, name)
        monkeypatch.setattr(strips, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    monkeypatch.setattr("limner.model.autoencoder.WHOLE_PIXELS", 64 * 64)
    autoencoder: Autoencoder = pipe.autoencoder
    with torch.no_grad():
        for side, expected in ((64, []), (96, ["encode", "decode"])):
            autoencoder.whole_pixels = 64 * 64
            pixels = torch.rand(1, 3, side, side) * 2 - 1
            latents = autoencoder.encode(pixels)
            picture = autoencoder.decode(autoencoder.denormalise(latents))
            assert calls == expected
            monkeypatch.setattr("limner.model.autoencoder.WHOLE_PIXELS", 1 << 20)
            autoencoder.whole_pixels = 1 << 20
            assert relative_error(latents, autoencoder.encode(pixels)) < 1e-5
            assert relative_error(picture, autoencoder.decode(autoencoder.denormalise(latents))) < 1e-5
            monkeypatch.setattr("limner.model.autoencoder.WHOLE_PIXELS", 64 * 64)
    calls.clear()
    autoencoder.encode(torch.rand(1, 3, 96, 96))  # gradients are recorded: strips write in place
    assert calls == []
