"""What a picture may be given as, and what is said of anything else."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.pictures import encoded
from tests.support.tiny import picture

from limner import InvalidRequest, ReferencePolicy
from limner.images import prepare_reference, prepare_references

IMAGE = picture(64, 80)
ARRAY = np.asarray(IMAGE)
TENSOR = torch.from_numpy(ARRAY.copy()).permute(2, 0, 1)
POLICY = ReferencePolicy(background="white")


@pytest.mark.parametrize(
    "form",
    [
        IMAGE,
        encoded(IMAGE),
        memoryview(encoded(IMAGE)),
        io.BytesIO(encoded(IMAGE)),
        ARRAY,
        ARRAY[:, ::-1][:, ::-1],
        ARRAY.astype(np.float32) / 255,
        ARRAY.astype(np.float16) / 255,
        TENSOR,
        TENSOR.double() / 255,
        (TENSOR / 255).to(torch.float32).requires_grad_(),
        np.dstack([ARRAY, np.full((80, 64), 255, np.uint8)]),
    ],
    ids=lambda form: type(form).__name__,
)
def test_forms_of_one_picture(form: Any) -> None:
    found = prepare_reference(form, policy=POLICY)
    if getattr(form, "dtype", None) == np.float16:
        assert np.abs(np.frombuffer(found.data, np.uint8).astype(int) - ARRAY.ravel()).max() <= 1
    else:
        assert found.data == IMAGE.tobytes()


def test_gray_arrays() -> None:
    for form in (ARRAY[..., 0], ARRAY[..., :1], TENSOR[0], TENSOR[:1]):
        assert prepare_reference(form, policy=POLICY).data == IMAGE.getchannel("R").convert("RGB").tobytes()


def test_open_files_are_read_from_the_start_and_left_where_they_were() -> None:
    file = io.BytesIO(encoded(IMAGE))
    file.seek(7)
    assert prepare_reference(file, policy=POLICY).data == IMAGE.tobytes()
    assert file.tell() == 7

    class Pipe(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            data = source.read(len(buffer))
            buffer[: len(data)] = data
            return len(data)

    source = io.BytesIO(encoded(IMAGE))
    assert prepare_reference(io.BufferedReader(Pipe()), policy=POLICY).data == IMAGE.tobytes()


def test_lists() -> None:
    for form in ([ARRAY, ARRAY], (IMAGE, TENSOR), np.stack([ARRAY, ARRAY]), torch.stack([TENSOR, TENSOR])):
        found = prepare_references(form, policy=POLICY)
        assert [one.data for one in found] == [IMAGE.tobytes()] * 2
    assert prepare_references(found[0], policy=POLICY) == (found[0],)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            ARRAY.transpose(2, 0, 1),
            r"image 1: an array of shape \[3, 80, 64\] is not .*; use array.transpose\(1, 2, 0\)",
        ),
        (TENSOR.permute(1, 2, 0), r"image 1: a tensor of shape \[80, 64, 3\] is not .*; use tensor.permute\(2, 0, 1\)"),
        (ARRAY.astype(np.float32), "values go from .*; floating point values are from 0 to 1: divide by 255"),
        (ARRAY / 127.5 - 1, r"use \(x \+ 1\) / 2"),
        (np.full((64, 64, 3), np.nan), "its values go from nan to nan"),
        (ARRAY.astype(np.uint16), "its values are uint16; allowed: uint8"),
        (TENSOR.long(), "its values are int64; allowed: uint8"),
        (np.zeros((64, 64, 2), np.uint8), "is not .height, width, channels. with 1, 3 or 4"),
        (np.zeros((0, 64, 3), np.uint8), "shape"),
        (np.array(["a"]), "shape"),
        (io.StringIO("text"), "open it in binary"),
        (io.BytesIO(b""), "not a PNG, JPEG or WebP"),
        (5, "image: int is not a picture or a list of pictures"),
        (None, "image: NoneType is not a picture"),
        ({"a": IMAGE}, "image: dict is not a picture"),
        ([IMAGE, 5], "image 2: int is not a picture"),
        ([], "an empty list has no reference"),
    ],
)
def test_refuses(form: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        prepare_references(form, policy=POLICY)


def test_closed_files() -> None:
    file = io.BytesIO(encoded(IMAGE))
    file.close()
    with pytest.raises(InvalidRequest, match="image: the open file cannot be read"):
        prepare_reference(file, policy=POLICY)
