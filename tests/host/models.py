"""The models that tests and the quick start use, made once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.host.shapes import FOLDERS

SCRIPT = Path(__file__).with_name("checkpoint.py")
SHAPES = Path(__file__).with_name("shapes.py")
SEEDS = {"a": 1, "b": 2, "wide": 3}


def cached_models(host_dir: Path, cache_dir: Path, names: Iterable[str] = ("a", "b")) -> Path:
    """A models directory with these checkpoints and loras/lora.safetensors."""
    models_dir = cache_dir / f"models-{_key(SCRIPT, host_dir)}"
    for name in names:
        if not (models_dir / "checkpoints" / f"{name}.safetensors").exists():
            command = [sys.executable, str(SCRIPT), str(host_dir), str(models_dir)]
            options = ["--wide"] if name == "wide" else []
            subprocess.run([*command, "--seed", str(SEEDS[name]), "--name", name, *options], check=True)
    return models_dir


def cached_shapes(host_dir: Path, cache_dir: Path) -> Path:
    """A models directory with the above and small models of other shapes: sdxl, flux, control."""
    models_dir = cached_models(host_dir, cache_dir)
    shapes_dir = cache_dir / f"shapes-{models_dir.name}-{_key(SHAPES, host_dir)}"
    shapes_dir.mkdir(parents=True, exist_ok=True)
    for folder in models_dir.iterdir():
        if not (shapes_dir / folder.name).exists():
            (shapes_dir / folder.name).symlink_to(folder)
    missing = [kind for kind, folder in FOLDERS.items() if not (shapes_dir / folder / f"{kind}.safetensors").exists()]
    made = [subprocess.Popen([sys.executable, str(SHAPES), str(host_dir), str(shapes_dir), kind]) for kind in missing]
    failed = [process.args for process in made if process.wait() != 0]
    if failed:
        raise RuntimeError(f"models could not be made: {failed}")
    return shapes_dir


def _key(script: Path, host_dir: Path) -> str:
    """One per script and version of the host, which may name and shape the weights of a model differently."""
    version = host_dir / "comfyui_version.py"
    return hashlib.sha256(script.read_bytes() + version.read_bytes()).hexdigest()[:12]
