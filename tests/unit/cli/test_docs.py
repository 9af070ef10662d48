"""docs/cli.md is what docs/cli.py makes of the parsers now, and has every option."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from limner.options import ListenOptions, ModelOptions, ReplicaOptions, ServeOptions, StoreOptions, options_of

DOCS = Path(__file__).parents[3] / "docs"
KINDS = (ModelOptions, StoreOptions, ServeOptions, ListenOptions, ReplicaOptions)


@pytest.mark.parametrize("store", [None, "/kept"])
def test_the_document_is_up_to_date(store: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMNER_STORE", raising=False)
    if store:
        monkeypatch.setenv("LIMNER_STORE", store)
    expected = runpy.run_path(str(DOCS / "cli.py"))["document"]()
    assert (DOCS / "cli.md").read_text() == expected, (
        "docs/cli.md is out of date: .venv/bin/python docs/cli.py renews it"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_every_option(kind: type) -> None:
    text = (DOCS / "cli.md").read_text()
    for option in options_of(kind):
        name = option.flag or option.name
        assert f"`{name}`" in text or f"`{name} " in text, name
        assert option.help.replace("|", "\\|").replace("<", "&lt;") in text, name
