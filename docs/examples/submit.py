"""Submits a workflow to one GPU or to whichever is free, follows its progress, and fetches its images.

usage: python docs/examples/submit.py WORKFLOW.json [--url http://127.0.0.1:8188] [--gpu 2] [--output FOLDER]

WORKFLOW.json is what ComfyUI's menu "Export (API)" saves. Needs: pip install websocket-client
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import websocket

ENDS = ("execution_success", "execution_error", "execution_interrupted")


def call(url: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
    """The reply's body. A refusal ends the program with what the server says."""
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, sent)) as reply:
            content: bytes = reply.read()
            return content
    except urllib.error.HTTPError as refusal:
        sys.exit(f"{refusal.code}: {refusal.read().decode()}")


def submit(url: str, workflow: Any, gpu: str, client_id: str) -> str:
    """Queue a job; its id. `gpu` is a slot's number, or auto."""
    body = {"prompt": workflow, "client_id": client_id}
    reply = json.loads(call(f"{url}/prompt", body, {"X-TARGET-GPU": gpu}))
    print(f"job {reply['prompt_id']} is queued for {'any slot' if reply['gpu_id'] is None else reply['gpu_id']}")
    prompt_id: str = reply["prompt_id"]
    return prompt_id


def follow(socket: websocket.WebSocket, prompt_id: str) -> None:
    """Show the job's progress until it ends."""
    while True:
        message = socket.recv()
        if not isinstance(message, str):
            continue  # A preview picture.
        event = json.loads(message)
        data = event["data"]
        if data.get("prompt_id") != prompt_id:
            continue
        if event["type"] == "progress":
            print(f"slot {data['gpu_id']}: step {data['value']} of {data['max']}")
        if event["type"] in ENDS:
            print(event["type"])
            return


def fetch_images(url: str, prompt_id: str, folder: Path) -> list[Path]:
    """Save the job's images in a folder; their paths."""
    job = json.loads(call(f"{url}/history/{prompt_id}"))[prompt_id]
    print(f"it ran on slot {job['gpu_id']}: {job['status']['status_str']}")
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for output in job["outputs"].values():
        for image in output.get("images", []):
            path = folder / Path(image["filename"]).name
            path.write_bytes(call(f"{url}/view?{urllib.parse.urlencode(image)}"))
            saved.append(path)
    return saved


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8188")
    parser.add_argument("--gpu", default="auto", help="a slot's number, or auto")
    parser.add_argument("--output", type=Path, default=Path("."))
    options = parser.parse_args()
    client_id = uuid.uuid4().hex
    socket = websocket.create_connection(f"{options.url.replace('http', 'ws', 1)}/ws?clientId={client_id}")
    try:
        workflow = json.loads(options.workflow.read_text(encoding="utf-8"))
        prompt_id = submit(options.url, workflow, options.gpu, client_id)
        follow(socket, prompt_id)
    finally:
        socket.close()
    for path in fetch_images(options.url, prompt_id, options.output):
        print(f"saved {path}")


if __name__ == "__main__":
    main()
