"""Wide autoencoders on a CPU: channels last, fused norms, doublings as one product. diffusers' numbers up to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.tiny import relative_error
from tests.unit.model.test_strips import live
from torch import Tensor, nn

from limner.model import autoencoder as module
from limner.model import feature_maps, strips
from limner.model.autoencoder import Autoencoder
from limner.model.autoencoder_network import AutoencoderNetwork
from limner.native import kernels as native
from limner.weights.networks import diffusers_autoencoder

CONFIGS: dict[str, dict[str, Any]] = {
    "one width": {"block_out_channels": [64, 64, 96, 96], "latent_channels": 4},
    "no attention, no multiple of 16": {
        "block_out_channels": [72, 72, 96, 80],
        "decoder_block_out_channels": [64, 96, 64, 72],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
    },
}
LAST = torch.channels_last


def networks(name: str) -> tuple[Any, AutoencoderNetwork]:
    """diffusers' network and ours, of the same weights."""
    theirs = diffusers_autoencoder(CONFIGS[name]).eval().requires_grad_(False)
    for p in theirs.parameters():
        p.normal_(std=0.2) if p.dim() < 2 else p.normal_(std=p[0].numel() ** -0.5)
    theirs.bn.running_mean.normal_()
    theirs.bn.running_var.uniform_(0.5, 2.0)
    ours = AutoencoderNetwork(CONFIGS[name]).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(autouse=True)
def all_doublings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one product, however small the map."""
    monkeypatch.setattr(feature_maps, "_LEAST_DOUBLED", 1)


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int] | None:
    """The widths of maps whose norms were native so far; None without the kernels, where torch's are used."""
    seen: list[int] = []
    if not request.param:
        monkeypatch.setattr(native, "runs_maps", lambda x: False)
        return None
    if native.native_library() is None:
        pytest.skip("no AVX-512 BF16 or no C compiler")
    original = native.map_silu
    monkeypatch.setattr(native, "map_silu", lambda x, *a, **k: seen.append(x.shape[1]) or original(x, *a, **k))
    return seen


@pytest.mark.parametrize("large", [False, True], ids=["whole", "strips"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_numbers_are_diffusers(
    name: str, large: bool, norms: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32: sums in another order and sums of weights, over values of about 1."""
    theirs, ours = networks(name)
    seen: list[torch.Size] = []
    original = feature_maps.doubled
    for where in ("strips", "autoencoder_network"):
        target = f"limner.model.{where}.doubled"
        monkeypatch.setattr(target, lambda conv, weight, x: seen.append(x.shape) or original(conv, weight, x))
    pixels, latents = torch.rand(2, 3, 80, 112) * 2 - 1, torch.randn(2, 4, 10, 14)
    expected = theirs.decode(latents).sample, Autoencoder(theirs).encode(pixels)
    wrapped = Autoencoder(ours)
    if large:
        monkeypatch.setattr(strips, "_PIXELS", 1)
        monkeypatch.setattr(strips, "_LEAST", 7)
        monkeypatch.setattr(module, "WHOLE_PIXELS", 1)
        wrapped.whole_pixels = 1
    before = pixels.clone(), latents.clone()
    found = wrapped.decode(latents), wrapped.encode(pixels)
    for one, exact in zip(found, expected, strict=True):
        assert one.is_contiguous()
        assert (one - exact).abs().max() < 2e-5
        assert relative_error(one, exact) < 3e-6
    assert (len(seen) > 3) if large else (len(seen) == 3)
    assert norms is None or set(norms) >= ({64, 96} if name == "one width" else {96, 80, 64})
    assert torch.equal(pixels, before[0])
    assert torch.equal(latents, before[1])


@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth(norms: list[int] | None) -> None:
    """A norm and its activation are rounded once instead of twice, sums of two or four weights once more."""
    theirs, ours = networks("one width")
    pixels, latents = torch.rand(2, 3, 80, 112) * 2 - 1, torch.randn(2, 4, 10, 14)
    exact = theirs.decode(latents).sample, Autoencoder(theirs).encode(pixels)
    theirs, ours = theirs.bfloat16(), Autoencoder(ours.bfloat16())
    plain = theirs.decode(latents.bfloat16()).sample, Autoencoder(theirs).encode(pixels)
    found = ours.decode(latents), ours.encode(pixels)
    for one, other, right in zip(found, plain, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert relative_error(one, right) < 1.1 * relative_error(other, right) < 0.1
    assert norms is None or set(norms) >= {64, 96}


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 7)])
@torch.no_grad()
def test_a_convolution_of_a_doubled_map(size: tuple[int, int]) -> None:
    conv, x = nn.Conv2d(6, 10, 3, padding=1).double(), torch.randn(2, 6, *size).double()
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    found = feature_maps.doubled(conv, feature_maps.doubling_weight(conv), x)
    assert relative_error(found, expected) < 2e-7  # weights are added in float32


@torch.no_grad()
def test_small_maps_are_doubled_before_their_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, laying out the weights costs more than the products that are saved."""
    monkeypatch.setattr(feature_maps, "_LEAST_DOUBLED", 8 * 6)
    module = nn.Conv2d(4, 4, 3)
    feature_maps.fuse(module)
    sizes = ((8, 6), (8, 5))
    maps = [torch.randn(1, 4, *size).contiguous(memory_format=LAST) for size in sizes]
    assert [feature_maps.doubles(module, x) for x in maps] == [True, False]
    assert not feature_maps.doubles(nn.Conv2d(4, 4, 3), maps[0])


@torch.no_grad()
def test_strips_do_not_change_the_moments(norms: list[int] | None) -> None:
    """A mean of a thousand deviations: squares in float32 would lose the deviation."""
    x = (torch.randn(2, 64, 30, 20) * 0.1 + 100).contiguous(memory_format=LAST)
    norm = nn.GroupNorm(4, 64, eps=1e-6)
    nn.init.normal_(norm.weight)
    feature_maps.fuse(norm)
    expected = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6))
    parts = feature_maps.Moments(norm)
    for start in range(0, 30, 8):
        parts.add(x[:, :, start : start + 8])
    whole = parts.normaliser(nn.SiLU())
    assert relative_error(torch.cat([whole(x[:, :, i : i + 15]) for i in (0, 15)], dim=2), expected) < 5e-5
    if norms is not None:
        assert norms == [64, 64]
        assert relative_error(feature_maps.normalised(norm, nn.SiLU(), x), expected) < 5e-5


def test_gradients_and_narrow_networks_have_the_plain_layout() -> None:
    """Their bits are diffusers', whatever the layout of what they are given."""
    theirs, ours = networks("one width")
    pixels, latents = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    wide = Autoencoder(ours)
    shifted = latents.clone().requires_grad_()
    picture = wide.decode(shifted)
    picture.sum().backward()
    assert torch.equal(picture, theirs.decode(latents).sample)
    assert shifted.grad is not None
    config = {"block_out_channels": [32, 64, 64, 64], "latent_channels": 4, "decoder_block_out_channels": [64] * 4}
    narrow = Autoencoder(AutoencoderNetwork(config).eval().requires_grad_(False))
    plain = Autoencoder(diffusers_autoencoder(config).eval().requires_grad_(False))
    plain.network.load_state_dict(narrow.network.state_dict())
    with torch.no_grad():
        assert torch.equal(narrow.encode(pixels.contiguous(memory_format=LAST)), plain.encode(pixels))
        assert not torch.equal(wide.encode(pixels), Autoencoder(theirs).encode(pixels))
    assert (narrow.arithmetic, plain.arithmetic, Autoencoder(theirs).arithmetic) == (None, None, None)


def test_the_layout_is_part_of_keys() -> None:
    wide = Autoencoder(networks("one width")[1])
    names = {wide.arithmetic, copy.deepcopy(wide).half().arithmetic, wide.to("meta").arithmetic}
    has_kernels = native.native_library() is not None
    assert names == {None, "channels last"} | ({f"channels last {native.source_digest()}"} if has_kernels else set())


@torch.no_grad()
def test_memory_of_whole_pictures_and_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """In maps of the widest stage at full resolution; `limner.memory` counts with 5, 6, and 2 for strips."""
    monkeypatch.setattr(strips, "_PIXELS", 8 * 128)
    config = {"block_out_channels": [64, 128, 128, 128], "latent_channels": 4, "mid_block_add_attention": False}
    wide = Autoencoder(AutoencoderNetwork(config).eval().requires_grad_(False))
    pixels, latents = torch.rand(1, 3, 128, 128), torch.randn(1, 4, 16, 16)

    def maps(call: Any, given: Tensor, width: int) -> float:
        return live(lambda: call(given)) / (width * 128 * 128 * 4)

    assert maps(wide.encode, pixels, 64) < 4.5
    assert maps(wide.decode, latents, 128) < 4
    monkeypatch.setattr(module, "WHOLE_PIXELS", 1)
    wide.whole_pixels = 1
    assert maps(wide.encode, pixels, 64) < 2.8
    assert maps(wide.decode, latents, 128) < 2.5
