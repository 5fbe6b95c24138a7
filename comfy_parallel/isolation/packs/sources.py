"""The source files of one node pack, and what their names stand for."""

from __future__ import annotations

import ast
import functools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_HOST = {"comfy", "comfy_extras", "comfy_execution", "comfy_api", "execution", "folder_paths", "nodes", "server"}
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", ".venv", ".git", "tests", "test"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Thing:
    """What a name stands for: a `module`, `name`, `function`, `class` or class `attribute` of the pack's, or something
    `outside` of it, where `name` is dotted."""

    kind: str
    path: str
    name: str = ""


@dataclass
class File:
    """One source file: what its module level defines. `path` is relative to the pack's folder."""

    path: str
    tree: ast.Module
    values: dict[str, ast.expr | None] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    declared: set[str] = field(default_factory=set)
    writes_to_others: bool = False  # to attributes of other things than `self`, as far as can be told; or it caches

    def __post_init__(self) -> None:
        for statement in _module_level(self.tree):
            self._add(statement)
        for node in ast.walk(self.tree):
            self._add_import(node)
            if isinstance(node, ast.Global):
                self.declared.update(node.names)
            self.writes_to_others = self.writes_to_others or _writes_to_others(node)
        for name in self.declared:
            if name not in self.functions and name not in self.classes:
                self.values.setdefault(name, None)

    def attributes(self, class_name: str) -> dict[str, ast.expr | None]:
        """What the body of a class assigns."""
        found: dict[str, ast.expr | None] = {}
        for node in self.classes[class_name].body:
            found.update(_assigned(node))
        return found

    def methods(self, class_name: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
        """The functions in the body of a class."""
        return {node.name: node for node in self.classes[class_name].body if isinstance(node, _DEFINITIONS)}

    def _add(self, node: ast.stmt) -> None:
        if isinstance(node, _DEFINITIONS):
            self.functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            self.classes[node.name] = node
        for name, value in _assigned(node).items():
            self.values.setdefault(name, value)

    def top_imports(self) -> Iterator[ast.ImportFrom]:
        """The `from … import …` statements at module level."""
        return (node for node in _module_level(self.tree) if isinstance(node, ast.ImportFrom))

    def _add_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                self.imports.setdefault(alias.asname or whole, (whole, None))
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                if alias.name == "*":
                    self.stars.append(module)
                else:
                    self.imports.setdefault(alias.asname or alias.name, (module, alias.name))


class Pack:
    """All source files of a pack: a folder, or one file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {file.path: file for file in _read(root)}

    def look_up(self, path: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Thing | None:
        """What a global name of one file stands for, wherever it was imported from."""
        file = self.files[path]
        if (path, name) in seen:
            return None
        for kind, names in (("class", file.classes), ("function", file.functions), ("name", file.values)):
            if name in names and (kind != "name" or name not in file.imports or name in file.declared):
                return Thing(kind, path, name)
        if name in file.imports:
            return self._imported(path, *file.imports[name], seen=seen | {(path, name)})
        for module in file.stars:
            target = self.find(path, module)
            found = self.look_up(target, name, seen | {(path, name)}) if target else None
            if found is not None:
                return found
        return None

    def member(self, thing: Thing, name: str) -> Thing | None:
        """What an attribute of something stands for."""
        if thing.kind == "outside":
            return Thing("outside", "", f"{thing.name}.{name}")
        if thing.kind == "module":
            return self.look_up(thing.path, name) or Thing("name", thing.path, name)
        if thing.kind == "class":
            return self._class_member(thing, name)
        if thing.kind == "function":
            return Thing("attribute", thing.path, f"{thing.name}.{name}")
        return None

    @functools.cached_property
    def method_names(self) -> set[str]:
        """The names of all methods of the pack's classes."""
        return {name for file in self.files.values() for owner in file.classes for name in file.methods(owner)}

    def base_classes(self, thing: Thing) -> Iterator[Thing]:
        """The classes of the pack that a class of the pack is made of, itself first."""
        yield thing
        for base in self.files[thing.path].classes[thing.name].bases:
            found = self.resolve(thing.path, base)
            if found is not None and found.kind == "class" and found != thing:
                yield from self.base_classes(found)

    def resolve(self, path: str, node: ast.expr) -> Thing | None:
        """What an expression at module level stands for, as far as names and attributes tell."""
        if isinstance(node, ast.Name):
            return self.look_up(path, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(path, node.value)
            return None if owner is None else self.member(owner, node.attr)
        return None

    def find(self, path: str, module: str) -> str | None:
        """The file of a module that another file imports under this name."""
        return self._find(path, module)

    def _class_member(self, thing: Thing, name: str) -> Thing | None:
        for owner in self.base_classes(thing):
            file = self.files[owner.path]
            if name in file.methods(owner.name):
                return Thing("method", owner.path, f"{owner.name}.{name}")
            if name in file.attributes(owner.name):
                return Thing("attribute", owner.path, f"{owner.name}.{name}")
        return Thing("attribute", thing.path, f"{thing.name}.{name}")

    def _imported(self, path: str, module: str, name: str | None, seen: frozenset[tuple[str, str]]) -> Thing | None:
        target = self._find(path, module)
        if name is None:
            return Thing("module", target) if target else Thing("outside", "", module)
        below = self._find(path, f"{module}{'' if module.endswith('.') else '.'}{name}")
        if target is None and below is None:
            return Thing("outside", "", f"{module}.{name}")
        found = self.look_up(target, name, seen) if target else None
        return found or (Thing("module", below) if below else None)

    def _find(self, path: str, module: str) -> str | None:
        level = len(module) - len(module.lstrip("."))
        parts = [part for part in module.lstrip(".").split(".") if part]
        if level:
            folder = PurePosixPath(path).parent
            for _ in range(level - 1):
                folder = folder.parent
            return self._file_at(str(folder.joinpath(*parts)))
        if not parts or parts[0] in _HOST or parts[0] in sys.stdlib_module_names:
            return None
        return self._by_end.get("/".join(parts))

    def _file_at(self, place: str) -> str | None:
        place = "" if place == "." else place
        options = (f"{place}.py", f"{place}/__init__.py" if place else "__init__.py")
        return next((option for option in options if option in self.files), None)

    @functools.cached_property
    def _by_end(self) -> dict[str, str]:
        """Packs put their own folders on `sys.path`, so any end of a path may be a module's name."""
        found: dict[str, str] = {}
        for path in sorted(self.files, key=lambda path: path.count("/")):
            parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
            for start in range(len(parts)):
                found.setdefault("/".join(parts[start:]), path)
        return found


def source_paths(root: Path) -> list[Path]:
    """The source files of a pack, but for its tests and what was installed into it."""
    if root.is_file():
        return [root]
    return [path for path in sorted(root.rglob("*.py")) if not _SKIPPED & set(path.relative_to(root).parts[:-1])]


def _read(root: Path) -> Iterator[File]:
    for path in source_paths(root):
        tree = parsed(path)
        if tree is not None:
            yield File(path.relative_to(root.parent if root.is_file() else root).as_posix(), tree)


def parsed(path: Path) -> ast.Module | None:
    """The syntax tree of a file; None where Python could not import it either."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None


def _module_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported, but for those in classes."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.If | ast.Try | ast.With | ast.For | ast.While | ast.ExceptHandler):
            yield from _module_level(child)


def _writes_to_others(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=owner, ctx=ast.Store() | ast.Del()):
            return not (isinstance(owner, ast.Name) and owner.id == "self")
        case ast.Name(id="setattr" | "delattr" | "vars" | "globals" | "lru_cache" | "cache"):
            return True
        case ast.Attribute(attr="__dict__" | "__setattr__" | "lru_cache" | "cache"):
            return True
    return False


def _assigned(node: ast.stmt) -> dict[str, ast.expr | None]:
    match node:
        case ast.Assign(targets=targets, value=value):
            names = [leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
            return {leaf.id: value for leaf in names if isinstance(leaf.ctx, ast.Store)}
        case ast.AnnAssign(target=ast.Name(id=name), value=value):
            return {name: value} if value is not None else {}
        case ast.AugAssign(target=ast.Name(id=name), value=value):
            return {name: value}
    return {}
