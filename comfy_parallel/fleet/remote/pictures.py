"""Previews as another ComfyUI has encoded them."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

IMAGE, PICTURE, TEXT, WITH_METADATA = 1, 2, 3, 4  # the host's binary events (protocol.BinaryEventTypes)
_FORMATS = {1: "JPEG", 2: "PNG", 3: "WEBP"}


class Encoded:
    """A picture that the host encodes into the bytes that it came in; to others it is as PIL has it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._opened: Any = None

    def save(self, file: Any, format: str | None = None, **options: Any) -> None:
        file.write(self._data)

    def __getattr__(self, name: str) -> Any:
        if self._opened is None:
            from PIL import Image

            self._opened = Image.open(io.BytesIO(self._data))
        return getattr(self._opened, name)


def event_of(frame: bytes, there: str, here: str) -> tuple[int, Any]:
    """A binary message as `PromptServer.send_sync` takes it. `there` and `here` are the job's two ids.

    Raises:
        ValueError, struct.error: when it is no message of ComfyUI's.
    """
    (kind,), body = struct.unpack_from(">I", frame), frame[4:]
    if kind == IMAGE:
        (number,) = struct.unpack_from(">I", body)
        if number in _FORMATS:
            return PICTURE, (_FORMATS[number], Encoded(body[4:]), None)
    if kind == WITH_METADATA:
        (length,) = struct.unpack_from(">I", body)
        metadata = json.loads(renamed(body[4 : 4 + length].decode(), there, here))
        form = "PNG" if metadata.get("image_type") == "image/png" else "JPEG"
        return WITH_METADATA, ((form, Encoded(body[4 + length :]), None), metadata)
    return kind, body


def renamed(text: str, there: str, here: str) -> str:
    """JSON in which a job has the other id."""
    return text.replace(there, json.dumps(here)[1:-1])
