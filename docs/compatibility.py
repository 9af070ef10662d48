"""Writes the tables of docs/compatibility.md that the code's own tables give; a test tells when they are out of date.

.venv/bin/python docs/compatibility.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is outside is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from limner.weights.convert import LAYOUTS
from limner.weights.gguf import QUANTIZED
from limner.weights.layouts import FOREIGN, QUANTIZED_BY
from limner.weights.packing import FORMATS

FILE = Path(__file__).with_suffix(".md")
_W = "tests/unit/weights/"
_ROWS: tuple[tuple[str, str, str, str], ...] = (
    (
        "a model's folder in the diffusers layout, sharded or not, with variants",
        "yes; of shards and a single file in one folder diffusers' parts take the shards, the text encoder the single "
        "file; the log says which",
        "diffusers",
        "test_sources.py::test_shards_and_a_single_file_that_differ test_sources.py::test_variants",
    ),
    (
        "a model on the hub: `revision`, `token`, `cache_dir`, `local_files_only`",
        "yes",
        "",
        "test_sources.py::test_the_hub_s_arguments",
    ),
    (
        "transformer in the original names, bare or under `model.diffusion_model.` (ComfyUI), norms in `.scale` or "
        "`.weight`",
        "yes; memory-mapped, q, k and v are views of the fused matrix",
        "original",
        "test_layouts.py::test_original_file_is_what_diffusers_makes_of_it test_layouts.py::test_norms_may_end_in_weight",
    ),
    (
        "transformer in GGUF (architecture `flux`)",
        "yes; blocks are widened: GGUF_BLOCKS",
        "",
        "test_gguf.py::test_a_transformer_is_what_diffusers_makes_of_it",
    ),
    (
        "autoencoder: diffusers' names, or `ae.safetensors`",
        "yes",
        "diffusers, original",
        "test_layouts.py::test_autoencoder_is_what_diffusers_makes_of_it",
    ),
    (
        "autoencoder whose decoder is narrower (`full_encoder_small_decoder.safetensors`)",
        "yes, alone too: the widths are those of the file",
        "diffusers, original",
        "test_layouts.py::test_a_decoder_of_other_widths",
    ),
    (
        "small decoder for previews (`taef2_decoder.safetensors`, `taef2.safetensors`): `preview_decoder`",
        "yes; a preview is as large as its picture",
        "",
        "test_tiny_decoder.py::test_taef2_s_layers_by_hand test_tiny_decoder.py::test_previews_of_a_call",
    ),
    (
        "text encoder: a Qwen3, with or without `model.`, or inside an all-in-one file",
        "yes, up to the last layer that is read; a file that mixes dtypes gets the commonest",
        "diffusers",
        "test_layouts.py::test_text_encoder_files test_layouts.py::test_other_networks_have_one_dtype_too",
    ),
    (
        "text encoder in GGUF (architecture `qwen3`)",
        "yes; its header gives rope base, stretching of positions (linear, YaRN), epsilon and sizes",
        "",
        "test_gguf.py::test_the_header_of_a_text_encoder test_gguf.py::test_positions_that_are_stretched",
    ),
)
"""File, how it is read, the layouts in which it is written, and its tests."""
_FORMATS = {
    "fp8": "test_layouts.py::test_fp8 test_packing.py::test_what_comfy_kitchen_writes",
    "fp8_blocks": "test_packing.py::test_one_scale_a_square test_packing.py::test_qwen3_in_fp8",
    "fp8_raw": "test_packing.py::test_fp8_without_scales_is_what_it_says",
    "int8": "test_layouts.py::test_int8_with_fused_projections",
    "int8_tensorwise": "test_packing.py::test_int8_of_others_is_not_rounded_again",
    "int8_convrot": "test_packing.py::test_what_comfy_kitchen_writes test_packing.py::test_refuses_markers",
    "int8_blocks": "test_packing.py::test_one_scale_a_square",
    "mxfp8": "test_packing.py::test_what_comfy_kitchen_writes test_packing.py::test_filled_up_matrices_and_rows_of_them",
    "nvfp4": "test_packing.py::test_what_comfy_kitchen_writes test_packing.py::test_formats_mixed_in_one_file",
}
"""The tests of each format of `packing`."""
_REFUSED = (
    (
        "a marker of another format, or of a change of weights that is not known",
        "test_packing.py::test_refuses_markers",
    ),
    (
        "a header that speaks of a rotation, and weights without a marker",
        "test_packing.py::test_refuses_a_rotation_that_only_the_header_mentions",
    ),
    ("U8 without a marker: the order of halves and scales is not known", "test_packing.py::test_refuses_damage"),
    ("a GGUF header that its tensors or a Qwen3 contradict", "test_gguf.py::test_refuses_headers_that_are_not_read"),
    ("GGUF of other architectures, and an autoencoder in GGUF", "test_gguf.py::test_refuses_other_architectures"),
    (
        "pickles (`.ckpt`, `.pt`, `.bin`), which are never opened",
        "test_layouts.py::test_refuses_files_that_are_no_weights",
    ),
    ("truncated files, and indexes that point out of their folder", "test_layouts.py::test_refuses_tricks_in_an_index"),
)
"""What no table of the code lists."""


def tables() -> dict[str, Callable[[], str]]:
    """Return the makers of the tables by name."""
    return {"files": files, "formats": formats, "refused": refused}


def files() -> str:
    rows = (
        (file, read.replace("GGUF_BLOCKS", ", ".join(sorted(QUANTIZED))), _written(written), _tests(tests))
        for file, read, written, tests in _ROWS
    )
    return _table(("file", "read", "written by `limner convert --to`", "tested by"), rows)


def formats() -> str:
    rows = (
        (
            f"`{one.name}`",
            one.stored,
            one.read,
            "depends on their size" if one.error is None else f"{one.error:.1%}",
            _written("int8" if one.name == "int8" else ""),
            _tests(_FORMATS[one.name]),
        )
        for one in FORMATS
    )
    return _table(
        ("format", "stored as", "read", "lost at most", "written by `limner convert --to`", "tested by"), rows
    )


def refused() -> str:
    rows = [
        *((reason.replace("; only klein-like", ": only klein-like"), "test_layouts.py") for _, reason in FOREIGN),
        *((f"is quantized by {tool}", "test_packing.py::test_refuses_damage") for _, tool in QUANTIZED_BY),
        *_REFUSED,
    ]
    return _table(("what", "tested by"), ((what, _tests(tests)) for what, tests in rows))


def _written(layouts: str) -> str:
    assert all(one in LAYOUTS for one in layouts.split(", ") if one), layouts
    return layouts or "no"


def _tests(names: str) -> str:
    """Return tests as links to their files."""
    found = []
    for name in names.split():
        file, _, test = name.partition("::")
        found.append(f"[`{test or file}`](../{_W}{file})")
    return ", ".join(found)


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def document(text: str) -> str:
    """Return the document with its tables made anew. Raises `KeyError` for a table that has no maker."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{tables()[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


if __name__ == "__main__":
    FILE.write_text(document(FILE.read_text()))
