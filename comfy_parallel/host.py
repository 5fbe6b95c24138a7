"""Everything we ask of the host, ComfyUI, besides the patches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from comfy_parallel.errors import HostMismatch


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


def allows_origins() -> bool:
    """Whether the host answers requests from other origins (`--enable-cors-header`)."""
    from comfy.cli_args import args

    return bool(args.enable_cors_header)
