"""The page's own modules in Chromium, without a host."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from selenium.webdriver import Chrome

from comfy_parallel.http.dashboard import FILES_DIR

pytestmark = pytest.mark.browser

KEYED = """
const [rounds, done] = arguments;
import("/dom.js").then(({el, keyed}) => {
  const parent = el("ul");
  document.documentElement.append(parent);
  let made = 0;
  const make = () => { made += 1; return el("li", {tabIndex: 0}); };
  const shown = rounds.map((items, round) => {
    keyed(parent, items, ([key]) => key, make, (child, [, text]) => { child.textContent = text; });
    if (round === 0) parent.children[1].focus();
    return [...parent.children].map(child => child.textContent);
  });
  done([shown, made, document.activeElement.textContent]);
});
"""
WORDS = """
const [language, done] = arguments;
import("/text.js").then(async text => {
  await text.loadWords(language);
  done([text.seconds(3.25), text.seconds(75), text.seconds(600), text.seconds(9000), text.seconds(null),
    text.bytes(5 * 2 ** 20), text.bytes(3.5 * 2 ** 30), text.slotOrAuto(null), text.slotOrAuto(0),
    text.t("no.such.word")]);
});
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Tests print nothing."""


@pytest.fixture(scope="module")
def files(chromium: Chrome) -> Iterator[Chrome]:
    """Chromium on a page from which the page's modules can be imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(FILES_DIR)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium.get(f"http://127.0.0.1:{server.server_port}/vendor/")
    try:
        yield chromium
    finally:
        server.shutdown()
        server.server_close()


def test_rows_follow_their_items_keep_the_focus_and_may_share_a_key(files: Chrome) -> None:
    rounds = [
        [["a", "1"], ["b", "2"], ["b", "3"]],
        [["a", "1"], ["b", "2"], ["b", "3"]],
        [["c", "4"], ["b", "2"], ["a", "1"], ["b", "3"]],
        [["b", "2"], ["c", "4"]],
        [["b", "2"], ["b", "5"]],
    ]
    shown, made, focused = files.execute_async_script(KEYED, rounds)
    assert shown == [[text for _, text in items] for items in rounds]
    assert made == 5  # a, both of b, c, and the second b again
    assert focused == "2"


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        (
            "en",
            ["3.3 s", "75 s", "10 min 0 s", "2 h 30 min", "–", "5 MiB", "3.5 GiB", "auto", "Slot 0", "no.such.word"],
        ),
        (
            "zh",
            [
                "3.3 秒",
                "75 秒",
                "10 分 0 秒",
                "2 小时 30 分",
                "–",
                "5 MiB",
                "3.5 GiB",
                "自动",
                "槽位 0",
                "no.such.word",
            ],
        ),
        (
            "fr",
            ["3.3 s", "75 s", "10 min 0 s", "2 h 30 min", "–", "5 MiB", "3.5 GiB", "auto", "Slot 0", "no.such.word"],
        ),
    ],
)
def test_numbers_are_written_in_both_languages(files: Chrome, language: str, expected: list[str]) -> None:
    told = files.execute_async_script(WORDS, language)
    assert [text.replace("\xa0", " ") for text in told] == expected
