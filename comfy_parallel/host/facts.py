"""Everything we ask of the host, ComfyUI, besides the patches."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from comfy_parallel.errors import HostMismatch
from comfy_parallel.slots.slot import current_slot


def directory() -> Path:
    """The host's root folder, in whose process we are.

    Raises:
        HostMismatch: when this process is no ComfyUI.
    """
    spec = importlib.util.find_spec("folder_paths")
    if spec is None or spec.origin is None:
        raise HostMismatch("folder_paths: not found; comfy_parallel.install() belongs in ComfyUI's process")
    return Path(spec.origin).resolve().parent


def version(host_dir: Path) -> str:
    """The version a checkout says it has; `unknown` where it says none."""
    path = host_dir / "comfyui_version.py"
    if not path.is_file():
        return "unknown"
    namespace = dict(line.partition("=")[::2] for line in path.read_text().splitlines() if "=" in line)
    return namespace.get("__version__ ", namespace.get("__version__", '"unknown"')).strip().strip("\"'")


def device_type() -> str:
    """What the host computes on: `cuda`, `cpu`, `xpu`, `mps`."""
    import comfy.model_management

    return str(comfy.model_management.get_torch_device().type)


def vram(device: str) -> dict[str, int]:
    """A device's memory as the host counts it, in bytes: what torch holds without using it is free."""
    import comfy.model_management
    import torch

    total = int(comfy.model_management.get_total_memory(torch.device(device)))
    free = int(comfy.model_management.get_free_memory(torch.device(device)))
    return {"used_bytes": max(0, total - free), "free_bytes": free}


def least_to_compute() -> int:
    """How many bytes of a device the host keeps free of models, to compute at all."""
    import comfy.model_management

    return int(comfy.model_management.minimum_inference_memory())


def allows_origins() -> bool:
    """Whether the host answers requests from other origins (`--enable-cors-header`)."""
    from comfy.cli_args import args

    return bool(args.enable_cors_header)


def may_pin() -> bool:
    """Whether the host may pin memory (`--disable-pinned-memory`)."""
    from comfy.cli_args import args

    return not getattr(args, "disable_pinned_memory", False)


def temp_directory() -> str:
    """Where the host keeps what it shows and does not save."""
    import folder_paths

    return str(folder_paths.get_temp_directory())


def set_temp_directory(path: str) -> None:
    """Have the host keep such files there."""
    import folder_paths

    folder_paths.set_temp_directory(path)


def has_argument(name: str) -> bool:
    """Whether the host's command line knows an argument, written as an attribute: `database_url`."""
    from comfy.cli_args import args

    return hasattr(args, name)


def weight_files(folder: str) -> list[str]:
    """The files of a model folder, as the host's loader nodes know them."""
    import folder_paths

    return folder_paths.get_filename_list(folder) if folder in folder_paths.folder_names_and_paths else []


def weight_name(path: str) -> str:
    """A weight file's folder and name as the loader nodes know them; its last part when it is in none."""
    import folder_paths

    for folder, (roots, _) in folder_paths.folder_names_and_paths.items():
        for root in roots:
            if folder != "custom_nodes" and Path(path).is_relative_to(root):
                return f"{folder}/{Path(path).relative_to(root).as_posix()}"
    return Path(path).name


def node_classes() -> dict[str, type]:
    """The classes of all nodes that the host has loaded, by the names that workflows use."""
    import nodes

    return dict(nodes.NODE_CLASS_MAPPINGS)


def raise_if_interrupted() -> None:
    """What the host's nodes call now and then.

    Raises:
        InterruptProcessingException: the host's, when the job was interrupted.
    """
    import comfy.model_management

    slot = current_slot()
    if slot is not None and slot.run is not None:
        slot.run.alive_at = time.monotonic()  # Who waits for others has not stalled.
    comfy.model_management.throw_exception_if_processing_interrupted()


def add_nodes(classes: dict[str, type]) -> None:
    """Make node classes known to the host."""
    import nodes

    nodes.NODE_CLASS_MAPPINGS.update(classes)


def state_file() -> Path:
    """Where the queue is kept unless the user names a file: in the host's user directory, out of its users' reach."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "__comfy_parallel" / "queue.sqlite3"


def gpu_config_file() -> Path:
    """Where `gpu_config.json` is unless the user names another file."""
    return state_file().with_name("gpu_config.json")


def pack_folders() -> list[Path]:
    """The folders in which the host looks for node packs."""
    import folder_paths

    return [Path(path) for path in folder_paths.get_folder_paths("custom_nodes")]


def log_lines() -> list[str]:
    """What the host has logged last, as far as it remembers; nothing of a host that does not."""
    try:
        from app.logger import get_logs
    except ImportError:
        return []
    return [str(entry.get("m", "")) if isinstance(entry, dict) else str(entry) for entry in list(get_logs() or ())]
