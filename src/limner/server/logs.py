"""What the log of a service looks like: JSON lines or text, on stderr.

Owns handlers and formats, set when a server starts and never at import. Knows nothing of what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

__all__ = ["log_everything", "log_own"]


def log_everything(form: str) -> None:
    """Send all loggers to one handler of this form: from INFO on for Limner and uvicorn, from WARNING on for others.

    json, text, or auto: text where stderr is a terminal.
    """
    logging.basicConfig(handlers=[_handler(form)], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in ("limner", "uvicorn"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = []
        logger.propagate = True


def log_own(form: str) -> None:
    """Send Limner's loggers alone to stderr, in a process where somebody else owns the others."""
    logger = logging.getLogger("limner")
    logger.handlers, logger.propagate = [_handler(form)], False
    logger.setLevel(logging.INFO)


def _handler(form: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    is_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s") if is_text else _JSONLines())
    return handler


class _JSONLines(logging.Formatter):
    """One JSON object a line. The fields of a message that is a JSON object itself are merged into it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        message = record.getMessage()
        try:
            own = json.loads(message) if message.startswith("{") else None
        except ValueError:
            own = None
        line |= own if isinstance(own, dict) else {"message": message}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
