"""What a job saved on the other ComfyUI is fetched into the host's own folders, under names that overwrite nothing."""

from __future__ import annotations

import os
import re
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

from comfy_parallel.errors import RemoteError
from comfy_parallel.fleet.remote.wire import RemoteFile, Wire
from comfy_parallel.host import files

_NUMBERED = re.compile(r"(.+)_([0-9]{4,})([_.\-].*)?", re.DOTALL)
_MOST_KNOWN = 20_000

Place = tuple[str, str, str]  # the folder's kind, the folder in it, and the name


class Fetched:
    """The files that have been fetched from one ComfyUI: one that a later job shows again is not fetched twice."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Place, str], tuple[Place, int]] = OrderedDict()

    def get(self, place: Place, tag: str | None) -> Place | None:
        """Where it is here, if it still is."""
        known = self._known.get((place, tag)) if tag is not None else None
        if known is None:
            return None
        (kind, subfolder, name), size = known
        path = files.directory(kind) / subfolder / name
        return known[0] if path.is_file() and path.stat().st_size == size else None

    def add(self, place: Place, tag: str | None, here: Place, size: int) -> None:
        if tag is not None:
            self._known[place, tag] = here, size
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)


class Outputs:
    """The files of one job. It is used in the job's slot, which the numbers of its files belong to."""

    def __init__(self, wire: Wire, fetched: Fetched) -> None:
        self._wire, self._fetched = wire, fetched
        self._here: dict[Place, Place] = {}
        self._series: dict[tuple[str, str, str], tuple[int, Any]] = {}  # a number there, and the one here for it

    async def bring(self, shown: Any) -> Any:
        """Fetch what is named in what nodes show; returns that with the names that the files have here.

        Raises:
            RemoteError: when a file cannot be fetched.
        """
        if isinstance(shown, list):
            return [await self.bring(part) for part in shown]
        if not isinstance(shown, dict):
            return shown
        place = _place(shown)
        if place is None:
            return {name: await self.bring(part) for name, part in shown.items()}
        kind, subfolder, name = await self._fetch(place)
        told = {**shown, "filename": name, "subfolder": subfolder}
        if isinstance(shown.get("fullpath"), str):
            told["fullpath"] = str(files.directory(kind) / subfolder / name)
        return told

    async def _fetch(self, place: Place) -> Place:
        if place not in self._here:
            kind, subfolder, name = place
            try:
                async with self._wire.file(kind, subfolder, name) as file:
                    here = self._fetched.get(place, file.tag)
                    self._here[place] = here if here is not None else await self._write(place, file)
            except (ValueError, OSError) as error:
                raise RemoteError(f"its file {name!r} cannot be written here: {error}") from error
        return self._here[place]

    async def _write(self, place: Place, file: RemoteFile) -> Place:
        kind = place[0]
        path = self._new_file(*place)
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with part.open("wb") as opened:
                await file.write_to(opened.write)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        subfolder = path.parent.relative_to(files.directory(kind)).as_posix()
        here = kind, "" if subfolder == "." else subfolder, path.name
        self._fetched.add(place, file.tag, here, path.stat().st_size)
        return here

    def _new_file(self, kind: str, subfolder: str, name: str) -> Path:
        """An empty file of a name that nobody else has."""
        folder = files.folder_in(kind, subfolder)
        numbered = _NUMBERED.fullmatch(name)
        attempt = 0
        while True:
            path = folder / self._name(kind, subfolder, name, numbered, attempt)
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                attempt += 1
            else:
                return path

    def _name(self, kind: str, subfolder: str, name: str, numbered: re.Match[str] | None, attempt: int) -> str:
        if numbered is None:
            stem, ending = os.path.splitext(name)
            return f"{stem} ({attempt}){ending}" if attempt else name
        prefix, digits, rest = numbered[1], numbered[2], numbered[3] or ""
        series = kind, subfolder, prefix
        there, here = self._series.get(series) or (int(digits), None)
        if here is None or int(digits) < there:
            there, here = int(digits), files.numbered_place(kind, subfolder, prefix)[1]
        elif attempt:  # A file that is no image may have the number without the host's counting it.
            here = here + 1
        self._series[series] = there, here
        ahead = int(digits) - there
        return f"{prefix}_{format(here + ahead if ahead else here, f'0{len(digits)}d')}{rest}"


def _place(shown: dict[str, Any]) -> Place | None:
    """Where the file is that a node shows; None when this is none.

    Raises:
        RemoteError: when it is named in a way that leads elsewhere.
    """
    name, kind, subfolder = shown.get("filename"), shown.get("type"), shown.get("subfolder") or ""
    if not isinstance(name, str) or not isinstance(subfolder, str) or kind not in files.KINDS:
        return None
    subfolder = subfolder.replace("\\", "/")
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise RemoteError(f"it names a file {name[:200]!r}")
    return kind, subfolder, name
