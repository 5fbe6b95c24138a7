"""`comfy-parallel caddy`: what it writes, what it warns of, what it refuses."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from comfy_parallel.errors import ConfigError
from comfy_parallel.ops.caddy import configuration
from comfy_parallel.ops.cli import main
from comfy_parallel.ops.entry import Entry

TOKEN = "0123456789abcdef.+"
HASH = "$2a$14$m7y/G78II5x8HFP3Q2/SvenU7bboqXZ3H7./rz7e94O1BdECQA9Lm"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a certificate, its key, passwords and tokens."""
    monkeypatch.chdir(tmp_path)
    texts = {"cert": "", "key": "", "passwords": f"# mine\nann:{HASH}\n", "tokens": f"{TOKEN}\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("gpus", [1, 2, 16, 99])
def test_every_slot_has_its_port(gpus: int) -> None:
    text = configuration(Entry(program="caddy", gpus=gpus, port=9000))
    assert re.findall(r"^http://:(\d+) \{$", text, re.M) == [str(9000 + index) for index in range(gpus + 1)]
    assert re.findall(r"request_header X-TARGET-GPU (\d+)$", text, re.M) == [str(slot) for slot in range(gpus)]


def test_no_marker_is_left_over() -> None:
    entry = Entry(program="caddy", gpus=2, tls=("/cert", "/key"), passwords=(("ann", HASH),), tokens=(TOKEN,))
    assert re.findall("@[a-z ]+@", configuration(entry)) == []


def test_it_says_caddy_where_it_warns(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["caddy", "--gpus", "2"]) == 0
    heard = capfd.readouterr()
    assert heard.err.count("comfy-parallel: WARNING: caddy listens on every address of this machine") == 2
    assert heard.out.count("# WARNING: caddy listens") == 2
    assert main(["caddy", "--gpus", "2", "--listen", "127.0.0.1"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("auth", [["basic", "passwords"], ["bearer", "tokens"]])
def test_a_file_with_secrets_is_for_its_owner_only(files: Path, auth: list[str]) -> None:
    assert main(["caddy", "--gpus", "1", "--tls", "cert", "key", "--auth", *auth, "--output", "out"]) == 0
    assert stat.S_IMODE((files / "out").stat().st_mode) == 0o600
    text = (files / "out").read_text()
    assert f'tls "{files / "cert"}" "{files / "key"}"' in text
    assert (f'"ann" {HASH}' in text) == (auth[0] == "basic")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ann:$6$salt$hash\n", "line 1 is not NAME:BCRYPT_HASH"),
        (f"ann:{HASH}\na b:{HASH}\n", "line 2 is not NAME:BCRYPT_HASH"),
        ("# nobody\n", "it holds no line NAME:BCRYPT_HASH"),
    ],
)
def test_passwords_that_caddy_cannot_use_are_refused(
    files: Path, capfd: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (files / "passwords").write_text(text)
    assert main(["caddy", "--gpus", "1", "--auth", "basic", "passwords", "--output", "out"]) == 2
    heard = capfd.readouterr().err
    assert said in heard
    assert "caddy hash-password" in heard
    assert not (files / "out").exists()


def test_a_file_name_that_caddy_would_misread_is_refused() -> None:
    with pytest.raises(ConfigError, match="caddy cannot be given the file name"):
        Entry(program="caddy", gpus=1, tls=("/{env.HOME}/cert", "/key"))
