"""Applies all patches to a host in this process and takes them off again; prints what that left, as JSON.

usage: python tests/host/apply_revert.py HOST_DIR BASE_DIR {off|late|failures}...|early

late: the host is imported first, patched and restored three times. early: patched first, then imported, as
in a real start. failures: one failure injected at each patch. off: the start script is run as the host does
it, with the scheduler off.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import operator
import os
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[2]
HOST_MODULES = ("comfy.utils", "execution", "server", "nodes", "comfy.model_management")
ROUNDS = 3
Snapshot = dict[str, dict[str, Any]]


def enter_host(host_dir: str, base_dir: str) -> None:
    """What main.py does before it runs the custom nodes' prestartup scripts."""
    os.environ |= {"COMFY_MULTI_GPU_SCHED": "1", "COMFY_PARALLEL_DEVICES": "cpu,cpu"}
    os.chdir(host_dir)
    sys.path[:0] = [host_dir, str(REPO_DIR)]
    sys.argv = ["main.py", "--cpu", "--base-directory", base_dir, "--database-url", "sqlite:///:memory:"]
    import comfy.options

    comfy.options.enable_args_parsing()
    for name in ("utils.extra_config", "comfy_execution.progress", "folder_paths"):
        importlib.import_module(name)


def import_host() -> None:
    from comfy_parallel import patches

    for name in dict.fromkeys((*HOST_MODULES, *(patch.module for patch in patches.ALL))):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise


def snapshot() -> Snapshot:
    """Every module's namespace and class, and those of the classes that patches reach into, by identity."""
    taken = {
        name: {**vars(module), "(class)": type(module)}
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] not in ("comfy_parallel", "__main__")
    }
    for name, owner in classes():
        taken[name] = dict(vars(owner))
    taken["sys"] = {"meta_path": list(sys.meta_path)}  # the rest of it belongs to the interpreter
    taken["sys.modules"] = {name: module for name, module in sys.modules.items() if "comfy_parallel" not in name}
    return taken


def classes() -> Iterator[tuple[str, type]]:
    from comfy_parallel import patches

    for patch in patches.ALL:
        owner: Any = sys.modules.get(patch.module)
        for parent in patch.path[:-1]:
            owner = getattr(owner, parent, None)
        if isinstance(owner, type):
            yield f"{patch.module}:{'.'.join(patch.path[:-1])}", owner


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    found = [f"{owner} is {'new' if owner in after else 'gone'}" for owner in before.keys() ^ after.keys()]
    for owner in before.keys() & after.keys():
        if is_all_same(before[owner], after[owner]):
            continue
        names = before[owner].keys() | after[owner].keys()
        found += [f"{owner}.{name}" for name in names if not is_same(before[owner], after[owner], name)]
    return sorted(found)


def is_all_same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """A quick look; False says nothing."""
    return list(before) == list(after) and all(map(operator.is_, before.values(), after.values()))


def is_same(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    if name == "meta_path":
        return before[name] == after[name]
    return (name in before) == (name in after) and before.get(name) is after.get(name)


def remnants() -> list[str]:
    """Names in modules of others that still lead to something of comfy_parallel."""
    return sorted(
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and module.__name__.partition(".")[0] not in ("comfy_parallel", "__main__")
        for name, value in list(vars(module).items())
        if is_ours(value)
    )


def is_ours(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return Path(value.__code__.co_filename).is_relative_to(REPO_DIR / "comfy_parallel")
    kinds = type.mro(value if isinstance(value, type) else type(value))
    return any(str(vars(kind).get("__module__")).startswith("comfy_parallel") for kind in kinds)


def late() -> dict[str, Any]:
    import_host()
    import comfy_parallel

    before = snapshot()
    rounds = []
    for _ in range(ROUNDS):
        is_on = comfy_parallel.install()
        changed = differences(before, snapshot())
        comfy_parallel.uninstall()
        rounds.append({"is_on": is_on, "changed": changed, "left": differences(before, snapshot())})
    return {"rounds": rounds, "remnants": remnants()}


def early() -> dict[str, Any]:
    import comfy_parallel

    is_on = comfy_parallel.install()
    import_host()
    patch_set = sys.modules["comfy_parallel.install"]._patches  # The package has a function of this name.
    missing = None if patch_set is None else patch_set.missing()
    with_patches = remnants()
    comfy_parallel.uninstall()
    return {"is_on": is_on, "missing": missing, "with_patches": with_patches, "remnants": remnants()}


def failures() -> dict[str, Any]:
    import_host()
    from comfy_parallel import patches
    from comfy_parallel.errors import HostMismatch
    from comfy_parallel.patching.patch_set import PatchSet

    def fail(self: Any, module: ModuleType) -> Any:
        raise ValueError("injected")

    def mismatch(self: Any, module: ModuleType) -> Any:
        raise HostMismatch("injected")

    def fail_after(self: Any, module: ModuleType) -> Iterator[Any]:
        yield from type(self).__mro__[1].apply(self, module)
        raise ValueError("injected")

    present = [patch for patch in patches.ALL if patch.module in sys.modules]  # others are never applied
    firsts = list({patch.module: patch for patch in reversed(present)}.values())
    lasts = list({patch.module: patch for patch in present}.values())
    kinds = {  # A module's patches are all checked before the first of them is applied.
        "mismatch": (lasts, {"check_live": mismatch}),
        "check": (lasts[-1:], {"check_live": fail}),
        "apply": (firsts[-1:], {"apply": fail}),
        "after": (present, {"apply": fail_after}),
    }
    before = snapshot()
    outcomes: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for kind, (failing, methods) in kinds.items():
        for patch in failing:
            told: list[str] = []
            patch_set = PatchSet(
                tuple(broken(each, methods) if each is patch else each for each in patches.ALL),
                lambda reason, told=told: told.append(f"all: {reason}"),
                lambda what, reason, told=told: told.append(f"{what}: {reason}"),
            )
            patch_set.install()
            is_untouched = not differences(before, snapshot())
            patch_set.revert()
            outcomes[kind].append([patch.target, patch.feature, told, is_untouched, differences(before, snapshot())])
    return {"present": [patch.target for patch in present], "outcomes": outcomes}


def broken(patch: Any, methods: dict[str, Any]) -> Any:
    """The same patch with other methods."""
    kind = type("Broken", (type(patch),), methods)
    return kind(**{field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)})


def off() -> dict[str, Any]:
    import_host()
    results = {}
    for value in (None, "0"):
        os.environ.pop("COMFY_MULTI_GPU_SCHED", None)
        if value is not None:
            os.environ["COMFY_MULTI_GPU_SCHED"] = value
        before, environment, threads = snapshot(), dict(os.environ), threading.enumerate()
        runpy.run_path(str(REPO_DIR / "prestartup_script.py"))
        results[str(value)] = {
            "changed": differences(before, snapshot()),
            "new_threads": len(set(threading.enumerate()) - set(threads)),
            "same_environment": environment == dict(os.environ),
        }
    os.environ["COMFY_MULTI_GPU_SCHED"] = "1"
    return {"results": results, "remnants": remnants()}


def main() -> None:
    host_dir, base_dir, *modes = sys.argv[1:]
    enter_host(host_dir, base_dir)
    runs = {"off": off, "late": late, "failures": failures, "early": early}
    result = {mode: runs[mode]() for mode in modes}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
