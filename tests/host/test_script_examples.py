"""ComfyUI's own `script_examples` get from two slots what they get from stock ComfyUI.

They queue 20 steps at 512x512, minutes on a CPU. So they run as copies with a smaller size and fewer steps; how many
steps differs from run to run, so that no run finds an earlier one's result in a cache.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.host.jobs import await_idle, held, hold, interrupt, outcome, queue_ids, release
from tests.host.server import JSON, POLL_S, HostServer, clean_environment

pytestmark = pytest.mark.host

PORT = 8188  # written in the examples
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"  # also written there
SAVE, SEND = "9", "save_image_websocket_node"  # nodes there
SENDING_NODE = "websocket_image_save.py"  # what ComfyUI itself keeps in its custom_nodes
FULL_SIZE, SIZE = 512, 64
FULL_STEPS = 20
QUEUES, FETCHES, RECEIVES = EXAMPLES = (
    "basic_api_example.py",
    "websockets_api_example.py",
    "websockets_api_example_ws_images.py",
)
SLOTS = (0, 1)
STEPS = {  # of each example: alone on slot 0, alone on slot 1, beside another
    QUEUES: (2, 3, 4),
    FETCHES: (5, 6, 7),
    RECEIVES: (8, 9, 10),
}
TIMEOUT_S = 120.0

# Runs an example as `python EXAMPLE` would, then tells which images it holds in its global `images`.
CHILD = """
import json, runpy, sys
images = runpy.run_path(sys.argv[1], run_name="__main__").get("images", {})
print(json.dumps({node: [image.hex() for image in batch] for node, batch in images.items()}))
"""


@dataclass(frozen=True)
class Script:
    """A copy of an example, whose job is known by its steps."""

    path: Path
    steps: int


@dataclass(frozen=True)
class Result:
    """The images an example held at its end, by node; those its job saved; and its job's history entry."""

    received: dict[str, list[bytes]]
    saved: list[bytes]
    entry: JSON


@contextmanager
def host_on_the_port(host_dir: Path, base_dir: Path, models_dir: Path, slots: str | None) -> Iterator[HostServer]:
    """A host where the examples look for one, with the checkpoint and the node that they name."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the host does
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError as error:
            pytest.fail(f"port {PORT}, the only one that ComfyUI's examples know, is not free: {error}", pytrace=False)
    checkpoint = base_dir / "models" / "checkpoints" / CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(models_dir / "checkpoints" / "a.safetensors")
    server = HostServer(host_dir, base_dir, slots=slots)
    (base_dir / "custom_nodes" / SENDING_NODE).symlink_to(host_dir / "custom_nodes" / SENDING_NODE)
    server.port = PORT
    with server:
        yield server


@pytest.fixture(scope="module")
def scripts(host_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Script]:
    """Small copies of the examples, by their steps."""
    folder = tmp_path_factory.mktemp("script_examples")
    originals = {name: (host_dir / "script_examples" / name).read_text() for name in EXAMPLES}
    copies: dict[int, Script] = {}
    for name, original in originals.items():
        for steps in STEPS[name]:
            copies[steps] = Script(folder / f"{steps}_steps_{name}", steps)
            copies[steps].path.write_text(small(original, steps))
    return copies


def small(text: str, steps: int) -> str:
    smaller = {"width": (FULL_SIZE, SIZE), "height": (FULL_SIZE, SIZE), "steps": (FULL_STEPS, steps)}
    for name, (old, new) in smaller.items():
        assert text.count(f'"{name}": {old}') == 1
        text = text.replace(f'"{name}": {old}', f'"{name}": {new}')
    return text


@pytest.fixture(scope="module")
def stock(
    host_dir: Path, models_dir: Path, scripts: dict[int, Script], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Result]:
    """What stock ComfyUI gives the examples, by their steps."""
    with host_on_the_port(host_dir, tmp_path_factory.mktemp("stock"), models_dir, None) as server:
        return {steps: run(server, script) for steps, script in scripts.items()}


@pytest.fixture(scope="module")
def server(
    stock: dict[int, Result], host_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HostServer]:
    """Two slots, on the port that stock has left."""
    with host_on_the_port(host_dir, tmp_path_factory.mktemp("host"), models_dir, "cpu,cpu") as server:
        yield server


@contextmanager
def started(server: HostServer, script: Path) -> Iterator[subprocess.Popen[str]]:
    """An example at work, from the host's directory as its users start it."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(script)],
        cwd=server.host_dir,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


def finish(server: HostServer, child: subprocess.Popen[str], steps: int) -> Result:
    output, errors = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0, errors
    received = {node: [bytes.fromhex(image) for image in batch] for node, batch in json.loads(output).items()}
    entry = await_entry(server, steps)
    images = entry["outputs"].get(SAVE, {}).get("images", [])
    saved = [(server.base_dir / "output" / image["filename"]).read_bytes() for image in images]
    return Result(received, saved, entry)


def run(server: HostServer, script: Script) -> Result:
    with started(server, script.path) as child:
        return finish(server, child, script.steps)


def await_entry(server: HostServer, steps: int) -> JSON:
    """The history entry of the example's job; the first example ends before its job does."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        history: dict[str, JSON] = server.request("GET", "/history")[1]
        found = [entry for entry in history.values() if steps_of(entry["prompt"][2]) == steps]
        if found:
            return found[0]
        assert time.monotonic() < deadline, f"the job of {steps} steps is not done after {TIMEOUT_S} s"
        time.sleep(POLL_S)


def steps_of(workflow: dict[str, Any]) -> int | None:
    """The steps in an example's workflow, None in another's."""
    steps: int | None = workflow["3"]["inputs"]["steps"] if "3" in workflow else None
    return steps


def await_pending(server: HostServer, count: int, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(queue_ids(server)[1]) < count:
        assert child.poll() in (None, 0), child.communicate()[1]
        assert time.monotonic() < deadline, f"fewer than {count} jobs are pending after {TIMEOUT_S} s"
        time.sleep(POLL_S)


def assert_is_stocks(result: Result, stocks: Result, slot: int) -> None:
    assert result.entry["gpu_id"] == slot
    assert outcome(result.entry) == "success"
    assert result.received == stocks.received
    assert result.saved == stocks.saved


def assert_shows_something(image: bytes) -> None:
    with Image.open(BytesIO(image)) as picture:
        assert (picture.format, picture.size) == ("PNG", (SIZE, SIZE))
        colours = picture.convert("RGB").getcolors(SIZE * SIZE)
    assert colours is not None
    assert len(colours) > SIZE


def test_on_stock_the_examples_make_the_images_that_the_slots_must_make(stock: dict[int, Result]) -> None:
    """Else the comparisons below would compare nothing."""
    for steps in STEPS[QUEUES]:
        assert (stock[steps].received, len(stock[steps].saved)) == ({}, 1)
    for steps in STEPS[FETCHES]:
        assert stock[steps].received == {SAVE: stock[steps].saved}
    for steps in STEPS[RECEIVES]:
        assert (list(stock[steps].received), stock[steps].saved) == ([SEND], [])
    images = [image for result in stock.values() for image in result.saved or result.received[SEND]]
    for image in images:
        assert_shows_something(image)
    assert len(set(images)) == len(stock)


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gets_stocks_images_from_the_free_slot(
    server: HostServer, stock: dict[int, Result], scripts: dict[int, Script], name: str, slot: int
) -> None:
    steps = STEPS[name][slot]
    with held(server, 1 - slot):
        result = run(server, scripts[steps])
    assert_is_stocks(result, stock[steps], slot)


def test_two_examples_side_by_side_get_stocks_images(
    server: HostServer, stock: dict[int, Result], scripts: dict[int, Script]
) -> None:
    steps = STEPS[FETCHES][2], STEPS[RECEIVES][2]
    with ExitStack() as at_work:
        first_hold, second_hold = at_work.enter_context(held(server, *SLOTS))
        children = [at_work.enter_context(started(server, scripts[steps[0]].path))]
        await_pending(server, 1, children[0])
        # Slot 0 takes this after the first example's job and before the second's, which slot 1 so gets for certain.
        barrier = server.submit(hold(1), 0)["prompt_id"]
        children.append(at_work.enter_context(started(server, scripts[steps[1]].path)))
        await_pending(server, 3, children[1])
        release(server, first_hold)
        release(server, second_hold)
        results = [finish(server, child, number) for child, number in zip(children, steps, strict=True)]
        interrupt(server, barrier)
    for slot, result in enumerate(results):
        assert_is_stocks(result, stock[steps[slot]], slot)


def test_the_unchanged_example_is_accepted(server: HostServer) -> None:
    """At its full size it would take minutes: it is taken out of the queue."""
    await_idle(server)
    with held(server, *SLOTS):
        with started(server, server.host_dir / "script_examples" / QUEUES) as child:
            _, errors = child.communicate(timeout=TIMEOUT_S)
            assert child.returncode == 0, errors
        waiting = server.request("GET", "/queue")[1]["queue_pending"]
        server.request("POST", "/queue", {"clear": True})
    assert [steps_of(item[2]) for item in waiting] == [FULL_STEPS]
    await_idle(server)
