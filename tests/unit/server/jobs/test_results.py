"""What a signed result says of the pictures that it was made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.support.jobs import POLICY, job, reference
from tests.support.tiny import picture

from limner.images import encode, picture_of_mask, prepare_canvas
from limner.server.jobs.known_references import KnownReferences
from limner.server.jobs.offload import Offload
from limner.server.jobs.records import JobPictures
from limner.server.jobs.results import ResultWriter
from limner.server.jobs.store import JobStore

pytest.importorskip("c2pa", reason="the extra c2pa is not installed")
from limner.trust.provenance import development_credentials, read


def test_what_is_repainted_is_the_parent_and_a_mask_is_no_ingredient(on_disk: JobStore, tmp_path: Path) -> None:
    import numpy as np

    own, canvas = reference(1), prepare_canvas(picture(101, 83), policy=POLICY)
    mask = picture_of_mask(np.full((83, 101), 255, np.uint8))
    asked = job(own, canvas=canvas.report, mask=mask.report)
    on_disk.add(asked, JobPictures(references=(own,), canvas=canvas, mask=mask).all)
    signer, offload = development_credentials(tmp_path / "keys"), Offload()
    writer = ResultWriter(
        engine=SimpleNamespace(model=SimpleNamespace(digest="d")),  # type: ignore[arg-type]
        jobs=on_disk,
        offload=offload,
        known=KnownReferences(on_disk, offload=offload, is_shared=True),
        signer=signer,
    )
    data = encode(picture(101, 83, seed=2), "png")
    signed = writer._sign(data, asked, {"box": [0, 0, 101, 83]}, signer)
    offload.close()
    report = read(signed)
    assert report.ingredients == ("parentOf", "inputTo")
    assert report.generation["box"] == [0, 0, 101, 83]
    assert b"canvas" in signed
