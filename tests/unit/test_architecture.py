"""The rules that keep the package readable, checked on its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPO_DIR = Path(__file__).resolve().parents[2]
PACKAGE = REPO_DIR / "comfy_parallel"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

HOST = {
    "api_server",
    "app",
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_aimdo",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "cuda_malloc",
    "execution",
    "folder_paths",
    "hook_breaker_ac10a0",
    "latent_preview",
    "main",
    "middleware",
    "node_helpers",
    "nodes",
    "protocol",
    "server",
    "utils",
}
MAX_LINES = 400
# Each folder imports only from rows further down; folders of one row do not import each other.
ORDER = (
    ("ops",),
    ("install",),
    ("patches",),
    ("http", "ui", "nodes"),
    ("fleet",),
    ("weights", "graphs", "isolation", "host"),
    ("slots",),
    ("journal",),
    ("patching", "core"),
    ("config",),
    ("errors",),
)
ROW = {place: row for row, places in enumerate(ORDER) for place in places}
ENTRY = {"", "__main__"}  # `comfy_parallel` itself and `python -m comfy_parallel`: above all rows.
# Without torch, aiohttp and the host.
PURE = (
    "config",
    "errors",
    "core",
    "patching",
    "nodes.allocation",
    "nodes.plan",
    "slots.items",
    "slots.queues",
    "slots.sight",
    "slots.slot",
    "isolation.interrupts",
)
PRINTS = {"ops/cli.py"}
EDGES = {
    "ops/cli.py",
    "slots/device.py",
    "install.py",
    "isolation/glance.py",
    "isolation/process_state.py",
    "fleet/ray/driver.py",  # These two are programs of their own.
    "fleet/ray/worker.py",
}


def place_of(name: str) -> str:
    """The folder of a file, or the file itself where it lies at the top: `slots`, `config`."""
    return name.partition("/")[0].removesuffix(".py").replace("__init__", "")


def own_imports(name: str) -> Iterator[str]:
    """The places in the package that a file imports from, anywhere in it."""
    for node in ast.walk(TREES[name]):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "comfy_parallel":
            modules = [f"comfy_parallel.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "comfy_parallel" and rest.partition(".")[0] in ROW:
                yield rest.partition(".")[0]


def imports(name: str, *, at_module_level: bool = False) -> Iterator[str]:
    """The top-level packages that a file imports, anywhere or when it is imported itself."""
    for node in module_level(TREES[name]) if at_module_level else ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module.partition(".")[0]


def module_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from module_level(child)


def test_the_package_was_found() -> None:
    assert {"__init__.py", "slots/queues.py", "patches/__init__.py"} <= FILES.keys()


def test_every_file_has_a_place_in_the_order() -> None:
    assert {place_of(name) for name in FILES} - ENTRY <= ROW.keys()


def test_folders_import_only_from_further_down() -> None:
    def allowed(place: str, imported: str) -> bool:
        return place in ENTRY or place == imported or ROW[place] < ROW[imported]

    wrong = {
        f"{name} imports {used}" for name in FILES for used in own_imports(name) if not allowed(place_of(name), used)
    }
    assert wrong == set()


def test_only_http_imports_aiohttp() -> None:
    importers = {name for name in FILES if "aiohttp" in imports(name)}
    assert {place_of(name) for name in importers - {"fleet/remote/wire.py"}} == {"http"}


def test_only_host_and_patches_import_comfyui() -> None:
    importers = [name for name in FILES if set(imports(name)) & HOST]
    assert {place_of(name) for name in importers} <= {"host", "patches"}


def test_imports_are_absolute() -> None:
    statements = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)]
    assert [name for name, node in statements if isinstance(node, ast.ImportFrom) and node.level] == []


def test_no_module_imports_torch_numpy_or_the_host_when_it_is_imported() -> None:
    """The package is imported before ComfyUI has set the environment that torch reads."""
    eager = {name: set(imports(name, at_module_level=True)) & ({"torch", "numpy"} | HOST) for name in FILES}
    assert {name: found for name, found in eager.items() if found} == {}


def test_the_pure_modules_work_without_torch_aiohttp_and_the_host() -> None:
    forbidden = sorted({"torch", "numpy", "aiohttp", "psutil", "prometheus_client"} | HOST)
    modules = {f"comfy_parallel.{name.removesuffix('.py').replace('/', '.')}" for name in FILES}
    pure = [
        module for module in sorted(modules) if f"{module}.".startswith(tuple(f"comfy_parallel.{p}." for p in PURE))
    ]
    code = f"""
import importlib, sys
for name in {pure}:
    importlib.import_module(name)
loaded = [name for name in {forbidden} if name in sys.modules]
sys.exit(", ".join(loaded) or None)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO_DIR, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")


def test_installing_with_the_scheduler_off_loads_no_patch() -> None:
    code = """
import sys
import comfy_parallel
assert comfy_parallel.install({}) is False
loaded = [name for name in sys.modules if name.startswith(("torch", "aiohttp", "comfy_parallel.patches"))]
sys.exit(", ".join(loaded) or None)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO_DIR, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")


def test_no_file_is_too_long() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_nothing_prints_but_the_command_line() -> None:
    names = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assert {name for name, node in names if node.id == "print"} <= PRINTS


def test_every_file_says_what_it_is_for() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_only_the_edges_read_the_environment() -> None:
    nodes = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)]
    readers = {name for name, node in nodes if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")}
    assert readers <= EDGES
