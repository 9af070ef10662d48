"""limner verify as a user types it: exit code, text and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.command import run
from tests.support.tiny import picture

import limner
from limner.images import encode
from limner.trust.provenance import Ingredient, development_credentials, sign


def verify(*args: object) -> subprocess.CompletedProcess[str]:
    return run("verify", *args)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    signer = development_credentials(folder / "c2pa")
    data = encode(picture(64, 64), "JPEG", metadata={"prompt": "a cat", "seed": 3})
    references = [Ingredient(data=data, title=name) for name in ("a", "b")]
    signed = sign(data, format="JPEG", title="t", action="edited", ingredients=references, signer=signer)
    (folder / "signed.jpg").write_bytes(signed)
    at = signed.rfind(b"\xff\xda") + 100  # the last: a signature may hold these two bytes, compressed pixels may not
    (folder / "changed.jpg").write_bytes(signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :])
    (folder / "plain.png").write_bytes(encode(picture(64, 64), "PNG", metadata={"seed": 4}))
    (folder / "text.png").write_text("hello")
    return folder


def test_whole(files: Path) -> None:
    done = verify(files / "signed.jpg", files / "plain.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{files}/signed.jpg:\n"
        '  metadata: prompt "a cat", seed 3\n'
        "  C2PA: whole, untrusted; signed by Limner development certificate, Limner development (not for production); "
        "for development only, proves nothing of who made it\n"
        "  actions: c2pa.opened, c2pa.edited; trainedAlgorithmicMedia\n"
        f"  generator: Limner {limner.__version__}\n"
        "  ingredients: 2 (parentOf, inputTo)\n"
        f"{files}/plain.png:\n"
        "  metadata: seed 4\n"
        "  C2PA: no manifest\n"
    )


def test_changed(files: Path) -> None:
    done = verify(files / "plain.png", files / "changed.jpg")
    assert (done.returncode, done.stderr) == (1, "")
    assert "  C2PA: broken; signed by Limner development certificate" in done.stdout
    assert done.stdout.endswith("  problem: the file was changed after it was signed\n")


def test_json(files: Path) -> None:
    done = verify("--json", files / "signed.jpg", files / "changed.jpg", files / "plain.png")
    assert (done.returncode, done.stderr) == (1, "")
    signed, changed, plain = json.loads(done.stdout)["files"]
    assert (signed["file"], signed["whole"], signed["state"]) == (str(files / "signed.jpg"), True, "Valid")
    assert (signed["development"], signed["ingredients"]) == (True, ["parentOf", "inputTo"])
    assert signed["metadata"] == {"prompt": "a cat", "seed": 3}
    assert (changed["whole"], changed["state"]) == (False, "Invalid")
    assert changed["problems"] == ["the file was changed after it was signed"]
    assert (plain["whole"], plain["state"], plain["metadata"]) == (True, None, {"seed": 4})


def test_trusted_roots(files: Path) -> None:
    done = verify("--trust", files / "c2pa" / "root.pem", files / "signed.jpg")
    assert done.returncode == 0
    assert "C2PA: whole, trusted; signed by" in done.stdout
    done = verify("--trust", files / "none.pem", files / "signed.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"limner: --trust: {files}/none.pem cannot be read")
    assert done.stderr.count("\n") == 1


def test_bad_files(files: Path) -> None:
    done = verify(files / "text.png", files / "plain.png", files / "none.png", files / "changed.jpg")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"limner: file: {files}/text.png is not a PNG, JPEG or WebP picture; give one",
        f"limner: file: {files}/none.png cannot be read (No such file or directory); give a picture file",
    ]
    assert f"{files}/plain.png:\n  metadata: seed 4" in done.stdout  # the others are looked at all the same
    assert "C2PA: broken" in done.stdout
    found = json.loads(verify("--json", files / "text.png", files / "plain.png").stdout)["files"]
    assert "is not a PNG" in found[0]["error"]
    assert found[1]["whole"] is True


def test_is_light() -> None:
    """Verifying reads files only, so torch is not imported."""
    program = "import sys; from limner.trust import provenance; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
