"""Applies all patches to a host in this process and takes them off again; prints what that left, as JSON.

usage: python tests/host/apply_revert.py HOST_DIR BASE_DIR {late|early|failures}

late: the host is imported first, patched and restored three times. early: patched first, then imported, as
in a real start. failures: one failure injected at each patch.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
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
        names = before[owner].keys() | after[owner].keys()
        found += [f"{owner}.{name}" for name in names if not is_same(before[owner], after[owner], name)]
    return sorted(found)


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
    owner = value if isinstance(value, type) else type(value)
    return str(vars(owner).get("__module__")).startswith("comfy_parallel")


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
    import comfy_parallel.start as start

    missing = start._patches.missing() if start._patches is not None else None
    with_patches = remnants()
    comfy_parallel.uninstall()
    return {"is_on": is_on, "missing": missing, "with_patches": with_patches, "remnants": remnants()}


def failures() -> dict[str, Any]:
    import_host()
    from comfy_parallel import patches
    from comfy_parallel.errors import HostMismatch
    from comfy_parallel.patching import PatchSet

    def fail(exception: type[Exception]) -> Callable[..., Any]:
        def raise_it(self: Any, module: ModuleType) -> Any:
            raise exception("injected")

        return raise_it

    def fail_after(self: Any, module: ModuleType) -> Iterator[Any]:
        yield from type(self).__mro__[1].apply(self, module)
        raise ValueError("injected")

    kinds = {
        "mismatch": {"check_live": fail(HostMismatch)},
        "check": {"check_live": fail(ValueError)},
        "apply": {"apply": fail(ValueError)},
        "after": {"apply": fail_after},
    }
    before = snapshot()
    outcomes: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for index, patch in enumerate(patches.ALL):
        if patch.module not in sys.modules:
            continue  # not in this host: never applied
        for kind, methods in kinds.items():
            failing = type("Failing", (type(patch),), methods)
            fields = {field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)}
            told: list[Any] = []
            changed = (*patches.ALL[:index], failing(**fields), *patches.ALL[index + 1 :])
            patch_set = PatchSet(changed, told.append)
            try:
                patch_set.install()
            except ValueError as error:
                told.append(error)
            outcomes[kind].append([patch.target, [str(each) for each in told], differences(before, snapshot())])
            patch_set.revert()
    return outcomes


def main() -> None:
    host_dir, base_dir, what = sys.argv[1:]
    enter_host(host_dir, base_dir)
    result = {"late": late, "early": early, "failures": failures}[what]()
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
