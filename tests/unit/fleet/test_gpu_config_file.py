"""The file that `gpu_config.json` is: whole before and after a change, and others may write it too."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from comfy_parallel.core.gpu_config import GpuConfig
from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet.gpu_config_file import GpuConfigFile


@pytest.fixture
def file(tmp_path: Path) -> GpuConfigFile:
    return GpuConfigFile(tmp_path / "folder" / "gpu_config.json")


def test_a_file_that_is_not_there_is_made_by_the_first_change(file: GpuConfigFile) -> None:
    assert file.read().workers == ()
    file.change(lambda config: config.with_worker("1", {"port": 8189}))
    assert json.loads(file.path.read_text()) == {"workers": [{"id": "1", "port": 8189}]}
    assert [worker.id for worker in file.read().workers] == ["1"]


def test_what_another_program_writes_is_seen(file: GpuConfigFile) -> None:
    file.change(lambda config: config.with_setting("debug", True))
    file.path.write_text('{"settings": {"debug": false}, "mine": 1}')
    assert file.read().setting("debug") is False
    assert file.change(lambda config: config.with_setting("debug", True)).json["mine"] == 1


def test_a_change_that_cannot_be_made_leaves_the_file(file: GpuConfigFile) -> None:
    file.change(lambda config: config.with_worker("1", {"port": 8189}))
    before = file.path.read_bytes()
    with pytest.raises(ConfigError, match=r"workers\[0\]\.port"):
        file.change(lambda config: config.with_worker("1", {"port": -1}))
    assert file.path.read_bytes() == before
    assert [path.name for path in file.path.parent.iterdir()] == ["gpu_config.json"]


def test_changes_at_once_are_all_made(file: GpuConfigFile) -> None:
    def add(number: int) -> None:
        file.change(lambda config: config.with_worker(str(number), {"port": 9000 + number}))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {worker.id for worker in file.read().workers} == {str(number) for number in range(20)}


def test_a_link_stays_a_link_and_rights_stay(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    real.write_text("{}")
    real.chmod(0o640)
    (tmp_path / "link.json").symlink_to(real)
    GpuConfigFile(tmp_path / "link.json").change(lambda config: config.with_setting("debug", True))
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(real.read_text()) == {"settings": {"debug": True}}
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b" " * (2 << 20)])
def test_a_file_that_is_none_is_named_and_left_alone(file: GpuConfigFile, content: bytes) -> None:
    file.path.parent.mkdir()
    file.path.write_bytes(content)
    with pytest.raises(ConfigError, match="gpu_config.json"):
        file.change(_same)
    assert file.path.read_bytes() == content


def _same(config: GpuConfig) -> GpuConfig:
    return config


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(file: GpuConfigFile) -> None:
    file.path.parent.mkdir()
    file.path.parent.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        file.change(_same)


def test_a_folder_in_its_place_is_told(file: GpuConfigFile) -> None:
    file.path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be"):
        file.change(_same)
