"""The configuration of nginx before one ComfyUI: a port per slot, one for all, TLS and passwords, as text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from comfy_parallel.ops.entry import Entry, comments, quoted, slots, warning_comments


def configuration(entry: Entry) -> str:
    """The text of the file, for the http{} context of nginx."""
    parts = {
        "port": str(entry.port),
        "comfyui port": str(entry.comfyui_port),
        "entries": _lines(comments(entry)),
        "warnings": warning_comments(entry),
        "slot ports": _lines(f"    {_at(port):28}{slot};" for slot, port in slots(entry)),
        "listen": _lines(_listens(entry)),
        "tls": _tls(entry),
        "allowed": _allowed(entry),
        "auth": _auth(entry),
        "hidden": _HIDDEN if entry.has_auth else "",
        "unauthorized": _UNAUTHORIZED if entry.tokens else "",
    }
    return re.sub("@([a-z ]+)@", lambda found: parts[found[1]], _TEMPLATE)


def _at(port: int) -> str:
    """The pattern of a map for what came to this port; the map looks at "port address"."""
    return f'"~^{port} "'


def _listens(entry: Entry) -> Iterator[str]:
    where = (
        "" if entry.address is None else f"[{entry.address}]:" if entry.address.version == 6 else f"{entry.address}:"
    )
    for port in entry.ports:
        yield f"    listen {where}{port}{' ssl' if entry.tls else ''};"


def _tls(entry: Entry) -> str:
    if entry.tls is None:
        return ""
    certificate, key = entry.tls
    return _TLS.replace("@certificate@", quoted(certificate)).replace("@key@", quoted(key))


def _auth(entry: Entry) -> str:
    password = _BASIC.replace("@file@", quoted(entry.password_file)) if entry.password_file else ""
    return password + (_BEARER if entry.tokens else "")


def _allowed(entry: Entry) -> str:
    if not entry.tokens:
        return ""
    # Plain strings of a map are compared without regard to case; regular expressions are not.
    escaped = [re.sub("[.+]", r"[\g<0>]", token) for token in entry.tokens]
    return _ALLOWED.replace("@rows@", _lines(f'    "~^(?i:bearer) +{token}$"  1;' for token in escaped))


def _lines(lines: Iterator[str]) -> str:
    return "\n".join(lines)


_TLS = """
    ssl_certificate @certificate@;
    ssl_certificate_key @key@;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_cache shared:comfy_parallel_tls:10m;
    ssl_session_timeout 1d;
    error_page 497 =308 https://$http_host$request_uri;  # who says http:// to a port with TLS
"""

_BASIC = """
    auth_basic "ComfyUI";
    auth_basic_user_file @file@;
"""

_BEARER = """
    error_page 401 @unauthorized;
    if ($comfy_parallel_allowed = 0) {
        return 401;
    }
"""

_HIDDEN = """    proxy_set_header Authorization "";  # ComfyUI and its node packs need not know it
"""

_ALLOWED = """# These tokens are secrets: let only root read this file.
map $http_authorization $comfy_parallel_allowed {
    default  0;
@rows@
}

"""

_UNAUTHORIZED = """
    location @unauthorized {
        default_type application/json;
        add_header WWW-Authenticate 'Bearer realm="ComfyUI"' always;
        return 401 '{"error": {"type": "unauthorized", "message": "No valid token", "details": "send the header Authorization: Bearer TOKEN", "extra_info": {}}, "node_errors": {}}';
    }
"""  # noqa: E501

_TEMPLATE = r"""# Entry points to one ComfyUI with comfy_parallel on, for the http{} context of nginx:
#     cp comfy_parallel.conf /etc/nginx/conf.d/ && nginx -t && systemctl reload nginx
#
@entries@
#
# Written by `comfy-parallel nginx`, which also writes it for other slots, ports, TLS and passwords. A slot
# that the server does not have is refused by the server itself (400, invalid_target_gpu).
@warnings@#
# Where this differs from the configuration first sketched for the project:
#   - the limit counts POST /prompt only; on every request, it broke the loading of the user interface
#   - "Connection: upgrade" only for WebSockets; on every request, it defeated keep-alive to ComfyUI
#   - Host keeps its port ($http_host); without it, ComfyUI answers browsers 403 (Origin and Host differ)
#   - the path form passes the address on as it came; a rewrite decodes the %2F in names of saved workflows

map "$server_port $request_uri" $comfy_parallel_slot {
    default                     $http_x_target_gpu;
    "~^@port@ /gpu(?<slot>\d+)/"  $slot;
@slot ports@
}

map "$server_port $request_uri" $comfy_parallel_uri {
    default                         $request_uri;
    "~^@port@ /gpu\d+(?<rest>/.*)$"   $rest;
}

map $http_upgrade $comfy_parallel_connection {
    default  upgrade;
    ""       "";
}

# Requests with an empty key are not counted.
map "$request_method $uri" $comfy_parallel_client {
    default                              "";
    "~^POST (/gpu\d+)?(/api)?/prompt$"   "$binary_remote_addr $server_port";
}

@allowed@limit_req_zone $comfy_parallel_client zone=comfy_parallel:10m rate=10r/s;

upstream comfy_parallel {
    server 127.0.0.1:@comfyui port@;
    keepalive 32;
    keepalive_timeout 60s;  # ComfyUI itself closes an idle connection after 75 s at the earliest
}

server {
@listen@
@tls@@auth@
    # Also where the operator allows them elsewhere: X_TARGET_GPU and the like are dropped, not passed on.
    underscores_in_headers off;
    ignore_invalid_headers on;

    limit_req zone=comfy_parallel burst=20 nodelay;
    limit_req_status 429;
    error_page 429 @too_many_jobs;

    client_max_body_size 101m;  # ComfyUI itself refuses files of more than 100 (--max-upload-size)

    proxy_http_version 1.1;
    proxy_set_header X-TARGET-GPU $comfy_parallel_slot;
    proxy_set_header Host $http_host;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection $comfy_parallel_connection;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme;
@hidden@
    proxy_read_timeout 600s;
    proxy_connect_timeout 60s;
    proxy_send_timeout 60s;

    location / {
        proxy_pass http://comfy_parallel$comfy_parallel_uri;
    }

    # An idle browser tab says nothing for hours. nginx never buffers an upgraded connection.
    location ~ ^(/gpu\d+)?(/api)?/ws$ {
        proxy_read_timeout 12h;
        proxy_send_timeout 12h;
        proxy_pass http://comfy_parallel$comfy_parallel_uri;
    }

    # The user interface needs the slash at the end of its address.
    location ~ ^/gpu\d+$ {
        absolute_redirect off;
        return 301 $uri/;
    }

    location @too_many_jobs {
        default_type application/json;
        add_header Retry-After 1 always;
        return 429 '{"error": {"type": "too_many_jobs", "message": "Too many jobs at once", "details": "at most 10 a second and 20 more in a burst; try again in a second", "extra_info": {}}, "node_errors": {}}';
    }
@unauthorized@}
"""  # noqa: E501
