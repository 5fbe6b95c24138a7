"""What a pack keeps is every slot's own, starting with what its import made."""

from __future__ import annotations

import sys
import textwrap
import threading

import pytest

from comfy_parallel.config import PackModes
from comfy_parallel.isolation.packs import loader
from comfy_parallel.isolation.threads import start_in_slot
from comfy_parallel.slots.slot import entered
from tests.fakes import make_slots
from tests.unit.isolation.packs.conftest import InSlot, Load, check_each_slot_has_its_own

# Each pack has `put(value)`, which a job calls, and `get()`, which returns what is kept.
KINDS = {
    "global": """
        last = 0
        def put(value):
            global last
            last = value
        def get():
            return last
    """,
    "global that the import does not make": """
        def put(value):
            global last
            last = value
        def get():
            return globals_or_zero()
        def globals_or_zero():
            try:
                return last
            except NameError:
                return 0
    """,
    "global in a nested function": """
        last = 0
        def put(value):
            def inner():
                global last
                last += value
            inner()
        def get():
            return (lambda: last)()
    """,
    "walrus": """
        last = 0
        def put(value):
            global last
            if (last := value):
                pass
        def get():
            return last
    """,
    "dictionary": """
        store = {'value': 0}
        def put(value):
            store['value'] = value
        def get():
            return store['value']
    """,
    "list in a dictionary": """
        store = {'values': [0]}
        def put(value):
            store['values'].append(value)
        def get():
            return [value for value in store['values']][-1]
    """,
    "container passed on": """
        store = {}
        def put(value):
            fill(store, value)
        def fill(where, value):
            where['value'] = value
        def get():
            return store.get('value', 0)
    """,
    "two names of one thing": """
        first = [0]
        second = first
        def put(value):
            first.append(value)
            second.append(value)
        def get():
            return first[-1] if len(first) % 2 else 'not one list'
    """,
    "class attribute": """
        class Store:
            last = 0
            @classmethod
            def put(cls, value):
                cls.last = value
        def put(value):
            Store.put(value)
        def get():
            return Store().last
    """,
    "class attribute of a subclass": """
        class Base:
            last = 0
            @classmethod
            def put(cls, value):
                cls.last = value
        class Store(Base):
            pass
        def put(value):
            Store.put(value)
        def get():
            return Store.last if Base.last == 0 else 'on the base'
    """,
    "counter by type(self)": """
        class Store:
            count = 0
            def put(self, value):
                type(self).count += value
        def put(value):
            Store().put(value)
        def get():
            return Store.count
    """,
    "container of a class": """
        class Store:
            images = {'value': 0}
            def put(self, value):
                self.images['value'] = value
        def put(value):
            Store().put(value)
        def get():
            return Store.images['value']
    """,
    "class attribute that the import does not make": """
        class Store:
            pass
        def put(value):
            Store.last = value
        def get():
            return getattr(Store, 'last', 0)
    """,
    "setattr": """
        class Store:
            last = 0
        def put(value):
            setattr(Store, 'last', value)
        def get():
            return Store.last
    """,
    "object": """
        class State:
            def __init__(self):
                self.value = 0
        state = State()
        def put(value):
            state.value = value
        def get():
            return state.value
    """,
    "object with methods": """
        class State:
            def __init__(self):
                self.values = [0]
            def put(self, value):
                self.values.append(value)
        state = State()
        def put(value):
            state.put(value)
        def get():
            return state.values[-1]
    """,
    "singleton": """
        class State:
            _instance = None
            def __new__(cls):
                if cls._instance is None:
                    cls._instance = super().__new__(cls)
                    cls._instance.value = 0
                return cls._instance
        def put(value):
            State().value = value
        def get():
            return State().value
    """,
    "cache of a function": """
        import functools
        @functools.lru_cache(maxsize=None)
        def state():
            return [0]
        def put(value):
            state().append(value)
        def get():
            return state()[-1]
    """,
    "dataclass": """
        import dataclasses
        @dataclasses.dataclass
        class Settings:
            value: int = 0
        settings = Settings()
        def put(value):
            settings.value = value
        def get():
            return settings.value
    """,
    "namespace of the module": """
        import sys
        this = sys.modules[__name__]
        last = 0
        def put(value):
            setattr(this, 'last', value)
        def get():
            return last
    """,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_slot_has_its_own(load: Load, in_slot: InSlot, kind: str) -> None:
    check_each_slot_has_its_own(load(KINDS[kind]), in_slot)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_slots_it_is_as_without_us(load: Load, in_slot: InSlot, kind: str) -> None:
    pack = load(KINDS[kind])
    in_slot(None, pack.put, 3)
    assert in_slot(None, pack.get) == 3


SHARED_BY_TWO_FILES = {
    "as an attribute": """
        from . import shared
        def put(value):
            shared.last = value
            shared.rows.append(value)
        def get():
            return shared.last if shared.rows[-1] == shared.last else 'apart'
    """,
    "by name": """
        from .shared import rows
        def put(value):
            rows.append(value)
        def get():
            return rows[-1]
    """,
    "by another name": """
        from .shared import rows as mine
        def put(value):
            mine.append(value)
        def get():
            return mine[-1]
    """,
    "by way of another file": """
        from .between import rows
        def put(value):
            rows.append(value)
        def get():
            return rows[-1]
    """,
    "by a star": """
        from .between import *
        def put(value):
            rows.append(value)
        def get():
            return rows[-1]
    """,
    "in a function": """
        def put(value):
            from .shared import rows
            rows.append(value)
        def get():
            from .shared import rows
            return rows[-1]
    """,
    "where it may fail": """
        try:
            from .shared import rows
        except ImportError:
            from shared import rows
        def put(value):
            rows.append(value)
        def get():
            return rows[-1]
    """,
}


@pytest.mark.parametrize("way", SHARED_BY_TWO_FILES)
def test_files_of_a_pack_see_the_same(load: Load, in_slot: InSlot, way: str) -> None:
    shared = "last = 0\nrows = [0]\ndef last_row(): return rows[-1]"
    pack = load(SHARED_BY_TWO_FILES[way], shared=shared, between="from .shared import rows\ndef f(): return rows")
    for slot in (0, 1):
        in_slot(slot, pack.put, slot + 1)
    last_row = sys.modules["pack.shared"].last_row
    assert [in_slot(slot, pack.get) for slot in (0, 1, None)] == [1, 2, 0]
    assert [in_slot(slot, last_row) for slot in (0, 1, None)] == [1, 2, 0]


def test_a_thread_of_a_job_sees_what_its_job_does(load: Load) -> None:
    pack = load(KINDS["global"])
    seen = []
    start = start_in_slot(threading.Thread.start)

    def job() -> None:
        pack.put(7)
        thread = threading.Thread(target=lambda: seen.append(pack.get()))
        start(thread)
        thread.join()

    first, second = make_slots("cpu", "cpu")
    with entered(first):
        job()
    with entered(second):
        assert (seen, pack.get()) == ([7], 0)


def test_what_a_route_shares_with_nodes_stays_one(load: Load, in_slot: InSlot) -> None:
    pack = load(
        """
        waiting = {}
        class Routes:
            def post(self, path):
                return lambda function: function
        routes = Routes()
        class Node:
            @classmethod
            def INPUT_TYPES(cls):
                return {}
            def run(self, key):
                waiting[key] = None
                return waiting
        @routes.post('/answer')
        async def answer(request):
            waiting[request] = True
        """
    )
    assert in_slot(0, pack.Node().run, "a") is in_slot(1, pack.Node().run, "b") is pack.waiting


def test_a_name_is_deleted_for_one_slot(load: Load, in_slot: InSlot) -> None:
    pack = load("last = 0\ndef drop():\n    global last\n    del last\ndef get():\n    return last")
    in_slot(0, pack.drop)
    assert in_slot(1, pack.get) == 0
    with pytest.raises(NameError, match="last"):
        in_slot(0, pack.get)
    with pytest.raises(NameError):
        in_slot(0, pack.drop)


def test_locks_stay_one(load: Load, in_slot: InSlot) -> None:
    pack = load(
        """
        import threading
        class State:
            def __init__(self):
                self.lock, self.value = threading.Lock(), 0
            def put(self, value):
                self.value = value
        state = State()
        def get():
            return state
        """
    )
    first, second = in_slot(0, pack.get), in_slot(1, pack.get)
    assert first is not second
    assert first.lock is second.lock


def test_a_device_chosen_at_import_is_the_slots_own(load: Load, in_slot: InSlot) -> None:
    torch = pytest.importorskip("torch")
    pack = load(
        """
        import torch
        def get_torch_device():
            return torch.device('cuda:0')
        device = get_torch_device()
        other = torch.device('cuda', 3)
        class Node:
            device = get_torch_device()
        def get():
            return device, other, Node.device
        """
    )
    first, second, third = (torch.device("cuda", index) for index in (0, 1, 3))
    assert in_slot(0, pack.get) == (first, third, first)
    assert in_slot(1, pack.get) == (second, third, second)


def test_lines_in_tracebacks_stay(load: Load, in_slot: InSlot) -> None:
    pack = load(textwrap.dedent(KINDS["container of a class"]).strip() + "\ndef fail():\n    Store.images['no']")
    with pytest.raises(KeyError) as raised:
        in_slot(0, pack.fail)
    assert raised.traceback[-1].lineno + 1 == 10


def test_a_pack_without_state_is_loaded_as_it_is(load: Load) -> None:
    pack = load("def put(value):\n    self = value\n    return [value for value in (1, 2)]")
    assert [name for name in vars(pack) if name.startswith("__comfy_parallel")] == [
        "__comfy_parallel_pack__",
        "__comfy_parallel_shared__",
    ]


def test_an_import_in_a_job_makes_what_all_slots_start_with(load: Load, in_slot: InSlot) -> None:
    text = "def get():\n    from . import later\n    return later.put()"
    later = "rows = []\ndef fill():\n    rows.append(0)\nfill()\ndef put():\n    rows.append(1)\n    return rows"
    pack = load(text, later=later)
    assert [in_slot(slot, pack.get) for slot in (0, 0, 1)] == [[0, 1, 1], [0, 1, 1], [0, 1]]


def test_a_trusted_pack_is_loaded_as_it_is(load: Load, in_slot: InSlot) -> None:
    loader.use(PackModes(named=(("pack", "trust"),)))
    try:
        pack = load(KINDS["global"])
    finally:
        loader.use(PackModes())
    in_slot(0, pack.put, 1)
    assert in_slot(1, pack.get) == 1


def test_a_file_may_lend_a_name_that_it_does_not_use_itself(load: Load, in_slot: InSlot) -> None:
    pack = load(SHARED_BY_TWO_FILES["by name"], shared="rows = [0]")
    in_slot(0, pack.put, 1)
    assert [in_slot(slot, pack.get) for slot in (0, 1)] == [1, 0]
