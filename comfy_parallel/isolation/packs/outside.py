"""What is done about what a pack's jobs change outside of the pack."""

from __future__ import annotations

import sys

from comfy_parallel.isolation.packs.finding import ALONE, HOST_WRITE, PER_SLOT, SHARED, SWITCH
from comfy_parallel.isolation.packs.uses import Change

_OF_THE_INTERPRETER = ("sys", "builtins")  # Code in C reads their names, and asks for no slot's.
_TABLES = ("os.environ", "sys.modules")
_HOSTS = ("comfy", "nodes", "execution", "comfy_extras", "latent_preview")
_INNARDS = ("__code__", "__defaults__", "__kwdefaults__", "__closure__", "__class__", "__bases__")


def outside_treatment(change: Change) -> tuple[str, str, str]:
    """The kind of finding that a change is, what is done about it, and why; the kind is empty for no finding."""
    name = change.thing.name
    top = name.partition(".")[0]
    if name.startswith("torch.backends."):
        return SWITCH, ALONE, "torch has one for all threads"
    if top in sys.stdlib_module_names and (name in _TABLES or change.how == "rebind"):
        return _of_python(change, top)
    if "PromptServer" in name or top in ("server", "folder_paths"):
        return HOST_WRITE, SHARED, "the server's"
    if change.how == "rebind":
        if name.rpartition(".")[2] in _INNARDS:
            return HOST_WRITE, ALONE, "changed in place for all slots"
        return HOST_WRITE, PER_SLOT, "ends with the job"
    if change.how == "call" or top not in _HOSTS or _is_patched(name):
        return "", "", ""
    if change.is_guarded:
        return HOST_WRITE, SHARED, "an entry that is made once"
    return HOST_WRITE, ALONE, "changed in place for all slots"


def _of_python(change: Change, top: str) -> tuple[str, str, str]:
    if change.how == "rebind":
        if top in _OF_THE_INTERPRETER and change.thing.name not in ("sys.stdout", "sys.stderr"):
            return HOST_WRITE, ALONE, "Python's own, one for all threads"
        return HOST_WRITE, PER_SLOT, "ends with the job"
    if change.is_guarded or change.is_constant:
        return HOST_WRITE, SHARED, "the same for all jobs"
    return HOST_WRITE, ALONE, "Python's own, one for all threads"


def _is_patched(name: str) -> bool:
    return name.startswith("comfy.model_management.current_loaded_models")
