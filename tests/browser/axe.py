"""What axe-core finds on a page: the rules of WCAG that a program can check."""

from __future__ import annotations

from pathlib import Path

from selenium.webdriver import Chrome

from tests.conftest import missing

VERSION = "4.10.3"  # as tests/setup.sh gets it
RUN = """
const [within, done] = arguments;
const told = ({id, impact, nodes}) =>
  nodes.map(node => `${id} (${impact}): ${node.html.slice(0, 200)} ${node.failureSummary}`);
axe.run(within ? {include: [...document.querySelectorAll(within)]} : document)
  .then(({violations}) => done(violations.flatMap(told)));
"""


def faults(driver: Chrome, cache_dir: Path, within: str | None = None) -> list[str]:
    """One line for each fault of the page as it is now; of its parts that match a selector, when one is given."""
    path = cache_dir / f"axe-core-{VERSION}" / "axe.min.js"
    if not path.is_file():
        missing("axe-core is not there; run: bash tests/setup.sh --browser")
    driver.execute_script(path.read_text(encoding="utf-8"))
    found: list[str] = driver.execute_async_script(RUN, within)
    return found
