"""The engine: patches fit or are refused with a reason, go on all or none, and come off exactly."""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from comfy_parallel.errors import HostMismatch
from comfy_parallel.patching.engine import Addition, Fit, Patch, Undo, replace
from comfy_parallel.patching.patch_set import PatchSet, survey
from comfy_parallel.patching.sources import Checkout, ModuleSource, source_of
from tests.unit.conftest import MakeModule

SOURCE = """
LIMIT = [1, 2]

def plain(a, b=2):
    return ("plain", a, b)

class Base:
    def inherited(self, x):
        return ("inherited", x)

class Thing(Base):
    def method(self, x, *rest):
        return ("method", x, *rest)

    @classmethod
    def made(cls, x):
        return ("made", cls.__name__, x)

    @staticmethod
    def loose(x):
        return ("loose", x)

    class Inner:
        def deep(self):
            return "deep"
"""


def marked(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its result shows it."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ("patched", original(*args, **kwargs))

    return wrapper


def patch(path: str, wrap: Callable[[Any], Any] = marked, **options: Any) -> Patch:
    return Patch(target=f"fake_host:{path}", wrap=wrap, why="a test", until="never", **options)


def addition(path: str, value: Any = "added", **options: Any) -> Addition:
    return Addition(target=f"fake_host:{path}", wrap=lambda nothing: value, why="a test", until="never", **options)


@dataclass(frozen=True, kw_only=True)
class TwoChanges(Patch):
    """Changes two names, and may fail between them."""

    wrap: Callable[[Any], Any] = field(default=marked)
    fails: bool = False

    def apply(self, module: ModuleType) -> Iterator[Undo]:
        yield replace(module, "LIMIT", "changed")
        if self.fails:
            raise RuntimeError("injected")
        yield replace(module, "NEW", "made")


ALL = (
    patch("plain", params=("a", "b")),
    patch("Thing.method", params=("self", "x")),
    patch("Thing.made", params=("cls",)),
    patch("Thing.loose"),
    patch("Thing.inherited"),
    patch("Thing.Inner.deep"),
    addition("Thing.extra"),
    TwoChanges(target="fake_host:LIMIT", why="a test", until="never"),
)


@pytest.fixture
def host(make_module: MakeModule) -> ModuleType:
    return make_module("fake_host", SOURCE)


@pytest.fixture
def failures() -> list[HostMismatch]:
    return []


@pytest.fixture
def make_set(failures: list[HostMismatch]) -> Iterator[Callable[..., PatchSet]]:
    """`make_set(patch, …)`; every set leaves the import system at the end."""
    made: list[PatchSet] = []

    def make(*patches: Patch) -> PatchSet:
        made.append(PatchSet(patches, failures.append))
        return made[-1]

    yield make
    for patch_set in made:
        patch_set._hooks.stop()


MakeSet = Callable[..., PatchSet]


def state(module: Any) -> dict[str, Any]:
    """Everything that a patch could have changed, by identity."""
    found: dict[str, Any] = {}

    def add(owner: Any, where: str) -> None:
        for name, value in vars(owner).items():
            found[f"{where}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module.__name__ and name != "__class__":
                add(value, f"{where}.{name}")

    add(module, module.__name__)
    return found


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    changed = [name for name in before if now[name] is not before[name] and name.rpartition(".")[2] != "__dict__"]
    assert changed == []


# Applying and reverting.


def test_patches_change_the_host_and_come_off_exactly_any_number_of_times(
    host: ModuleType, make_set: MakeSet, failures: list[HostMismatch]
) -> None:
    before = state(host)
    patch_set = make_set(*ALL)
    for _ in range(3):
        patch_set.install()
        assert host.plain(1) == ("patched", ("plain", 1, 2))
        thing = host.Thing()
        assert thing.method(1, 2, 3) == ("patched", ("method", 1, 2, 3))
        assert thing.inherited(1) == ("patched", ("inherited", 1))
        assert host.Base().inherited(1) == ("inherited", 1)
        assert thing.Inner().deep() == ("patched", "deep")
        assert (thing.extra, host.LIMIT, host.NEW) == ("added", "changed", "made")
        patch_set.revert()
        assert_same(state(host), before)
    assert failures == []


def test_class_and_static_methods_stay_what_they_are(host: ModuleType, make_set: MakeSet) -> None:
    make_set(*ALL).install()
    assert isinstance(vars(host.Thing)["made"], classmethod)
    assert isinstance(vars(host.Thing)["loose"], staticmethod)
    for thing in (host.Thing, host.Thing()):
        assert thing.made(1) == ("patched", ("made", "Thing", 1))
        assert thing.loose(1) == ("patched", ("loose", 1))


def test_an_inherited_attribute_is_taken_off_the_class_that_never_had_it(host: ModuleType, make_set: MakeSet) -> None:
    patch_set = make_set(patch("Thing.inherited"))
    patch_set.install()
    assert "inherited" in vars(host.Thing)
    patch_set.revert()
    assert "inherited" not in vars(host.Thing)
    assert host.Thing().inherited(1) == ("inherited", 1)


def test_two_patches_of_one_target_nest_and_come_off_in_reverse(host: ModuleType, make_set: MakeSet) -> None:
    before = state(host)
    patch_set = make_set(patch("plain"), patch("plain"))
    patch_set.install()
    assert host.plain(1) == ("patched", ("patched", ("plain", 1, 2)))
    patch_set.revert()
    assert_same(state(host), before)


def test_an_optional_target_that_is_not_there_is_left_out(
    host: ModuleType, make_set: MakeSet, failures: list[HostMismatch]
) -> None:
    make_set(patch("nowhere", optional=True), patch("Nowhere.method", spare=True), patch("plain")).install()
    assert host.plain(1) == ("patched", ("plain", 1, 2))
    assert not hasattr(host, "nowhere")
    assert failures == []


def test_a_module_is_patched_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_set: MakeSet, failures: list[HostMismatch]
) -> None:
    (tmp_path / "late_host.py").write_text("def plain():\n    return 'plain'\n")
    (tmp_path / "late_user.py").write_text("from late_host import plain\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("late_host", "late_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    target = Patch(target="late_host:plain", wrap=marked, why="a test", until="never")
    patch_set = make_set(target)
    patch_set.install()
    assert "late_host" not in sys.modules
    assert patch_set.missing() == ["late_host"]

    late_user = __import__("late_user")
    assert late_user.plain() == ("patched", "plain")
    assert patch_set.missing() == []
    assert failures == []
    patch_set.revert()
    assert late_user.plain() == "plain"
    monkeypatch.delitem(sys.modules, "late_host")
    monkeypatch.delitem(sys.modules, "late_user")


def test_what_is_missing_counts_only_modules_that_are_needed(make_set: MakeSet) -> None:
    needed = Patch(target="never_imported:name", wrap=marked, why="a test", until="never")
    optional = Patch(target="not_needed:name", wrap=marked, why="a test", until="never", optional=True)
    patch_set = make_set(needed, optional)
    patch_set.install()
    assert patch_set.missing() == ["never_imported"]


# Copies of the original in other modules.


def test_names_copied_before_are_replaced_and_put_back(
    host: ModuleType, make_module: MakeModule, make_set: MakeSet
) -> None:
    user = make_module("fake_user", "from fake_host import plain, plain as other, Thing, LIMIT")
    before = state(user)
    patch_set = make_set(patch("plain"), patch("Thing.method"), TwoChanges(target="fake_host:LIMIT", why="", until=""))
    patch_set.install()
    assert user.plain is user.other is host.plain
    assert user.plain(1) == ("patched", ("plain", 1, 2))
    assert user.LIMIT == [1, 2], "a value is no function: whoever copied it keeps it"
    patch_set.revert()
    assert_same(state(user), before)


def test_a_replaced_class_is_replaced_in_other_modules_too(
    host: ModuleType, make_module: MakeModule, make_set: MakeSet
) -> None:
    user = make_module("fake_user", "from fake_host import Thing")
    original = host.Thing
    patch_set = make_set(patch("Thing", wrap=lambda thing: type("Thing", (thing,), {}), expects=type))
    patch_set.install()
    assert user.Thing is host.Thing is not original
    patch_set.revert()
    assert user.Thing is host.Thing is original


def test_what_is_no_module_in_sys_modules_is_left_alone(
    host: ModuleType, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fake_nothing", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "fake_object", object())  # type: ignore[arg-type]
    make_set(patch("plain")).install()
    assert host.plain(1) == ("patched", ("plain", 1, 2))


# All or nothing.


def fail(original: Any) -> Any:
    raise RuntimeError("injected")


@pytest.mark.parametrize("index", range(len(ALL) + 1))
def test_a_failure_anywhere_is_told_once_and_leaves_the_host_untouched(
    host: ModuleType, make_module: MakeModule, make_set: MakeSet, failures: list[HostMismatch], index: int
) -> None:
    user = make_module("fake_user", "from fake_host import plain, Thing")
    before = state(host), state(user)
    make_set(*ALL[:index], patch("plain", wrap=fail), *ALL[index:]).install()
    assert len(failures) == 1
    assert str(failures[0]).startswith(
        "fake_host:plain: RuntimeError('injected') while it was applied (test_engine.py:"
    )
    assert isinstance(failures[0].__cause__, RuntimeError)
    assert_same(state(host), before[0])
    assert_same(state(user), before[1])


def test_a_failure_between_two_changes_of_one_patch_takes_the_first_back(
    host: ModuleType, make_set: MakeSet, failures: list[HostMismatch]
) -> None:
    before = state(host)
    broken = TwoChanges(target="fake_host:LIMIT", why="a test", until="never", fails=True)
    make_set(*ALL[:-1], broken).install()
    assert ["RuntimeError('injected')" in str(failure) for failure in failures] == [True]
    assert_same(state(host), before)


def test_what_ends_the_process_is_no_mismatch(
    host: ModuleType, make_set: MakeSet, failures: list[HostMismatch]
) -> None:
    def interrupted(original: Any) -> Any:
        raise KeyboardInterrupt

    before = state(host)
    with pytest.raises(KeyboardInterrupt):
        make_set(*ALL, patch("plain", wrap=interrupted)).install()
    assert failures == []
    assert_same(state(host), before)


# Other features than the core: what does not fit is left out, and the rest works.


def part(feature: str, path: str, wrap: Callable[[Any], Any] = marked, module: str = "fake_host", **more: Any) -> Patch:
    return Patch(target=f"{module}:{path}", wrap=wrap, why="", until="", feature=feature, **more)


@pytest.mark.parametrize(
    "wrong", [part("extra", "nowhere"), part("extra", "plain", fail), part("extra", "LIMIT", expects=dict)]
)
@pytest.mark.parametrize("index", range(len(ALL) + 1))
def test_a_feature_that_does_not_fit_is_left_out_whole(
    host: ModuleType, make_module: MakeModule, failures: list[HostMismatch], wrong: Patch, index: int
) -> None:
    other = make_module("fake_other", "def plain(): return 'other'\ndef kept(): return 'kept'")
    before = state(host), state(other)
    told: list[tuple[str, str]] = []
    patches = (
        part("extra", "plain", module="fake_other"),
        *ALL[:index],
        part("extra", "plain"),
        wrong,
        *ALL[index:],
        part("third", "kept", module="fake_other"),
    )
    patch_set = PatchSet(patches, failures.append, lambda what, reason: told.append((what, str(reason))))
    patch_set.install()
    assert failures == []
    assert [what for what, _ in told] == ["extra"]
    assert told[0][1].startswith(wrong.target)
    assert host.plain(1) == ("patched", ("plain", 1, 2)), "once, by the core"
    assert (other.plain(), other.kept()) == ("other", ("patched", "kept"))
    assert patch_set.features() == {"core", "third"}
    patch_set.revert()
    assert_same(state(host), before[0])
    assert_same(state(other), before[1])


def test_a_module_that_does_not_fit_when_it_comes_late_takes_its_feature_off_the_others(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_set: MakeSet, failures: list[HostMismatch]
) -> None:
    (tmp_path / "late_host.py").write_text("def plain():\n    return 'plain'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_host", raising=False)
    core = Patch(target="late_host:plain", wrap=marked, why="", until="")
    make_set(part("extra", "plain"), core, part("extra", "nowhere", module="late_host")).install()
    assert host.plain(1) == ("patched", ("plain", 1, 2))
    assert __import__("late_host").plain() == ("patched", "plain")
    assert host.plain(1) == ("plain", 1, 2)
    assert failures == []
    monkeypatch.delitem(sys.modules, "late_host")


def test_a_module_that_comes_while_jobs_run_and_does_not_fit_is_left_as_it_is(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: list[HostMismatch]
) -> None:
    """To take the patches off under running jobs would be worse."""
    (tmp_path / "late_host.py").write_text("def plain():\n    return 'plain'\ndef other():\n    return 'other'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_host", raising=False)
    told: list[str] = []
    late = [
        Patch(target=f"late_host:{name}", wrap=wrap, why="", until="")
        for name, wrap in (("plain", marked), ("other", fail))
    ]
    patch_set = PatchSet(
        (patch("plain"), *late), failures.append, lambda what, reason: told.append(f"{what}: {reason}")
    )
    patch_set.install()
    patch_set.in_use()
    assert __import__("late_host").plain() == "plain"
    assert host.plain(1) == ("patched", ("plain", 1, 2))
    assert failures == []
    (said,) = told
    assert said.startswith("late_host: late_host:other: RuntimeError('injected')")
    patch_set.revert()
    assert host.plain(1) == ("plain", 1, 2)
    monkeypatch.delitem(sys.modules, "late_host")


def test_a_patch_that_can_be_spared_is_left_out_alone_where_it_does_not_fit(
    host: ModuleType, failures: list[HostMismatch]
) -> None:
    told: list[tuple[str, str]] = []
    odd = part("extra", "plain", params=("x",), spare=True)
    lacking = part("extra", "Thing.method", needs=("nowhere",), spare=True)
    patches = (odd, lacking, part("extra", "Thing.loose"))
    patch_set = PatchSet(patches, failures.append, lambda what, reason: told.append((what, str(reason))))
    patch_set.install()
    assert host.plain(1) == ("plain", 1, 2)
    assert host.Thing.loose(1) == ("patched", ("loose", 1))
    assert failures == []
    assert told == [
        ("fake_host:plain", "fake_host:plain: expected parameters ('x',), host has ('a', 'b')"),
        ("fake_host:Thing.method", "fake_host:Thing.method: needs fake_host:nowhere, not found in this host"),
    ]


def test_the_source_tells_what_the_live_host_would(tmp_path: Path, failures: list[HostMismatch]) -> None:
    (tmp_path / "fake_host.py").write_text(SOURCE)
    told: list[str] = []
    patches = (
        *ALL[:3],
        part("extra", "plain"),
        part("extra", "nowhere"),
        part("extra", "plain", params=("x",)),
        part("extra", "plain", params=("x",), spare=True),
        part("third", "plain", params=("x",), spare=True),
        part("third", "plain", needs=("LIMIT",)),
        part("fourth", "plain", needs=("nowhere",)),
    )
    patch_set = PatchSet(patches, failures.append, lambda what, reason: told.append(f"{what}: {reason}"))
    assert patch_set.check(Checkout(tmp_path)) == []
    assert told == [
        "extra: fake_host:nowhere: not found in this host; "
        "fake_host:plain: expected parameters ('x',), host has ('a', 'b')",
        "fourth: fake_host:plain: needs fake_host:nowhere, not found in this host",
        "fake_host:plain: fake_host:plain: expected parameters ('x',), host has ('a', 'b')",
    ]
    assert patch_set.patches == (*ALL[:3], patches[-2])


# What a patch reads of the host.


def reading(original: Any, *values: Any) -> Any:
    return lambda *args: (values, original(*args))


def test_a_patch_is_given_what_it_says_it_needs(
    host: ModuleType, make_module: MakeModule, make_set: MakeSet, failures: list[HostMismatch]
) -> None:
    make_module("fake_package.part", "class Names:\n    ONE = 1")
    needs = ("LIMIT", "fake_package.part:Names.ONE", "nowhere?", "fake_nowhere:name?")
    make_set(patch("plain", wrap=reading, needs=needs)).install()
    assert failures == []
    assert host.plain(1) == (([1, 2], 1, None, None), ("plain", 1, 2))


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ("nowhere", "fake_host:plain: needs fake_host:nowhere, not found in this host"),
        ("Thing.nowhere", "fake_host:plain: needs fake_host:Thing.nowhere, not found in this host"),
        ("fake_nowhere:name", "fake_host:plain: needs fake_nowhere:name, not found in this host"),
    ],
)
def test_a_need_that_the_host_lacks_is_a_mismatch_live_and_by_source(
    host: ModuleType, tmp_path: Path, make_set: MakeSet, failures: list[HostMismatch], need: str, reason: str
) -> None:
    (tmp_path / "fake_host.py").write_text(SOURCE)
    before = state(host)
    patch_set = make_set(*ALL[:4], patch("plain", wrap=reading, needs=(need,)))
    assert [str(problem) for problem in patch_set.check(Checkout(tmp_path))] == [reason]
    patch_set.install()
    assert [str(failure) for failure in failures] == [reason]
    assert_same(state(host), before)


def test_a_source_that_cannot_be_read_is_a_mismatch(tmp_path: Path, make_set: MakeSet) -> None:
    (tmp_path / "fake_host.py").write_text("def plain(:")
    (problem,) = make_set(patch("plain")).check(Checkout(tmp_path))
    assert str(problem).startswith("fake_host.py: cannot be read: invalid syntax")


@pytest.mark.parametrize("index", range(len(ALL) + 1))
def test_a_mismatch_anywhere_is_told_once_and_leaves_the_host_untouched(
    host: ModuleType, make_set: MakeSet, failures: list[HostMismatch], index: int
) -> None:
    before = state(host)
    make_set(*ALL[:index], patch("nowhere"), *ALL[index:]).install()
    assert [str(failure) for failure in failures] == ["fake_host:nowhere: not found in this host"]
    assert_same(state(host), before)


@pytest.mark.parametrize(
    "order", [("fake_host", "fake_second", "fake_third"), ("fake_third", "fake_second", "fake_host")]
)
def test_a_mismatch_in_one_module_takes_the_patches_off_all_and_keeps_them_off(
    host: ModuleType,
    make_module: MakeModule,
    make_set: MakeSet,
    failures: list[HostMismatch],
    order: tuple[str, ...],
) -> None:
    third = make_module("fake_third", "def plain(): pass")
    make_module("fake_second", "")
    before = state(host), state(third)
    make_set(*(Patch(target=f"{name}:plain", wrap=marked, why="", until="") for name in order)).install()
    assert [str(failure) for failure in failures] == ["fake_second:plain: not found in this host"]
    assert_same(state(host), before[0])
    assert_same(state(third), before[1])


def test_after_a_mismatch_later_imports_are_not_patched(
    host: ModuleType,
    make_set: MakeSet,
    failures: list[HostMismatch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "late_host.py").write_text("def plain():\n    return 'plain'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_host", raising=False)
    late = Patch(target="late_host:plain", wrap=marked, why="a test", until="never")
    make_set(patch("nowhere"), late).install()
    assert len(failures) == 1
    assert __import__("late_host").plain() == "plain"
    monkeypatch.delitem(sys.modules, "late_host")


# Someone else patches the same names.


def test_a_change_over_ours_is_refused_loudly(host: ModuleType, make_set: MakeSet) -> None:
    patch_set = make_set(patch("plain"), patch("Thing.method"))
    patch_set.install()
    host.Thing.method = lambda self, x: "theirs"
    with pytest.raises(HostMismatch, match=r"Thing.*\.method: something else patched it after us"):
        patch_set.revert()
    assert host.Thing().method(1) == "theirs"
    assert host.plain(1) == ("patched", ("plain", 1, 2)), "a half-reverted host would be worse"


def test_once_the_change_over_ours_is_gone_ours_comes_off(host: ModuleType, make_set: MakeSet) -> None:
    before = state(host)
    patch_set = make_set(*ALL)
    patch_set.install()
    ours = host.plain
    host.plain = lambda a, b=2: "theirs"
    with pytest.raises(HostMismatch):
        patch_set.revert()
    host.plain = ours
    patch_set.revert()
    assert_same(state(host), before)


# Reasons, against the live host.


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (patch("nowhere"), "fake_host:nowhere: not found in this host"),
        (patch("Thing.nowhere"), "fake_host:Thing.nowhere: not found in this host"),
        (patch("plain", params=("a", "c")), "fake_host:plain: expected parameters ('a', 'c'), host has ('a', 'b')"),
        (
            patch("plain", params=("a", "b", "c")),
            "fake_host:plain: expected parameters ('a', 'b', 'c'), host has ('a', 'b')",
        ),
        (
            patch("Thing.made", params=("self",)),
            "fake_host:Thing.made: expected parameters ('self',), host has ('cls', 'x')",
        ),
        (patch("LIMIT", expects=dict), "fake_host:LIMIT: expected dict, found list"),
        (patch("plain", expects=type), "fake_host:plain: expected type, found function"),
        (
            addition("Thing.method"),
            "fake_host:Thing.method: expected no such class attribute, the host has one",
        ),
        (
            addition("Thing.inherited"),
            "fake_host:Thing.inherited: expected no such class attribute, the host has one",
        ),
    ],
    ids=lambda value: value.target if isinstance(value, Patch) else "",
)
def test_a_live_mismatch_says_what_was_expected_and_found(
    host: ModuleType, make_set: MakeSet, failures: list[HostMismatch], wrong: Patch, reason: str
) -> None:
    before = state(host)
    make_set(wrong).install()
    assert [str(failure) for failure in failures] == [reason]
    assert_same(state(host), before)


@pytest.mark.parametrize("fitting", ALL, ids=lambda value: value.target)
def test_what_fits_fits_live_and_by_source(host: ModuleType, tmp_path: Path, fitting: Patch) -> None:
    assert fitting.check_live(host) is Fit.FITS
    if not fitting.target.endswith("inherited"):
        assert fitting.check_source(source(SOURCE)) is Fit.FITS


# Reasons, against source code alone.


def source(text: str) -> ModuleSource:
    return ModuleSource(textwrap.dedent(text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("f", "def f(): pass"),
        ("f", "async def f(): pass"),
        ("f", "if sys.platform == 'linux':\n    def f(): pass"),
        ("f", "if x:\n    pass\nelse:\n    def f(): pass"),
        ("f", "if x:\n    pass\nelif y:\n    def f(): pass"),
        ("f", "try:\n    def f(): pass\nexcept ImportError:\n    pass"),
        ("f", "try:\n    import a\nexcept ImportError:\n    def f(): pass"),
        ("f", "try:\n    pass\nexcept ImportError:\n    pass\nelse:\n    def f(): pass"),
        ("f", "try:\n    pass\nfinally:\n    def f(): pass"),
        ("f", "with a:\n    def f(): pass"),
        ("f", "if x:\n    try:\n        def f(): pass\n    except E:\n        pass"),
        ("f", "import f"),
        ("f", "import a.b as f"),
        ("f", "from a import f"),
        ("f", "from a import b as f"),
        ("f", "f = 1"),
        ("f", "e = f = 1"),
        ("f", "f: int = 1"),
        ("f", "e, f = 1, 2"),
        ("f", "[e, (d, *f)] = g"),
        ("C.m", "class C:\n    def m(self): pass"),
        ("C.m", "class C:\n    if x:\n        def m(self): pass"),
        ("C.D.m", "class C:\n    class D:\n        def m(self): pass"),
        ("C.a", "class C:\n    a = 1"),
        ("f.g", "def f():\n    def g(): pass"),
    ],
)
def test_a_definition_is_found_wherever_it_stands(tmp_path: Path, path: str, text: str) -> None:
    assert source(text).find(path.split(".")) is not None


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("f", ""),
        ("f", "def g():\n    def f(): pass"),
        ("f", "class C:\n    def f(self): pass"),
        ("f", "a.f = 1"),
        ("f", "a[f] = 1"),
        ("f", "print(f)"),
        ("f", "import f.g as h"),
        ("C.m", "def m(): pass\nclass C: pass"),
        ("C.m", "class D:\n    def m(self): pass"),
    ],
)
def test_what_is_defined_elsewhere_or_only_used_is_not_found(tmp_path: Path, path: str, text: str) -> None:
    assert source(text).find(path.split(".")) is None


def test_the_last_definition_counts(tmp_path: Path) -> None:
    twice = source("def f(old): pass\ntry:\n    def f(new): pass\nexcept E:\n    pass")
    assert patch("f", params=("new",)).check_source(twice) is Fit.FITS


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (patch("nowhere"), "fake_host:nowhere: not found in this host"),
        (patch("Nowhere.method"), "fake_host:Nowhere.method: not found in this host"),
        (patch("plain", params=("x",)), "fake_host:plain: expected parameters ('x',), host has ('a', 'b')"),
        (patch("LIMIT", params=("a",)), "fake_host:LIMIT: expected a function, found LIMIT = [1, 2]"),
        (addition("Nowhere.extra"), "fake_host:Nowhere.extra: not found in this host"),
        (
            addition("Thing.method"),
            "fake_host:Thing.method: expected no such class attribute, the host has one",
        ),
    ],
    ids=lambda value: value.target if isinstance(value, Patch) else "",
)
def test_a_mismatch_in_source_says_what_was_expected_and_found(tmp_path: Path, wrong: Patch, reason: str) -> None:
    with pytest.raises(HostMismatch) as mismatch:
        wrong.check_source(source(SOURCE))
    assert str(mismatch.value) == reason


def test_positional_only_parameters_count(tmp_path: Path) -> None:
    text = "def f(a, /, b, *, c): pass"
    assert patch("f", params=("a", "b")).check_source(source(text)) is Fit.FITS


def test_checking_a_host_tells_every_reason_and_imports_nothing(tmp_path: Path, make_set: MakeSet) -> None:
    (tmp_path / "fake_host.py").write_text(SOURCE)
    (tmp_path / "fake_package").mkdir()
    (tmp_path / "fake_package" / "__init__.py").write_text("def f(): pass")
    (tmp_path / "fake_package" / "part.py").write_text("raise SystemExit('imported')\ndef g(): pass")
    good = (
        patch("plain"),
        Patch(target="fake_package:f", wrap=marked, why="", until=""),
        Patch(target="fake_package.part:g", wrap=marked, why="", until=""),
        Patch(target="torch:randn", wrap=marked, why="", until=""),
        Patch(target="gone:f", wrap=marked, why="", until="", optional=True),
        patch("gone", optional=True),
    )
    bad = (patch("nowhere"), Patch(target="gone:f", wrap=marked, why="", until=""))
    assert make_set(*good).check(Checkout(tmp_path)) == []
    assert [str(problem) for problem in make_set(*good, *bad).check(Checkout(tmp_path))] == [
        "fake_host:nowhere: not found in this host",
        "gone:f: not found in this host",
    ]
    fits = [result for _, result in survey(good, Checkout(tmp_path))]
    assert fits == [Fit.FITS, Fit.FITS, Fit.FITS, Fit.LIVE, Fit.ABSENT, Fit.ABSENT]
    assert "fake_package" not in sys.modules


def test_a_module_of_another_is_no_source_of_the_host(tmp_path: Path) -> None:
    assert source_of("threading", Checkout(tmp_path)) is None
    assert source_of("fake.part", Checkout(tmp_path)) is None
