"""What the names of a pack were given when it was imported: what may change in it, and what can be copied."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from comfy_parallel.isolation.packs.expressions import GENERATORS, arguments, last_name, parts
from comfy_parallel.isolation.packs.scopes import FUNCTIONS, own_nodes
from comfy_parallel.isolation.packs.sources import Pack, Thing

_EMPTY_MAKERS = {
    *("dict", "list", "set", "OrderedDict", "defaultdict", "deque", "Counter"),
    *("WeakValueDictionary", "WeakKeyDictionary", "WeakSet"),
}
_ARRAY_MAKERS = {
    *("zeros", "ones", "empty", "full", "tensor", "array", "arange", "linspace", "eye", "asarray", "rand", "randn"),
    *GENERATORS,
}
_PLAIN_MAKERS = {
    *_EMPTY_MAKERS,
    *_ARRAY_MAKERS,
    *("SimpleNamespace", "Namespace", "bytearray", "copy", "deepcopy", "partial"),
}
SAFE_MAKERS = {
    *("Lock", "RLock", "Event", "Condition", "Semaphore", "BoundedSemaphore", "Barrier", "local", "Queue"),
    *("SimpleQueue", "LifoQueue", "PriorityQueue", "getLogger", "ContextVar", "ThreadPoolExecutor", "TypeVar"),
    "count",  # of itertools: a number for each that asks
}
_READ_ONLY = {
    "len",
    "list",
    "tuple",
    "set",
    "dict",
    "sorted",
    "str",
    "max",
    "min",
    "sum",
    "frozenset",
    "copy",
    "deepcopy",
}


def value_of(pack: Pack, thing: Thing) -> ast.expr | None:
    """The expression that the import gives a name or class attribute, where there is one."""
    file = pack.files[thing.path]
    owner, _, name = thing.name.rpartition(".")
    if owner:
        return file.attributes(owner).get(name) if owner in file.classes else None
    return file.values.get(name)


def maker(value: ast.expr | None) -> str:
    """The last name of what is called to make it."""
    return last_name(value.func) if isinstance(value, ast.Call) else ""


def is_empty(value: ast.expr | None) -> bool:
    """Whether it is an empty container."""
    match value:
        case ast.Dict(keys=[]) | ast.List(elts=[]):
            return True
        case ast.Call(args=args):
            return maker(value) in _EMPTY_MAKERS and (not args or maker(value) == "defaultdict")
    return False


def may_change(pack: Pack, thing: Thing, value: ast.expr | None) -> bool:
    """Whether it is a container, or an object of the pack that holds something."""
    match value:
        case ast.Dict() | ast.List() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
            return True
        case ast.Call(func=func):
            made_of = pack.resolve(thing.path, func)
            if made_of is not None and made_of.kind == "class":
                bases = pack.base_classes(made_of)
                return any(_holds_something(pack.files[base.path].classes[base.name]) for base in bases)
            return maker(value) in _PLAIN_MAKERS - _ARRAY_MAKERS
    return False


def _holds_something(node: ast.ClassDef) -> bool:
    return any(
        isinstance(part, ast.Assign | ast.AnnAssign) or (isinstance(part, ast.FunctionDef) and part.name == "__init__")
        for part in node.body
    )


def can_be_copied(pack: Pack, thing: Thing, value: ast.expr | None) -> bool:
    """Whether `copies.own_copy` makes another one of it."""
    if not isinstance(value, ast.Call):
        return not isinstance(value, ast.GeneratorExp | ast.Lambda)
    made_of = pack.resolve(thing.path, value.func)
    if made_of is not None and made_of.kind == "function":
        return not _is_generator(pack.files[made_of.path].functions[made_of.name])
    if maker(value) == "iter":  # of a list that stands there: what waits to be replaced by a job's own
        return all(isinstance(given, ast.List | ast.Tuple) for given in value.args)
    return maker(value) in _PLAIN_MAKERS or (made_of is not None and made_of.kind in ("class", "method"))


def _is_generator(function: ast.AST) -> bool:
    return any(isinstance(node, ast.Yield | ast.YieldFrom) for node in own_nodes(function))


def can_be_held(pack: Pack, holder: Thing) -> bool:
    """Whether a copy of `holder` would hold a copy of what it holds: not so for a function around it."""
    value = value_of(pack, holder)
    made_of = pack.resolve(holder.path, value.func) if isinstance(value, ast.Call) else None
    return can_be_copied(pack, holder, value) and (made_of is None or made_of.kind != "function")


def holders(pack: Pack) -> dict[Thing, set[Thing]]:
    """For each name or class attribute, those that hold it since the import: its other names, what was made with it."""
    found: dict[Thing, set[Thing]] = defaultdict(set)
    for path, file in pack.files.items():
        values = [(Thing("name", path, name), value) for name, value in file.values.items()]
        for owner in file.classes:
            attributes = file.attributes(owner).items()
            values += [(Thing("attribute", path, f"{owner}.{name}"), value) for name, value in attributes]
        for holder, value in values:
            for part in _held(pack, holder.path, value):
                thing = pack.resolve(path, part)
                if thing is not None and thing.kind in ("name", "attribute") and thing != holder:
                    found[thing].add(holder)
    return found


def _held(pack: Pack, path: str, value: ast.expr | None) -> Iterator[ast.expr]:
    for part in parts(value):
        match part:
            case ast.Name() | ast.Attribute():
                yield part
            case ast.Dict(values=values):
                for inner in values:
                    yield from _held(pack, path, inner)
            case ast.Call(func=func) if not _only_reads(pack, path, func):
                for inner in arguments(part):
                    yield from _held(pack, path, inner)


def _only_reads(pack: Pack, path: str, called: ast.expr) -> bool:
    """Whether what a call returns does not hold what it is given, most probably."""
    thing = pack.resolve(path, called)
    if thing is None or thing.kind != "function":
        return isinstance(called, ast.Name) and called.id in _READ_ONLY
    function = pack.files[thing.path].functions[thing.name]
    return not (_is_generator(function) or any(isinstance(node, FUNCTIONS) for node in own_nodes(function)))
