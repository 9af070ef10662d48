"""Writes docs/openapi.json, the OpenAPI document of the service; a test tells when it is not up to date.

.venv/bin/python docs/openapi.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from limner import Pipeline
from limner.engine import Engine
from limner.server.access.keys import KeyRing
from limner.server.app import create_app
from limner.server.http.settings import ServeSettings
from limner.trust.safety import no_checks

FILE = Path(__file__).with_suffix(".json")


def as_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def main() -> None:
    engine = Engine(Pipeline.from_pretrained())
    with tempfile.TemporaryDirectory() as folder:
        settings = ServeSettings(data=Path(folder))
        app = create_app(engine=engine, keyring=KeyRing.open(), checks=no_checks(), settings=settings)
        FILE.write_text(as_text(app.openapi()))
        app.state.service.jobs.close()
    engine.close()


if __name__ == "__main__":
    main()
