"""Jobs of real node packs at the same time: are they, and plain jobs beside and after them, stock ComfyUI's bytes?

    python benchmarks/packs.py COMFYUI_DIR PACKS_DIR [--slots 2,4] [--jobs 40] [--only WORD,…]
        [--skip-cost | --only-cost]

PACKS_DIR holds node packs, each in a folder of its own; benchmarks/pack_workflows.py and pack_patch_workflows.py have
workflows for many that are widely used, and those whose pack is missing or does not load are left out. Run it by a
Python that has what the packs need. Every job runs once on stock ComfyUI, alone. Then, on CPU slots: two jobs of each
kind at once with a plain one, --jobs mixed jobs in random order, and plain jobs on every slot. Jobs that differ run
once more on stock ComfyUI, in another order: there are nodes whose results depend on the jobs before. Last, what plain
jobs cost with the packs installed: COMFY_PARALLEL_PACKS=auto against trust, in turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pack_patch_workflows import MORE
from pack_workflows import IMAGES, KINDS, Kind, plain

from tests.host.models import cached_shapes
from tests.host.server import JSON, HostServer, HostServerError, without_front_end
from tests.host.workflows import Workflow

PLAIN = Kind("", "plain job", plain)
JOB_TIMEOUT_S = 300
ROUNDS, JOBS_PER_ROUND = 7, 24
Job = tuple[Kind, int]
saved: dict[str, list[Path]] = {}  # the files of each result, by its hash


def main() -> int:
    options = parse()
    packs = sorted(path for path in options.packs.iterdir() if (path / "__init__.py").is_file())
    with tempfile.TemporaryDirectory() as made:
        hosts = Hosts(options.comfyui, Path(made), packs)
        if options.only_cost:
            report_cost(hosts)
            return 0
        kinds = [
            kind
            for kind in (*KINDS, *MORE)
            if not options.only or any(word in f"{kind.pack} {kind.name}" for word in options.only)
        ]
        jobs = [(kind, number) for kind in kinds for number in (1, 2)]
        mixed = mix(kinds, options.jobs)
        expected = run_stock(hosts, {*jobs, *mixed}, kinds)
        wrong: set[tuple[int, str, Job]] = set()
        for slots in options.slots:
            with hosts.start(slots) as server:
                wrong |= {(slots, *found) for found in compare(server, slots, kinds, mixed, expected)}
        by_order = differ_by_order(hosts, {job for _, _, job in wrong}, kinds, expected) if wrong else set()
        if not options.skip_cost:
            report_cost(hosts)
    for slots, phase, (kind, number) in sorted(wrong, key=str):
        why = ": stock's, too, depends on the jobs before" if (kind, number) in by_order else ""
        print(f"differs: {slots} slots, {phase}: {kind.pack} {kind.name} {number}{why}")
    print(f"{len(wrong)} of all jobs differ from stock")
    return 1 if any(job not in by_order for _, _, job in wrong) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, metavar="COMFYUI_DIR")
    parser.add_argument("packs", type=Path, metavar="PACKS_DIR")
    parser.add_argument("--slots", type=lambda text: [int(part) for part in text.split(",")], default=[2, 4])
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--skip-cost", action="store_true")
    parser.add_argument("--only-cost", action="store_true")
    return parser.parse_args()


class Hosts:
    """Starts ComfyUI with all packs: stock, or with slots."""

    def __init__(self, comfyui: Path, folder: Path, packs: list[Path]) -> None:
        self.comfyui, self.folder, self.packs = comfyui, folder, packs
        self.models = cached_shapes(comfyui, Path.home() / ".cache" / "comfy_parallel")
        self._count = 0

    def start(self, slots: int | None, **env: str) -> HostServer:
        """A host that is not yet started; `slots` of the CPU, or None for stock."""
        self._count += 1
        home = self.folder / str(self._count)
        home.mkdir()
        (home / "models").symlink_to(self.models)
        server = HostServer(
            self.comfyui,
            home,
            slots=None if slots is None else ",".join(["cpu"] * slots),
            env={"COMFY_PARALLEL_PACKS": "auto", **env},
            args=without_front_end(home / "page"),
            link=slots is not None,
            packs=self.packs,
        )
        (home / "custom_nodes" / "comfy_parallel_test_nodes").unlink(missing_ok=True)
        make_pictures(home / "input")
        return server


def make_pictures(folder: Path) -> None:
    """Pictures of 64x64 with colours in them, the same each time."""
    from PIL import Image

    for number in range(IMAGES):
        colours = random.Random(number).randbytes(8 * 8 * 3)
        Image.frombytes("RGB", (8, 8), colours).resize((64, 64), Image.Resampling.BICUBIC).save(
            folder / f"pack{number}.png"
        )


def mix(kinds: list[Kind], count: int) -> list[Job]:
    """Jobs of all kinds in turns, a third of them plain, in an order that is the same each time."""
    numbers = range(max(1, count - count // 3))
    jobs = [(kinds[number % len(kinds)], 3 + number // len(kinds)) for number in numbers]
    jobs += [(PLAIN, number) for number in range(count - len(jobs))]
    random.Random(1).shuffle(jobs)
    return jobs


def run_stock(hosts: Hosts, jobs: set[Job], kinds: list[Kind]) -> dict[Job, str]:
    """What each job gives on stock ComfyUI, one after the other; plain jobs first, as packs may leave things behind."""
    order = [PLAIN, *kinds]
    wanted = {*jobs, *((PLAIN, number) for number in range(12))}
    with hosts.start(None) as server:
        known = server.request("GET", "/object_info")[1]
        expected: dict[Job, str] = {}
        for kind, number in sorted(wanted, key=lambda job: (order.index(job[0]), job[1])):
            workflow = kind.make(number)
            missing = {made["class_type"] for made in workflow.values()} - known.keys()
            if missing:
                expected[kind, number] = f"not loaded: {sorted(missing)}"
            else:
                expected[kind, number] = outcomes(server, [(workflow, None)])[0]
    return expected


def outcomes(server: HostServer, jobs: Iterable[tuple[Workflow, int | None]]) -> list[str]:
    """A hash of what each job showed and saved, in their order; how it ended, if not well."""
    ids: list[str] = []
    refused: dict[int, str] = {}
    for place, (workflow, slot) in enumerate(jobs):
        try:
            ids.append(server.submit(workflow, slot)["prompt_id"])
        except HostServerError as error:
            refused[place] = f"refused: {error}"
            ids.append("")
    entries = server.wait(filter(None, ids), JOB_TIMEOUT_S)
    return [refused.get(place) or result(server, entries[job_id]) for place, job_id in enumerate(ids)]


def result(server: HostServer, entry: JSON) -> str:
    if entry["status"]["status_str"] != "success":
        errors = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
        return f"error: {errors[0]['exception_message'].strip()[:150]}" if errors else "error"
    digest, files = hashlib.sha256(), []
    for name, shown in sorted(entry["outputs"].items()):
        values = [value for part in shown.values() for value in part]
        files += [path for value in values if (path := file_of(server, value)) is not None]
        digest.update(f"{name}: {[content(server, value) for value in values]}".encode())
    saved[digest.hexdigest()] = files
    return digest.hexdigest()


def content(server: HostServer, value: Any) -> Any:
    """Of a saved file its bytes' hash, for its number may be another; anything else as it is."""
    path = file_of(server, value)
    return json.dumps(value, sort_keys=True) if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def file_of(server: HostServer, value: Any) -> Path | None:
    """The file that a node says it has saved; None for anything else."""
    if not isinstance(value, dict) or "filename" not in value:
        return None
    return server.base_dir / value["type"] / value["subfolder"] / value["filename"]


def difference(expected: str, got: str) -> str:
    """By how much the first pictures of two results differ: another job's picture, or the last bit of a pixel."""
    from PIL import Image, ImageChops

    for one, other in zip(saved[expected], saved[got], strict=False):
        first, second = (Image.open(path).convert("RGB") for path in (one, other))
        if first.size != second.size:
            return f"other bytes: {second.size} instead of {first.size}"
        apart = ImageChops.difference(first, second)
        if (box := apart.getbbox()) is not None:
            return f"other bytes: up to {max(high for _, high in apart.getextrema())} of 255 in {box}"
    return "other bytes"


def compare(
    server: HostServer, slots: int, kinds: list[Kind], mixed: list[Job], expected: dict[Job, str]
) -> set[tuple[str, Job]]:
    """Print a row per kind and one per phase; the wrong jobs, each with its phase."""
    print(f"\n{slots} slots\n{'pack':32} {'workflow':26} result")
    wrong: set[tuple[str, Job]] = set()
    for count, kind in enumerate(kinds):
        if not is_hash(expected[kind, 1]):
            print(f"{kind.pack:32} {kind.name:26} stock: {expected[kind, 1][:110]}")
            continue
        jobs = [(kind, 1), (kind, 2), (PLAIN, count % 12)]
        seen = outcomes(server, [(kind.make(1), 0), (kind.make(2), 1), (plain(count % 12), slots - 1)])
        bad = report(jobs, seen, expected)
        print(f"{kind.pack:32} {kind.name:26} {'; '.join(bad.values()) or 'stock'}", flush=True)
        wrong |= {("in pairs", job) for job in bad}
    phases = {"mixed": mixed, "plain, after": [(PLAIN, number % 12) for number in range(3 * slots)]}
    for name, jobs in phases.items():
        usable = [job for job in jobs if is_hash(expected[job])]
        targets = [number % slots if name != "mixed" else None for number in range(len(usable))]
        seen = outcomes(server, [(kind.make(n), slot) for (kind, n), slot in zip(usable, targets, strict=True)])
        bad = report(usable, seen, expected)
        print(f"{name:32} {len(usable)} jobs, {len(bad)} differ {'; '.join(bad.values())}", flush=True)
        wrong |= {(name, job) for job in bad}
    return wrong


def differ_by_order(hosts: Hosts, jobs: set[Job], kinds: list[Kind], expected: dict[Job, str]) -> set[Job]:
    """Those of the jobs that give other bytes on stock ComfyUI when they run in the opposite order."""
    order = [PLAIN, *kinds]
    with hosts.start(None) as server:
        ordered = sorted(jobs, key=lambda job: (order.index(job[0]), job[1]), reverse=True)
        return {
            (kind, number)
            for kind, number in ordered
            if outcomes(server, [(kind.make(number), None)])[0] != expected[kind, number]
        }


def is_hash(outcome: str) -> bool:
    return len(outcome) == 64 and " " not in outcome


def report(jobs: list[Job], seen: list[str], expected: dict[Job, str]) -> dict[Job, str]:
    """A word on each job that is not as on stock."""
    return {
        (kind, number): f"{kind.pack or 'plain'} {number}: "
        + (difference(expected[kind, number], got) if is_hash(got) else got)
        for (kind, number), got in zip(jobs, seen, strict=True)
        if got != expected[kind, number]
    }


def report_cost(hosts: Hosts) -> None:
    """Print plain jobs' throughput and processor time with the packs installed, isolated against trusted."""
    rates: dict[str, list[float]] = {"trust": [], "auto": []}
    times: dict[str, list[float]] = {"trust": [], "auto": []}
    servers = {mode: hosts.start(2, COMFY_PARALLEL_PACKS=mode) for mode in rates}
    with servers["trust"], servers["auto"]:
        for number in range(ROUNDS + 1):  # the first round loads the models
            for mode in sorted(servers, reverse=bool(number % 2)):
                started, worked = time.monotonic(), processor_time_s(servers[mode])
                jobs = [(plain(10_000 + number * JOBS_PER_ROUND + n), None) for n in range(JOBS_PER_ROUND)]
                outcomes(servers[mode], jobs)
                rates[mode].append(JOBS_PER_ROUND / (time.monotonic() - started))
                times[mode].append((processor_time_s(servers[mode]) - worked) / JOBS_PER_ROUND)
    rate, work = ({mode: statistics.median(seen[1:]) for mode, seen in kept.items()} for kept in (rates, times))
    print(
        f"\nplain jobs with {len(hosts.packs)} packs installed: {rate['auto']:.2f} jobs/s isolated,"
        f" {rate['trust']:.2f} trusted, {rate['auto'] / rate['trust']:.3f}; {work['auto'] * 1000:.1f} ms of processor"
        f" time each, {work['trust'] * 1000:.1f} trusted, {work['trust'] / work['auto']:.3f}"
        f" (medians of {ROUNDS} rounds of {JOBS_PER_ROUND})"
    )


def processor_time_s(server: HostServer) -> float:
    """What all threads of the host have worked so far."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    raise SystemExit(main())
