"""What we know about names of packs better than a look at their source tells."""

from __future__ import annotations

from comfy_parallel.isolation.packs.finding import PER_SLOT

# (end of the file's path, name) -> treatment and why. Files are told by their ends, whatever a pack's folder is called.
OVERRIDES: dict[tuple[str, str], tuple[str, str]] = {
    ("nodes_glsl.py", "GLContext._instance"): (PER_SLOT, "a GL context is current on one thread"),
    ("nodes_glsl.py", "GLContext._initialized"): (PER_SLOT, "a GL context is current on one thread"),
}
