"""Libraries that are built at first use: what they fall back to, and the reason that is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.support.native import has_tiles

import limner
from limner.native import kernels, tiles
from limner.native.build import Library

CODE = """
import torch
from limner.doctor import _kernels
from limner.model.int8 import Int8Linear, packs_weights
from limner.native import kernels, tiles
made, x = Int8Linear.of(torch.nn.Linear(64, 64, bias=False)), torch.randn(3, 64)
error = (made(x) - x @ (made.weight * made.weight_scale[:, None]).t()).norm() / x.norm()
print(kernels.native_library() is not None, tiles.fits(64, 64), packs_weights(), float(error) < 0.02, made.packed_bytes)
print(tiles.why_missing())
notes = []
print(_kernels(notes)["int8 products"], *notes, sep="; ")
"""


def run(folder: Path, **settings: str) -> tuple[list[str], str]:
    """What runs in a process of its own, and what is told of int8 products."""
    source = str(Path(limner.__file__).parents[1])
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(folder), "PYTHONPATH": source, **settings}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, told = done.stdout.split("\n", 1)
    return first.split(), told


@has_tiles
def test_a_compiler_that_does_not_know_tiles(tmp_path: Path) -> None:
    """The other kernels are built, oneDNN multiplies packed copies, and the reason is told."""
    compiler = tmp_path / "old-cc"
    found = next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))
    compiler.write_text(
        '#!/bin/sh\nfor word in "$@"; do if [ "$word" = -mamx-int8 ]; then\n'
        f'echo "error: unrecognized option $word" >&2; exit 1; fi; done\nexec {found} "$@"\n'
    )
    compiler.chmod(0o755)
    runs, told = run(tmp_path, CC=str(compiler))
    assert runs == ["True", "False", "True", "True", "4096"]
    assert "unrecognized option -mamx-int8" in told
    assert "oneDNN, with a second copy of the weights; no AMX tiles: " in told
    assert "GCC 11 or newer" in told
    runs, told = run(tmp_path)
    assert runs == ["True", "True", "False", "True", "0"]
    assert told == "None\nAMX tiles\n"


@pytest.mark.skipif(kernels.native_library() is None, reason=f"no native kernels: {kernels.why_missing()}")
def test_native_code_can_be_turned_off(tmp_path: Path) -> None:
    runs, told = run(tmp_path, LIMNER_NATIVE="0")
    assert (runs[:2], runs[3]) == (["False", "False"], "True")
    assert told.startswith("LIMNER_NATIVE is 0\n")
    assert not (tmp_path / "limner").exists()


@has_tiles
@pytest.mark.parametrize("how", ["no tiles from the system", "a name that is not there", "another CPU"])
def test_what_does_not_load_is_told(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def declare(library: object) -> None:
        if how == "no tiles from the system":
            raise OSError(how)
        assert how != "another CPU"
        library.limner_nothing  # type: ignore[attr-defined]  # noqa: B018

    made = Library(
        "tiles",
        files=tiles._library._files,
        flags=tiles._library._flags,
        missing=lambda: how if how == "another CPU" else None,
        declare=declare,
    )
    assert made.loaded is None
    assert made.why_missing is not None
    assert ("limner_nothing" if how == "a name that is not there" else how) in made.why_missing
    monkeypatch.setattr(tiles, "_library", made)
    assert not tiles.fits(64, 64)
    assert tiles.why_missing() == made.why_missing
    x = torch.zeros(1, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="not for this product"):
        tiles.product(x, x.to(torch.int8).expand(32, 64), scales=(torch.ones(1, 1), torch.ones(32)))


def test_digests_are_those_of_the_sources() -> None:
    """Of a source and what all sources share: another of either is another digest."""
    digests = {kernels._library: kernels.source_digest(), tiles._library: tiles.digest()}
    assert len(set(digests.values())) == 2
    for library, digest in digests.items():
        same = Library("same", files=library._files, missing=lambda: "a test", declare=lambda library: None)
        assert same.digest == digest
        same = Library("same", files=library._files, missing=lambda: "a test", declare=lambda library: None)
        same._source += b"\n"
        assert same.digest != digest
        common = (Path(kernels.__file__).parent / "common.h").read_bytes()
        assert same._source.startswith(common)
