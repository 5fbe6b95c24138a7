"""What each function of a pack does with what the whole process shares: names it touches, changes and calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from comfy_parallel.isolation.packs import expressions
from comfy_parallel.isolation.packs.expressions import KEYED, changes_its_object
from comfy_parallel.isolation.packs.objects import set_on_self
from comfy_parallel.isolation.packs.scopes import FUNCTIONS, SCOPES, Scope, is_global, outer_parts, scope_of
from comfy_parallel.isolation.packs.sources import Pack, Thing

MODULE = "<module>"
STATE = ("name", "attribute")  # the kinds of things that hold something
Function = ast.FunctionDef | ast.AsyncFunctionDef
_ROUTES = {"get", "post", "put", "delete", "patch", "view", "head", "ws", "route", "middleware"}


@dataclass(frozen=True)
class Change:
    """One change of a thing: `rebind` (the name itself), `key` (one entry), `call` (of a method that changes objects of
    other libraries, by its name) or `mutate` (the rest). `is_constant`: every job would write the same."""

    thing: Thing
    how: str
    path: str
    line: int
    is_guarded: bool = False
    is_constant: bool = False


@dataclass
class Unit:
    """A function or method with all that is defined in it, or the module level of a file."""

    path: str
    name: str
    changes: list[Change] = field(default_factory=list)
    touches: set[Thing] = field(default_factory=set)
    lets_go: set[Thing] = field(default_factory=set)  # returned, kept elsewhere or passed on: changed who knows where
    refers: set[Thing] = field(default_factory=set)
    calls_only: set[Thing] = field(default_factory=set)  # of `refers`: those that are called or decorate, no more
    methods_called: set[str] = field(default_factory=set)  # of objects of which it cannot be told what they are
    calls: list[tuple[Thing, ast.Call]] = field(default_factory=list)
    unknown_calls: list[tuple[str, ast.Call]] = field(default_factory=list)
    seeds: list[ast.Attribute] = field(default_factory=list)  # of generators of which cannot be told whose they are
    is_route: bool = False  # or has one in it

    @property
    def class_name(self) -> str | None:
        return self.name.partition(".")[0] if "." in self.name else None


def units(pack: Pack) -> Iterator[Unit]:
    """The functions and methods of a pack, and a unit for each file's module level."""
    for path, file in pack.files.items():
        top = Unit(path, MODULE)
        _Walk(pack, top, None).walk_module(file.tree)
        yield top
        for name, function in file.functions.items():
            yield _used(pack, path, name, function, None)
        for class_name in file.classes:
            for name, function in file.methods(class_name).items():
                yield _used(pack, path, f"{class_name}.{name}", function, class_name)


def _used(pack: Pack, path: str, name: str, function: Function, class_name: str | None) -> Unit:
    unit = Unit(path, name)
    _Walk(pack, unit, class_name).walk_function(function)
    return unit


class _Walk(ast.NodeVisitor):
    """Fills a unit."""

    def __init__(self, pack: Pack, unit: Unit, class_name: str | None) -> None:
        self._pack, self._unit, self._class = pack, unit, class_name
        self._file = pack.files[unit.path]
        self._scopes: list[Scope] = []
        self._aliases: dict[str, Thing] = {}
        self._within: dict[str, set[Thing]] = {}  # local names of what lies in things
        self._is_constant = False
        self._guards: list[set[str]] = []
        self._itself: set[str] = set()

    def walk_module(self, tree: ast.Module) -> None:
        """All that runs at import; the bodies of functions and methods are units of their own."""
        self.generic_visit(tree)

    def walk_function(self, function: Function) -> None:
        self._unit.is_route = any(map(_is_route, function.decorator_list))
        if self._class is not None:
            arguments = [*function.args.posonlyargs, *function.args.args]
            self._itself = {arguments[0].arg} if arguments else set()
        self._inside(function)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, SCOPES):
            self._open(node)
        else:
            super().visit(node)

    def _open(self, node: ast.AST) -> None:
        for part in outer_parts(node):
            decorates = part in getattr(node, "decorator_list", ())
            self._refer(part) if decorates and isinstance(part, ast.expr) else self.visit(part)
            self._unit.is_route |= decorates and self._unit.name != MODULE and _is_route(part)
        is_unit = self._unit.name == MODULE and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not is_unit:
            self._inside(node)

    def _inside(self, node: ast.AST) -> None:
        is_code = self._unit.name != MODULE or isinstance(node, FUNCTIONS)
        outer = set(map(id, outer_parts(node)))
        if is_code:
            if isinstance(node, FUNCTIONS):
                self._alias_defaults(node.args)
            self._scopes.append(scope_of(node))
        for child in ast.iter_child_nodes(node):
            if id(child) not in outer:
                self.visit(child)
        if is_code:
            self._scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._alias(target, node.value)
        if not all(isinstance(target, ast.Name) for target in node.targets):
            self._let_go(node.value)
        self._is_constant = isinstance(node.value, ast.Constant)
        for target in node.targets:
            self.visit(target)
        self._is_constant = False
        self.visit(node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._alias(node.target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._alias_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._alias_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        self._let_go(node.value)
        self.generic_visit(node)

    def visit_Yield(self, node: ast.Yield) -> None:
        self._let_go(node.value)
        self.generic_visit(node)

    def _alias(self, target: ast.expr, value: ast.expr) -> None:
        """A local name becomes another name of a thing, or of what lies in it."""
        for one, given in expressions.paired(target, value):
            if not isinstance(one, ast.Name) or not self._scopes or is_global(one.id, self._scopes):
                continue
            thing = self._resolve(given)
            if thing is not None:
                self._aliases[one.id] = thing
            else:
                for option in expressions.options(given):
                    self._note_within(one.id, {thing for thing, _ in self._roots(option)})

    def _alias_items(self, target: ast.expr, iterated: ast.expr) -> None:
        for leaf in ast.walk(target) if self._scopes else ():
            if isinstance(leaf, ast.Name):
                self._note_within(leaf.id, self._all_roots(iterated))

    def _note_within(self, name: str, things: set[Thing]) -> None:
        self._within.setdefault(name, set()).update(thing for thing in things if thing.kind in STATE)

    def _alias_defaults(self, arguments: ast.arguments) -> None:
        """A parameter whose default is a thing may be that thing."""
        for argument, default in expressions.defaults(arguments):
            thing = self._resolve(default)
            if thing is not None and thing.kind in STATE:
                self._aliases[argument.arg] = thing
                self._unit.touches.add(thing)

    def _let_go(self, value: ast.expr | None) -> None:
        found = map(self._resolve, expressions.parts(value))
        self._unit.lets_go.update(thing for thing in found if thing is not None and thing.kind in STATE)

    def visit_If(self, node: ast.If) -> None:
        """`if x is None: x = …` makes a thing on first use; so do `if key not in x` and an early return."""
        self.visit(node.test)
        named = [leaf for leaf in ast.walk(node.test) if isinstance(leaf, ast.Name | ast.Attribute)]
        names = {leaf.id if isinstance(leaf, ast.Name) else leaf.attr for leaf in named}
        self._guards.append(names if _asks_for_absence(node.test) else set())
        for statement in node.body:
            self.visit(statement)
        self._guards.pop()
        if isinstance(node.body[-1], ast.Return | ast.Raise):
            self._guards.append(names)
        for statement in node.orelse:
            self.visit(statement)

    def visit_Name(self, node: ast.Name) -> None:
        thing = self._resolve(node)
        if thing is None:
            return
        if not isinstance(node.ctx, ast.Load):
            if self._scopes and is_global(node.id, self._scopes):
                self._change(thing, "rebind", node)
            return
        self._note(thing)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        thing = self._resolve(node)
        if not isinstance(node.ctx, ast.Load):
            self._store(node, thing)
        elif thing is not None:
            self._note(thing)
        elif isinstance(node.ctx, ast.Load):
            self._unit.methods_called.add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not isinstance(node.ctx, ast.Load):
            for root, depth in self._roots(node.value):
                self._change(root, "key" if depth == 0 else "mutate", node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        thing = self._resolve(node.func)
        if thing is not None:
            self._unit.calls.append((thing, node))
        elif isinstance(node.func, ast.Attribute):
            self._unit.unknown_calls.append((node.func.attr, node))
        if isinstance(node.func, ast.Attribute):
            self._call_method(node.func, node)
        if isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr") and len(node.args) > 1:
            self._set_attribute(node)
        self._pass_on(node, thing)
        self._refer(node.func)
        for part in (*node.args, *node.keywords):
            self.visit(part)

    def _call_method(self, method: ast.Attribute, node: ast.Call) -> None:
        roots = self._roots(method.value)
        if not roots and method.attr in expressions.SEEDS and isinstance(method.value, ast.Attribute):
            self._unit.seeds.append(method)
        for root, depth in roots:
            if root.kind == "outside" and expressions.is_in_place(method.attr):
                continue  # a function of a module
            if changes_its_object(method.attr):
                self._change(root, "key" if depth == 0 and method.attr in KEYED else "mutate", node)
            elif depth == 0 and root.kind == "name" and expressions.sounds_like_a_change(method.attr):
                self._change(root, "call", node)

    def _pass_on(self, node: ast.Call, called: Thing | None) -> None:
        """What is passed on may be changed by who gets it, or kept."""
        name = called.name.rpartition(".")[2] if called is not None else expressions.last_name(node.func)
        is_of_the_pack = name in self._pack.method_names if called is None else called.kind != "outside"
        if is_of_the_pack or name == "partial":
            for argument in expressions.arguments(node):
                self._let_go(argument)
        elif expressions.changes_its_arguments(name) and (called is not None or isinstance(node.func, ast.Name)):
            for argument in expressions.arguments(node):
                self._change_all(argument, node)
        for keyword in node.keywords:
            if keyword.arg == "out":
                self._change_all(keyword.value, node)

    def _change_all(self, value: ast.expr, node: ast.AST) -> None:
        for root in self._all_roots(value):
            if root.kind in STATE:
                self._change(root, "mutate", node)

    def _set_attribute(self, node: ast.Call) -> None:
        owner = self._resolve(node.args[0])
        if owner is None or owner.kind not in ("outside", "module", "class"):
            for root in self._all_roots(node.args[0]):
                self._change(root, "mutate", node)
            return
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else "*"
        thing = self._pack.member(owner, str(name))
        if thing is not None:
            self._change(thing, "rebind", node)

    def _store(self, node: ast.Attribute, thing: Thing | None) -> None:
        owner = self._resolve(node.value)
        if owner is not None and owner.kind == "instance":
            return
        if thing is not None:
            self._change(thing, "rebind", node)
            return
        for root in self._all_roots(node.value):
            self._change(root, "mutate", node)

    def _refer(self, node: ast.expr) -> None:
        """Something is called, or decorates."""
        known = self._unit.refers - self._unit.calls_only
        self.visit(node)
        thing = self._resolve(node)
        if thing is not None and thing in self._unit.refers and thing not in known:
            self._unit.calls_only.add(thing)

    def _note(self, thing: Thing) -> None:
        if thing.kind in STATE:
            self._unit.touches.add(thing)
        elif thing.kind in ("function", "class", "method"):
            self._unit.refers.add(thing)
            self._unit.calls_only.discard(thing)

    def _change(self, thing: Thing, how: str, node: ast.AST) -> None:
        if thing.kind in STATE:
            self._unit.touches.add(thing)
        elif thing.kind != "outside" and how != "rebind":
            return
        name = thing.name.rpartition(".")[2]
        is_guarded = any(name in guard for guard in self._guards)
        line = getattr(node, "lineno", 0)
        self._unit.changes.append(Change(thing, how, self._unit.path, line, is_guarded, self._is_constant))

    def _roots(self, node: ast.expr) -> list[tuple[Thing, int]]:
        """The shared things at the start of `thing[…].x[…]`, and how many steps it is from there."""
        inner: ast.expr | None = node
        depth = 0
        while inner is not None:
            thing = self._resolve(inner)
            if thing is not None and thing.kind in (*STATE, "outside"):
                return [(thing, depth)]
            if isinstance(inner, ast.Name):
                return [(found, depth + 1) for found in sorted(self._within.get(inner.id, ()), key=str)]
            inner, depth = expressions.lies_in(inner), depth + 1
        return []

    def _all_roots(self, node: ast.expr) -> set[Thing]:
        return {thing for part in expressions.parts(node) for thing, _ in self._roots(part)}

    def _resolve(self, node: ast.expr) -> Thing | None:
        match node:
            case ast.Name(id=name):
                return self._resolve_name(name)
            case ast.Attribute(value=value, attr="__class__"):
                owner = self._resolve(value)
                return Thing("class", owner.path, owner.name) if owner and owner.kind == "instance" else None
            case ast.Call(func=ast.Name(id="type"), args=[argument]):
                owner = self._resolve(argument)
                return Thing("class", owner.path, owner.name) if owner and owner.kind == "instance" else None
            case ast.Attribute(value=value, attr=attr):
                owner = self._resolve(value)
                if owner is None:
                    return None
                return self._of_instance(owner, attr) if owner.kind == "instance" else self._pack.member(owner, attr)
        return None

    def _resolve_name(self, name: str) -> Thing | None:
        if not self._scopes or is_global(name, self._scopes):
            return self._pack.look_up(self._unit.path, name)
        if name in self._itself and self._class is not None:
            is_class = name in ("cls", "s", "c", "mcs", "klass") or self._is_class_method()
            return Thing("class" if is_class else "instance", self._unit.path, self._class)
        if name in self._aliases:
            return self._aliases[name]
        return self._pack.look_up(self._unit.path, name) if name in self._file.imports else None

    def _is_class_method(self) -> bool:
        method = self._file.methods(str(self._class)).get(self._unit.name.rpartition(".")[2])
        decorators = method.decorator_list if method is not None else []
        return any(isinstance(node, ast.Name) and node.id == "classmethod" for node in decorators)

    def _of_instance(self, owner: Thing, name: str) -> Thing | None:
        """A class's attribute that is reached through an object, unless objects have their own of it."""
        member = self._pack.member(Thing("class", owner.path, owner.name), name)
        if member is None or member.kind == "method":
            return member
        for base in self._pack.base_classes(Thing("class", owner.path, owner.name)):
            file = self._pack.files[base.path]
            if any(name in set_on_self(method) for method in file.methods(base.name).values()):
                return None
        defined = member.path in self._pack.files and name in self._pack.files[member.path].attributes(
            member.name.partition(".")[0]
        )
        return member if defined else None


def _asks_for_absence(test: ast.expr) -> bool:
    return any(isinstance(leaf, ast.Not | ast.Is | ast.NotIn) for leaf in ast.walk(test))


def _is_route(decorator: ast.AST) -> bool:
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    if not isinstance(decorator, ast.Attribute) or decorator.attr not in _ROUTES:
        return False
    owner = ast.unparse(decorator.value).lower()
    return any(word in owner for word in ("route", "app", "server", "web"))
