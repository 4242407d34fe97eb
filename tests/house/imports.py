"""Which module imports which, read from the syntax trees of all files; nothing is imported.

Seen are `import` and `from` statements, absolute and relative, at the top of a file, inside
functions and under `TYPE_CHECKING`, and modules that are named by a string: as an argument of
`importlib.import_module` and its like, in the tables of `tokenprune.lazy`, and anywhere else in the
code, docstrings left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

When = Literal["start", "later", "typing", "string"]
"""At import time, inside a function, for type checkers alone, or by a string."""

_LOADERS = {"import_module", "__import__", "find_spec", "resolve_name", "run_module", "lazy_names"}
_PREFIX = re.compile(r"(?:[a-zA-Z_]\w*\.)+")  # of a module whose last name is put in later
_DOTTED = re.compile(r"[a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)*")


@dataclass(frozen=True, order=True)
class Import:
    """One module naming another.

    Attributes
    ----------
    source, target
        Dotted names; the target as precise as the file says it.
    line
        In the source's file.
    when
        See `When`.
    """

    source: str
    target: str
    line: int
    when: When

    @property
    def packages(self) -> tuple[str, str]:
        """The top-level packages of source and target."""
        return self.source.partition(".")[0], self.target.partition(".")[0]


def modules_of(roots: Mapping[str, Path]) -> dict[str, Path]:
    """Return dotted name -> file, for every file of packages: name -> folder."""
    found = {}
    for package, folder in roots.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names = [package, *(parts[:-1] if parts[-1] == "__init__" else parts)]
            found[".".join(names)] = path
    return found


def imports_of(modules: Mapping[str, Path]) -> list[Import]:
    """Return every import of every module, also of packages that `modules` does not have."""
    found = (one for name, path in modules.items() for one in _Reader(name, path, modules).read())
    return list(dict.fromkeys(found))


class _Reader:
    """Reads one file."""

    def __init__(self, name: str, path: Path, modules: Mapping[str, Path]) -> None:
        self.name, self.modules = name, modules
        self.is_package = path.name == "__init__.py"
        self.tree = ast.parse(path.read_text("utf-8"), str(path))
        self.ours = {module.partition(".")[0] for module in modules}

    def read(self) -> Iterator[Import]:
        yield from self._statements(self.tree, "start")
        yield from self._strings()

    def _statements(self, node: ast.AST, when: When) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = when
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside = "later" if when == "start" else when
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(self.name, alias.name, child.lineno, when)
            elif isinstance(child, ast.ImportFrom):
                yield from self._from(child, when)
            elif isinstance(child, ast.If) and _is_type_checking(child.test):
                for statement in child.body:
                    yield from self._statements(ast.Module([statement], []), "typing")
                for statement in child.orelse:
                    yield from self._statements(ast.Module([statement], []), when)
            else:
                yield from self._statements(child, inside)

    def _from(self, node: ast.ImportFrom, when: When) -> Iterator[Import]:
        base = node.module or ""
        if node.level:
            # One dot is the package that the module is in; a package is in itself.
            parts = self.name.split(".")
            up = node.level - 1 if self.is_package else node.level
            base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
        for alias in node.names:
            within = f"{base}.{alias.name}"
            target = within if within in self.modules else base
            yield Import(self.name, target, node.lineno, when)

    def _strings(self) -> Iterator[Import]:
        """Yield modules that strings name: constants, and the beginnings of f-strings."""
        documentation = set(_docstrings(self.tree))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _called(node) == "lazy_names":
                yield from self._lazy(node)
            if isinstance(node, ast.JoinedStr):
                first = node.values[0] if node.values else None
                if isinstance(first, ast.Constant) and _PREFIX.fullmatch(str(first.value)):
                    package = str(first.value).partition(".")[0]
                    if package in self.ours:
                        yield Import(self.name, package, node.lineno, "string")
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            target = self._named(node.value)
            if target is not None and id(node) not in documentation:
                yield Import(self.name, target, node.lineno, "string")
        for node in ast.walk(self.tree):
            # Whatever a loader is given counts, also what is no module of ours.
            if isinstance(node, ast.Call) and _called(node) in _LOADERS and node.args:
                text = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                if isinstance(text, str) and _DOTTED.fullmatch(text) and self._named(text) is None:
                    yield Import(self.name, text, node.lineno, "string")

    def _named(self, text: str) -> str | None:
        """Return the module of ours that a string names, as a whole or with a name in it."""
        module = text.partition(":")[0]
        if module.partition(".")[0] not in self.ours or not _DOTTED.fullmatch(module):
            return None
        while module not in self.modules:
            module = module.rpartition(".")[0]
            if not module:
                return None
        if "." not in text and ":" not in text and text == self.name.partition(".")[0]:
            return None  # a package's own name
        return module

    def _lazy(self, call: ast.Call) -> Iterator[Import]:
        """Yield the homes in a table of lazy names: ``lazy_names("package", _HOMES)``."""
        package, table = call.args[:2]
        if isinstance(table, ast.Name):
            table = next(
                node.value
                for node in self.tree.body
                if isinstance(node, ast.Assign)
                and any(isinstance(to, ast.Name) and to.id == table.id for to in node.targets)
            )
        if not isinstance(table, ast.Dict) or not isinstance(package, ast.Constant):
            raise TypeError(f"{self.name}:{call.lineno}: lazy_names takes a name and a table")
        for home in table.values:
            if not isinstance(home, ast.Constant):
                raise TypeError(f"{self.name}:{home.lineno}: a home must be written out")
            # A home outside the package is written in full.
            target = self._named(str(home.value)) or f"{package.value!s}.{home.value!s}"
            yield Import(self.name, target, home.lineno, "string")


def _called(node: ast.Call) -> str:
    """Return the last name of what is called."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _docstrings(tree: ast.Module) -> Iterator[int]:
    """Yield the ids of string constants that are statements: docstrings of all kinds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield id(node.value)


def wrong_ways(imports: Iterable[Import], allowed: Mapping[str, set[str]]) -> list[Import]:
    """Return imports between packages that `allowed`, source -> targets, does not have."""
    return sorted(
        one
        for one in imports
        for source, target in [one.packages]
        if target in allowed and source != target and target not in allowed[source]
    )


def circles(edges: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Return the sets of nodes that can all be reached from each other (Tarjan 1972)."""
    following: dict[str, set[str]] = {}
    for source, target in edges:
        following.setdefault(source, set()).add(target)
        following.setdefault(target, set())
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_nodes: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        open_nodes.append(node)
        for target in sorted(following[node]):
            if target not in number:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in open_nodes:
                lowest[node] = min(lowest[node], number[target])
        if lowest[node] == number[node]:
            place = open_nodes.index(node)
            circle = set(open_nodes[place:])
            del open_nodes[place:]
            if len(circle) > 1 or node in following[node]:
                found.append(circle)

    for node in sorted(following):
        if node not in number:
            visit(node)
    return found


def file_circles(imports: Iterable[Import]) -> list[set[str]]:
    """Return circles of files at import time."""
    return circles((one.source, one.target) for one in imports if one.when == "start")


def room_circles(imports: Iterable[Import], modules: Mapping[str, Path]) -> list[set[str]]:
    """Return circles of rooms: packages and subpackages, by whatever is imported at any time."""
    edges = set()
    for one in imports:
        if one.when != "typing" and one.target in modules:
            source, target = _room(one.source, modules), _room(one.target, modules)
            if source != target:
                edges.add((source, target))
    return circles(edges)


def _room(module: str, modules: Mapping[str, Path]) -> str:
    """Return the package that a module is in, or is."""
    return module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
