"""The source of a host, read without importing it: from a checkout, or from wherever its files are kept."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from comfy_parallel.errors import HostMismatch


class HostFiles(Protocol):
    """The files of one host, by their paths inside it, with `/` between the parts."""

    def read(self, path: str) -> str | None:
        """The text of a file; None where there is none."""

    def python_files(self) -> Iterable[str]:
        """The paths of all Python files."""


class Checkout:
    """A folder that holds a host, or some of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: str) -> str | None:
        file = self.folder / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def python_files(self) -> Iterable[str]:
        return (file.relative_to(self.folder).as_posix() for file in sorted(self.folder.rglob("*.py")))


class ModuleSource:
    """The definitions of one source file, found without importing it."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)

    def find(self, path: list[str]) -> ast.AST | None:
        """The node that defines a dotted path, or None."""
        body: Iterable[ast.stmt] = self.tree.body
        node: ast.AST | None = self.tree
        for name in path:
            node = _definition(body, name)
            body = getattr(node, "body", [])
        return node


def _definition(body: Iterable[ast.stmt], name: str) -> ast.AST | None:
    found: ast.AST | None = None
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = statement if statement.name == name else found
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            leaves = [leaf for target in targets for leaf in ast.walk(target)]
            names = [leaf.id for leaf in leaves if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)]
            found = statement if name in names else found
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            found = statement if name in [alias.asname or alias.name for alias in statement.names] else found
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            blocks = [getattr(statement, block, []) for block in ("body", "orelse", "finalbody")]
            handlers = [handler.body for handler in getattr(statement, "handlers", [])]
            found = _definition([s for block in (*blocks, *handlers) for s in block], name) or found
    return found


def file_of(module: str) -> str:
    """The file of a module that is no package, by its path inside the host."""
    return f"{module.replace('.', '/')}.py"


def source_of(module: str, files: HostFiles) -> ModuleSource | None:
    """The source of a module of the host; None when it is not one of the host's.

    Raises:
        HostMismatch: when its file is no Python that we can read.
    """
    base = module.replace(".", "/")
    for path in (f"{base}.py", f"{base}/__init__.py"):
        try:
            text = files.read(path)
            if text is not None:
                return ModuleSource(text)
        except (SyntaxError, ValueError) as error:
            raise HostMismatch(f"{path}: cannot be read: {error}") from error
    return None
