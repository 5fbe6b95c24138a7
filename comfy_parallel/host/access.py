"""What an operator should know whose ComfyUI others can reach: it has no passwords, and may have no TLS."""

from __future__ import annotations

from ipaddress import ip_address

_REMEDY = (
    "Start ComfyUI with --listen 127.0.0.1, and put nginx or Caddy before it (comfy-parallel nginx --auth … --tls …), "
    "or let a firewall guard the port."
)


def warnings(listen: str, port: int, *, has_tls: bool) -> list[str]:
    """Sentences about a host that listens on these addresses, separated by commas; none where only this machine is let
    in."""
    reachable = [address for address in map(str.strip, listen.split(",")) if address and not _is_loopback(address)]
    if not reachable:
        return []
    where = f"ComfyUI listens on port {port} of {', '.join(reachable)}"
    found = [f"{where} and asks for no password: who reaches it can run jobs and see all images. {_REMEDY}"]
    if not has_tls:
        found.append(f"{where} without TLS: others on the way can read and change all that is sent. {_REMEDY}")
    return found


def of_host() -> list[str]:
    """The warnings about this process's host."""
    from comfy.cli_args import args

    return warnings(args.listen, args.port, has_tls=bool(args.tls_keyfile and args.tls_certfile))


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
