"""Where the tests' models are kept."""

from __future__ import annotations

from pathlib import Path

from tests.host.models import cached_models


def make_host(path: Path, version: str) -> Path:
    path.mkdir()
    (path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return path


def test_versions_of_the_host_have_their_own_models(tmp_path: Path) -> None:
    """A later version may give a model's weights other names, which an earlier one does not know."""
    early, same, late = [make_host(tmp_path / name, name[0]) for name in ("1", "1 again", "2")]
    dirs = [cached_models(host, tmp_path, names=()) for host in (early, same, late)]
    assert dirs[0] == dirs[1]
    assert dirs[0] != dirs[2]
