"""For the site: a link to a file of the repository outside of docs/ becomes its path; the site has no such page.

The file has to be there: the build is strict. Read by mkdocs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#]+|[\w./-]+\.(?:yaml|py))(?:#[^)]*)?\)")
_PICTURE = re.compile(r"!\[([^\]]*)\]\(((?:\.\./)+[^)]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page's text with links that leave docs/ replaced. Raises `FileNotFoundError` for one that leads nowhere."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {link[2]} is not there")
        if target.is_relative_to(ROOT / "docs") and target.suffix == ".md":
            return link[0]
        path = target.relative_to(ROOT)
        return f"{link[1]} (`{path}`)" if link[1].strip("`") != str(path) else f"`{path}`"

    return _LINK.sub(replaced, _PICTURE.sub(replaced, markdown))
