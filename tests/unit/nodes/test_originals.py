"""Our nodes stay out beside the packs that they are known from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from comfy_parallel.nodes import originals


def test_a_pack_is_known_by_its_file_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "any name").mkdir()
    (tmp_path / "any name" / "known.py").touch()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert originals.installed("A pack", [tmp_path], "known.py", instead_of="nodes")
    assert [record.getMessage() for record in caplog.records] == [
        f"comfy_parallel: its nodes stay out, because A pack is installed ({tmp_path / 'any name'})"
    ]


@pytest.mark.parametrize(("folder", "is_it"), [("a pack.disabled", True), ("a pack", False)])
def test_a_pack_that_is_switched_off_or_another_one_does_not_count(tmp_path: Path, folder: str, is_it: bool) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "known.py").touch()
    assert not originals.installed("A pack", [tmp_path], "known.py", instead_of="nodes", is_it=lambda _: is_it)
