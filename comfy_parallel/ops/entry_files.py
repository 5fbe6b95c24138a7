"""The files that a web server's configuration is made from and written to: certificates, passwords, tokens."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from comfy_parallel.errors import ConfigError

# What a bearer token may be made of (RFC 6750), long enough that nobody guesses it, short enough for a header.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,1000}={0,2}")
# What nginx's auth_basic reads: crypt(3) with or without a $, and {SHA}, {SSHA} or {PLAIN}.
_PASSWORD = re.compile(r"[^:]+:(\$\S+|\{\w+\}\S+|[./0-9A-Za-z]{13})(:.*)?")

# What Caddy reads: a name that needs no care in its file, and bcrypt.
_BCRYPT = re.compile(r"([\w.@+-]+):(\$2[abxy]?\$\d\d\$[./0-9A-Za-z]{53})")


def existing(path: Path) -> str:
    """The absolute path of a file that is there; raises ConfigError where it is not."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {_reason(error)}") from error
    if not is_file:
        raise ConfigError(f"{path} is not a file")
    return os.path.abspath(path)


def password_file(path: Path) -> str:
    """The absolute path of a file of names and passwords; raises ConfigError for one that nobody could log in with."""
    where = existing(path)
    entries = _entries(path)
    wrong = [number for number, line in entries if not _PASSWORD.fullmatch(line)]
    if wrong or not entries:
        what = f"line {wrong[0]} is not NAME:HASH" if wrong else "it holds no line NAME:HASH"
        raise ConfigError(f'{path}: {what}; make one with: echo "NAME:$(openssl passwd -6)" > {path}')
    return where


def bcrypt_passwords(path: Path) -> tuple[tuple[str, str], ...]:
    """The names and hashes of a file; raises ConfigError for what Caddy could not use."""
    existing(path)
    found = [(number, _BCRYPT.fullmatch(line)) for number, line in _entries(path)]
    wrong = [number for number, match in found if match is None]
    if wrong or not found:
        what = f"line {wrong[0]} is not NAME:BCRYPT_HASH" if wrong else "it holds no line NAME:BCRYPT_HASH"
        raise ConfigError(f'{path}: {what}; make one with: echo "NAME:$(caddy hash-password)" > {path}')
    return tuple((match[1], match[2]) for _, match in found if match is not None)


def tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file, one a line; raises ConfigError where there are none or one is no token."""
    existing(path)
    entries = _entries(path)
    wrong = [number for number, line in entries if not _TOKEN.fullmatch(line)]
    if wrong or not entries:
        what = f"line {wrong[0]} is no token (16 to 1000 of A-Z a-z 0-9 . _ ~ + / -)" if wrong else "it holds no token"
        raise ConfigError(f"{path}: {what}; make one with: openssl rand -hex 32 > {path}")
    return tuple(dict.fromkeys(line for _, line in entries))


def write(path: Path, text: str, *, secret: bool) -> None:
    """Write the configuration, for its owner's eyes only if it is secret; raises ConfigError where it cannot."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600 if secret else 0o666), "w", encoding="utf-8") as file:
            if secret:
                os.fchmod(file.fileno(), 0o600)
            file.truncate()
            file.write(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {_reason(error)}") from error


def _entries(path: Path) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers; `#` begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}") from error
    numbered = enumerate(map(str.strip, lines), 1)
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
