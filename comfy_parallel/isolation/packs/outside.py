"""What is done about what a pack's jobs change outside of the pack."""

from __future__ import annotations

import sys

from comfy_parallel.isolation.packs.finding import ALONE, HOST_WRITE, IN_TURN, PER_SLOT, SHARED, SWITCH
from comfy_parallel.isolation.packs.uses import Change

_OF_THE_INTERPRETER = ("sys", "builtins")  # Code in C reads their names, and asks for no slot's.
_TABLES = ("os.environ", "sys.modules")
_HOSTS = ("comfy", "nodes", "execution", "comfy_extras", "latent_preview")
_OF_THE_SERVER = {"number", "client_id", "last_node_id", "last_prompt_id", "messages", "sockets"}
_INNARDS = ("__code__", "__defaults__", "__kwdefaults__", "__closure__", "__class__", "__bases__")


# Functions that set something for the whole process, and who keeps that.
SWITCHES = {
    **dict.fromkeys(
        (
            *("torch.set_default_dtype", "torch.set_default_tensor_type", "torch.set_float32_matmul_precision"),
            *("torch.use_deterministic_algorithms", "torch.set_flush_denormal", "torch.set_deterministic_debug_mode"),
            *("torch.backends.cuda.enable_flash_sdp", "torch.backends.cuda.enable_math_sdp"),
            *("torch.backends.cuda.enable_mem_efficient_sdp", "torch.backends.cuda.enable_cudnn_sdp"),
            "torch.backends.cuda.preferred_linalg_library",
        ),
        "torch",
    ),
    **{f"folder_paths.set_{kind}_directory": "the host" for kind in ("output", "input", "temp", "user")},
}


def outside_treatment(change: Change) -> tuple[str, str, str]:
    """The kind of finding that a change is, what is done about it, and why; the kind is empty for no finding."""
    name = change.thing.name
    top = name.partition(".")[0]
    if name.startswith("torch.backends."):
        return SWITCH, ALONE, "torch has one for all threads"
    if top in sys.stdlib_module_names and (name in _TABLES or change.how == "rebind"):
        return _of_python(change, top)
    if "PromptServer" in name or top == "server":
        return _of_the_server(change)
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


def _of_the_server(change: Change) -> tuple[str, str, str]:
    """A pack's own attribute of the server that jobs give other values is as one of the pack's."""
    is_hosts = change.thing.name.rpartition(".")[2] in _OF_THE_SERVER
    if change.how != "rebind" or change.is_guarded or change.is_constant or is_hosts:
        return HOST_WRITE, SHARED, "the server's"
    return HOST_WRITE, IN_TURN, "kept on the server, for all slots"


def _is_patched(name: str) -> bool:
    return name.startswith("comfy.model_management.current_loaded_models")
