"""The models that tests and the quick start use, made once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SCRIPT = Path(__file__).with_name("checkpoint.py")
SEEDS = {"a": 1, "b": 2, "wide": 3}


def cached_models(host_dir: Path, cache_dir: Path, names: Iterable[str] = ("a", "b")) -> Path:
    """A models directory with these checkpoints and loras/lora.safetensors."""
    key = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    models_dir = cache_dir / f"models-{key}"
    for name in names:
        if not (models_dir / "checkpoints" / f"{name}.safetensors").exists():
            command = [sys.executable, str(SCRIPT), str(host_dir), str(models_dir)]
            options = ["--wide"] if name == "wide" else []
            subprocess.run([*command, "--seed", str(SEEDS[name]), "--name", name, *options], check=True)
    return models_dir
