"""Reports in packs: what is at its default is not written, what is not comes back."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny import picture

from limner import Pipeline, ReferencePolicy, References
from limner.images import prepare_reference


def test_reports_outlive_a_pack(pipe: Pipeline, tmp_path: Path) -> None:
    image = picture(100, 70)
    plain = prepare_reference(image, policy=ReferencePolicy())
    image.info["icc_profile"] = b"damaged"
    padded = prepare_reference(image, policy=ReferencePolicy(fit="pad"))
    part = plain.part((16, 32, 80, 64))
    refs = pipe.prefill([plain, padded, part])
    refs.save(tmp_path / "a.safetensors")
    loaded = References.load(tmp_path / "a.safetensors")
    assert loaded.reports == refs.reports == (plain.report, padded.report, part.report)
    assert loaded.ids.equal(refs.ids)
    head = (tmp_path / "a.safetensors").read_bytes()[:4000]
    assert head.count(b'\\"added\\"') == head.count(b'\\"profile\\"') == head.count(b'\\"origin\\"') == 1
