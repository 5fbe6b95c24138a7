"""What expressions and calls do to the values in them, as far as their form tells."""

from __future__ import annotations

import ast
from collections.abc import Iterator

KEYED = {"setdefault", "pop", "popitem", "move_to_end", "add", "discard"}
GENERATORS = {"Random", "RandomState", "default_rng", "Generator"}
SEEDS = {"seed", "manual_seed", "setstate", "set_state"}
_MUTATORS = {
    *KEYED,
    *SEEDS,
    *("append", "appendleft", "insert", "remove", "clear", "update", "extend", "extendleft"),
    *("popleft", "sort", "reverse", "rotate", "subtract", "put_nowait", "__setitem__", "__delitem__"),
    *("fill", "itemset", "partition", "__setstate__", "send"),
}
_CHANGING = ("set", "reset", "seed", "load", "add", "push", "register", "enable", "disable", "write", "configure")
_CHANGING_NAMES = {"truncate", "seek", "clear", "update", "put", "insert", "remove"}
_CHANGE_ARGUMENTS = {
    *("copyto", "put", "place", "putmask", "fill_diagonal", "shuffle", "insort", "insort_left", "insort_right"),
    *("heappush", "heappop", "heapify", "heapreplace", "heappushpop", "exec", "next"),
}
_GIVE_ITEMS = {"get", "setdefault", "values", "items"}
_OF_ITEMS = {"enumerate", "zip", "reversed", "list", "tuple", "sorted", "iter"}


def changes_its_object(method: str) -> bool:
    """Whether a method called so changes what it is called on: a container, an array, a tensor, a generator."""
    return method in _MUTATORS or is_in_place(method)


def is_in_place(name: str) -> bool:
    """Whether torch would call so a function or method that works in place."""
    return name.endswith("_") and not name.startswith("_")


def changes_its_arguments(function: str) -> bool:
    """Whether a function of Python, numpy or torch that is called so changes what it is given."""
    return function in _CHANGE_ARGUMENTS or is_in_place(function)


def sounds_like_a_change(method: str) -> bool:
    """Whether a method of an object of which nothing else is known may change it."""
    return method.startswith(_CHANGING) or method in _CHANGING_NAMES


def parts(node: ast.expr | None) -> Iterator[ast.expr]:
    """The expressions whose values an expression may be, or hold as items."""
    for option in options(node):
        match option:
            case ast.Tuple(elts=values) | ast.List(elts=values) | ast.Set(elts=values):
                for value in values:
                    yield from parts(value)
            case ast.Starred(value=value):
                yield from parts(value)
            case ast.Call(func=ast.Name(id=name), args=args) if name in _OF_ITEMS:
                for value in args:
                    yield from parts(value)
            case _:
                yield option


def options(node: ast.expr | None) -> Iterator[ast.expr]:
    """The expressions of which one gives the value."""
    match node:
        case None:
            return
        case ast.IfExp(body=body, orelse=other):
            yield from (*options(body), *options(other))
        case ast.BoolOp(values=values):
            for value in values:
                yield from options(value)
        case ast.NamedExpr(value=value) | ast.Await(value=value):
            yield from options(value)
        case _:
            yield node


def lies_in(node: ast.expr) -> ast.expr | None:
    """What `node` is a part of: `x` for `x.y`, `x[1]` and `x.get(1)`."""
    match node:
        case ast.Attribute(value=value) | ast.Subscript(value=value):
            return value
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _GIVE_ITEMS:
            return value
    return None


def paired(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Names that are assigned to, and the expression that each gets its value from."""
    if not isinstance(target, ast.Tuple | ast.List):
        yield target, value
    elif isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
        for inner, given in zip(target.elts, value.elts, strict=True):
            yield from paired(inner, given)
    else:
        # A part of the value, which is as good as an item of it.
        item = ast.copy_location(ast.Subscript(value, ast.Constant(0), ast.Load()), value)
        for inner in target.elts:
            yield from paired(inner, item)


def defaults(arguments: ast.arguments) -> Iterator[tuple[ast.arg, ast.expr]]:
    """The parameters that have a default."""
    placed = [*arguments.posonlyargs, *arguments.args]
    yield from zip(placed[len(placed) - len(arguments.defaults) :], arguments.defaults, strict=True)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            yield argument, default


def arguments(call: ast.Call) -> list[ast.expr]:
    """What a call passes on."""
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def last_name(node: ast.expr) -> str:
    """`c` of `a.b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
