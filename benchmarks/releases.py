"""Whether every release of ComfyUI fits, from its source alone: one row per release of a git history.

usage: python benchmarks/releases.py GIT_DIR [--from 0.3.60] [--only VERSION...]

GIT_DIR is a clone of ComfyUI, bare or not; nothing is checked out. The exit status is 0 when all fit.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfy_parallel import patches
from comfy_parallel.patching import scan
from comfy_parallel.patching.patch_set import Verdict, judge, survey

_VERSION_FILE = "comfyui_version.py"
_ENV = {**os.environ, "GIT_NO_LAZY_FETCH": "1"}  # A partial clone lacks large files; they are no source.


class Release(NamedTuple):
    version: str
    commit: str
    date: str

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split("."))


class History:
    """A git directory, read through one `git cat-file` process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = subprocess.Popen(
            self._command("cat-file", "--batch"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENV
        )

    def releases(self) -> list[Release]:
        """Each version with the commit that set it, oldest first."""
        found = {}
        log = self._run("log", "--first-parent", "--reverse", "--format=%H %cs", "--", _VERSION_FILE)
        for line in log.splitlines():
            commit, date = line.split()
            version = re.search(r"__version__ *= *[\"']([0-9.]+)[\"']", self.read(f"{commit}:{_VERSION_FILE}") or "")
            if version is not None:
                found.setdefault(version[1], Release(version[1], commit, date))
        return sorted(found.values(), key=lambda release: release.order)

    def tree(self, commit: str) -> dict[str, str]:
        """The object of each Python file of a commit, by its path."""
        entries = [line.split("\t") for line in self._run("ls-tree", "-r", "-z", commit).split("\0") if line]
        return {path: about.split()[2] for about, path in entries if path.endswith(".py")}

    def read(self, name: str) -> str | None:
        """The text of a git object; None where this clone lacks it."""
        assert self._reader.stdin is not None
        assert self._reader.stdout is not None
        self._reader.stdin.write(f"{name}\n".encode())
        self._reader.stdin.flush()
        head = self._reader.stdout.readline().split()
        if head[-1] == b"missing":
            return None
        content = self._reader.stdout.read(int(head[2]) + 1)[:-1]
        return content.decode("utf-8")

    def _run(self, *command: str) -> str:
        done = subprocess.run(self._command(*command), env=_ENV, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"git {command[0]} in {self._folder}: {done.stderr.strip()}")
        return done.stdout

    def _command(self, *command: str) -> list[str]:
        return ["git", "-C", str(self._folder), *command]


class Tree:
    """The files of one release; those that this clone lacks are named in `lacking`."""

    def __init__(self, history: History, release: Release) -> None:
        self._history, self._objects = history, history.tree(release.commit)
        self.lacking: list[str] = []

    def read(self, path: str) -> str | None:
        if path not in self._objects:
            return None
        text = self._history.read(self._objects[path])
        if text is None:
            self.lacking.append(path)
        return text

    def python_files(self) -> Iterable[str]:
        return sorted(self._objects)

    def object_of(self, path: str) -> str:
        return self._objects[path]


@cache
def changed_globals(history: History, name: str) -> dict[str, int]:
    """Of one file; most files are the same in many releases."""
    return scan.changed_globals(history.read(name) or "")


def unknown_globals(history: History, tree: Tree) -> list[str]:
    paths = [path for path in tree.python_files() if scan.is_scanned(path)]
    changed = [(path, name) for path in paths for name in changed_globals(history, tree.object_of(path))]
    return [f"{path}:{name}" for path, name in changed if (path, name) not in scan.TREATMENTS]


def row(history: History, release: Release) -> tuple[bool, str]:
    """Whether a release fits, and its row of the table."""
    tree = Tree(history, release)
    verdict = judge(survey(patches.ALL, tree))
    unknown = unknown_globals(history, tree)
    notes = [*reasons(verdict), *unknown, *(f"{path}: not in this clone" for path in tree.lacking)]
    fits = not verdict.problems
    cells = [release.version, release.date, "fits" if fits else "does not fit", str(len(unknown)), "; ".join(notes)]
    return fits, f"| {' | '.join(cells)} |"


def reasons(verdict: Verdict) -> Iterator[str]:
    yield from map(str, verdict.problems)
    yield from (f"without {feature}: {reason}" for feature, reason in verdict.off.items())
    yield from (f"without {patch.target}" for patch, _ in verdict.left_out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("git_dir", type=Path, metavar="GIT_DIR")
    parser.add_argument("--from", dest="first", default="0.3.60", help="the oldest release to look at")
    parser.add_argument("--only", nargs="+", help="these releases only")
    options = parser.parse_args()
    history = History(options.git_dir)
    first = Release(options.first, "", "").order
    chosen = [release for release in history.releases() if release.order >= first]
    if options.only:
        chosen = [release for release in chosen if release.version in options.only]
    if not chosen:
        raise SystemExit(f"{options.git_dir}: no release was found")
    print("| ComfyUI | date | patches | unknown globals | notes |\n|---|---|---|---|---|")
    fitting = 0
    for release in chosen:
        fits, line = row(history, release)
        fitting += fits
        print(line, flush=True)
    print(f"\n{fitting} of {len(chosen)} releases fit")
    return 0 if fitting == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
