"""The manifest: what a row may say; a line that says something else is an error of that row."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.batches import write

from limner.batch.manifest import BrokenRow, read_manifest, seed_of
from limner.errors import InvalidRequest


def test_seeds_come_from_ids_and_stay() -> None:
    assert seed_of("one") == 1997727856
    assert len({seed_of(str(i)) for i in range(1000)}) == 1000


BROKEN = {
    "text": (b"hello", None, "row: is not one JSON object in UTF-8"),
    "bytes": (b'{"id": "x", "prompt": "\xff"}', None, "row: is not one JSON object in UTF-8"),
    "list": (b"[1]", None, "row: is a JSON list, not an object"),
    "deep": (b"[" * 100_000, None, "row: is not one JSON object"),
    "twice": (b'{"id": "x", "id": "y", "prompt": "p"}', None, "a name stands twice"),
    "no id": (b'{"prompt": "p"}', None, "id: None is not a text of 1 to 200"),
    "number": (b'{"id": 7, "prompt": "p"}', None, "id: 7 is not a text"),
    "path": (b'{"id": "../x", "prompt": "p"}', None, "id: '../x' is not a text"),
    "hidden": (b'{"id": ".x", "prompt": "p"}', None, "id: '.x' is not a text"),
    "unknown": (b'{"id": "x", "prompt": "p", "cfg": 3}', "x", "cfg: is not a field of a row; allowed: id, prompt"),
    "prompt": (b'{"id": "x"}', "x", "prompt: '' is empty"),
    "prompt type": (b'{"id": "x", "prompt": 3}', "x", "prompt: int is not a text"),
    "surrogate": (b'{"id": "x", "prompt": "\\ud800"}', "x", "prompt: is not valid Unicode"),
    "reference": (b'{"id": "x", "prompt": "p", "references": "a.png"}', "x", "references: 'a.png' is not a list"),
    "reference name": (b'{"id": "x", "prompt": "p", "references": ["\\ud800"]}', "x", "is not valid Unicode"),
    "seed": (b'{"id": "x", "prompt": "p", "seed": -1}', "x", "seed: -1 is not a whole number from 0 to"),
    "seed type": (b'{"id": "x", "prompt": "p", "seed": true}', "x", "seed: True is not a whole number"),
    "size": (b'{"id": "x", "prompt": "p", "size": [64, 64]}', "x", 'size: [64, 64] is not "WIDTHxHEIGHT"'),
    "grid": (b'{"id": "x", "prompt": "p", "size": "100x64"}', "x", "size: width 100 is not a multiple of 16"),
    "steps": (b'{"id": "x", "prompt": "p", "steps": 0}', "x", "steps: 0 is not a whole number from 1 to 1000"),
    "mask": (b'{"id": "x", "prompt": "p", "mask": ["m.png"]}', "x", "mask: ['m.png'] is not the name of a file"),
    "canvas": (b'{"id": "x", "prompt": "p", "canvas": "\\ud800"}', "x", "canvas: '\\ud800' is not valid Unicode"),
    "expand": (b'{"id": "x", "prompt": "p", "expand": 8}', "x", "expand: 8 is not [left, top, right, bottom]"),
    "weights": (b'{"id": "x", "prompt": "p", "reference_weights": 1}', "x", "reference_weights: 1 is not a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_an_error_of_that_row(name: str, folder: Path) -> None:
    data, id, message = BROKEN[name]
    write(folder, b'{"id": "before", "prompt": "p"}\n\n' + data + b'\n{"id": "after", "prompt": "p"}')
    before, broken, after = read_manifest(folder / "rows.jsonl")
    assert (before.id, after.id) == ("before", "after")
    assert isinstance(broken, BrokenRow)
    assert (broken.line, broken.id) == (3, id)
    assert message in str(broken.error)


def test_manifests_that_are_none(folder: Path) -> None:
    write(folder, b"\n\n")
    for path, message in (
        (folder / "rows.jsonl", "has no rows"),
        (folder / "no", "No such file"),
        (folder, "directory"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            read_manifest(path)
