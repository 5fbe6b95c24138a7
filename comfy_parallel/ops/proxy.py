"""The commands `comfy-parallel nginx` and `comfy-parallel caddy`, which take the same arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from comfy_parallel.errors import ConfigError
from comfy_parallel.ops import caddy, entry_files, nginx
from comfy_parallel.ops.entry import Entry, address

_CONFIGURATIONS = {"nginx": nginx.configuration, "caddy": caddy.configuration}
_PASSWORDS = {"nginx": "as htpasswd makes them", "caddy": "NAME:HASH, with caddy hash-password"}


def add_to(command: argparse.ArgumentParser, program: str) -> None:
    """Declare the arguments."""
    command.add_argument("--gpus", metavar="N", type=int, required=True, help="how many slots the server has")
    command.add_argument(
        "--port", type=int, default=8180, help="leads to all slots; the next port to slot 0, and so on (8180)"
    )
    command.add_argument("--comfyui-port", metavar="PORT", type=int, default=8188, help="where ComfyUI listens (8188)")
    command.add_argument("--listen", metavar="ADDRESS", help="an IP address of this machine (all IPv4 addresses)")
    command.add_argument("--tls", metavar=("CERT", "KEY"), nargs=2, type=Path, help="two PEM files")
    command.add_argument(
        "--auth",
        metavar=("KIND", "FILE"),
        nargs=2,
        help=f"basic PASSWORDS ({_PASSWORDS[program]}) for browsers, or bearer TOKENS (one a line) for programs",
    )
    command.add_argument("--output", metavar="FILE", type=Path, help="where to write it (standard output)")
    command.set_defaults(run=run, program=program)


def run(options: argparse.Namespace) -> int:
    """Write the configuration, and what its reader should be warned of to standard error."""
    entry = _entry(options)
    text = _CONFIGURATIONS[options.program](entry)
    if options.output is None:
        sys.stdout.write(text)
    else:
        _refuse_to_overwrite_what_was_read(options)
        entry_files.write(options.output, text, secret=entry.is_secret)
    for warning in entry.warnings():
        sys.stderr.write(f"comfy-parallel: WARNING: {warning}\n")
    return 0


def _entry(options: argparse.Namespace) -> Entry:
    kind, file = options.auth or (None, "")
    if kind not in (None, "basic", "bearer"):
        raise ConfigError(f"--auth is {kind!r}; say basic PASSWORD_FILE or bearer TOKEN_FILE")
    is_caddy = options.program == "caddy"
    return Entry(
        program=options.program,
        gpus=options.gpus,
        port=options.port,
        comfyui_port=options.comfyui_port,
        address=None if options.listen is None else address(options.listen),
        tls=(entry_files.existing(options.tls[0]), entry_files.existing(options.tls[1])) if options.tls else None,
        password_file=entry_files.password_file(Path(file)) if kind == "basic" and not is_caddy else None,
        passwords=entry_files.bcrypt_passwords(Path(file)) if kind == "basic" and is_caddy else (),
        tokens=entry_files.tokens(Path(file)) if kind == "bearer" else (),
    )


def _refuse_to_overwrite_what_was_read(options: argparse.Namespace) -> None:
    read = [*(options.tls or ()), *(Path(file) for file in (options.auth or ())[1:])]
    if options.output.exists() and any(options.output.samefile(path) for path in read):
        raise ConfigError(f"--output {options.output} would overwrite a file that the configuration needs")
