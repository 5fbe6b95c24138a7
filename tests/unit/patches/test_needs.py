"""No patch reads a name of the host that it does not declare: a host without it would not start."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest

from comfy_parallel import patches
from comfy_parallel.patching.engine import Addition, Patch
from comfy_parallel.patching.patch_set import _is_library
from tests.unit.test_architecture import FILES, HOST, TREES

# They look at the namespace of a function that they were given, for what every module has or for themselves.
LOOKS = {
    "graphs/code.py",
    "graphs/watch.py",
    "isolation/packs/redirect.py",
    "isolation/save_numbers.py",
    "isolation/slot_globals.py",
    "patching/namespaces.py",
    "slots/host_worker.py",
}
VALUES = ("latent_preview:args", "comfy.samplers:collections")  # no functions
FUNCTIONS = [
    patch for patch in patches.ALL if type(patch) is Patch and patch.expects is None and patch.target not in VALUES
]


class Watched(dict[str, Any]):
    """The global names of a host function; tells which were asked for."""

    def __init__(self) -> None:
        super().__init__(__name__="fake_host", __builtins__=__builtins__)
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.asked.append(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.append(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.append(name)
        return super().get(name, default)


class Anything:
    """Stands for whatever a patch has declared."""

    def __getattr__(self, name: str) -> Any:
        return Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Anything()


def function(names: dict[str, Any]) -> Any:
    code = compile("def original(self, x, t, *args, **kwargs): pass", "host.py", "exec").co_consts[0]
    return FunctionType(code, names)


@pytest.mark.parametrize("patch", FUNCTIONS, ids=lambda patch: patch.target)
def test_no_wrapper_reads_a_global_that_its_patch_does_not_declare(patch: Patch) -> None:
    names = Watched()
    wrapped = patch.wrap(function(names), *(Anything() for _ in patch.needs))
    assert callable(wrapped) or patch.target == "torch.random:default_generator"
    assert names.asked == []


def test_most_patches_are_looked_at() -> None:
    kinds = {Patch, Addition}
    assert len(FUNCTIONS) > 0.8 * len([patch for patch in patches.ALL if type(patch) in kinds]) > 50


def test_no_code_of_ours_reads_the_namespace_of_a_host_function() -> None:
    """Not when a patch is applied, and not when what it put there is called."""
    readers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("__globals__", "f_globals")
    }
    assert readers <= LOOKS


def host_imports(name: str) -> Iterator[str]:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in HOST)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in HOST:
            yield str(node.module)


def test_no_patch_imports_a_module_of_the_host() -> None:
    """What it needs of one is declared, and handed to it."""
    found = {name: list(host_imports(name)) for name in FILES if name.startswith("patches/")}
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_every_feature_is_one_that_can_be_switched_off_or_done_without() -> None:
    always = {"core", "device nodes", "one workflow over all slots", "speed"}
    always |= {"a pace of its own for each client", "a check of what nodes show"}
    always |= {
        "a second run of jobs that find no memory",
        "noticing that a GPU is lost",
        "dropping the frames of errors",
    }
    assert {patch.feature for patch in patches.ALL} == {*always, "weights", "graphs"}
    assert {patch.feature for patch in patches.without({"weights", "graphs"})} == always
    assert {patch.feature for patch in patches.without({"weights"})} == {*always, "graphs"}


def test_what_only_saves_time_never_keeps_a_host_from_starting() -> None:
    assert [patch.target for patch in patches.ALL if patch.feature == "speed" and not patch.spare] == []


def test_every_module_is_known_as_the_hosts_or_as_a_librarys() -> None:
    """A library's module is looked for when it is imported, not among the host's files."""
    roots = {module.partition(".")[0] for patch in patches.ALL for module in patch.modules}
    assert {root for root in roots if root not in HOST and not _is_library(root)} == set()
    assert not [root for root in HOST if _is_library(root) and root != "comfy_aimdo"]
