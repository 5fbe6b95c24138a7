"""The commands that a page of Markdown tells its reader to type, in whatever way they are written."""

from __future__ import annotations

import re

SHELLS = {"bash", "sh", "shell", "zsh", "console", "shell-session", "powershell", "bat", "cmd"}
PROGRAMS = (
    "apt-get|apt|bash|caddy|cat|cd|chmod|chown|comfy|comfy-parallel|conda|cp|curl|docker|dpkg|echo|env|"
    "export|git|htpasswd|journalctl|kill|ln|logrotate|ls|make|mkdir|mv|mypy|nginx|node|npm|npx|nvidia-smi|"
    "openssl|pip|pip3|pipx|podman|promtool|py|py-spy|pytest|python|python3|rm|ruff|sed|set|sh|source|sudo|"
    "systemctl|systemd-analyze|systemd-run|tail|tar|taskset|torchrun|uv|uvx|wget|wrk"
)
_PREFIX = r"(?:\$ )?(?:[A-Za-z_]\w*=\S* +)*"  # a prompt; settings
_START = re.compile(_PREFIX + f"(?:(?:{PROGRAMS})" + r""" +[\w./$@"'{<-]|\.{0,2}/[\w./-]+\.(?:sh|bat|py)\b)""")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n]*\n(.*?)^ {0,3}\1[`~]* *$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


def commands(text: str) -> list[str]:
    """Each command of a page, in order, on one line and without comments; one that is named alone is none.

    Those of a shell's blocks, and what begins like a command in other blocks, in indented lines and between backquotes.
    """
    found: list[tuple[int, str]] = []
    for fence in _FENCE.finditer(text):
        is_shell = fence[2].lower() in SHELLS
        lines = re.sub(r"\\\n\s*", " ", fence[3]).splitlines()
        found += [(fence.start(), line) for line in lines if is_shell or _START.match(line.strip())]
    rest = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    indented = re.finditer(r"^(?: {4,}|\t)(\S.*)$", rest, re.MULTILINE)
    found += [(len(text) + line.start(), line[1]) for line in indented if _START.match(line[1])]
    found += [(len(text) + span.start(), span[2]) for span in _SPAN.finditer(rest) if _is_told(span[2])]
    return [part for _, line in sorted(found, key=lambda pair: pair[0]) for part in _parts(line)]


def _is_told(span: str) -> bool:
    words = span.split()
    return bool(words) and (words[0] == "comfy-parallel" or bool(_START.match(span.strip())))


def _parts(line: str) -> list[str]:
    bare = re.sub(r"^\$ ", "", re.sub(r"(^|\s+)# .*", "", line.strip()))
    return [part for each in bare.split(" && ") if (part := re.sub(r"\s+", " ", each).strip())]


def languages(text: str) -> set[str]:
    """What the blocks of a page say that they are written in; "" for those that say nothing."""
    return {fence[2].lower() for fence in _FENCE.finditer(text)}
