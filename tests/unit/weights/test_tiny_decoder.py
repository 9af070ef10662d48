"""A small decoder for previews: as diffusers' tiny autoencoder, and, with its residuals around a norm, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.support import checkpoints as made
from tests.support.tiny import generators
from torch import Tensor

from limner import CheckpointError, Pipeline
from limner.tokens import unpatchify
from limner.weights.inspect import inspect
from limner.weights.tiny_decoder import load_tiny_decoder

CPU = torch.device("cpu")


def diffusers_decoder(channels: int) -> torch.nn.Module:
    """diffusers' decoder of the same layers, but for the pooled residuals, which it lacks."""
    from diffusers.models.autoencoders.vae import DecoderTiny

    torch.manual_seed(7)
    return DecoderTiny(
        in_channels=channels,
        out_channels=3,
        num_blocks=(3, 3, 3, 1),
        block_out_channels=(8, 8, 8, 8),
        upsampling_scaling_factor=2,
        act_fn="relu",
        upsample_fn="nearest",
    ).eval()


def tensors(decoder: torch.nn.Module) -> dict[str, Tensor]:
    return {f"decoder.{name}": value.clone() for name, value in decoder.state_dict().items()}


def in_sequence(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The makers' own numbering, in which what squeezes latents is number 0."""
    found = {}
    for name, value in state.items():
        _, _, index, rest = name.split(".", 3)
        found[f"{prefix}{int(index) + 1}.{rest}"] = value
    return found


@pytest.mark.parametrize("naming", ["diffusers", "", "decoder."])
def test_a_decoder_without_norms_is_diffusers(naming: str, tmp_path: Path) -> None:
    theirs, latents = diffusers_decoder(4), torch.randn(2, 16, 3, 5, generator=generators(1)[0]) * 2
    state = tensors(theirs) if naming == "diffusers" else in_sequence(tensors(theirs), naming)
    state["encoder.0.weight"] = torch.zeros(8, 3, 3, 3)  # left out
    ours = load_tiny_decoder(made.save(state, tmp_path / "taef2.safetensors"), device=CPU)
    assert ours.channels == 16
    with torch.no_grad():
        expected = theirs(unpatchify(latents)) / 2 + 0.5  # theirs is in [-1, 1]
    found = ours(latents)
    assert found.shape == (2, 3, 48, 80)
    assert (found - expected.clamp(0, 1)).abs().max() < 1e-6


def pooled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """TAEF2's residuals before the first three blocks."""
    torch.manual_seed(8)
    for block in (2, 3, 4):
        name = f"decoder.layers.{block}.pool"
        state[f"{name}.0.weight"] = torch.randn(32, 8, 1, 1) * 0.3
        state[f"{name}.1.weight"], state[f"{name}.1.bias"] = torch.randn(32), torch.randn(32)
        state[f"{name}.3.weight"] = torch.randn(8, 32, 1, 1) * 0.3
    return state


def by_hand(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    def of(index: int, x: Tensor, rest: str = "") -> Tensor:
        name = f"decoder.layers.{index}.{rest}"
        return F.conv2d(x, state[f"{name}weight"], state.get(f"{name}bias"), padding=1)

    x = F.relu(of(0, torch.tanh(unpatchify(latents) / 3) * 3))
    for index in range(2, 18):
        if index in (5, 10, 15):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif index in (6, 11, 16):
            x = of(index, x)
        else:
            if index < 5:
                p = f"decoder.layers.{index}.pool"
                y = torch.einsum("oi,bihw->bohw", state[f"{p}.0.weight"][:, :, 0, 0], x)
                groups = y.reshape(len(y), 4, -1)
                mean, var = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
                y = ((groups - mean) / (var + 1e-5).sqrt()).reshape(y.shape)
                y = F.relu(y * state[f"{p}.1.weight"][:, None, None] + state[f"{p}.1.bias"][:, None, None])
                x = x + torch.einsum("oi,bihw->bohw", state[f"{p}.3.weight"][:, :, 0, 0], y)
            y = F.relu(of(index, F.relu(of(index, x, "conv.0.")), "conv.2."))
            x = F.relu(of(index, y, "conv.4.") + x)
    return of(18, x).clamp(0, 1)


def test_taef2_s_layers_by_hand(tmp_path: Path) -> None:
    state, latents = pooled(tensors(diffusers_decoder(4))), torch.randn(2, 16, 3, 2, generator=generators(2)[0])
    ours = load_tiny_decoder(made.save(state, tmp_path / "taef2.safetensors"), device=CPU)
    expected = by_hand(state, latents)
    assert expected.std() > 0.01
    assert (ours(latents) - expected).abs().max() < 1e-5  # sums in another order


def test_previews_of_a_call(tiny_folder: Path, tmp_path: Path) -> None:
    file = made.save(pooled(tensors(diffusers_decoder(4))), tmp_path / "taef2.safetensors")
    pipe, seen = Pipeline.from_pretrained(tiny_folder, preview_decoder=file), []
    pipe(
        "a dog",
        height=64,
        width=96,
        num_inference_steps=2,
        generator=generators(1)[0],
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append((tensors["denoised"], tensors["preview"])),
        callback_on_step_end_tensor_inputs=["denoised", "preview"],
    )
    assert [preview.shape for _, preview in seen] == [(1, 3, 64, 96)] * 2
    assert not torch.equal(seen[0][1], seen[1][1])
    other = made.save(tensors(diffusers_decoder(8)), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="preview_decoder.* read 32 channels, latents have 16"):
        Pipeline.from_pretrained(tiny_folder, preview_decoder=other)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("decoder.layers.3.conv.2.bias"), "Missing key.*layers.3.conv.2.bias"),
    "a layer less": (
        lambda t: [t.pop(n) for n in list(t) if ".layers.7." in n],
        "doubles sides 4 times, latents need 3",
    ),
    "no colours": (
        lambda t: t.update({"decoder.layers.18.weight": torch.zeros(4, 8, 3, 3)}),
        "does not end in three colours",
    ),
    "shape": (lambda t: t.update({"decoder.layers.3.conv.2.weight": torch.zeros(8, 9, 3, 3)}), "size mismatch"),
    "something else": (lambda t: t.update({"head": torch.zeros(1)}), "holds head; a small decoder"),
    "nan": (lambda t: t["decoder.layers.0.bias"].fill_(float("nan")), "holds values that are not finite"),
    "empty": (lambda t: t.clear() or t.update({"encoder.x": torch.zeros(1)}), "has no layers that are known"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_damage(name: str, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    state = tensors(diffusers_decoder(4))
    change(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tiny_decoder(made.save(state, tmp_path / "bad.safetensors"), device=CPU)
    assert "\n" not in str(caught.value)


def test_given_for_something_else(tmp_path: Path) -> None:
    file = made.save(tensors(diffusers_decoder(4)), tmp_path / "taef2.safetensors")
    with pytest.raises(CheckpointError, match="is a small decoder for previews, as TAEF2; give it as preview_decoder"):
        inspect(file)
    with pytest.raises(CheckpointError, match="is not a file; give the .safetensors file of a small decoder"):
        load_tiny_decoder(tmp_path / "nowhere", device=CPU)
