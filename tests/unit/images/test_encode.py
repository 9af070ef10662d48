"""Encoding and saving pictures."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.tiny import picture

from limner import InvalidRequest, OutputError
from limner.images import FORMATS, encode, read_metadata, save


@pytest.mark.parametrize("ending", FORMATS)
def test_saves_with_metadata(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"out{ending}"
    metadata = {"prompt": 'a "cat" é ☂ \\', "seed": 7, "references": ["ab", "cd"]}
    image = picture(64, 48)
    save(image, file, metadata=metadata)
    assert read_metadata(file) == metadata
    with Image.open(file) as saved:
        assert saved.format == FORMATS[ending]
        difference = np.abs(np.asarray(saved.convert("RGB")).astype(int) - np.asarray(image))
        assert difference.max() == 0 if ending == ".png" else difference.mean() < 12
    assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 & ~_umask()
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("ending", FORMATS)
def test_encode_makes_the_bytes_that_save_writes(ending: str, tmp_path: Path) -> None:
    metadata = {"prompt": "a cat", "seed": 7}
    image = picture(64, 48)
    save(image, tmp_path / f"out{ending}", metadata=metadata)
    data = encode(image, FORMATS[ending].lower(), metadata=metadata)
    assert data == (tmp_path / f"out{ending}").read_bytes()
    assert read_metadata(data) == metadata
    if ending != ".png":
        assert len(encode(image, FORMATS[ending], quality=30)) < len(data) / 2


def test_encode_refuses() -> None:
    with pytest.raises(InvalidRequest, match="format: 'gif' is not written; use JPEG, PNG, WEBP"):
        encode(picture(64, 64), "gif")
    for quality in (0, 101):
        with pytest.raises(InvalidRequest, match=f"quality: {quality} is not within 1 to 100"):
            encode(picture(64, 64), "jpeg", quality=quality)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_long_names(tmp_path: Path) -> None:
    save(picture(64, 64), tmp_path / ("n" * 251 + ".png"))
    for name in ("n" * 252 + ".png", "n" * 5000 + ".png"):
        with pytest.raises(OutputError, match="cannot be written"):
            save(picture(64, 64), tmp_path / name)
    assert len(os.listdir(tmp_path)) == 1


def test_refuses_outputs(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"output: .*out.gif has to end in .png, .jpg, .jpeg, .webp"):
        save(picture(64, 64), tmp_path / "out.gif")
    with pytest.raises(OutputError, match="has to be a folder that you may write to"):
        save(picture(64, 64), tmp_path / "nowhere" / "out.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        save(picture(64, 64), tmp_path / "folder.png")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A file size limit stands in for the disk; the old file survives."""
    file = tmp_path / "out.png"
    file.write_bytes(b"old")
    program = (
        "import resource, signal, sys; from PIL import Image; from limner import OutputError; from limner.images import save\n"
        "import numpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "image = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype='uint8'))\n"
        "try: save(image, sys.argv[1])\n"
        "except OutputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, timeout=60)
    assert "cannot be written (File too large); nothing was left there" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["out.png"]
    assert file.read_bytes() == b"old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
