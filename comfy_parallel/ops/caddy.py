"""The configuration of Caddy before one ComfyUI: a port per slot, one for all, TLS and passwords, as text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from comfy_parallel.ops.entry import Entry, comments, quoted, slots, warning_comments


def configuration(entry: Entry) -> str:
    """The text of a whole Caddyfile."""
    parts = {
        "comfyui port": str(entry.comfyui_port),
        "entries": "\n".join(comments(entry)),
        "warnings": warning_comments(entry),
        "redirect": _REDIRECT if entry.tls else "",
        "bind": "0.0.0.0" if entry.address is None else str(entry.address),
        "tls": "\n\ttls {} {}".format(*map(quoted, entry.tls)) if entry.tls else "",
        "auth": _basic(entry) + _bearer(entry),
        "hidden": _HIDDEN if entry.has_auth else "",
        "scheme": "https" if entry.tls else "http",
        "port": str(entry.port),
        "sites": "".join(_sites(entry)),
    }
    return re.sub("@([a-z ]+)@", lambda found: parts[found[1]], _TEMPLATE)


def _sites(entry: Entry) -> Iterator[str]:
    for slot, port in slots(entry):
        yield _SITE.format(scheme="https" if entry.tls else "http", port=port, slot=slot)


def _basic(entry: Entry) -> str:
    rows = "".join(f'\t\t"{name}" {hashed}\n' for name, hashed in entry.passwords)
    return f"\tbasicauth bcrypt ComfyUI {{\n{rows}\t}}\n" if rows else ""


def _bearer(entry: Entry) -> str:
    if not entry.tokens:
        return ""
    return _BEARER.replace("@tokens@", "|".join(re.sub("[.+]", r"\\\g<0>", token) for token in entry.tokens))


_REDIRECT = """
\t\tlistener_wrappers {
\t\t\thttp_redirect
\t\t\ttls
\t\t}"""

_BEARER = """\t# These tokens are secrets: let only Caddy's user read this file.
\t@unauthorized not header_regexp Authorization "^(?i:bearer) +(?:@tokens@)$"
\theader @unauthorized WWW-Authenticate `Bearer realm="ComfyUI"`
\theader @unauthorized Content-Type application/json
\trespond @unauthorized `{"error": {"type": "unauthorized", "message": "No valid token", "details": "send the header Authorization: Bearer TOKEN", "extra_info": {}}, "node_errors": {}}` 401
"""  # noqa: E501

_HIDDEN = """
\t\theader_up -Authorization # ComfyUI and its node packs need not know it"""

_SITE = """
{scheme}://:{port} {{
\timport comfy_parallel
\troute {{
\t\timport comfy_parallel_checks
\t\trequest_header X-TARGET-GPU {slot}
\t\timport comfy_parallel_server
\t}}
}}
"""

_TEMPLATE = """# Entry points to one ComfyUI with comfy_parallel on, a whole Caddyfile:
#     cp comfy_parallel.caddy /etc/caddy/Caddyfile && systemctl reload caddy
#
@entries@
#
# Written by `comfy-parallel caddy`, which also writes it for other slots, ports, TLS and passwords. A slot
# that the server does not have is refused by the server itself (400, invalid_target_gpu).
# Caddy itself limits no rates: where strangers may submit jobs, use `comfy-parallel nginx`, which does.
@warnings@{
\tauto_https off
\tservers {@redirect@
\t\tprotocols h1 h2
\t}
}

(comfy_parallel) {
\tbind @bind@@tls@
}

(comfy_parallel_checks) {
@auth@\t# The header is written below. Its other spellings are not passed on.
\trequest_header -X_TARGET_GPU
\trequest_header -X_TARGET-GPU
\trequest_header -X-TARGET_GPU
\t# A proxy drops the headers that a request's Connection names: a client could have it dropped.
\t@drops header_regexp Connection (?i)x-target-gpu
\trequest_header @drops -Connection
\t# How large a body may be says ComfyUI (--max-upload-size): Caddy keeps none of it.
}

(comfy_parallel_server) {
\treverse_proxy 127.0.0.1:@comfyui port@ {
\t\theader_up X-Real-IP {remote_host}@hidden@
\t\ttransport http {
\t\t\tkeepalive 60s # ComfyUI itself closes an idle connection after 75 s at the earliest
\t\t}
\t}
}

@scheme@://:@port@ {
\timport comfy_parallel
\troute {
\t\timport comfy_parallel_checks
\t\t# The user interface needs the slash at the end of its address.
\t\t@bare path_regexp ^/gpu\\d+$
\t\tredir @bare {path}/ 301
\t\t@slot path_regexp slot ^/gpu(\\d+)/
\t\trequest_header @slot X-TARGET-GPU {re.slot.1}
\t\turi @slot strip_prefix /gpu{re.slot.1}
\t\timport comfy_parallel_server
\t}
}
@sites@"""
