"""Print the order of imports for docs/architecture.md, computed from the imports of the source.

    .venv/bin/python docs/order.py            # print the block; exit code 1 if the document has another one
    .venv/bin/python docs/order.py --write    # put it into docs/architecture.md
    .venv/bin/python docs/order.py --fresh    # forget how the lines of the document are grouped

A line of the block is a rank: a file may import files on lower lines only. The lines of the document are kept as they
are while they are true. A new file is added to a line that fits; if no line fits, all lines are computed again, package
by package. tests/unit/test_imports.py reads the block with the functions below.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "limner"
DOCUMENT = ROOT / "docs" / "architecture.md"
WIDTH = 116
"""Lines of one package after another are joined up to this number of characters."""

Graph = dict[str, set[str]]
"""What each file imports. Files are named `pipeline/noise`, without `.py`."""


# Reading the source


def names_of_files(source: Path = SOURCE) -> dict[str, Path]:
    """Every source file by its name, but for `__init__` files that only re-export."""
    files = {file.relative_to(source).with_suffix("").as_posix(): file for file in sorted(source.rglob("*.py"))}
    return {
        name: file
        for name, file in files.items()
        if name != "__init__" and (not name.endswith("/__init__") or logic_of(file))
    }


def logic_of(file: Path) -> list[str]:
    """The statements of an `__init__` file that do more than re-export."""

    def only_names(node: ast.stmt) -> bool:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return True
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Assign):
            return [ast.unparse(target) for target in node.targets] == ["__all__"]
        return for_types(node) and isinstance(node, ast.If) and all(map(only_names, node.body))

    return [ast.unparse(node).splitlines()[0] for node in ast.parse(file.read_text()).body if not only_names(node)]


def for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(tree: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """All nodes outside of `if TYPE_CHECKING`, those of functions too; with `types` only the nodes inside of it."""

    def walk(node: ast.AST, inside: bool) -> Iterator[ast.AST]:
        if inside == types:
            yield node
        chosen = node.body if for_types(node) and isinstance(node, ast.If) else []
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or child in chosen)

    return walk(tree, False)


class Source:
    """The source files and what their imports mean: a name that a package re-exports belongs to the file it is from."""

    def __init__(self, source: Path = SOURCE) -> None:
        self.files = names_of_files(source)
        self._packages = {
            file.parent.relative_to(source).as_posix().removeprefix("."): file for file in source.rglob("__init__.py")
        }
        self._exports = {name: self._re_exported(file) for name, file in self._packages.items()}

    def imports(self, *, types: bool = False) -> Graph:
        """What each file imports; with `types` what it imports for its annotations alone."""
        return {name: self._imports_of(file, types=types) - {name} for name, file in self.files.items()}

    def _re_exported(self, file: Path) -> dict[str, tuple[str, str]]:
        """By name: the module and the name there."""
        tree = ast.parse(file.read_text())
        found: dict[str, tuple[str, str]] = {}
        for types in (True, False):
            for node in statements(tree, types=types):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "limner":
                    found.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        return found

    def _imports_of(self, file: Path, *, types: bool) -> set[str]:
        found: set[str] = set()
        for node in statements(ast.parse(file.read_text()), types=types):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    raise SystemExit(f"{file}: relative import; name the module from limner on")
                if node.module and node.module.split(".")[0] == "limner":
                    for alias in node.names:
                        found |= self._owners(node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("limner."):
                        found |= self._owners(alias.name, None)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and str(argument.value).startswith("limner."):
                        found |= self._owners(str(argument.value), None)
        return found

    def _owners(self, module: str, name: str | None, seen: tuple[tuple[str, str | None], ...] = ()) -> set[str]:
        """The files that `from module import name` needs; with None, all that `import module` needs."""
        path = "/".join(module.split(".")[1:])
        if path in self.files:
            return {path}
        if path not in self._packages or (module, name) in seen:
            return set()
        seen = (*seen, (module, name))
        own = f"{path}/__init__" if path else "__init__"
        if name is None:
            found = {own} & self.files.keys()
            for inner, inner_name in self._exports[path].values():
                found |= self._owners(inner, inner_name, seen)
            return found
        inner_path = f"{path}/{name}".removeprefix("/")
        if inner_path in self.files or inner_path in self._packages:
            return self._owners(f"{module}.{name}", None, seen)
        if name in self._exports[path]:
            return self._owners(*self._exports[path][name], seen)
        return {own} & self.files.keys()


# The block of the document


def block(kind: str, document: Path = DOCUMENT) -> list[list[str]]:
    """The names on each line of a fenced block of the document; `a/{b,c}` stands for `a/b a/c`."""
    found = re.search(rf"^```{kind}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [list(expanded(line)) for line in found[1].splitlines()] if found else []


def expanded(line: str) -> Iterator[str]:
    for word in line.split():
        folder, brace, names = word.partition("{")
        yield from (folder + name for name in names.removesuffix("}").split(",")) if brace else [word]


def folded(names: Iterable[str]) -> str:
    """The reverse: files of one folder are written as `folder/{a,b}`."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, own = name.rpartition("/")
        folders.setdefault(folder, []).append(own)
    words = []
    for folder, inner in folders.items():
        if not folder:
            words += inner
        else:
            words.append(f"{folder}/{inner[0]}" if len(inner) == 1 else f"{folder}/{{{','.join(inner)}}}")
    return " ".join(words)


def broken(order: list[list[str]], graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The pairs (file, import) whose import does not stand on a lower line."""
    rank = {name: line for line, names in enumerate(order) for name in names}
    return [
        (name, other)
        for name in sorted(graph, key=lambda name: rank.get(name, -1))
        for other in sorted(graph[name])
        if name in rank and other in rank and rank[other] >= rank[name]
    ]


# Sorting


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of files that import one another, each in a sorted list (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def layered(graph: Graph) -> list[list[str]]:
    """Each file as low as its imports allow; a circle, which no order allows, on one line."""
    left, lines = set(graph), []
    while left:
        inside = {name: graph[name] & left for name in left}
        ready = sorted(name for name in left if not inside[name]) or circles(inside)[0]
        lines.append(ready)
        left -= set(ready)
    return lines


def package_of(name: str) -> str:
    """The unit that stays together: a folder, and inside of `server` one folder deeper. A file of its own is one."""
    parts = name.split("/")
    if len(parts) == 1:
        return name
    return "/".join(parts[:2]) if parts[0] == "server" else parts[0]


def by_package(graph: Graph, prefer: Callable[[str], tuple[int, bool, str]]) -> list[list[str]]:
    """All lines anew: packages after one another, the files of each in as few lines as they need."""
    units: Graph = {}
    for name, others in graph.items():
        units.setdefault(package_of(name), set()).update(map(package_of, others))
    for unit, others in units.items():
        others.discard(unit)
    joined = {unit: group[0] for group in circles(units) for unit in group}
    merged: Graph = {}
    for unit, others in units.items():
        head = joined.get(unit, unit)
        merged.setdefault(head, set()).update({joined.get(other, other) for other in others} - {head})
    lines: list[list[str]] = []
    left = set(merged)
    while left:
        unit = min((unit for unit in left if not merged[unit] & left), key=prefer)
        left.remove(unit)
        own = {name for name in graph if joined.get(package_of(name), package_of(name)) == unit}
        for names in layered({name: graph[name] & own for name in own}):
            needed = [number for number, line in enumerate(lines) if any(graph[name] & set(line) for name in names)]
            fitting = range(max(needed, default=-1) + 1, len(lines))
            line = next((lines[i] for i in fitting if len(folded(lines[i] + names)) <= WIDTH), None)
            if line is None:
                lines.append(names)
            else:
                line += names
    return lines


def with_new_files(order: list[list[str]], graph: Graph) -> list[list[str]]:
    """The lines of the document without files that are gone, and with new ones where they fit; [] if one does not."""
    order = [[name for name in line if name in graph] for line in order]
    order = [line for line in order if line]
    users: Graph = {name: {other for other in graph if name in graph[other]} for name in graph}
    known = {name for line in order for name in line}
    for name in [name for line in layered(graph) for name in line if name not in known]:
        rank = {other: number for number, line in enumerate(order) for other in line}
        low = max((rank[other] for other in graph[name] if other in rank), default=-1)
        high = min((rank[other] for other in users[name] if other in rank), default=len(order))
        if high <= low:
            return []
        fitting = range(low + 1, high)
        same = [number for number in fitting if package_of(name) in map(package_of, order[number])]
        room = [number for number in fitting if len(folded([*order[number], name])) <= WIDTH]
        if same or room:
            order[(same or room)[0]].append(name)
        else:
            order.insert(low + 1, [name])
    return order if not broken(order, graph) else []


def proposed(graph: Graph, present: list[list[str]], *, fresh: bool = False) -> list[list[str]]:
    """The lines to stand in the document."""
    kept = [] if fresh else with_new_files(present, graph)
    if kept:
        return kept
    seen = [package_of(name) for line in present for name in line]

    def prefer(unit: str) -> tuple[int, bool, str]:
        """As in the document; else files of their own first."""
        return (
            seen.index(unit) if unit in seen else len(seen),
            any(name.startswith(f"{unit}/") for name in graph),
            unit,
        )

    return by_package(graph, prefer)


def main() -> int:
    parser = argparse.ArgumentParser(description="The order of imports in docs/architecture.md.")
    parser.add_argument("--write", action="store_true", help="put the block into the document")
    parser.add_argument("--fresh", action="store_true", help="compute all lines anew")
    options = parser.parse_args()
    source = Source()
    graph = source.imports()
    for group in circles(graph):
        pairs = [f"{name} imports {other}" for name in group for other in sorted(graph[name] & set(group))]
        print(f"a circle: {'; '.join(pairs)}", file=sys.stderr)
    present = block("order")
    order = proposed(graph, present, fresh=options.fresh)
    text = "".join(f"{folded(line)}\n" for line in order)
    print(text, end="")
    for name, other in broken(order, source.imports(types=True)):
        print(f"for types alone, to be listed below the block: {name} imports {other}", file=sys.stderr)
    if options.write:
        whole = DOCUMENT.read_text()
        replaced, count = re.subn(
            r"^```order\n.*?^```", lambda _: f"```order\n{text}```", whole, flags=re.MULTILINE | re.DOTALL
        )
        if count != 1:
            print(f"{DOCUMENT}: {count} blocks start with ```order, not one", file=sys.stderr)
            return 1
        DOCUMENT.write_text(replaced)
    return 1 if circles(graph) or (order != present and not options.write) else 0


if __name__ == "__main__":
    sys.exit(main())
