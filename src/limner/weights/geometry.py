"""The geometry of a transformer, read from the shapes in a file's header. Reads no tensors."""

from __future__ import annotations

import re
from pathlib import Path

from limner.config import KLEIN_4B, KLEIN_9B, TransformerConfig
from limner.errors import CheckpointError
from limner.weights.layouts import Layout

__all__ = ["geometry_name", "geometry_of"]


def geometry_of(layout: Layout, *, where: Path) -> TransformerConfig:
    """Return the geometry of a transformer from its shapes; rotary axes, base and epsilon are klein's.

    Raises `CheckpointError` that names the tensor that is missing or does not fit.
    """

    def shape(target: str, num_axes: int = 2) -> tuple[int, ...]:
        source = layout.source(target)
        if source is None:
            raise CheckpointError(
                f"{where}: missing {layout.prefix}{layout.names.rule(target).source}; the file is incomplete"
            )
        found = layout.tensors[source].shape
        if len(found) != num_axes or 0 in found:
            raise CheckpointError(f"{where}: {layout.prefix}{source} is {list(found)}; it needs {num_axes} axes")
        return found

    def count(target: str) -> int:
        rule = layout.names.rule(target.format(n=0))
        names = "|".join(re.escape(name) for name in (rule.source, *rule.also)).replace("\\.0\\.", r"\.(\d+)\.")
        found = [match for name in layout.tensors if (match := re.fullmatch(names, name))]
        return len({next(filter(None, match.groups())) for match in found})

    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    width, in_channels = shape("x_embedder.weight")
    mlp_width = shape("transformer_blocks.0.ff.linear_out.weight")[1]
    if width % head_dim or head_dim % 8:
        source = layout.source("transformer_blocks.0.attn.norm_q.weight")
        raise CheckpointError(
            f"{where}: {layout.prefix}{source} is [{head_dim}], but the hidden states are {width} wide; the file is damaged"
        )
    return TransformerConfig(
        num_double_blocks=count("transformer_blocks.{n}.attn.norm_q.weight"),
        num_single_blocks=max(1, count("single_transformer_blocks.{n}.attn.norm_q.weight")),
        num_heads=width // head_dim,
        head_dim=head_dim,
        text_width=shape("context_embedder.weight")[1],
        in_channels=in_channels,
        out_channels=shape("proj_out.weight")[0],
        mlp_ratio=mlp_width / width,
        rope_axes=(head_dim // 4,) * 4,
        time_channels=shape("time_guidance_embed.timestep_embedder.linear_1.weight")[1],
    )


def geometry_name(config: TransformerConfig, bundled: TransformerConfig | None = None) -> str:
    """Return the name of a known geometry, else "custom"."""
    known = {"klein-4B": KLEIN_4B, "klein-9B": KLEIN_9B, "bundled": bundled}
    return next((name for name, value in known.items() if value == config), "custom")
