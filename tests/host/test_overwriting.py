"""Jobs that save over files that other slots have mapped, and files whose old bytes cannot be kept."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import message, new_key, outcome
from tests.host.server import HostServer
from tests.host.test_weights import image_of, slots
from tests.host.workflows import node, txt2img, with_loras

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

PATIENCE_S = 40  # The kernel's is 45 s, after which the file is cut off under its users.


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> HostServer:
    """A host with models of its own, to be changed."""
    base = tmp_path_factory.mktemp("overwriting")
    shutil.copytree(models_dir, base / "models")
    return make_module_server(base, slots=slots(2))


def copy_of(path: Path) -> Path:
    """One that no other test uses."""
    return Path(shutil.copy(path, path.with_name(f"{new_key()}.safetensors")))


@pytest.mark.parametrize("how", ["torch.save", "safetensors", "native"])
def test_a_job_that_saves_over_a_model_in_use_is_not_kept_waiting(server: HostServer, how: str) -> None:
    path = copy_of(server.base_dir / "models" / "checkpoints" / "a.safetensors")
    expected = image_of(server, txt2img(1, ckpt=path.name), 1)
    assert image_of(server, txt2img(1, ckpt=path.name), 0) == expected
    entry = server.run({"save": node("CPTOverwrite", path=str(path), how=how)}, 0)
    assert outcome(entry) == "success", entry["status"]
    assert entry["outputs"]["save"]["value"][0] < PATIENCE_S
    assert image_of(server, txt2img(1, ckpt=path.name, prefix="again"), 1) == expected
    assert path.stat().st_size < 10_000


@pytest.fixture
def lora(server: HostServer) -> Path:
    """Slots keep what they have read of it, not only what was converted."""
    return copy_of(server.base_dir / "models" / "loras" / "lora.safetensors")


def test_jobs_whose_weights_could_not_be_kept_fail_and_the_next_read_the_file_anew(
    server: HostServer, lora: Path
) -> None:
    expected, whole = image_of(server, with_loras(txt2img(1), 1.0, lora=lora.name), 0), lora.read_bytes()
    server.request("POST", "/test/no_memory")
    with server.websocket() as client:
        running = server.submit(with_loras(txt2img(2, steps=60), 1.0, lora=lora.name), 0, client.client_id)["prompt_id"]
        beside = server.submit(txt2img(3, steps=30), 1)["prompt_id"]
        client.wait_for(lambda event: event["type"] == "progress" and event["data"]["value"] >= 2)
        subprocess.run(["sh", "-c", ': > "$0"', lora], check=True, timeout=PATIENCE_S)
    entries = server.wait([running, beside])
    assert outcome(entries[running]) == "error"
    told = message(entries[running], "execution_error")["exception_message"]
    assert str(lora) in told
    assert "Submit the job again" in told
    assert server.log().count("there was no memory to keep its old bytes") >= 1
    assert outcome(entries[beside]) == "success", "it uses another file"
    lora.write_bytes(whole)
    assert image_of(server, with_loras(txt2img(1, prefix="anew"), 1.0, lora=lora.name), 0) == expected


def test_an_idle_slot_lets_go_of_weights_that_could_not_be_kept(server: HostServer, lora: Path) -> None:
    expected, whole = image_of(server, with_loras(txt2img(1), 1.0, lora=lora.name), 0), lora.read_bytes()
    server.request("POST", "/test/no_memory")
    subprocess.run(["sh", "-c", ': > "$0"', lora], check=True, timeout=PATIENCE_S)
    lora.write_bytes(whole)
    entry = server.run(
        with_loras(txt2img(1, prefix="next"), 1.0, lora=lora.name), 0
    )  # It may come before the slot has let go.
    if outcome(entry) == "error":
        assert str(lora) in message(entry, "execution_error")["exception_message"]
    assert image_of(server, with_loras(txt2img(1, prefix="anew"), 1.0, lora=lora.name), 0) == expected
