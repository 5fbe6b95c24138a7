"""Replayed steps under dynamic VRAM: what happens when pages are taken away, or hold something else."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.graphs.residency import TOO_LARGE
from tests.gpu.conftest import MakeGpuServer
from tests.gpu.test_graphs import Servers, difference, side_by_side
from tests.host.graph_cases import Case, Steps, flux, lora, other_model, run_case, sd15, sdxl
from tests.host.jobs import interrupt, outcome
from tests.host.server import POLL_S, HostServer
from tests.host.shapes import FLUX
from tests.host.workflows import Workflow, node

pytestmark = [pytest.mark.gpu, pytest.mark.host, pytest.mark.timeout(300)]

GIB = 1 << 30


@pytest.fixture(scope="module")
def servers(make_gpu_server: MakeGpuServer, host_dir: Path) -> Servers:
    return eager_and_graphs(make_gpu_server, host_dir)


def eager_and_graphs(make_gpu_server: MakeGpuServer, host_dir: Path, *args: str) -> Servers:
    if "class ModelPatcherDynamic" not in (host_dir / "comfy" / "model_patcher.py").read_text():
        pytest.skip("this host has no dynamic VRAM")

    def make(mode: str) -> HostServer:
        return make_gpu_server(slots="cuda:0", env={"COMFY_PARALLEL_GRAPHS": mode}, args=args)

    with ThreadPoolExecutor(2) as pool:
        eager, graphs = pool.map(make, ("off", "auto"))
    assert "DynamicVRAM support detected and enabled" in graphs.log()
    return Servers(eager, eager, graphs)


def checked(workflow: Workflow) -> Workflow:
    """Fails if a page is still pinned after sampling."""
    workflow["pages"] = node("CPTPages", samples=["sampler", 0])
    workflow["save"]["inputs"]["samples"] = ["pages", 0]
    return workflow


def meddled(seed: int, way: str) -> Workflow:
    return other_model(checked(sd15(seed, steps=9)), "CPTMeddle", way=way)


def fp8(workflow: Workflow) -> Workflow:
    workflow["unet"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    return workflow


def v_prediction(seed: int) -> Workflow:
    return other_model(checked(sd15(seed)), "ModelSamplingDiscrete", sampling="v_prediction", zsnr=True)


CASES = (
    Case("a page evicted between steps", (sd15(300), meddled(301, "evict"), meddled(302, "evict"))),
    Case("all pages evicted between steps", (meddled(303, "evict all"), checked(sd15(304)))),
    Case("LoRAs in turns", (checked(sd15(310)), lora(311, 1.0), lora(312, 0.4), checked(sd15(313)), lora(314, 1.0))),
    Case("one LoRA", (lora(315, 0.7), lora(316, 0.7), lora(317, 0.7))),
    Case("a schedule, and none again", (checked(sd15(320)), v_prediction(321), checked(sd15(322)), v_prediction(323))),
    Case("float8 weights", (fp8(flux(330)), fp8(flux(331)), fp8(sdxl(332)), fp8(sdxl(333)))),
    Case("models in turns", (checked(sd15(340)), flux(341), sdxl(342), checked(sd15(343)), flux(344), sdxl(345))),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_under_dynamic_vram_are_stocks(case: Case, servers: Servers) -> None:
    before = Steps.of(servers.graphs, 0)
    expected, found = side_by_side((run_case, servers.eager, case, 0), (run_case, servers.graphs, case, 0))
    seen = Steps.of(servers.graphs, 0).since(before)
    print(f"{case.name:36}{seen.replays:6}{seen.captures:6}  {seen.eager}")
    assert difference(expected, found) == ""
    assert seen.replays > 0
    if "evicted" in case.name:
        assert seen.captures >= 3, "an eviction went unnoticed"


@pytest.fixture(scope="module")
def resizing_lora(gpu_models: Path) -> str:
    """The name of a LoRA that gives Flux's first layer twice as many inputs, as those for depth and canny do."""
    import torch
    from safetensors.torch import save_file

    size, wide, rank = FLUX["hidden_size"], 2 * FLUX["in_channels"] * FLUX["patch_size"] ** 2, 4
    layer = "diffusion_model.img_in"
    weights = {
        f"{layer}.lora_up.weight": torch.full((size, rank), 0.01),
        f"{layer}.lora_down.weight": torch.full((rank, wide), 0.02),
        f"{layer}.reshape_weight": torch.tensor([size, wide]),
    }
    save_file(weights, gpu_models / "loras" / "resizing.safetensors")
    return "resizing.safetensors"


def test_a_lora_that_resizes_a_layer(servers: Servers, resizing_lora: str) -> None:
    def resized(seed: int) -> Workflow:
        workflow = flux(seed)
        workflow["lora"] = node("LoraLoaderModelOnly", model=["unet", 0], lora_name=resizing_lora, strength_model=1.0)
        workflow["shift"]["inputs"]["model"] = ["lora", 0]
        return workflow

    case = Case("a LoRA that resizes a layer", (flux(380), resized(381), resized(382), flux(383), resized(384)))
    before = Steps.of(servers.graphs, 0)
    expected, found = side_by_side((run_case, servers.eager, case, 0), (run_case, servers.graphs, case, 0))
    assert difference(expected, found) == ""
    assert Steps.of(servers.graphs, 0).since(before).replays > 0


_MAKE_TAESD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from comfy.taesd.taesd import Decoder
from safetensors.torch import save_file
torch.manual_seed(1)
save_file(Decoder(4).state_dict(), sys.argv[2])
"""


def test_previews_decoded_between_steps(make_gpu_server: MakeGpuServer, host_dir: Path, gpu_models: Path) -> None:
    path = gpu_models / "vae_approx" / "taesd_decoder.safetensors"
    path.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", _MAKE_TAESD, str(host_dir), str(path)], check=True)
    both = eager_and_graphs(make_gpu_server, host_dir, "--preview-method", "taesd")
    case = Case("previews", (sd15(390), sd15(391), sd15(392)))
    expected, found = side_by_side((run_case, both.eager, case, 0), (run_case, both.graphs, case, 0))
    assert difference(expected, found) == ""
    seen = []
    for server in (both.eager, both.graphs):
        with server.websocket() as client:
            job_id = server.submit(sd15(393, steps=6), 0, client.client_id)["prompt_id"]
            client.wait_for_end(job_id)
            seen.append(client.frames)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 1
    assert Steps.of(both.graphs, 0).replays > 0


def test_a_repeated_job_is_only_replayed(servers: Servers) -> None:
    """Also with a LoRA: loads leave the small weights where they are."""
    for job in (sd15, lambda seed: lora(seed, 0.7)):
        run_case(servers.graphs, Case("before", (job(350), job(351))), 0)
        before = Steps.of(servers.graphs, 0)
        run_case(servers.graphs, Case("again", (job(352), job(353))), 0)
        seen = Steps.of(servers.graphs, 0).since(before)
        assert (seen.captures, seen.replays, seen.eager) == (0, 8, {})


@pytest.mark.parametrize("end", ["interrupt", "too little memory"])
def test_no_page_stays_pinned_when_a_job_ends_early(servers: Servers, end: str) -> None:
    run_case(servers.graphs, Case("before", (sd15(360), sd15(361))), 0)
    if end == "interrupt":
        before = Steps.of(servers.graphs, 0)
        job_id = servers.graphs.submit(sd15(362, steps=5000), 0)["prompt_id"]
        while Steps.of(servers.graphs, 0).since(before).replays < 10:
            servers.graphs.request("GET", "/prompt", timeout_s=POLL_S + 10)
        interrupt(servers.graphs, job_id)
        assert outcome(servers.graphs.wait([job_id])[job_id]) == "interrupted"
    else:
        entry = servers.graphs.run(meddled(363, "fail"), 0)
        assert entry["status"]["status_str"] == "error"
    after = Case("after", (checked(sd15(364)), checked(sd15(365))))
    expected, found = side_by_side((run_case, servers.eager, after, 0), (run_case, servers.graphs, after, 0))
    assert difference(expected, found) == ""


def test_a_model_for_which_there_is_no_room_steps_eagerly_and_says_why(
    make_gpu_server: MakeGpuServer, servers: Servers, one_gpu: Any
) -> None:
    import torch

    all_of_it = torch.cuda.get_device_properties(one_gpu).total_memory / GIB
    args = ["--reserve-vram", f"{all_of_it:.2f}"]
    small = make_gpu_server(slots="cuda:0", args=args, env={"COMFY_PARALLEL_GRAPHS": "auto"})
    case = Case("no room", (sd15(370), sd15(371), sdxl(372), sdxl(373)))
    expected, found = side_by_side((run_case, servers.eager, case, 0), (run_case, small, case, 0))
    assert difference(expected, found) == ""
    seen = Steps.of(small, 0)
    print(f"no room: {seen}")
    assert seen.eager.get(TOO_LARGE, 0) > 0
