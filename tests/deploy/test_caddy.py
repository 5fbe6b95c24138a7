"""What `comfy-parallel caddy` prints, in a real Caddy: before a real ComfyUI, and with TLS and passwords."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from comfy_parallel.ops.cli import main
from tests.deploy.conftest import Need
from tests.deploy.entries import (
    ADDRESSES,
    AUTHS,
    OTHER_TOKEN,
    PASSWORD,
    SPOOFS,
    TOKEN,
    WEBSOCKETS,
    Served,
    assert_hears_its_own_job,
    assert_let_in,
    assert_not_passed_on_with_a_space,
    assert_raw_request_says,
    assert_refused,
    assert_says,
    assert_sent_to_https,
    assert_takes_files_as_large_as_comfyui_does,
    make_options,
)
from tests.deploy.real_caddy import complaints, running_caddy
from tests.deploy.real_nginx import ALL_SLOTS, SLOT_PORTS, Echo, Nginx, running_echo
from tests.deploy.test_nginx import job, slot_that_ran, submit
from tests.host.server import HostServer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]


def printed(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        assert main(["caddy", *arguments]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def options(need: Need, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("caddy's files")
    return make_options(need, folder, [need("caddy"), "hash-password", "--plaintext", "open sesame"])


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize("tls", [False, True])
def test_caddy_accepts_it(need: Need, tmp_path: Path, options: dict[str, list[str]], tls: bool, auth: str) -> None:
    for gpus in ("1", "16"):
        more = [*(options["tls"] if tls else []), *options[auth], "--comfyui-port", "8100"]
        assert complaints(need("caddy"), tmp_path, printed("--gpus", gpus, *more)) == ""
    ipv6 = printed("--gpus", "99", "--port", "9000", "--listen", "::1")
    assert complaints(need("caddy"), tmp_path, ipv6) == ""


@pytest.fixture(scope="module")
def caddy(need: Need, host: HostServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    text = printed("--gpus", "4", "--listen", "127.0.0.1")
    with running_caddy(need("caddy"), tmp_path_factory.mktemp("caddy"), text, host.port) as running:
        yield running


@pytest.mark.parametrize(("slot", "port"), list(enumerate(SLOT_PORTS)))
def test_a_slots_port_leads_to_its_slot_whatever_the_client_asks_for(
    caddy: Nginx, host: HostServer, slot: int, port: int
) -> None:
    other = (slot + 1) % 4
    accepted = submit(caddy, port, "/api/prompt", job(extra_data={"target_gpu": other}), X_TARGET_GPU=str(other))
    assert (accepted["gpu_id"], slot_that_ran(host, accepted)) == (slot, slot)


def test_the_common_port_leaves_the_choice_to_the_server_or_to_the_client(caddy: Nginx, host: HostServer) -> None:
    assert submit(caddy, ALL_SLOTS)["gpu_id"] is None
    assert slot_that_ran(host, submit(caddy, ALL_SLOTS, X_TARGET_GPU="3")) == 3
    for path, slot in [("/gpu1/prompt", 1), ("/gpu2/api/prompt", 2)]:
        assert slot_that_ran(host, submit(caddy, ALL_SLOTS, path, X_TARGET_GPU="0")) == slot
    moved = caddy.call(ALL_SLOTS, "GET", "/gpu3")
    assert (moved.status, moved.headers["location"]) == (301, "/gpu3/")
    refused = caddy.call(ALL_SLOTS, "POST", "/gpu4/prompt", job())
    assert (refused.status, refused.json["error"]["type"]) == (400, "invalid_target_gpu")
    assert caddy.call(8182, "POST", "/gpu3/prompt", job()).status in (404, 405)


def test_names_with_an_escaped_slash_survive_the_path_form(caddy: Nginx) -> None:
    path = "/gpu1/api/userdata/workflows%2Fa%20b.json"
    assert caddy.call(ALL_SLOTS, "POST", path, {"saved": True}).status == 200
    assert caddy.call(ALL_SLOTS, "GET", path).json == {"saved": True}


@pytest.mark.parametrize(("port", "path", "slot"), WEBSOCKETS)
def test_a_websocket_hears_its_own_job_with_previews(
    caddy: Nginx, host: HostServer, port: int, path: str, slot: int | None
) -> None:
    assert_hears_its_own_job(caddy, host, port, path, slot)


def test_files_as_large_as_comfyui_takes_pass_and_larger_ones_do_not(caddy: Nginx, host: HostServer) -> None:
    assert_takes_files_as_large_as_comfyui_does(caddy, host)


def test_a_browsers_origin_is_compared_with_the_address_it_used(caddy: Nginx) -> None:
    own, foreign = f"http://127.0.0.1:{caddy.ports[8181]}", "http://127.0.0.1:1"
    assert caddy.call(8181, "POST", "/prompt", job(), Origin=own).status == 200
    assert caddy.call(8181, "POST", "/prompt", job(), Origin=foreign).status == 403


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with running_echo() as heard:
        yield heard


@pytest.fixture(scope="module")
def served(
    need: Need, echo: Echo, options: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """`served("basic", tls=True)` is a Caddy with two slots, before the echo server."""
    running: dict[tuple[str, bool], Nginx] = {}
    with ExitStack() as started:

        def serve(auth: str, *, tls: bool = False) -> Nginx:
            if (auth, tls) not in running:
                text = printed("--gpus", "2", "--listen", "127.0.0.1", *options[auth], *(options["tls"] if tls else []))
                home, program = tmp_path_factory.mktemp("caddy"), need("caddy")
                caddy = started.enter_context(running_caddy(program, home, text, echo.port, slot_ports=(8181, 8182)))
                caddy.certificate = Path(options["tls"][1]) if tls else None
                running[auth, tls] = caddy
            return running[auth, tls]

        yield serve


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(("auth", "header"), [("basic", PASSWORD), ("bearer", f"bearer {OTHER_TOKEN}")])
def test_who_knows_the_password_is_let_in_and_comfyui_does_not_hear_it(
    served: Served, echo: Echo, auth: str, header: str, tls: bool
) -> None:
    assert_let_in(served(auth, tls=tls), echo, header, tls=tls)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("auth", "header"),
    [
        ("basic", None),
        ("basic", "Basic " + base64.b64encode(b"ann:wrong").decode()),
        ("bearer", None),
        ("bearer", PASSWORD),
        ("bearer", f"Bearer {TOKEN.lower()}"),
        ("bearer", f"Bearer {TOKEN}x"),
        ("bearer", f"Bearer {TOKEN.replace('+', 'h')}"),
        ("bearer", "Bearer "),
    ],
)
def test_who_does_not_is_refused_everywhere(
    served: Served, echo: Echo, auth: str, header: str | None, tls: bool
) -> None:
    addresses = ADDRESSES[:1] if auth == "basic" and header else ADDRESSES  # bcrypt is slow on purpose
    assert_refused(served(auth, tls=tls), echo, auth, header, addresses)


def test_http_on_a_port_with_tls_is_sent_to_https(served: Served) -> None:
    assert_sent_to_https(served("none", tls=True))


@pytest.mark.parametrize(
    "spelling", ["X-TARGET-GPU", "x-target-gpu", "X_TARGET_GPU", "x_target-gpu", "X-TARGET_GPU", "x-Target_gpu"]
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


def test_comfyui_hears_the_address_as_it_came_and_who_asked(served: Served, echo: Echo) -> None:
    caddy = served("none")
    caddy.call(8182, "GET", "/a%2Fb?c=%20d", X_TARGET_GPU="0", Host="example.org:8182")
    caddy.call(ALL_SLOTS, "GET", "/gpu12/a%2Fb?c=%20d")
    caddy.call(ALL_SLOTS, "GET", "/a%2Fb")
    by_port, by_path, common = echo.requests[-3:]
    assert (by_port["path"], by_path["path"], common["path"]) == ("/a%2Fb?c=%20d", "/a%2Fb?c=%20d", "/a%2Fb")
    assert (by_port["headers"]["x-target-gpu"], by_path["headers"]["x-target-gpu"]) == ("1", "12")
    assert "x-target-gpu" not in common["headers"]
    assert by_port["headers"]["host"] == "example.org:8182"
    assert by_port["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert by_port["headers"]["x-real-ip"] == "127.0.0.1"
