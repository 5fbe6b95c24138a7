"""Jobs that run at once on four slots give, byte for byte, the images that stock ComfyUI makes one by one."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from tests.host import workflows
from tests.host.conftest import MakeServer
from tests.host.server import HostServer

pytestmark = [pytest.mark.host, pytest.mark.timeout(1200)]

SLOTS = "cpu,cpu,cpu,cpu"
JOBS_PER_GROUP = 25
FEWEST_JOBS_PER_SLOT = 20
REPEATED_JOBS = 40
TIMEOUT_S = 900
CHECKPOINT_BYTES = 680 << 20  # in RAM, where the CPU computes in float32
LORA = "lora.safetensors"
TEXTS = ("a lighthouse at dusk", "two foxes, snow", "an empty street in the rain", "portrait of a clockmaker")
SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "ddpm",
    "lcm",
    "ddim",
    "er_sde",
    "seeds_2",
    "sa_solver",
    "res_multistep_ancestral",
    "uni_pc",
)
SCHEDULERS = ("normal", "karras", "simple", "sgm_uniform")
GROUPS = (  # checkpoint, LoRA, text; neighbours differ in the checkpoint
    ("a.safetensors", None, TEXTS[0]),
    ("b.safetensors", None, TEXTS[1]),
    ("a.safetensors", LORA, TEXTS[1]),
    ("b.safetensors", LORA, TEXTS[2]),
    ("a.safetensors", None, TEXTS[2]),
    ("b.safetensors", None, TEXTS[3]),
    ("a.safetensors", LORA, TEXTS[3]),
    ("b.safetensors", LORA, TEXTS[0]),
)


@dataclass(frozen=True)
class Job:
    number: int
    kind: str
    options: dict[str, Any]

    @property
    def workflow(self) -> workflows.Workflow:
        return getattr(workflows, self.kind)(**self.options)

    def __str__(self) -> str:
        return f"job {self.number}: {self.kind}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


@dataclass(frozen=True)
class Run:
    """What one host made of some jobs: each job's PNG files, and the history entries."""

    images: dict[int, list[bytes]]
    entries: dict[int, dict[str, Any]]


def make_jobs(per_group: int = JOBS_PER_GROUP) -> list[Job]:
    """The same list every time. Jobs of a group share their text encodes, as a user's do."""
    choose = random.Random(20)
    jobs: list[Job] = []
    for ckpt, lora, text in GROUPS:
        for _ in range(per_group):
            number = len(jobs)
            options = {
                "seed": choose.randrange(2**62),
                "ckpt": ckpt,
                "lora": lora,
                "text": text,
                "sampler": SAMPLERS[number % len(SAMPLERS)],
                "scheduler": choose.choice(SCHEDULERS),
                "steps": choose.choice((2, 2, 3)),
                "batch": choose.choice((1, 1, 1, 2, 3)),
                "prefix": "parity",
            }
            jobs.append(Job(number, choose.choice(("txt2img", "txt2img", "img2img")), options))
    return jobs


def run_jobs(server: HostServer, jobs: Sequence[Job], *, slot: int | None = None) -> Run:
    ids = {job.number: server.submit(job.workflow, slot)["prompt_id"] for job in jobs}
    done = server.wait(ids.values(), TIMEOUT_S)
    entries = {number: done[prompt_id] for number, prompt_id in ids.items()}
    failed = {number: error_of(entry) for number, entry in entries.items() if not entry["status"]["completed"]}
    if failed:
        pytest.fail(f"{len(failed)} of {len(jobs)} jobs failed: {sorted(failed)}; the first:\n{failed[min(failed)]}")
    return Run({number: images_of(server, entry) for number, entry in entries.items()}, entries)


def error_of(entry: dict[str, Any]) -> str:
    errors = [message for kind, message in entry["status"]["messages"] if kind == "execution_error"]
    return "\n".join(f"{error['exception_message']}\n{''.join(error['traceback'][-4:])}" for error in errors)


def images_of(server: HostServer, entry: dict[str, Any]) -> list[bytes]:
    files = [server.base_dir / "output" / image["filename"] for image in entry["outputs"]["save"]["images"]]
    return [path.read_bytes() for path in files]


def differing(jobs: Sequence[Job], expected: Run, found: Run) -> list[str]:
    """The jobs whose images are not the same, each with what differs."""
    return [
        f"{job}: {difference}"
        for job in jobs
        if (difference := difference_of(expected.images[job.number], found.images[job.number]))
    ]


def difference_of(expected: list[bytes], found: list[bytes]) -> str:
    if expected == found:
        return ""
    if len(expected) != len(found):
        return f"{len(found)} images, not {len(expected)}"
    differences = [largest_difference(one, other) for one, other in zip(expected, found, strict=True)]
    return f"largest difference of a pixel's channels, per image: {differences} (0: only the PNG bytes differ)"


def largest_difference(png: bytes, other: bytes) -> int:
    one, two = Image.open(io.BytesIO(png)), Image.open(io.BytesIO(other))
    return max(high for _, high in ImageChops.difference(one, two).getextrema())


def pixels_of(png: bytes) -> tuple[tuple[int, int], bytes]:
    image = Image.open(io.BytesIO(png))
    return image.size, image.tobytes()


def memory(server: HostServer, field: str) -> int:
    """A field of the host process's status, in bytes."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return make_jobs()


@pytest.fixture(scope="module")
def stock(make_module_server: MakeServer, jobs: list[Job]) -> Run:
    """All jobs, one by one; two stock hosts with one half each, which saves time on two cores."""

    def half(part: list[Job]) -> Run:
        server = make_module_server(slots=None, link=False)
        run = run_jobs(server, part)
        server.stop()
        return run

    middle = len(jobs) // 2
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(half, (jobs[:middle], jobs[middle:]))
    return Run(first.images | second.images, first.entries | second.entries)


def test_jobs_cover_what_they_should(jobs: list[Job]) -> None:
    assert len(jobs) == 200
    assert {job.options["sampler"] for job in jobs} == set(SAMPLERS)
    for name, values in {"batch": {1, 2, 3}, "lora": {None, LORA}, "text": set(TEXTS)}.items():
        assert {job.options[name] for job in jobs} == values
    assert {job.kind for job in jobs} == {"txt2img", "img2img"}


def test_stock_equals_stock_in_any_order(make_server: MakeServer, jobs: list[Job], stock: Run) -> None:
    repeated = random.Random(1).sample(jobs, REPEATED_JOBS)
    repeated.sort(key=lambda job: (GROUPS.index(group_of(job)), random.Random(job.number).random()), reverse=True)
    again = run_jobs(make_server(slots=None, link=False), repeated)
    assert differing(repeated, stock, again) == []


def group_of(job: Job) -> tuple[str, str | None, str]:
    return job.options["ckpt"], job.options["lora"], job.options["text"]


def test_four_slots_equal_stock(make_server: MakeServer, jobs: list[Job], stock: Run) -> None:
    server = make_server(slots=SLOTS)
    before = memory(server, "VmRSS")
    found = run_jobs(server, jobs)

    mismatches = differing(jobs, stock, found)
    assert not mismatches, f"{len(mismatches)} of {len(jobs)} jobs differ:\n" + "\n".join(mismatches)
    per_slot = Counter(entry["gpu_id"] for entry in found.entries.values())
    assert sorted(per_slot) == [0, 1, 2, 3]
    assert min(per_slot.values()) >= FEWEST_JOBS_PER_SLOT, per_slot
    assert len(server.output_files()) == sum(map(len, stock.images.values()))
    # Each slot has at most the checkpoint it leaves and the one it loads; nothing may pile up with the jobs.
    assert memory(server, "VmHWM") - before < 4 * 2 * CHECKPOINT_BYTES


def test_stock_images_differ_between_jobs(jobs: list[Job], stock: Run) -> None:
    """Or the comparison would say nothing."""
    seen = {pixels_of(image) for images in stock.images.values() for image in images}
    assert len(seen) == sum(map(len, stock.images.values()))
