"""The files that a workflow names are sent to the other ComfyUI, unless it has them already."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

from comfy_parallel.errors import CannotRunThere
from comfy_parallel.fleet.remote.wire import Wire
from comfy_parallel.host.files import NamedFile, named_file

_CHUNK = 1 << 20


class Inputs:
    """What one ComfyUI has been sent, by where it is to be and what it contains."""

    def __init__(self, wire: Wire, is_choice: Callable[[str, str], bool]) -> None:
        self._wire, self._is_choice = wire, is_choice
        self._digests: dict[tuple[Any, ...], str] = {}
        self._sent: dict[tuple[str, str, str, str], tuple[str, str, str | None]] = {}

    def forget(self) -> None:
        """The other side was started again, and may have lost its files."""
        self._sent.clear()

    async def bring(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Send what the workflow names; returns it with the names that the files have there.

        That is the same workflow unless the other side has another file of a name.

        Raises:
            CannotRunThere: when a name that may be part of a text would have to change.
        """
        brought = {}
        for node_id, node in prompt.items():
            inputs = node.get("inputs") if isinstance(node, dict) else None
            changed = {}
            for name, value in inputs.items() if isinstance(inputs, dict) else ():
                told = await self._bring_value(str(node.get("class_type")), name, value)
                if told != value:
                    changed[name] = told
            brought[node_id] = {**node, "inputs": {**inputs, **changed}} if changed and inputs else node
        return brought

    async def _bring_value(self, kind: str, name: str, value: Any) -> Any:
        if isinstance(value, list) and not _is_link(value):
            return [await self._bring_value(kind, name, part) for part in value]
        if type(value) is not str or (file := named_file(value)) is None:
            return value
        told = await self._send(file)
        if told != (file.subfolder, file.name) and not self._is_choice(kind, name):
            raise CannotRunThere(
                f"another file {value!r} is there, and {kind} may not take a name of ours for its {name}"
            )
        return value if told == (file.subfolder, file.name) else file.renamed(*told)

    async def _send(self, file: NamedFile) -> tuple[str, str]:
        """Where it is there."""
        key = (file.kind, file.subfolder, file.name, await self._digest(file))
        known = self._sent.get(key)
        if known is not None and known[2] is not None and known[2] == await self._wire.tag(file.kind, *known[:2]):
            return known[:2]
        told = await self._wire.upload(file.path, file.kind, file.subfolder, file.name)
        subfolder, name = str(told.get("subfolder", "")).replace("\\", "/").strip("/"), str(told["name"])
        self._sent[key] = subfolder, name, await self._wire.tag(file.kind, subfolder, name)
        return subfolder, name

    async def _digest(self, file: NamedFile) -> str:
        seen = file.path.stat()
        key = (file.path, seen.st_ino, seen.st_mtime_ns, seen.st_size)
        if key not in self._digests:
            self._digests[key] = await asyncio.to_thread(_sha256, file)
        return self._digests[key]


def _sha256(file: NamedFile) -> str:
    digest = hashlib.sha256()
    with file.path.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_link(value: list[Any]) -> bool:
    return len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
