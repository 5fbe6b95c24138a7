"""`comfy-parallel nginx`: what it writes, what it warns of, what it refuses."""

from __future__ import annotations

import re
import stat
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.errors import ConfigError
from comfy_parallel.ops.cli import main
from comfy_parallel.ops.entry import Entry
from comfy_parallel.ops.nginx import configuration

SHIPPED = Path(__file__).resolve().parents[3] / "nginx" / "comfy_parallel.conf"
TOKEN = "0123456789abcdef.+"
HASH = "$6$salt$hash"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a certificate, its key, passwords and tokens."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"cert": "", "key": "", "passwords": f"ann:{HASH}\n", "tokens": f"# mine\n\n{TOKEN}\n"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def listens(text: str) -> list[str]:
    return re.findall(r"^    listen (.*);$", text, re.M)


def code_of(text: str) -> str:
    return re.sub(r"#.*", "", text)


def test_the_shipped_file_is_what_the_command_prints_for_four(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["nginx", "--gpus", "4"]) == 0
    assert capfd.readouterr().out == SHIPPED.read_text(encoding="utf-8")


@pytest.mark.parametrize("gpus", [1, 2, 7, 16, 99])
def test_every_slot_has_its_port(gpus: int) -> None:
    text = configuration(Entry(gpus=gpus, port=9000))
    assert listens(text) == [str(9000 + index) for index in range(gpus + 1)]
    assert re.findall(r'"~\^(\d+) " +(\d+);', text) == [(str(9001 + slot), str(slot)) for slot in range(gpus)]
    assert '"~^9000 /gpu' in text


def test_no_marker_is_left_over() -> None:
    entry = Entry(gpus=2, tls=("/cert", "/key"), password_file="/passwords", tokens=(TOKEN,))
    assert re.findall("@[a-z ]+@", configuration(entry)) == []


def test_the_address_and_comfyuis_port_are_used() -> None:
    text = configuration(Entry(gpus=1, address=ip_address("::1"), comfyui_port=9188))
    assert listens(text) == ["[::1]:8180", "[::1]:8181"]
    assert "server 127.0.0.1:9188;" in text
    assert listens(configuration(Entry(gpus=1, address=ip_address("10.0.0.1")))) == ["10.0.0.1:8180", "10.0.0.1:8181"]


def test_tls_is_on_every_port_and_file_names_are_quoted() -> None:
    text = configuration(Entry(gpus=2, tls=('/a b;"c\\d/cert', "/key")))
    assert listens(text) == ["8180 ssl", "8181 ssl", "8182 ssl"]
    assert 'ssl_certificate "/a b;\\"c\\\\d/cert";' in text
    assert 'ssl_certificate_key "/key";' in text
    assert "ssl_protocols TLSv1.2 TLSv1.3;" in text
    assert "ssl" not in code_of(configuration(Entry(gpus=2)))


def test_a_token_is_compared_letter_by_letter() -> None:
    (pattern,) = re.findall(r'"~(.*bearer.*)"  1;', configuration(Entry(gpus=1, tokens=(TOKEN,))))
    assert re.match(pattern, f"Bearer {TOKEN}")
    assert re.match(pattern, f"bearer {TOKEN}")
    wrong = [TOKEN, f"Bearer {TOKEN}x", f"Bearer x{TOKEN}", f"Bearer {TOKEN.upper()}", f"Basic {TOKEN}", "Bearer "]
    assert not any(re.match(pattern, sent) for sent in [*wrong, f"Bearer {TOKEN.replace('.', '!')}"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ["no password", "without TLS"]),
        ({"address": ip_address("0.0.0.0")}, ["no password", "without TLS"]),
        ({"address": ip_address("192.168.0.5")}, ["no password", "without TLS"]),
        ({"address": ip_address("::")}, ["no password", "without TLS"]),
        ({"tls": ("/cert", "/key")}, ["no password"]),
        ({"password_file": "/passwords"}, ["without TLS"]),
        ({"tokens": (TOKEN,)}, ["without TLS"]),
        ({"tls": ("/cert", "/key"), "tokens": (TOKEN,)}, []),
        ({"address": ip_address("127.0.0.1")}, []),
        ({"address": ip_address("127.1.2.3")}, []),
        ({"address": ip_address("::1")}, []),
    ],
)
def test_what_others_could_do_is_said_loudly(options: dict[str, Any], said: list[str]) -> None:
    entry = Entry(gpus=2, **options)
    assert len(entry.warnings()) == len(said)
    assert all(words in warning for words, warning in zip(said, entry.warnings(), strict=True))
    assert configuration(entry).count("WARNING") == len(said)


def test_warnings_go_to_stderr_and_the_rest_to_stdout(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["nginx", "--gpus", "2"]) == 0
    heard = capfd.readouterr()
    assert heard.err.count("comfy-parallel: WARNING: nginx listens on every address of this machine") == 2
    assert main(["nginx", "--gpus", "2", "--output", "out", "--listen", "127.0.0.1"]) == 0
    assert capfd.readouterr() == ("", "")
    assert listens((files / "out").read_text()) == ["127.0.0.1:8180", "127.0.0.1:8181", "127.0.0.1:8182"]


def test_relative_files_are_named_by_their_whole_path(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["nginx", "--gpus", "1", "--tls", "cert", "key", "--auth", "basic", "passwords"]) == 0
    heard = capfd.readouterr()
    for name in ("cert", "key", "passwords"):
        assert f'"{files / name}";' in heard.out
    assert heard.err == ""


def test_a_file_with_tokens_is_for_its_owner_only_and_a_longer_old_one_is_replaced(files: Path) -> None:
    out = files / "out"
    out.write_text("old\n" * 9999)
    out.chmod(0o644)
    assert main(["nginx", "--gpus", "1", "--auth", "bearer", "tokens", "--output", "out"]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert out.read_text() == configuration(Entry(gpus=1, tokens=(TOKEN,)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--gpus 0", "from 1 to 99"),
        ("--gpus -1", "from 1 to 99"),
        ("--gpus 100", "from 1 to 99"),
        ("--gpus 8", "8180 to 8188 include 8188, where ComfyUI listens"),
        ("--gpus 2 --port 8188", "8188 to 8190 include 8188"),
        ("--gpus 2 --port 9000 --comfyui-port 9002", "9000 to 9002 include 9002"),
        ("--gpus 2 --port 0", "say one from 1 to 65533"),
        ("--gpus 2 --port 65534", "say one from 1 to 65533"),
        ("--gpus 2 --comfyui-port 65536", "1 to 65535"),
        ("--gpus 2 --listen example.org", "say an IP address"),
        ("--gpus 2 --listen fe80::1%eth0", "say an IP address"),
        ("--gpus 2 --tls gone key", "gone cannot be used: no such file"),
        ("--gpus 2 --tls cert gone", "gone cannot be used: no such file"),
        ("--gpus 2 --tls cert .", ". is not a file"),
        ("--gpus 2 --tls cert $x", "$x"),
        ("--gpus 2 --auth digest passwords", "say basic PASSWORD_FILE or bearer TOKEN_FILE"),
        ("--gpus 2 --auth basic gone", "gone cannot be used: no such file"),
        ("--gpus 2 --auth basic key", "key: it holds no line NAME:HASH"),
        ("--gpus 2 --auth basic tokens", "tokens: line 3 is not NAME:HASH"),
        ("--gpus 2 --auth basic plain", "plain: line 1 is not NAME:HASH"),
        ("--gpus 2 --auth bearer gone", "gone cannot be used: no such file"),
        ("--gpus 2 --auth bearer key", "key: it holds no token"),
        ("--gpus 2 --auth bearer short", "short: line 1 is no token"),
        ("--gpus 2 --auth bearer passwords", "passwords: line 1 is no token"),
        ("--gpus 2 --auth bearer binary", "binary cannot be read: it is not text in UTF-8"),
        ("--gpus 2 --output gone/out", "gone/out cannot be written: no such file"),
        ("--gpus 2 --output .", ". cannot be written: is a directory"),
        ("--gpus 2 --tls cert key --output key", "would overwrite a file"),
        ("--gpus 2 --auth basic passwords --output ./passwords", "would overwrite a file"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_written(
    files: Path, capfd: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    for name, text in {"$x": b"", "plain": b"ann:my password\n", "short": b"abc\n", "binary": b"\xff" * 20}.items():
        (files / name).write_bytes(text)
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert main(["nginx", *arguments.split()]) == 2
    heard = capfd.readouterr()
    assert heard.out == ""
    assert heard.err.startswith("comfy-parallel: ")
    assert said in heard.err
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_a_secret_is_not_repeated_in_an_error(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (files / "tokens").write_text("my secret with spaces\n")
    assert main(["nginx", "--gpus", "2", "--auth", "bearer", "tokens"]) == 2
    assert "my secret" not in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/a\nb", "/$HOME", "/\udcff"])
def test_a_file_name_that_nginx_would_misread_is_refused(path: str) -> None:
    for options in ({"tls": (path, "/key")}, {"tls": ("/cert", path)}, {"password_file": path}):
        with pytest.raises(ConfigError, match="nginx cannot be given the file name"):
            Entry(gpus=1, **options)  # type: ignore[arg-type]
