"""What `comfy-parallel nginx` prints, in a real nginx: any number of slots, TLS, both kinds of passwords."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import pytest

from comfy_parallel.ops.cli import main
from tests.deploy.conftest import Need
from tests.deploy.entries import (
    AUTHS,
    OTHER_TOKEN,
    PASSWORD,
    SPOOFS,
    TOKEN,
    Served,
    assert_let_in,
    assert_not_passed_on_with_a_space,
    assert_raw_request_says,
    assert_refused,
    assert_says,
    assert_sent_to_https,
    make_options,
)
from tests.deploy.real_nginx import ALL_SLOTS, Echo, Nginx, complaints, running_echo, running_nginx, write_config

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def options(need: Need, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("nginx's files")
    return make_options(need, folder, [need("openssl"), "passwd", "-6", "open sesame"])


def printed(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        assert main(["nginx", *arguments]) == 0
    return out.getvalue()


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize("tls", [False, True])
def test_nginx_accepts_it_for_1_to_16_slots(
    need: Need, tmp_path: Path, options: dict[str, list[str]], tls: bool, auth: str
) -> None:
    for gpus in range(1, 17):
        more = [*(options["tls"] if tls else []), *options[auth], "--comfyui-port", "8100"]
        write_config(tmp_path, printed("--gpus", str(gpus), *more), {8100: 8100})
        assert complaints(need("nginx"), tmp_path) == "", gpus


def test_nginx_accepts_it_for_99_slots_and_on_ipv6(need: Need, tmp_path: Path) -> None:
    for more in (["--comfyui-port", "8100"], ["--port", "9000", "--listen", "::1"]):
        write_config(tmp_path, printed("--gpus", "99", *more), {8100: 8100})
        assert complaints(need("nginx"), tmp_path) == ""


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with running_echo() as heard:
        yield heard


@pytest.fixture(scope="module")
def served(
    need: Need, echo: Echo, options: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """`served("basic", tls=True)` is an nginx with two slots, before the echo server."""
    running: dict[tuple[str, bool], Nginx] = {}
    with ExitStack() as started:

        def serve(auth: str, *, tls: bool = False) -> Nginx:
            if (auth, tls) not in running:
                text = printed("--gpus", "2", "--listen", "127.0.0.1", *options[auth], *(options["tls"] if tls else []))
                home = tmp_path_factory.mktemp("nginx")
                program = need("nginx")
                nginx = started.enter_context(running_nginx(program, home, text, echo.port, slot_ports=(8181, 8182)))
                nginx.certificate = Path(options["tls"][1]) if tls else None
                running[auth, tls] = nginx
            return running[auth, tls]

        yield serve


GOOD = [("basic", PASSWORD), ("bearer", f"Bearer {TOKEN}"), ("bearer", f"bearer {OTHER_TOKEN}")]
BAD = [
    ("basic", None),
    ("basic", "Basic " + base64.b64encode(b"ann:wrong").decode()),
    ("basic", f"Bearer {TOKEN}"),
    ("bearer", None),
    ("bearer", PASSWORD),
    ("bearer", f"Bearer {TOKEN.lower()}"),
    ("bearer", f"Bearer {TOKEN}x"),
    ("bearer", f"Bearer {TOKEN.replace('+', 'h')}"),
    ("bearer", f"Bearer {TOKEN}, Bearer x"),
    ("bearer", "Bearer "),
]


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(("auth", "header"), GOOD)
def test_who_knows_the_password_is_let_in_and_comfyui_does_not_hear_it(
    served: Served, echo: Echo, auth: str, header: str, tls: bool
) -> None:
    assert_let_in(served(auth, tls=tls), echo, header, tls=tls)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(("auth", "header"), BAD)
def test_who_does_not_is_refused_everywhere(
    served: Served, echo: Echo, auth: str, header: str | None, tls: bool
) -> None:
    assert_refused(served(auth, tls=tls), echo, auth, header)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_jobs_without_a_password_are_refused_and_limited_like_others(served: Served, echo: Echo, auth: str) -> None:
    before = len(echo.requests)
    statuses = {served(auth).call(8182, "POST", "/prompt", {"prompt": {}}).status for _ in range(40)}
    assert 401 in statuses
    assert statuses <= {401, 429}
    assert len(echo.requests) == before


def test_a_websocket_is_asked_for_over_tls_with_a_password(served: Served, echo: Echo) -> None:
    nginx = served("bearer", tls=True)
    nginx.call(8182, "GET", "/ws", Upgrade="websocket", Connection="Upgrade", Authorization=f"Bearer {TOKEN}")
    headers = echo.requests[-1]["headers"]
    assert (headers["upgrade"], headers["connection"], headers["x-target-gpu"]) == ("websocket", "upgrade", "1")


def test_http_on_a_port_with_tls_is_sent_to_https(served: Served) -> None:
    assert_sent_to_https(served("none", tls=True))


@pytest.mark.parametrize(
    "spelling", ["X-TARGET-GPU", "x-target-gpu", "X-Target-Gpu", "X_TARGET_GPU", "x_target-gpu", "X-TARGET_GPU"]
)
@pytest.mark.parametrize(("port", "path", "slot"), [(8181, "/queue", "0"), (ALL_SLOTS, "/gpu0/queue", "0")])
def test_no_spelling_of_the_header_changes_what_a_port_or_a_path_says(
    served: Served, echo: Echo, spelling: str, port: int, path: str, slot: str
) -> None:
    assert_says(served("none"), echo, spelling, port, path, slot)


@pytest.mark.parametrize("request_", SPOOFS.values(), ids=SPOOFS)
@pytest.mark.parametrize(("port", "path"), [(8181, "/queue"), (8181, "/gpu1/queue"), (ALL_SLOTS, "/gpu0/queue")])
def test_no_request_changes_what_a_port_or_a_path_says(
    served: Served, echo: Echo, request_: str, port: int, path: str
) -> None:
    assert_raw_request_says(served("none"), echo, request_, port, path, "0")


def test_a_header_with_a_space_before_its_colon_is_not_passed_on(served: Served, echo: Echo) -> None:
    assert_not_passed_on_with_a_space(served("none"), echo)
