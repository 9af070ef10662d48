"""The rules of the source tree: imports go one way, files and functions stay short, importing is light.

The order of imports and the core path are the blocks `order` and `core` of docs/architecture.md; docs/order.py reads them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "limner"
DOCUMENT = ROOT / "docs" / "architecture.md"
FILE_LINES = 700
FUNCTION_LINES = 100
CORE_LINES = 3800
DOCUMENT_LINES = 180


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("order", ROOT / "docs" / "order.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


order = program()
TREE = order.Source()


def one_a_line(pairs: list[tuple[str, str]]) -> str:
    return "\n" + "\n".join(f"{name} imports {other}" for name, other in pairs)


def test_every_file_has_one_line() -> None:
    listed = [name for line in order.block("order") for name in line]
    assert sorted(listed) == sorted(TREE.files), "run docs/order.py --write"
    assert len(listed) > 70


def test_imports_go_to_lower_lines() -> None:
    pairs = order.broken(order.block("order"), TREE.imports())
    assert not pairs, one_a_line(pairs)
    assert sum(map(len, TREE.imports().values())) > 300


def test_imports_for_types_that_go_up_are_listed() -> None:
    pairs = order.broken(order.block("order"), TREE.imports(types=True))
    listed = re.findall(r"`([\w/]+) imports ([\w/]+)`", DOCUMENT.read_text())
    assert sorted(pairs) == sorted(listed), one_a_line(pairs)


def test_no_circle_of_files() -> None:
    assert order.circles(TREE.imports()) == []


def test_no_circle_of_packages() -> None:
    packages: dict[str, set[str]] = {}
    for name, others in TREE.imports().items():
        own = name.split("/")[0]
        packages.setdefault(own, set()).update({other.split("/")[0] for other in others} - {own})
    assert order.circles(packages) == []


def test_package_files_only_re_export() -> None:
    files = [file for file in SOURCE.rglob("__init__.py") if file.parent != SOURCE]
    assert {str(file.relative_to(SOURCE)): order.logic_of(file) for file in files if order.logic_of(file)} == {}


def test_the_order_sees_what_is_wrong(tmp_path: Path) -> None:
    """A package's names belong to the files that they are from, and no import is missed."""
    files = {
        "__init__": "def __getattr__(name): ...",
        "low": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from limner.top import Top",
        "room/__init__": "from limner.room.a import A as A\nfrom limner.room.b import B\n__all__ = ['A', 'B']",
        "room/a": "import limner.low",
        "room/b": "from limner.room import a",
        "full/__init__": "LIMIT = 3\nfrom limner.room import A",
        "top": "def lazy():\n    from limner.room import B\n    from limner.full import LIMIT",
        "all": "import limner.room",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    tree = order.Source(tmp_path)
    graph = tree.imports()
    assert graph == {
        "low": set(),
        "room/a": {"low"},
        "room/b": {"room/a"},
        "full/__init__": {"room/a"},
        "top": {"room/b", "full/__init__"},
        "all": {"room/a", "room/b"},
    }
    assert order.logic_of(tmp_path / "full" / "__init__.py") == ["LIMIT = 3"]
    lines = order.proposed(graph, [])
    assert order.broken(lines, graph) == []
    assert order.broken(lines, tree.imports(types=True)) == [("low", "top")]
    assert order.broken(lines[::-1], graph) != []
    assert order.broken([sorted(graph)], graph) != []  # not even on one line
    without = [[name for name in line if name != "room/b"] for line in lines]
    assert sorted(map(sorted, order.proposed(graph, without))) == sorted(map(sorted, lines))
    assert [*order.expanded("low room/{a,b}")] == ["low", "room/a", "room/b"]
    graph["low"] = {"top"}
    assert order.circles(graph) == [["full/__init__", "low", "room/a", "room/b", "top"]]


def test_model_knows_torch_and_config_only() -> None:
    for file in (SOURCE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if module and module.split(".")[0] == "limner":
                    assert module.split(".")[1] in ("model", "native", "config", "grid", "tokens", "errors"), (
                        f"{file.name} imports {module}"
                    )
        text = file.read_text()
        for word in ("import os", "from PIL", "from pathlib", "environ[", " open("):
            assert word not in text, f"{file.name}: {word}"


def test_import_is_light() -> None:
    words = "import sys, limner; print(sorted({'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def num_lines(name: str) -> int:
    return len((SOURCE / f"{name}.py").read_text().splitlines())


def test_no_file_is_long() -> None:
    long = {name: num_lines(name) for name in TREE.files if num_lines(name) > FILE_LINES}
    assert long == {}


def test_no_function_is_long() -> None:
    long: dict[str, int] = {}
    for name, file in TREE.files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{name}: {node.name}"] = lines
    assert long == {}


def test_the_core_path_is_short() -> None:
    names = [name for line in order.block("core") for name in line]
    assert len(names) == len(set(names)) > 15
    lines = {name: num_lines(name) for name in names}
    assert sum(lines.values()) <= CORE_LINES, lines


def test_files_named_in_the_document_exist() -> None:
    document = DOCUMENT.read_text()
    trees = "".join(re.findall(r"^```\w*\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL))
    named = {*re.findall(r"`([\w/]+\.py)`", document), *re.findall(r"\b([\w/]+\.py)\b", trees)}
    files = [str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py")]
    assert len(document.splitlines()) <= DOCUMENT_LINES
    named -= {name for name in named if name.startswith("tests/") and (ROOT / name).is_file()}
    missing = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
    assert missing == set()
    assert len(named) > 40
