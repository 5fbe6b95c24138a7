"""Takes the pictures of docs/images anew: the dashboard and the tab in ComfyUI's page, with jobs running.

    python benchmarks/pictures.py COMFYUI_DIR [--only dashboard,sidebar,nodes2,examples] [--into docs/images]

`nodes2` needs a ComfyUI with Nodes 2.0, 0.33.0 for example; the others are taken with 0.3.75. Look at them afterwards.
`examples` writes the example workflows, as ComfyUI's page saves them, with a picture of each: --into
comfy_parallel/ui/example_workflows.
Needs Chromium and its driver, and the models of the tests (tests/quick_start.sh makes them).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO_DIR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_DIR))

from selenium import webdriver

from tests.browser.conftest import CHROMIUM_FLAGS, CHROMIUM_NAMES, program
from tests.browser.page import Page
from tests.browser.test_dashboard import PHONE, Dashboard, painting
from tests.browser.test_sidebar import Sidebar
from tests.host.jobs import quick
from tests.host.models import cached_models
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node, txt2img

CACHE = Path(os.environ.get("COMFY_PARALLEL_CACHE", Path.home() / ".cache" / "comfy_parallel"))
WIDE = {"width": 1280, "height": 1187, "deviceScaleFactor": 1, "mobile": False}
NARROW = {**PHONE, "height": 1700}
PAGE = {**WIDE, "width": 1200, "height": 657}
DASHBOARDS = (
    ("dashboard-light", "light", "en", WIDE),
    ("dashboard-dark", "dark", "en", WIDE),
    ("dashboard-phone", "light", "en", NARROW),
    ("dashboard-zh", "dark", "zh", WIDE),
)
GRAPH = {"x": 100, "y": 150, "width": 1300, "height": 390, "scale": 1}  # without what surrounds it
PREVIEWS = "document.querySelectorAll('.job img[src]')"
KINDS = ("dashboard", "sidebar", "nodes2", "examples")
EXAMPLE_MODEL = "v1-5-pruned-emaonly-fp16.safetensors"
ARRANGE = """
const graph = app.graph;
graph.arrange(60);
return JSON.stringify(graph.serialize());
"""


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = program(*CHROMIUM_NAMES)
    for flag in CHROMIUM_FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show_as(driver: webdriver.Chrome, size: dict[str, Any], scheme: str) -> None:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def take(driver: webdriver.Chrome, path: Path) -> None:
    time.sleep(2)  # for what is drawn bit by bit
    is_small = path.suffix == ".jpg"
    form = {"format": "jpeg", "quality": 70, "clip": GRAPH} if is_small else {"format": "png"}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", form)
    path.write_bytes(base64.b64decode(shot["data"]))
    print(path, flush=True)


def busy(server: HostServer, seed: int) -> None:
    """A job that runs on each slot for a minute, and three that wait."""
    server.request("POST", "/queue", {"clear": True})
    server.request("POST", "/interrupt", {"all": True})
    for slot, colour in enumerate((0x4080C0, 0xC08040)):
        server.submit(painting(colour + seed, steps=600, ms=100), slot)
    for slot in (0, 1, "auto"):
        server.submit(quick(seed * 10 + hash(slot) % 7), slot)


def history(server: HostServer) -> None:
    """Jobs that have ended, most of them well."""
    fail = {"fail": node("CPTFail", message="no luck"), "out": node("CPTOut", value=["fail", 0])}
    jobs = [txt2img(seed, steps=4, prefix="dashboard") for seed in range(8)]
    ids = [server.submit(job)["prompt_id"] for job in (*jobs[:6], fail, *jobs[6:])]
    server.wait(ids)


def dashboards(driver: webdriver.Chrome, server: HostServer, into: Path) -> None:
    history(server)
    for number, (name, scheme, language, size) in enumerate(DASHBOARDS, 1):
        busy(server, number)
        show_as(driver, size, scheme)
        page = Dashboard(driver, server.url, language)
        page.wait(
            "previews", lambda page=page: page.js("return document.querySelectorAll('.job img[src]').length") == 2
        )
        time.sleep(5)
        take(driver, into / f"{name}.png")


def numbered(workflow: Workflow) -> Workflow:
    """The same with numbers for names, as ComfyUI's page has it."""
    numbers = {name: str(number) for number, name in enumerate(workflow, 1)}

    def renamed(value: Any) -> Any:
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[name]: node(part["class_type"], **{key: renamed(value) for key, value in part["inputs"].items()})
        for name, part in workflow.items()
    }


def examples() -> dict[str, Workflow]:
    """The example workflows, by name."""
    one, other = (txt2img(1, steps=20, width=512, height=512, prefix="example") for _ in range(2))
    virtual = {"virtual_vram_gb": 1.0, "donor_device": "cpu", "expert_mode_allocations": ""}
    inputs = {**one["ckpt"]["inputs"], "compute_device": "slot", **virtual, "eject_models": False}
    one["ckpt"] = node("CheckpointLoaderSimpleDisTorch2MultiGPU", **inputs, high_precision_loras=True)
    other["seed"] = node("DistributedSeed", seed=1)
    other["sampler"]["inputs"]["seed"] = ["seed", 0]
    other["all"] = node("DistributedCollector", images=["decode", 0], participants=0, load_balance=False)
    other["save"]["inputs"]["images"] = ["all", 0]
    parts = txt2img(1, steps=20, width=512, height=512, prefix="example")
    devices = {"unet_device": "slot", "clip_device": "cpu", "vae_device": "slot"}
    parts["ckpt"] = node("CheckpointLoaderAdvancedMultiGPU", **parts["ckpt"]["inputs"], **devices)
    return {
        "part_of_a_model_on_the_cpu": one,
        "text_encoder_on_the_cpu": parts,
        "one_workflow_over_all_slots": other,
    }


def write_examples(driver: webdriver.Chrome, server: HostServer, into: Path) -> None:
    server.request("POST", "/settings", {"Comfy.ColorPalette": "dark"})
    into.mkdir(exist_ok=True)
    for name, workflow in examples().items():
        show_as(driver, {**WIDE, "width": 1500, "height": 800}, "dark")
        page = Page(driver, server, into)
        page.load(numbered(workflow))
        saved = json.loads(driver.execute_script(ARRANGE))
        page.show_all_nodes()
        text = json.dumps(saved, indent=2).replace("a.safetensors", EXAMPLE_MODEL)
        (into / f"{name}.json").write_text(text + "\n")
        take(driver, into / f"{name}.jpg")
    (into / "workflow.json").unlink()


def sidebar(driver: webdriver.Chrome, server: HostServer, into: Path, palette: str, name: str) -> None:
    server.request("POST", "/settings", {"Comfy.ColorPalette": palette, "Comfy.VueNodes.Enabled": "nodes2" in name})
    show_as(driver, PAGE, "dark")
    page = Page(driver, server, into)
    tab = Sidebar(page)
    page.load(numbered(txt2img(1, prefix="sidebar")))
    tab.choose("1")
    busy(server, 50)
    page.wait("the job", lambda: "CPTProgress" in tab.text(0))
    take(driver, into / f"{name}.png")
    (into / "workflow.json").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, metavar="COMFYUI_DIR")
    parser.add_argument("--only", default="dashboard,sidebar", help=f"some of {','.join(KINDS)}")
    parser.add_argument("--into", type=Path, default=REPO_DIR / "docs" / "images")
    options = parser.parse_args()
    kinds = options.only.split(",")
    if set(kinds) - set(KINDS):
        parser.error(f"--only is {options.only!r}; say some of {','.join(KINDS)}")
    comfyui = options.comfyui.resolve()
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "models").symlink_to(cached_models(comfyui, CACHE), target_is_directory=True)
        with chromium() as driver, HostServer(comfyui, Path(base), slots="cpu,cpu") as server:
            if "dashboard" in kinds:
                dashboards(driver, server, options.into)
            if "sidebar" in kinds:
                sidebar(driver, server, options.into, "light", "sidebar-light")
                sidebar(driver, server, options.into, "dark", "sidebar-dark")
            if "nodes2" in kinds:
                sidebar(driver, server, options.into, "dark", "sidebar-nodes2")
            if "examples" in kinds:
                write_examples(driver, server, options.into)


if __name__ == "__main__":
    main()
