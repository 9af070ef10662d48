"""Pictures in and out, good and hostile ones."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import ExifTags, Image
from tests.support.tiny import picture

from limner import InvalidRequest, OutputError, ReferencePolicy
from limner.images import FORMATS, decode, encode, prepare_reference, read_metadata, save, to_pil, to_pixels

POLICY = ReferencePolicy()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, *, depth: int = 8) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    return encoded(picture(64, 64), "WEBP", save_all=True, append_images=[picture(64, 64, seed=1)], duration=50)


GOOD = encoded(picture(80, 64))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a PNG, JPEG or WebP"),
    "text": (b"hello" * 100, "is not a PNG, JPEG or WebP"),
    "gif": (encoded(picture(64, 64), "GIF"), "is not a PNG, JPEG or WebP"),
    "tiff": (encoded(picture(64, 64), "TIFF"), "is not a PNG, JPEG or WebP"),
    "truncated png": (GOOD[:-400], "truncated or damaged"),
    "truncated jpeg": (encoded(picture(200, 200), "JPEG")[:-900], "truncated or damaged"),
    "truncated webp": (encoded(picture(200, 200), "WEBP")[:-300], "truncated|damaged|not a PNG"),
    "png without pixels": (png_header(128, 128), "truncated or damaged"),
    "bomb": (png_header(9000, 9000), "9000x9000 is over 64000000 pixels; scale it down"),
    "huge bomb": (png_header(60000, 60000), "pixels"),
    "bomb that PIL warns of": (png_header(11000, 11000), "11000x11000 is over 64000000 pixels"),
    "animated": (animated(), r"animated \(2 frames\); save one frame"),
    "16 bit": (png_header(64, 64, depth=16), "16 bits a channel; save it with 8"),
    "16 bit grey": (encoded(Image.fromarray(np.full((64, 64), 40000, np.uint16))), "16 bits"),
    "cmyk": (
        encoded(picture(64, 64).convert("CMYK"), "JPEG"),
        "colour mode is CMYK; convert it to RGB with its colour profile",
    ),
    "alpha": (encoded(Image.new("RGBA", (64, 64), (1, 2, 3, 99))), "transparent in places; flatten it"),
    "palette alpha": (encoded(Image.new("P", (64, 64)), transparency=0), "transparent in places; flatten it"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    file = tmp_path / "input.png"
    file.write_bytes(data)
    for source in (data, file, str(file)):
        with pytest.raises(InvalidRequest, match=message) as caught:
            prepare_reference(source, policy=POLICY, field="image 3")
        assert caught.value.field.startswith("image 3")
        assert isinstance(source, bytes) or "input.png" in str(caught.value)


def test_refuses_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"image: .*nothing.png cannot be read \(No such file"):
        decode(tmp_path / "nothing.png")
    with pytest.raises(InvalidRequest, match="is not a file; give a picture file"):
        decode(tmp_path)


def test_refuses_what_is_not_a_file() -> None:
    for path in ("/dev/zero", "a\0b", "x" * 5000):
        with pytest.raises(InvalidRequest, match="is not a file|cannot be read|is not a file name"):
            decode(path)


def test_a_jpeg_with_previews_is_its_first_picture() -> None:
    buffer = io.BytesIO()
    picture(128, 96).save(buffer, "MPO", save_all=True, append_images=[picture(64, 64)])
    assert prepare_reference(buffer.getvalue(), policy=POLICY).report.original_size == (128, 96)


def test_refuses_policies() -> None:
    for changes in (
        {"max_pixels": -5},
        {"max_pixels": 0},
        {"min_side": 0},
        {"max_aspect": 0.5},
        {"max_pixels": float("nan")},
    ):
        with pytest.raises(InvalidRequest, match=f"{next(iter(changes))}: .* is not allowed; use"):
            ReferencePolicy(**changes)
    with pytest.raises(InvalidRequest, match="would be scaled to 45x5, under 16 pixels; raise max_pixels=256"):
        prepare_reference(picture(576, 72), policy=ReferencePolicy(max_pixels=256))


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """In a process that could not hold the pixels."""
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(30000, 30000))
    program = (
        "import resource, sys; from limner.images import decode; from limner import InvalidRequest\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)\n"
        "try: decode(sys.argv[1])\n"
        "except InvalidRequest as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, timeout=60)
    assert "pixels" in done.stdout, done.stderr


def test_orientation_is_applied_and_said() -> None:
    upright = picture(64, 96)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees to show
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    found = prepare_reference(turned, policy=POLICY)
    assert found.report.oriented
    assert found.report.processed_size == (64, 96)
    assert torch.equal(found.pixels, prepare_reference(upright, policy=POLICY).pixels)
    assert "turned upright (EXIF)" in found.report.describe()


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (1000, 1100), (2000, 1500), (3000, 400), (1024, 1024)])
def test_same_pixels_as_diffusers(size: tuple[int, int]) -> None:
    """Cap, resize, crop and range, as the klein pipeline does it."""
    image = picture(*size)
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    resized = processor._resize_to_target_area(image, 1024**2) if size[0] * size[1] > 1024**2 else image
    width, height = (side // 16 * 16 for side in resized.size)
    expected = processor.preprocess(resized, height=height, width=width, resize_mode="crop")
    found = prepare_reference(image, policy=POLICY)
    assert torch.equal(to_pixels(found.pixels), expected)
    assert found.report.processed_size == (width, height)
    assert found.report.original_size == size
    assert (found.report.resized_to is not None) == (size[0] * size[1] > 1024**2)


def test_report_says_what_was_cut() -> None:
    report = prepare_reference(picture(103, 66), policy=POLICY).report
    assert report.cut == (3, 1, 4, 1)
    assert report.describe() == "103x66, cut 3 left, 1 top, 4 right, 1 bottom, used as 96x64"
    capped = prepare_reference(picture(400, 400), policy=ReferencePolicy(max_pixels=64 * 64)).report
    assert capped.describe() == "400x400, scaled to 64x64, used as 64x64"


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = picture(64, 64).convert(mode)
    found = prepare_reference(image, policy=POLICY)
    assert np.array_equal(found.pixels.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_pixels_are_those_that_were_hashed() -> None:
    """They are made when asked for, from the bytes of the digest, whatever became of the picture since."""
    image = picture(64, 80)
    before = np.asarray(image).copy()
    found = prepare_reference(image, policy=POLICY)
    image.paste((255, 0, 0), (0, 0, 64, 80))
    assert hashlib.sha256(b"64x80:" + found.data).hexdigest() == found.report.digest
    assert np.array_equal(found.pixels.permute(1, 2, 0).numpy(), before)
    found.pixels.zero_()
    assert np.array_equal(found.pixels.permute(1, 2, 0).numpy(), before)


def test_digest_tells_pictures_apart() -> None:
    base = picture(64, 64)
    other = base.copy()
    other.putpixel((5, 5), tuple(255 - c for c in base.getpixel((5, 5))))
    tall, wide = Image.new("RGB", (64, 128)), Image.new("RGB", (128, 64))
    digests = {prepare_reference(image, policy=POLICY).report.digest for image in (base, other, tall, wide)}
    assert len(digests) == 4
    assert prepare_reference(encoded(base), policy=POLICY).report.digest in digests


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


@pytest.mark.parametrize("ending", FORMATS)
def test_a_very_long_prompt_does_not_lose_the_picture(ending: str, tmp_path: Path) -> None:
    prompt = "a ☂ " * 30000
    save(picture(64, 48), tmp_path / f"out{ending}", metadata={"prompt": prompt, "seed": 3})
    found = read_metadata(tmp_path / f"out{ending}")
    assert found["seed"] == 3
    if ending == ".png":
        assert found["prompt"] == prompt
    else:
        assert prompt.startswith(found["prompt"])
        assert (len(found["prompt"]), found["prompt_length"], len(found["prompt_sha256"])) == (4000, len(prompt), 64)


def test_long_names(tmp_path: Path) -> None:
    save(picture(64, 64), tmp_path / ("n" * 251 + ".png"))
    for name in ("n" * 252 + ".png", "n" * 5000 + ".png"):
        with pytest.raises(OutputError, match="cannot be written"):
            save(picture(64, 64), tmp_path / name)
    assert len(os.listdir(tmp_path)) == 1


def test_other_pictures_have_no_metadata(tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {}


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


def test_to_pil_rounds() -> None:
    values = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert to_pil(values)[0].getpixel((0, 0)) == (0, 128, 255)
