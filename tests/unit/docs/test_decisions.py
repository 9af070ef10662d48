"""docs/design/decisions.md numbers each decision once, and its contents say where each is."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).parents[3] / "docs" / "design" / "decisions.md").read_text()


def test_each_number_is_one_decision() -> None:
    numbers = [int(number) for number in re.findall(r"^### (\d+)\. ", TEXT, re.M)]
    assert sorted(numbers) == [*range(1, max(numbers) + 1)]


def test_the_contents_have_the_numbers_of_each_part() -> None:
    listed = {
        title: sorted(
            number for first, last in re.findall(r"(\d+)(?: to (\d+))?", numbers) for number in span(first, last)
        )
        for title, numbers in re.findall(r"^- \[(.*?)\]\(#.*?\): (.*)$", TEXT, re.M)
    }
    parts = re.split(r"^## ", TEXT, flags=re.M)[1:]
    found = {part.partition("\n")[0]: sorted(map(int, re.findall(r"^### (\d+)\. ", part, re.M))) for part in parts}
    assert listed == found


def span(first: str, last: str) -> range:
    return range(int(first), int(last or first) + 1)
