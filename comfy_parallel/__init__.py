"""One ComfyUI server that uses every GPU in the machine, N jobs at once, in one process.

`install()` is the whole public API: call it in ComfyUI's process before torch is imported. With
`COMFY_MULTI_GPU_SCHED` unset or 0 it does nothing at all.
"""

from __future__ import annotations

from comfy_parallel.install import install, uninstall

__all__ = ["__version__", "install", "uninstall"]
__version__ = "0.1.0"
