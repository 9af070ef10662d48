"""Imports go one way, and nothing heavy happens at import time."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import limner

SOURCE = Path(limner.__file__).parent
LAYERS = (
    {"errors", "config", "native", "version"},
    {"places", "grid", "files", "options"},
    {"tokens", "schedule", "images"},
    {"requests", "trust"},
    {"model"},
    {"memory"},
    {"weights", "references"},
    {"store", "ranks"},
    {"pipeline"},
    {"engine", "bench"},
    {"batch"},
    {"server"},
    {"deploy"},
    {"cli"},
    {"__main__"},
)


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, outside of `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "limner":
            names = [node.module] if node.module != "limner" else [f"limner.{alias.name}" for alias in node.names]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("limner"))
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
    return found


def test_imports_go_one_way() -> None:
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    checked = 0
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module in imported(file):
            other = module.split(".")[1] if "." in module else "__init__"
            if other in ("__init__", "__version__") or other == own:
                continue
            assert rank[other] <= rank[own], f"{file.relative_to(SOURCE)} imports {module}"
            checked += 1
    assert checked > 20


def test_model_knows_torch_and_config_only() -> None:
    for file in (SOURCE / "model").glob("*.py"):
        for module in imported(file):
            assert module.split(".")[1] in ("model", "native", "config", "tokens", "errors"), (
                f"{file.name} imports {module}"
            )
        text = file.read_text()
        for word in ("import os", "from PIL", "from pathlib", "environ[", " open("):
            assert word not in text, f"{file.name}: {word}"


def test_import_is_light() -> None:
    program = "import sys, limner; print(sorted({'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
