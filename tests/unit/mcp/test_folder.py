"""Nothing outside of the allowed folder is read or written, whatever a path says and whatever the folder holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from limner.errors import InvalidRequest

pytest.importorskip("mcp", reason="the extra mcp is not installed")
from limner.mcp import AllowedFolder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder `in` beside what no assistant may see."""
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.png").write_bytes(b"secret")
    (tmp_path / "in" / "a.png").write_bytes(b"a")
    (tmp_path / "in" / "below" / "b c.png").write_bytes(b"b")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out" / "secret.png")
    (tmp_path / "in" / "inner.png").symlink_to(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "door").symlink_to(tmp_path / "out")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    return tmp_path


@pytest.fixture
def folder(place: Path) -> Iterator[AllowedFolder]:
    folder = AllowedFolder(place / "in")
    yield folder
    folder.close()


def test_files_inside_are_read_by_each_name(folder: AllowedFolder, place: Path) -> None:
    inside = place / "in" / "below" / "b c.png"
    for name in ("below/b c.png", "./below//b c.png", str(inside), inside.as_uri(), f"file://localhost{inside}"):
        assert folder.read(name, field="image") == b"b"


def test_the_folder_itself_may_be_a_link(place: Path) -> None:
    (place / "name").symlink_to(place / "in")
    folder = AllowedFolder(place / "name")
    for name in ("a.png", place / "name" / "a.png", place / "in" / "a.png"):
        assert folder.read(str(name), field="image") == b"a"
    folder.close()


OUTSIDE = [
    "../out/secret.png",
    "below/../../out/secret.png",
    "{place}/out/secret.png",
    "{place}/in/../out/secret.png",
    "file://{place}/out/secret.png",
    "file://{place}/in/%2e%2e/out/secret.png",
    "link.png",
    "door/secret.png",
    "inner.png",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_is_read(name: str, folder: AllowedFolder, place: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"outside of|symbolic link"):
        folder.read(name.format(place=place), field="image")


@pytest.mark.parametrize(
    "name",
    ["", ".", "below", "pipe.png", "no.png", "a.png/x.png", "a\0.png", "\ud800.png", "file://host/a.png", "file:a?b"],
)
def test_what_is_no_file_is_refused(name: str, folder: AllowedFolder) -> None:
    with pytest.raises(InvalidRequest, match="image: "):
        folder.read(name, field="image")


def test_a_folder_that_becomes_a_link_leads_nowhere(folder: AllowedFolder, place: Path) -> None:
    """Between a check and the reading: what counts is what is opened."""
    (place / "in" / "below").rename(place / "in" / "was")
    (place / "in" / "below").symlink_to(place / "out")
    with pytest.raises(InvalidRequest, match="symbolic link"):
        folder.read("below/secret.png", field="image")
    with pytest.raises(InvalidRequest, match="symbolic link"):
        folder.write_new("below/new.png", b"x", field="save_as")
    assert sorted(os.listdir(place / "out")) == ["secret.png"]


@pytest.mark.parametrize("name", [*OUTSIDE, "a.png", "below/no/x.png", "x.txt", "x", "pipe.png", "x" * 260 + ".png"])
def test_only_new_files_inside_are_written(name: str, folder: AllowedFolder, place: Path) -> None:
    with pytest.raises(InvalidRequest, match="save_as: "):
        folder.check_new(name.format(place=place), field="save_as")
    assert sorted(os.listdir(place / "out")) == ["secret.png"]


def test_a_file_is_written_whole_and_never_over_another(folder: AllowedFolder, place: Path) -> None:
    assert folder.check_new(f"{place}/in/below/new.png", field="save_as") == "below/new.png"
    folder.write_new("below/new.png", b"one", field="save_as")
    with pytest.raises(InvalidRequest, match="exists already"):
        folder.write_new("below/new.png", b"two", field="save_as")
    with pytest.raises(InvalidRequest, match="exists already"):
        folder.write_new("link.png", b"two", field="save_as")
    assert (place / "in" / "below" / "new.png").read_bytes() == b"one"
    assert (place / "out" / "secret.png").read_bytes() == b"secret"
    assert sorted(os.listdir(place / "in" / "below")) == ["b c.png", "new.png"]


def test_without_hard_links_nothing_is_written_over(
    folder: AllowedFolder, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object, **options: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    folder.write_new("new.png", b"one", field="save_as")
    with pytest.raises(InvalidRequest, match="exists already"):
        folder.write_new("new.png", b"two", field="save_as")
    assert (place / "in" / "new.png").read_bytes() == b"one"
    assert not [name for name in os.listdir(place / "in") if name.startswith(".limner")]


def test_a_folder_that_is_none_is_refused(place: Path) -> None:
    for name in ("no", "in/a.png"):
        with pytest.raises(InvalidRequest, match="--folder: .* is not a folder"):
            AllowedFolder(place / name)
