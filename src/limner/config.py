"""Geometry of the networks, the words that they know, and the policy for references, as frozen values.

Knows no tensors and no files. Names follow the diffusers configuration where a file holds that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from limner.errors import CheckpointError, InvalidRequest
from limner.grid import MIN_SIDE, PIXELS

__all__ = [
    "BUNDLED_MODEL",
    "FITS",
    "KLEIN_4B",
    "KLEIN_9B",
    "MODELS",
    "QWEN3_4B",
    "QWEN3_8B",
    "WHOLE_PIXELS",
    "AutoencoderConfig",
    "Fit",
    "KnownWords",
    "ModelGeometry",
    "NetworkConfig",
    "ReferencePolicy",
    "TextConfig",
    "TransformerConfig",
]

BUNDLED_MODEL = "limner-stickers"
"""The name of the bundled model, as services and results show it."""


class NetworkConfig(dict[str, Any]):
    """What a file says of a network, under its own names, which are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Geometry of one transformer of the family; the defaults are klein's, and no member changes them.

    `text_width` is the width of the text tokens, `in_channels` that of latent tokens, `rope_axes` the share of the head
    dimension that each position axis (t, h, w, l) rotates.
    """

    num_double_blocks: int
    num_single_blocks: int
    num_heads: int
    head_dim: int
    text_width: int
    in_channels: int = 128
    out_channels: int = 128
    mlp_ratio: float = 3.0
    rope_axes: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    time_channels: int = 256
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if len(self.rope_axes) != 4 or any(axis % 2 for axis in self.rope_axes) or sum(self.rope_axes) != self.head_dim:
            raise ValueError(
                f"axes_dims_rope={list(self.rope_axes)} has to be 4 even numbers (t, h, w, l) that add up to "
                f"attention_head_dim={self.head_dim}"
            )
        for name in (
            "num_double_blocks",
            "num_single_blocks",
            "num_heads",
            "text_width",
            "in_channels",
            "out_channels",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1")

    @property
    def width(self) -> int:
        """Width C of the hidden states."""
        return self.num_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Width of one half of the gated MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def num_layers(self) -> int:
        """Number of attention layers, hence of K/V pairs in a prefill."""
        return self.num_double_blocks + self.num_single_blocks

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], *, where: str = "config.json") -> TransformerConfig:
        """Read the `config.json` of a diffusers `Flux2Transformer2DModel`; `where` names it in messages.

        Raises `CheckpointError` for a configuration that this engine would compute wrongly.
        """
        if config.get("guidance_embeds", True):
            raise CheckpointError(
                f"{where}: guidance_embeds is true (a guidance-distilled model, FLUX.2-dev-like); "
                "only klein-like models without guidance embedding are supported"
            )
        if config.get("patch_size", 1) != 1:
            raise CheckpointError(f"{where}: patch_size={config['patch_size']} is not supported; allowed: 1")
        names = {
            "num_layers": "num_double_blocks",
            "num_single_layers": "num_single_blocks",
            "num_attention_heads": "num_heads",
            "attention_head_dim": "head_dim",
            "joint_attention_dim": "text_width",
        }
        missing = [name for name in names if name not in config]
        if missing:
            raise CheckpointError(f"{where}: missing {', '.join(missing)}; is this the transformer of a klein model?")
        try:
            in_channels = _whole(config.get("in_channels", 128), "in_channels")
            return cls(
                **{ours: _whole(config[theirs], theirs) for theirs, ours in names.items()},
                in_channels=in_channels,
                out_channels=_whole(config.get("out_channels") or in_channels, "out_channels"),
                mlp_ratio=float(config.get("mlp_ratio", 3.0)),
                rope_axes=tuple(
                    _whole(axis, "axes_dims_rope") for axis in config.get("axes_dims_rope", (32, 32, 32, 32))
                ),
                rope_theta=float(config.get("rope_theta", 2000)),
                time_channels=_whole(config.get("timestep_guidance_channels", 256), "timestep_guidance_channels"),
                eps=float(config.get("eps", 1e-6)),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from error

    def to_diffusers(self) -> dict[str, Any]:
        """Return the `config.json` that diffusers reads."""
        return {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": None if self.out_channels == self.in_channels else self.out_channels,
            "num_layers": self.num_double_blocks,
            "num_single_layers": self.num_single_blocks,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.num_heads,
            "joint_attention_dim": self.text_width,
            "timestep_guidance_channels": self.time_channels,
            "mlp_ratio": self.mlp_ratio,
            "axes_dims_rope": list(self.rope_axes),
            "rope_theta": int(self.rope_theta) if self.rope_theta == int(self.rope_theta) else self.rope_theta,
            "eps": self.eps,
            "guidance_embeds": False,
        }


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} has to be a whole number")
    return value


KLEIN_9B = TransformerConfig(num_double_blocks=8, num_single_blocks=24, num_heads=32, head_dim=128, text_width=12288)
KLEIN_4B = TransformerConfig(num_double_blocks=5, num_single_blocks=20, num_heads=24, head_dim=128, text_width=7680)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Geometry of a Qwen3 text encoder of `num_layers` layers, of which the first `num_used` are loaded.

    `has_head`: its files have the matrix of a language model too, which is never read.
    """

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_used: int
    has_head: bool = False

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any], *, where: str = "config.json") -> TextConfig:
        """Read the `config.json` of a Qwen3; `num_used` is klein's three quarters. Raises `CheckpointError`."""
        names = {
            "width": "hidden_size",
            "mlp_width": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "vocab_size": "vocab_size",
        }
        try:
            values = {ours: _whole(config.get(theirs), theirs) for ours, theirs in names.items()}
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}; is this a Qwen3?") from error
        has_head = not config.get("tie_word_embeddings", False)
        return cls(**values, num_used=3 * values["num_layers"] // 4, has_head=has_head)


WHOLE_PIXELS = 1024 * 1024
"""Pictures with more pixels go through the autoencoder in strips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Geometry of diffusers' `AutoencoderKLFlux2`; channels from the full resolution down."""

    encoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    num_resnets: int = 2
    latent_channels: int = 32
    mid_attention: bool = True

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], *, where: str = "config.json") -> AutoencoderConfig:
        """Read the `config.json` of the autoencoder; what it leaves out is FLUX.2's. Raises `CheckpointError`."""
        try:
            channels = tuple(
                _whole(c, "block_out_channels") for c in config.get("block_out_channels", (128, 256, 512, 512))
            )
            own = config.get("decoder_block_out_channels") or channels
            return cls(
                encoder_channels=channels,
                decoder_channels=tuple(_whole(c, "decoder_block_out_channels") for c in own),
                num_resnets=_whole(config.get("layers_per_block", 2), "layers_per_block"),
                latent_channels=_whole(config.get("latent_channels", 32), "latent_channels"),
                mid_attention=bool(config.get("mid_block_add_attention", True)),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelGeometry:
    """The three networks of a model."""

    transformer: TransformerConfig
    text_encoder: TextConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()


_QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "attention_bias": False,
}
QWEN3_4B: dict[str, Any] = _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
"""The `config.json` of klein-4b's text encoder."""
QWEN3_8B: dict[str, Any] = _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
"""The `config.json` of klein-9b's text encoder."""
MODELS = {
    "klein-9b": ModelGeometry(transformer=KLEIN_9B, text_encoder=TextConfig.from_transformers(QWEN3_8B)),
    "klein-4b": ModelGeometry(transformer=KLEIN_4B, text_encoder=TextConfig.from_transformers(QWEN3_4B)),
}
"""The models whose geometry is known without their files."""


Fit = Literal["crop", "pad", "resize"]
FITS: tuple[str, ...] = get_args(Fit)
"""The ways to bring the sides of a reference to multiples of 16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencePolicy:
    """How a reference is prepared before it is encoded. The defaults are those of the model card's system.

    A picture with more than `max_pixels` is scaled down (LANCZOS, aspect kept). Then `fit` brings its sides to multiples
    of 16: "crop" cuts what is over around the middle, "pad" repeats the pixels at the edges, "resize" scales each side to
    the nearest multiple, which changes the aspect a little. Without `max_pixels` the cap is the model's
    (`max_reference_pixels` in its `limner.json`), or else 1024 x 1024. A picture with a side under `min_side` or an aspect
    over `max_aspect` is refused. A transparent picture is refused unless `background`, a colour name or "#rrggbb", says
    what stands behind it.

    Where `sizes` (width, height) are given, a picture becomes one of them: the nearest by aspect, and of several such the
    nearest in pixels to what it would be without them; as `fit` says, and scaled up too. Sizes over the cap do not count;
    without any left, the grid alone does. None: those that the model has learned (`sizes` in its `limner.json`), if any.
    """

    max_pixels: int | None = None
    min_side: int = MIN_SIDE
    max_aspect: float = 8.0
    background: str | None = None
    fit: str = "crop"
    sizes: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise InvalidRequest("fit", f"{self.fit!r} is not one of {', '.join(FITS)}")
        for name, low in (("max_pixels", PIXELS**2), ("min_side", PIXELS), ("max_aspect", 1)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise InvalidRequest(name, f"{value} is not allowed; use {low} or more")
        for size in self.sizes or ():
            if not (isinstance(size, tuple) and len(size) == 2 and all(_is_side(side) for side in size)):
                allowed = f"(width, height), multiples of {PIXELS} of at least {MIN_SIDE}"
                raise InvalidRequest("sizes", f"{size!r} is not {allowed}; give a tuple of such sizes")

    @property
    def over_cap(self) -> tuple[tuple[int, int], ...]:
        """The `sizes` that no picture becomes, as they have more pixels than the cap."""
        return tuple((width, height) for width, height in self.sizes or () if width * height > self.pixels)

    @property
    def pixels(self) -> int:
        """Pixels that a picture may have before it is scaled down."""
        return 1024 * 1024 if self.max_pixels is None else self.max_pixels

    def for_model(self, max_reference_pixels: int | None, sizes: Sequence[tuple[int, int]] = ()) -> ReferencePolicy:
        """Return this policy with the model's cap and sizes, where the policy has none."""
        cap = self.max_pixels if self.max_pixels is not None else max_reference_pixels or self.pixels
        return replace(self, max_pixels=cap, sizes=tuple(sizes) if self.sizes is None else self.sizes)


def _is_side(value: object) -> bool:
    return isinstance(value, int) and value >= MIN_SIDE and value % PIXELS == 0


@dataclass(frozen=True, slots=True)
class KnownWords:
    """The only words that a model was trained on; none: any. `card` is the file that says what it understands."""

    words: frozenset[str] = frozenset()
    card: str = ""
