"""Jobs of real node packs that do not end with themselves: videos made in several jobs, and choices left to a person.

    python benchmarks/pack_sequels.py COMFYUI_DIR PACKS_DIR

PACKS_DIR holds ComfyUI-VideoHelperSuite, cg-image-picker and cg-image-filter (what is missing is left out), and the
Python that runs this has imageio-ffmpeg and OpenCV. On two CPU slots: eight H.264 videos without the picture that
reserves their number; two videos made by the batch manager, at the same time and with the same node numbers; two
choosers of each kind. Frames and pictures are compared with those of the same jobs on stock ComfyUI, one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packs import Hosts

from tests.host.jobs import await_idle
from tests.host.server import HostServer
from tests.host.workflows import Workflow, node

VIDEOS, FRAMES, PER_BATCH, SIZE, RATE = 8, 24, 5, 64, 8
LIMIT_S = 120
ASKED_AFTER_S = 1.5
Answer = Callable[[HostServer], bool]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, metavar="COMFYUI_DIR")
    parser.add_argument("packs", type=Path, metavar="PACKS_DIR")
    options = parser.parse_args()
    comfyui, packs_dir = options.comfyui, options.packs
    names = ("ComfyUI-VideoHelperSuite", "cg-image-picker", "cg-image-filter")
    with tempfile.TemporaryDirectory() as made:
        hosts = Hosts(comfyui, Path(made), [packs_dir / name for name in names if (packs_dir / name).is_dir()])
        expected = run(hosts, slots=None)
        seen = run(hosts, slots=2)
    wrong = {name for name in expected if seen.get(name) != expected[name]}
    for name, value in expected.items():
        print(f"{name:24} {value:40} {'differs: ' + str(seen.get(name)) if name in wrong else 'stock'}")
    return 1 if wrong else 0


def run(hosts: Hosts, slots: int | None) -> dict[str, str]:
    """What each job made; all of a kind at once where there are slots."""
    server = hosts.start(slots)
    make_video(server.base_dir / "input" / "in.mp4")
    with server:
        known = server.request("GET", "/object_info")[1]
        found = videos(server, slots) | batched_videos(server, slots)
        for kind, make, answer in ((PICKER, picked, pick), (FILTER, filtered, choose)):
            if kind in known:
                found |= choices(server, slots, kind, make, answer)
            else:
                print(f"{kind}: not loaded")
    return found


def videos(server: HostServer, slots: int | None) -> dict[str, str]:
    """The frames of each video, by the job's number; all want the same number of a file."""
    ids = []
    for number in range(VIDEOS):
        ids.append(submit_video(server, video(number), None if slots is None else number % slots))
        if slots is None:
            await_idle(server)
    entries = server.wait(ids, LIMIT_S)
    shown = [entries[job_id]["outputs"].get("save", {}).get("gifs", [{}])[0].get("filename") for job_id in ids]
    return {
        f"video {number}": frames(server.base_dir / "output" / name) if name else "no file"
        for number, name in enumerate(shown)
    }


def batched_videos(server: HostServer, slots: int | None) -> dict[str, str]:
    """The frames of each video that several jobs make."""
    for number in range(2):
        submit_video(server, batches(number), None if slots is None else number % slots)
        if slots is None:
            await_idle(server)
    await_idle(server)
    files = [sorted((server.base_dir / "output").glob(f"batches{number}_*.mp4")) for number in range(2)]
    return {f"batches {number}": " ".join(map(frames, paths)) or "no file" for number, paths in enumerate(files)}


def submit_video(server: HostServer, workflow: Workflow, slot: int | None) -> str:
    """Without the picture beside the video, which would reserve its number."""
    options = {"workflow": {"extra": {"VHS_MetadataImage": False}}}
    reply = server.submit(workflow, slot, extra_data={"extra_pnginfo": options})
    return str(reply["prompt_id"])


def choices(
    server: HostServer, slots: int | None, kind: str, make: Callable[[int], Workflow], answer: Callable[[int], Answer]
) -> dict[str, str]:
    """What is saved of the pictures that were chosen, by the job's number."""
    ids: list[str] = []
    for number in range(2):
        ids.append(server.submit(make(number), None if slots is None else number)["prompt_id"])
        if slots is None:
            answer_until_done(server, ids[number], answer(number))
    for number, job_id in enumerate(ids):
        answer_until_done(server, job_id, answer(number))
    files = [sorted((server.base_dir / "output").glob(f"{kind.replace(' ', '')}{number}_*.png")) for number in range(2)]
    return {f"{kind} {number}": " ".join(map(pixels, paths)) or "no file" for number, paths in enumerate(files)}


def answer_until_done(server: HostServer, job_id: str, answer: Answer) -> None:
    """Answer once the job has had time to ask: an answer that nobody waits for may be kept for the next job."""
    deadline = time.monotonic() + LIMIT_S
    while not server.request("GET", f"/history/{job_id}")[1]:
        if time.monotonic() > deadline:
            raise SystemExit(f"nobody took the answer for {job_id}")
        time.sleep(ASKED_AFTER_S)
        answer(server)
        time.sleep(ASKED_AFTER_S)


def video(n: int) -> Workflow:
    """One colour."""
    return {
        "image": node("EmptyImage", width=SIZE, height=SIZE, batch_size=FRAMES, color=n * 0x1F1F1F),
        "save": combined(["image", 0], "video"),
    }


def batches(n: int) -> Workflow:
    """The input video, turned for odd jobs, a few frames in each job."""
    load = {"force_rate": 0, "custom_width": 0, "custom_height": 0, "frame_load_cap": 0, "skip_first_frames": 0}
    return {
        "batch": node("VHS_BatchManager", frames_per_batch=PER_BATCH + n),
        "load": node("VHS_LoadVideo", video="in.mp4", select_every_nth=1, meta_batch=["batch", 0], **load),
        "flip": node(
            "ImageScale", image=["load", 0], upscale_method="area", width=SIZE >> n, height=SIZE, crop="disabled"
        ),
        "save": combined(["flip", 0], f"batches{n}", meta_batch=["batch", 0]),
    }


def combined(images: list[object], prefix: str, **inputs: object) -> dict[str, object]:
    save = {"frame_rate": float(RATE), "loop_count": 0, "pingpong": False, "save_output": True}
    encoder = {"pix_fmt": "yuv420p", "crf": 19, "save_metadata": False, "trim_to_audio": False}
    made = {"images": images, "filename_prefix": prefix, "format": "video/h264-mp4", **save, **encoder, **inputs}
    return node("VHS_VideoCombine", **made)


PICKER, FILTER = "Preview Chooser", "Image Filter"


def chosen(n: int, kind: str, **chooser: object) -> Workflow:
    """Two pictures to choose from, the same numbers of nodes in each job."""
    dark, light = (
        node("EmptyImage", width=16, height=16, batch_size=1, color=colour << 8 * n) for colour in (0x40, 0xC0)
    )
    return {
        "1": dark,
        "2": light,
        "3": node("ImageBatch", image1=["1", 0], image2=["2", 0]),
        "4": node(kind, images=["3", 0], **chooser),
        "5": node("SaveImage", images=["4", 0], filename_prefix=f"{kind.replace(' ', '')}{n}"),
    }


def picked(n: int) -> Workflow:
    return chosen(n, PICKER, mode="Always pause", count=1)


def pick(n: int) -> Answer:
    return lambda server: post(server, "/image_chooser_message", id="4", message=str(n))


def filtered(n: int) -> Workflow:
    return chosen(n, FILTER, timeout=60, ontimeout="send none", graph_id=f"graph{n}", pick_list="", pick_list_start=0)


def choose(n: int) -> Answer:
    response = f'{{"graph_id": "graph{n}", "selection": ["{n}"]}}'
    return lambda server: post(server, "/cg-image-filter-message", response=response)


def post(server: HostServer, path: str, **fields: str) -> bool:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return server.request("POST", path, data=urllib.parse.urlencode(fields).encode(), headers=headers)[0] == 200


def ffmpeg() -> str:
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def make_video(path: Path) -> None:
    source = f"testsrc=size={SIZE}x{SIZE}:rate={RATE}:duration={FRAMES // RATE}"
    subprocess.run([ffmpeg(), "-v", "error", "-f", "lavfi", "-i", source, str(path)], check=True)


def pixels(path: Path) -> str:
    """A hash of a picture without its text, in which the chooser's own `is_changed` is random."""
    from PIL import Image

    return hashlib.md5(Image.open(path).tobytes()).hexdigest()


def frames(path: Path) -> str:
    """The number of frames of a video and a hash of them."""
    command = [ffmpeg(), "-v", "error", "-i", str(path), "-f", "framemd5", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    if done.returncode or not rows:
        return f"unreadable: {done.stderr.strip()[:80]}"
    return f"{len(rows)} frames {hashlib.md5(chr(10).join(rows).encode()).hexdigest()[:12]}"


if __name__ == "__main__":
    raise SystemExit(main())
