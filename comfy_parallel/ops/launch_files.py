"""The weight files that `comfy-parallel launch` is given: checked, and named as ComfyUI's loader nodes know them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_parallel.config import WEIGHT_DTYPES
from comfy_parallel.errors import ConfigError
from comfy_parallel.weights.files.formats import is_safetensors, read_entries

# By option: ComfyUI's kind of model, and the folders under models/ where it looks for it.
KINDS = {
    "unet": ("diffusion_models", ("diffusion_models", "unet")),
    "clip": ("text_encoders", ("text_encoders", "clip")),
    "vae": ("vae", ("vae",)),
    "checkpoint": ("checkpoints", ("checkpoints",)),
}
_PICKLES = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


@dataclass(frozen=True, slots=True)
class Weights:
    """`preload`: the files as COMFY_PARALLEL_PRELOAD names them; `folders`: kinds and folders to tell ComfyUI of."""

    preload: tuple[str, ...] = ()
    folders: tuple[tuple[str, str], ...] = ()


def find(named: Iterable[tuple[str, str]], models_dir: Path, weight_dtype: str | None) -> Weights:
    """Look for the files; `named` are options of KINDS with a path, or with a name in its folder under models/.

    Raises:
        ConfigError: naming the option and the file that is missing or is no model, or the kind of number.
    """
    options = list(named)
    _check_dtype(weight_dtype, [option for option, _ in options])
    preload, folders = [], []
    for option, name in options:
        path = _path(option, name, models_dir)
        _check_header(option, path)
        kind, places = KINDS[option]
        known_as = _known_as(path, [models_dir / place for place in places])
        if known_as is None:
            known_as = path.name
            folders.append((kind, str(path.parent)))
        suffix = f"={weight_dtype}" if option == "unet" and weight_dtype else ""
        preload.append(f"{kind}/{known_as}{suffix}")
    return Weights(tuple(dict.fromkeys(preload)), tuple(dict.fromkeys(folders)))


def _check_dtype(weight_dtype: str | None, options: Sequence[str]) -> None:
    if weight_dtype is None:
        return
    if weight_dtype not in WEIGHT_DTYPES:
        known = ", ".join(WEIGHT_DTYPES)
        raise ConfigError(f"--weight-dtype is {weight_dtype!r}, which ComfyUI does not know; say one of {known}")
    if "unet" not in options:
        raise ConfigError("--weight-dtype is for the file that --unet names; name one, or leave it out")


def _path(option: str, name: str, models_dir: Path) -> Path:
    _, places = KINDS[option]
    looked = [Path(os.path.abspath(Path(name).expanduser())), *(models_dir / place / name for place in places)]
    found = next((path for path in looked if path.is_file()), None)
    if found is None:
        where = ", ".join(str(path) for path in looked)
        raise ConfigError(f"--{option} {name}: no such file; looked for {where}")
    if "," in str(found) or "\n" in str(found):
        raise ConfigError(f"--{option} {name}: names with a comma or a line break cannot be passed on; rename the file")
    return found


def _known_as(path: Path, folders: Iterable[Path]) -> str | None:
    return next((path.relative_to(folder).as_posix() for folder in folders if path.is_relative_to(folder)), None)


def _check_header(option: str, path: Path) -> None:
    """Read only what says that it is a model: it may be tens of gigabytes."""
    try:
        with path.open("rb") as file:
            problem = _problem(path, file.fileno())
    except OSError as error:
        raise ConfigError(f"--{option} {path} cannot be read: {error.strerror}") from error
    if problem is not None:
        raise ConfigError(f"--{option} {path} is no model: {problem}; name a safetensors file or a checkpoint")


def _problem(path: Path, fd: int) -> str | None:
    if is_safetensors(str(path)):
        try:
            return None if read_entries(fd) else "it holds no tensor"
        except (ValueError, OverflowError, RecursionError, OSError) as error:
            return str(error) or "its header cannot be read"
        except Exception as error:  # noqa: BLE001 - the header is anybody's bytes
            return f"its header cannot be read ({type(error).__name__})"
    if not path.name.lower().endswith(_PICKLES):
        return (
            f"its name ends with {path.suffix or 'nothing'}, and ComfyUI loads {', '.join(_PICKLES)} and .safetensors"
        )
    start = os.pread(fd, 4, 0)
    return None if start == _ZIP or start[:1] == _PICKLE else "it begins like neither a zip file nor a pickle"
