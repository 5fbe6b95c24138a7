"""Puts comfy_parallel among a ComfyUI's custom nodes, and takes it out again."""

from __future__ import annotations

import shutil
from pathlib import Path

from comfy_parallel.errors import ComfyParallelError

NAME = "comfy_parallel"
ROOT = Path(__file__).resolve().parents[2]
MARK = "# Written by `comfy-parallel link`; `comfy-parallel unlink` removes this folder.\n"
PRESTARTUP = f"{MARK}import comfy_parallel\n\ncomfy_parallel.install()\n"
INIT = (
    f"{MARK}from comfy_parallel.install import own_nodes, web_directory\n\n"
    "NODE_CLASS_MAPPINGS = own_nodes()\nWEB_DIRECTORY = web_directory()\n"
)
STUB = {"prestartup_script.py": PRESTARTUP, "__init__.py": INIT}


def link(comfyui_dir: str | Path) -> Path:
    """Make this package a custom node of that ComfyUI; does nothing when it is one already.

    Returns:
        The entry in `custom_nodes`: a symlink to the clone this package runs from, or, when the package
        was installed by pip, a folder with two small files.

    Raises:
        ComfyParallelError: nothing was changed; the message says what to do.
    """
    custom_nodes = _custom_nodes(comfyui_dir)
    for entry in custom_nodes.iterdir():
        if _leads_here(entry) and entry.suffix != ".disabled":
            return entry
    entry = custom_nodes / NAME
    _refuse_foreign(entry)
    try:
        if _is_clone():
            _make_symlink(entry)
        else:
            _write_stub(entry)
    except OSError as error:
        raise ComfyParallelError(f"cannot write {entry}: {error.strerror}; run this as a user who may") from error
    return entry


def is_linked(custom_nodes: Path) -> bool:
    """Whether a ComfyUI with these custom nodes loads this package."""
    if not custom_nodes.is_dir():
        return False
    entries = [entry for entry in custom_nodes.iterdir() if entry.suffix != ".disabled"]
    return any(_leads_here(entry) or (entry.name == NAME and _is_stub(entry)) for entry in entries)


def unlink(comfyui_dir: str | Path) -> bool:
    """Remove what `link` made; whether there was anything to remove.

    Raises:
        ComfyParallelError: something is there that `link` did not make; it was left alone.
    """
    entry = _custom_nodes(comfyui_dir) / NAME
    if not _exists(entry):
        return False
    _refuse_foreign(entry)
    try:
        _remove(entry)
    except OSError as error:
        raise ComfyParallelError(f"cannot remove {entry}: {error.strerror}; run this as a user who may") from error
    return True


def _is_clone() -> bool:
    return (ROOT / "prestartup_script.py").is_file()


def _custom_nodes(comfyui_dir: str | Path) -> Path:
    home = Path(comfyui_dir).expanduser().absolute()
    if not (home / "main.py").is_file() or not (home / "custom_nodes").is_dir():
        raise ComfyParallelError(
            f"{home} is no ComfyUI: it holds no main.py with a custom_nodes folder beside it; "
            "name the folder that ComfyUI is started from"
        )
    return home / "custom_nodes"


def _refuse_foreign(entry: Path) -> None:
    """Raise if something is there that `link` did not make."""
    is_ours = _leads_here(entry) if entry.is_symlink() else _is_stub(entry)
    if is_ours or not _exists(entry):
        return
    what = f"a symlink to {entry.readlink()}" if entry.is_symlink() else "not made by `comfy-parallel link`"
    raise ComfyParallelError(f"{entry} is {what}; move it away or delete it yourself, then try again")


def _exists(entry: Path) -> bool:
    return entry.is_symlink() or entry.exists()


def _leads_here(entry: Path) -> bool:
    """Whether the host would load this clone through the entry."""
    return _is_clone() and entry.is_dir() and entry.samefile(ROOT)


def _is_stub(entry: Path) -> bool:
    """Whether the folder holds our files and nothing else."""
    if not entry.is_dir() or not {item.name for item in entry.iterdir()} <= {*STUB, "__pycache__"}:
        return False
    return all((entry / name).is_file() and (entry / name).read_text().startswith(MARK) for name in STUB)


def _make_symlink(entry: Path) -> None:
    if _exists(entry):  # the folder of an earlier installation by pip
        _remove(entry)
    entry.symlink_to(ROOT, target_is_directory=True)


def _write_stub(entry: Path) -> None:
    entry.mkdir(exist_ok=True)
    for name, text in STUB.items():
        (entry / name).write_text(text)


def _remove(entry: Path) -> None:
    if entry.is_symlink():
        entry.unlink()
    else:
        shutil.rmtree(entry)
