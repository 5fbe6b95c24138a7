"""Run by ComfyUI before it imports torch, when this folder is one of its custom nodes."""

import importlib.util
import sys
from pathlib import Path


def _package():
    """The package that lies beside this file, imported without putting this folder on the import path."""
    if "comfy_parallel" not in sys.modules:
        folder = Path(__file__).resolve().parent / "comfy_parallel"
        spec = importlib.util.spec_from_file_location(
            "comfy_parallel", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["comfy_parallel"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["comfy_parallel"])
    return sys.modules["comfy_parallel"]


_package().install()
