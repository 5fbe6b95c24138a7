"""What is installed by pip and told to ComfyUI's registry."""

from __future__ import annotations

import re
from pathlib import Path

import tomllib

REPO_DIR = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO_DIR / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_file_of_the_package_is_installed_by_pip() -> None:
    package = REPO_DIR / "comfy_parallel"
    files = [path for path in package.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    others = {path for path in files if path.suffix != ".py"}
    named = PROJECT["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for module, patterns in named.items()
        for pattern in patterns
        for path in (REPO_DIR / module.replace(".", "/")).glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
    }
    assert len(others) > 15
    assert others - installed == set()
    folders = {path.parent for path in files if path.suffix == ".py"}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_registry_is_told_who_what_and_for_which_comfyui() -> None:
    told = PROJECT["tool"]["comfy"]
    assert re.fullmatch("[a-z0-9-]+", told["PublisherId"])
    assert told["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", told["requires-comfyui"])
    version = (REPO_DIR / told["version"]["path"]).read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', version, re.MULTILINE)
    requirements = (REPO_DIR / "requirements.txt").read_text(encoding="utf-8").split()
    assert requirements == PROJECT["project"]["dependencies"]
