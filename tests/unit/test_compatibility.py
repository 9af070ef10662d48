"""docs/compatibility.md is what docs/compatibility.py makes of the code's tables now, and the tests that it names are there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tables_are_up_to_date() -> None:
    text = (DOCS / "compatibility.md").read_text()
    assert runpy.run_path(str(DOCS / "compatibility.py"))["document"](text) == text, (
        "docs/compatibility.md is out of date: .venv/bin/python docs/compatibility.py renews it"
    )


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"\[`(test_\w+)(?:\.py)?`\]\(([^)]+)\)", (DOCS / "compatibility.md").read_text())
    assert len(named) > 20
    for test, link in named:
        file = DOCS / link
        assert file.name == f"{test}.py" or f"def {test}(" in file.read_text(), (test, link)
