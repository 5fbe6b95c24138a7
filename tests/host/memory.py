"""How much memory a process needs, whatever other processes map of the same files."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path


def used_bytes(pid: int) -> int:
    """What only this process has, and of each file that it maps the pages that it has mapped, once.

    The kernel's proportional set size would change with each process beside that starts or ends, as all map the same
    libraries and models.
    """
    private = 0
    files: dict[str, int] = defaultdict(int)
    name, resident = "", 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):
            parts = line.split(maxsplit=5)  # address, rights, offset, device, inode, path
            name = "" if parts[4] == "0" else f"{parts[3]} {parts[4]}"
        elif field == "Rss:":
            resident = _kilobytes(rest)
        elif field == "Anonymous:":
            anonymous = _kilobytes(rest)
            private += anonymous
            if name:
                files[name] = max(files[name], resident - anonymous)
            else:
                private += resident - anonymous
    return private + sum(files.values())


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) << 10
