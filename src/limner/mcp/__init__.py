"""The model as tools of an assistant, over the Model Context Protocol (https://modelcontextprotocol.io).

Imports `mcp`, which is in the extra of that name.
"""

from limner.mcp.folder import AllowedFolder
from limner.mcp.run import run
from limner.mcp.server import Assistant, create_server

__all__ = ["AllowedFolder", "Assistant", "create_server", "run"]
