"""What a source says of a model's kind, who is asked, and what follows: kind, log line, warning."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.support.tiny import picture

import limner
from limner import CheckpointError, InvalidRequest, Pipeline
from limner.kinds import ModelKind, hinted_kind
from limner.weights.convert import convert
from limner.weights.folder import chosen_kind, find_kind
from limner.weights.inspect import inspect

ISOLATED, STANDARD = ("isolated", True), ("joint", True)
BASE, ISOLATED_BASE = ("joint", False), ("isolated", False)
KV, KLEIN, INPAINT = "Flux2KleinKVPipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline"

# source; references=, class called; kind; words of the log line; words of the warning
TABLE: list[tuple[str, dict[str, Any], str | None, tuple[str, bool], str, str | None]] = [
    (f"{KV}", {}, None, ISOLATED, "model_index.json", None),
    (f"{KV} distilled=false", {}, None, ISOLATED_BASE, "model_index.json", None),
    (f"{KLEIN} distilled=true", {}, None, STANDARD, "model_index.json", None),
    (f"{KLEIN}", {}, None, BASE, "model_index.json", None),
    (f"{INPAINT} distilled=true", {}, None, STANDARD, "model_index.json", None),
    (f"{INPAINT}", {}, None, BASE, "model_index.json", None),
    (f"{KV} limner=joint", {}, None, STANDARD, "limner.json", None),
    (f"{KLEIN} limner=isolated,true", {}, None, ISOLATED, "limner.json", None),
    (f"{KLEIN} distilled=true", {"references": "isolated"}, None, ISOLATED, "given", "model_index.json says joint"),
    (f"{KV}", {"references": "joint"}, None, STANDARD, "given", "model_index.json says isolated"),
    (f"{KV}", {"references": "isolated"}, None, ISOLATED, "given", None),
    (f"{KV}", {}, KV, ISOLATED, KV, None),
    (f"{KLEIN} distilled=true", {}, KV, ISOLATED, KV, "model_index.json says joint"),
    (f"{KLEIN}", {}, KV, ISOLATED, KV, "model_index.json says joint"),
    (f"{KLEIN}", {}, KLEIN, BASE, KLEIN, None),
    (f"{KV}", {}, KLEIN, BASE, KLEIN, "model_index.json says isolated"),
    (f"{KV} distilled=true", {}, KLEIN, STANDARD, KLEIN, "model_index.json says isolated"),
    (f"{KLEIN} distilled=true", {}, INPAINT, STANDARD, INPAINT, None),
    (f"{KV} file=klein.safetensors", {}, None, ISOLATED, "nothing in the files says it", None),
    (f"{KV} file=flux-2-klein-9b-kv.safetensors", {}, None, ISOLATED, "nothing in the files says it", None),
    (f"{KV} file=flux-2-klein-9b.safetensors", {}, None, ISOLATED, "nothing in the files says it", "named as one of joint"),
    (f"{KV} file=flux-2-klein-base-9b.safetensors", {}, None, ISOLATED, "nothing in the files", "joint references, base"),
    (f"{KV} file=flux-2-klein-9b.safetensors", {"references": "joint"}, None, STANDARD, "nothing", None),
    (f"{KLEIN} file=x.safetensors", {}, KLEIN, BASE, "nothing in the files says it", None),
    (f"{KV} file=x.safetensors title=FLUX.2 klein 4B", {}, None, STANDARD, "modelspec.title in the header", None),
    (f"{KLEIN} file=x.safetensors title=flux-2-klein-9b-kv", {}, None, ISOLATED, "modelspec.title in the header", None),
    (f"{KLEIN} file=x.safetensors kind=isolated distilled", {}, None, ISOLATED, "limner.kind in the header", None),
]  # fmt: skip


def make(folder: Path, tiny: Path, source: str) -> tuple[Path, Path | None]:
    """Write `model_index.json`, and `limner.json` or a file of the transformer, as a source of the table says."""
    name, _, rest = source.partition(" ")
    words = dict(part.split("=", 1) for part in _split(rest))
    index: dict[str, Any] = {"_class_name": name}
    if "distilled" in words:
        index["is_distilled"] = words["distilled"] == "true"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    if "limner" in words:
        references, _, distilled = words["limner"].partition(",")
        own = {"references": references} | ({"is_distilled": distilled == "true"} if distilled else {})
        (folder / "limner.json").write_text(json.dumps(own))
    if "file" not in words:
        return folder, None
    header = {"modelspec.title": words["title"]} if "title" in words else {}
    header |= {"limner.kind": words["kind"]} if "kind" in words else {}
    tensors = load_file(next((tiny / "transformer").glob("*.safetensors")))
    save_file({name: tensors[name] for name in list(tensors)[:1]}, folder / words["file"], metadata=header or None)
    return folder, folder / words["file"]


def _split(rest: str) -> list[str]:
    """Words with "=" and what follows them."""
    parts: list[str] = []
    for word in rest.split():
        if "=" in word:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    return parts


@pytest.mark.parametrize(("source", "how", "called", "kind", "says", "warns"), TABLE, ids=lambda x: str(x)[:60])
def test_no_kind_passes_silently(
    source: str,
    how: dict[str, Any],
    called: str | None,
    kind: tuple[str, bool],
    says: str,
    warns: str | None,
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "limner")
    folder, transformer = make(tmp_path / "model", tiny_folder, source)
    chosen = chosen_kind(find_kind(folder, transformer=transformer), given=how.get("references"), called=called)
    assert (chosen.references, chosen.distilled) == kind
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1
    assert says in lines[0]
    assert str(chosen) in lines[0]
    assert len(warnings) == (warns is not None)
    if warns is not None:
        assert warns in warnings[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flux-2-klein-9b-kv-fp8.safetensors", ISOLATED),
        ("flux2-klein-9b-kv-nvfp4.safetensors", ISOLATED),
        ("FLUX.2-klein-4B", STANDARD),
        ("flux-2-klein-base-4b_q8_0.gguf", BASE),
        ("flux1-dev.safetensors", None),
        ("kv.safetensors", None),
    ],
)
def test_names_are_hints(name: str, kind: tuple[str, bool] | None) -> None:
    found = hinted_kind(name)
    assert (found and (found.references, found.distilled)) == kind


def test_wrong_words_are_refused(tiny_copy: Path) -> None:
    with pytest.raises(InvalidRequest, match="references: 'kv' is not one of None, 'isolated', 'joint'"):
        Pipeline.from_pretrained(tiny_copy, references="kv")
    (tiny_copy / "limner.json").write_text('{"is_distilled": "yes"}')
    with pytest.raises(CheckpointError, match="limner.json: is_distilled='yes' has to be true or false"):
        Pipeline.from_pretrained(tiny_copy)


def test_a_transformer_of_another_folder_brings_its_kind(tiny_folder: Path, standard_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder, transformer=standard_folder)
    assert pipe.kind == ModelKind(references="joint", distilled=True)


def test_pipelines_of_diffusers_bring_their_kind(oracle: Any) -> None:
    from diffusers import Flux2KleinPipeline

    parts = {name: getattr(oracle, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    assert Pipeline.from_diffusers(oracle).kind == ModelKind(references="isolated", distilled=True)
    assert Pipeline.from_diffusers(Flux2KleinPipeline(**parts)).kind == ModelKind(references="joint", distilled=False)
    with_key = Flux2KleinPipeline(**parts, is_distilled=True)
    assert Pipeline.from_diffusers(with_key).kind == ModelKind(references="joint", distilled=True)
    assert limner.Pipeline.from_diffusers(with_key, references="isolated").kind.references == "isolated"


def test_files_that_are_written_keep_the_kind(standard_folder: Path, tmp_path: Path) -> None:
    convert(standard_folder, tmp_path / "t.safetensors", to="original", part="transformer")
    report = inspect(tmp_path / "t.safetensors", digests=False)
    assert report.kind is not None
    assert (report.kind["references"], report.kind["is_distilled"]) == STANDARD
    assert "kind: joint references, distilled (limner.kind in the header of t.safetensors)" in report.lines()
    assert "kind: joint references, distilled (model_index.json)" in inspect(standard_folder, digests=False).lines()
    shutil.copytree(standard_folder, tmp_path / "copy")
    pipe = Pipeline.from_pretrained(tmp_path / "copy", transformer=tmp_path / "t.safetensors")
    assert pipe.kind == ModelKind(references="joint", distilled=True)


def test_the_kind_stands_in_the_metadata(standard_folder: Path, tiny_folder: Path) -> None:
    for folder, expected in ((standard_folder, "joint"), (tiny_folder, "isolated")):
        pipe = Pipeline.from_pretrained(folder)
        out = pipe("a dog", image=picture(64, 64), height=64, width=64, num_inference_steps=1)
        assert out.metadata["references_attention"] == expected
