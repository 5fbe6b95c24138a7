"""Find what a node pack does to the seams that we use ourselves: the host's queue, its workers, its routes, its
devices."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from comfy_parallel.isolation.packs.finding import Clash, pack_name
from comfy_parallel.isolation.packs.fixed_devices import MAY_NAME, fixed_devices
from comfy_parallel.isolation.packs.sources import parsed, source_paths

_ROUTES = {"/prompt", "/queue", "/interrupt", "/free", "/history", "/queue/all", "/debug/queues", "/metrics"}
_METHODS = {"get", "post", "route", "add_get", "add_post", "add_route"}
_QUEUE = {"put", "get", "task_done", "get_current_queue", "get_current_queue_volatile", "get_tasks_remaining"}
_REPLACED = {
    "PromptQueue": _QUEUE,
    "PromptExecutor": {"execute", "execute_async", "reset"},
    "PromptServer": {"send_sync", "trigger_on_prompt", "queue_updated", "prompt_queue"},
}
_WHOLE = {"PromptQueue", "PromptExecutor", "PromptServer", "prompt_queue"}
# What a file with a clash has in it; the others, nearly all, need not be parsed. Escapes may hide a string's letters.
_MAY_CLASH = re.compile(
    rb"queue|PromptExecutor|PromptServer|\binstance\b|/(api|prompt|interrupt|free|history|metrics)\b|\\[xuN0-7]",
    re.IGNORECASE,
)
_FOR_QUEUES = (
    "every slot's jobs pass through it; if they do not run, take this part out of the pack or use one of the two"
)
_FOR_OTHERS = "it is then called for the jobs of all slots, on several threads at once"


def clashes(pack_dir: Path) -> list[Clash]:
    """What a pack (a folder, or one file) replaces of the host's queue, executor, server and routes, and the devices
    that it names itself."""
    root = pack_dir.parent if pack_dir.is_file() else pack_dir
    trees = [(path.relative_to(root).as_posix(), tree) for path in source_paths(pack_dir) if (tree := _tree_of(path))]
    found = {clash for path, tree in trees for clash in _of_tree(path, tree)}
    found.update(fixed_devices(pack_name(pack_dir), trees))
    return sorted(found, key=lambda clash: (clash.file, clash.line))


def _tree_of(path: Path) -> ast.Module | None:
    try:
        text = path.read_bytes()
    except OSError:  # Python cannot import it either
        return None
    return parsed(path) if _MAY_CLASH.search(text) or MAY_NAME.search(text) else None


def _of_tree(path: str, tree: ast.Module) -> Iterator[Clash]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _replaced(path, target)
        elif isinstance(node, ast.Call):
            yield from _set(path, node)
            yield from _routed(path, node)


def _replaced(path: str, target: ast.expr) -> Iterator[Clash]:
    """`PromptQueue.get = …`, `server.prompt_queue.put = …`, `execution.PromptQueue = …`."""
    if not isinstance(target, ast.Attribute):
        return
    owner, name = ast.unparse(target.value).rpartition(".")[2], target.attr
    owner = "PromptServer" if owner == "instance" else owner
    is_queue = owner.lower().endswith("queue") and name in _QUEUE
    if is_queue or (name in _WHOLE and owner != "self") or name in _REPLACED.get(owner, ()):
        consequence = _FOR_QUEUES if is_queue or "queue" in name.lower() else _FOR_OTHERS
        yield Clash(f"it replaces {owner}.{name}", consequence, path, target.lineno)


def _set(path: str, call: ast.Call) -> Iterator[Clash]:
    """`setattr(PromptQueue, "get", …)`."""
    match call:
        case ast.Call(func=ast.Name(id="setattr"), args=[owner, ast.Constant(value=str(name)), _]):
            made = ast.parse(f"{ast.unparse(owner)}.{name}", mode="eval").body
            for clash in _replaced(path, made):
                yield Clash(clash.what, clash.consequence, path, call.lineno)


def _routed(path: str, call: ast.Call) -> Iterator[Clash]:
    """`routes.post("/prompt")`, `app.router.add_route("POST", "/prompt", …)`."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in _METHODS:
        return
    owner = ast.unparse(call.func.value).lower()
    if not any(word in owner for word in ("route", "app")):
        return
    words = [arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    for route in words:
        if route.removeprefix("/api") in _ROUTES:
            consequence = "whichever of the two was there first answers: jobs sent there may not reach the slots"
            yield Clash(f"it takes the route {route}", consequence, path, call.lineno)
