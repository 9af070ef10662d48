"""Adding a key to a file of API keys, which holds their hashes.

Owns the writing of that file; `limner.server.access.keys` reads it. Knows no HTTP.
"""

from __future__ import annotations

from pathlib import Path

from limner.errors import OutputError
from limner.files import write_file
from limner.server.access.keys import new_key

__all__ = ["add_key"]


def add_key(name: str, *, file: str) -> str:
    """Append a new key to a key file and return it; nothing else ever has it in plain text. Raises `OutputError`."""
    plain, line = new_key(name)
    path = Path(file)
    try:
        before = path.read_bytes() if path.exists() else b""
        gap = b"" if not before or before.endswith(b"\n") else b"\n"
        write_file(path, before + gap + line.encode() + b"\n")
        path.chmod(0o600)
    except OSError as error:
        raise OutputError(f"keys: {file} cannot be written ({error.strerror or error})") from error
    return plain
