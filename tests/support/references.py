"""Small References, some on a device that is played, and what damages their packs."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from limner import References, ReferenceStore
from limner.images import ReferenceReport
from limner.model.kv import LayerKV, ReferenceKV

TOKENS = 16
LONG_AGO = time.time() - 3600


def references(number: int = 0, *, seconds: float = 100.0, tokens: int = TOKENS) -> References:
    """Small References of their own key; a prefill that is worth keeping."""
    generator = torch.Generator().manual_seed(number)
    layers = tuple(LayerKV(*(torch.randn(1, tokens, 2, 8, generator=generator) for _ in range(2))) for _ in range(3))
    size = (tokens * 16, 16)
    report = ReferenceReport(
        original_size=size,
        oriented=False,
        resized_to=None,
        cut=(0, 0, 0, 0),
        processed_size=size,
        digest=f"{number:064x}",
    )
    return References.make(
        ReferenceKV(layers=layers),
        weights="w",
        kernel="k",
        quantization=None,
        reports=(report,),
        prefill_seconds=seconds,
    )


ONE = references().nbytes
KEY = references().key


def same(a: References, b: References) -> bool:
    return a.key == b.key and all(
        torch.equal(x, y)
        for one, other in zip(a.layers, b.layers, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def never() -> References:
    raise AssertionError("made again")


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def damage_foreign(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def damage_other_key(path: Path) -> None:
    references(5).save(path)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [damage_truncate, damage_flip, damage_foreign, damage_other_key, damage_empty]


def file_of(folder: Path, one: References) -> Path:
    return folder / f"{one.key}.safetensors"


def fill_folder(folder: Path, *numbers: int) -> None:
    """Entries in a folder, the first the least recently used."""
    store = ReferenceStore(disk_path=folder, disk_bytes=None)
    for i, number in enumerate(numbers):
        store.put(references(number))
        store.flush()
        os.utime(file_of(folder, references(number)), (i, i))


class Elsewhere(References):
    """On a device with memory of its own, which is played: the values are real, and moves are counted."""

    number = 0
    moves: list[str] = []  # noqa: RUF012 (emptied by the tests that read it)

    @property
    def device(self) -> torch.device:
        return torch.device("meta", self.number)

    def to(self, device: torch.device | str) -> References:
        device = torch.device(device)
        if device == self.device:
            return self
        self.moves.append("to")
        return elsewhere(self, device.index or 0) if device.type == "meta" else self._plain()

    def to_host(self, *, page_locked: bool) -> References:
        self.moves.append("to_host")
        return self._plain()

    def _plain(self) -> References:
        return References(**{f.name: getattr(self, f.name) for f in dataclasses.fields(References)})


def elsewhere(one: References, number: int = 0) -> Elsewhere:
    made = Elsewhere(**{f.name: getattr(one, f.name) for f in dataclasses.fields(References)})
    object.__setattr__(made, "number", number)
    made.moves.clear()
    return made
