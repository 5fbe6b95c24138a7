"""What a pack keeps elsewhere than in its names is every slot's own too: in defaults, closures, caches and aliases."""

from __future__ import annotations

import pytest

from tests.unit.isolation.packs.conftest import InSlot, Load, check_each_slot_has_its_own

# Each pack has `put(value)`, which a job calls, and `get()`, which returns what is kept.
KINDS = {
    "default of a parameter": """
        def kept(value=None, store={'value': 0}):
            '''It says what it does.'''
            if value is not None:
                store['value'] = value
            return store['value']
        def put(value):
            kept(value)
        def get():
            return kept()
    """,
    "default of a method's keyword": """
        class Store:
            @staticmethod
            def kept(value=None, *, store=[0]):
                if value is not None:
                    store.append(value)
                return store[-1]
        def put(value):
            Store.kept(value)
        def get():
            return Store.kept()
    """,
    "default that is a name": """
        store = {'value': 0}
        def kept(value, where=store):
            where['value'] = value
        def put(value):
            kept(value)
        def get():
            return store['value']
    """,
    "closure": """
        def make():
            last: int
            last = 0
            def put(value):
                nonlocal last
                last = value
            return put, lambda: last
        put_here, get_here = make()
        def put(value):
            put_here(value)
        def get():
            return get_here()
    """,
    "parameter of a closure": """
        def make(last, steps=()):
            def put(value):
                nonlocal last
                for last in (0, value):
                    [last for _ in steps]
            def get():
                def inner(last=last):
                    return last
                return inner()
            return put, get
        put_here, get_here = make(0)
        def put(value):
            put_here(value)
        def get():
            return get_here()
    """,
    "container of a closure": """
        def make():
            store = [0]
            class Kept:
                def put(self, value):
                    store.append(value)
                def get(self):
                    return store[-1]
            return Kept()
        kept = make()
        def put(value):
            kept.put(value)
        def get():
            return kept.get()
    """,
    "decorator that remembers": """
        def memo(function):
            kept = {}
            def remembering(name, value=0):
                if name not in kept:
                    kept[name] = function(name, value)
                return kept[name]
            remembering.forget = lambda: kept.clear()
            return remembering
        @memo
        def load(name, value):
            return value
        def put(value):
            load.forget()
            load('a', value)
        def get():
            return load('a')
    """,
    "cache around a function": """
        import functools
        def make():
            return [0]
        state = functools.lru_cache(maxsize=None)(make)
        def put(value):
            state().append(value)
        def get():
            return state()[-1]
    """,
    "what a function returns": """
        class State:
            def __init__(self):
                self.value = 0
        state = State()
        def current():
            return state
        def put(value):
            current().value = value
        def get():
            return state.value
    """,
    "what an object keeps": """
        state = {'value': 0}
        class User:
            def __init__(self):
                self.state = state
            def put(self, value):
                self.state['value'] = value
        def put(value):
            User().put(value)
        def get():
            return state['value']
    """,
    "what a method is given": """
        class State:
            value = 0
        state = State()
        class Writer:
            def fill(self, target, value):
                target.value = value
        def put(value):
            Writer().fill(state, value)
        def get():
            return state.value
    """,
    "items by a local name": """
        stores, other = {'a': [0], 'b': [0]}, [0]
        def put(value):
            for store in stores.values():
                store.append(value)
            mine = other if value else None
            mine.append(value)
            first, second = stores['a'], other
            second[-1] = first[-1]
        def get():
            return stores['a'][-1] if stores['b'][-1] == other[-1] == stores['a'][-1] else 'apart'
    """,
    "an iterator of a list": """
        numbers = iter([0, 0, 0, 0])
        def put(value):
            global numbers
            numbers = iter((value, value, value, value))
        def get():
            return next(numbers)
    """,
    "globals()": """
        last = 0
        def put(value):
            globals()['last'] = value
        def get():
            return last if globals()['last'] == globals().get('last') == last else 'apart'
    """,
    "partial": """
        import functools
        def fill(where, value):
            where['value'] = value
        store = {'value': 0}
        fill_store = functools.partial(fill, store)
        def put(value):
            fill_store(value)
        def get():
            return store['value']
    """,
    "view of another object": """
        class View:
            def __init__(self, store):
                self.store = store
        store = {'value': 0}
        view = View(store)
        def put(value):
            store['value'] = value
        def get():
            return view.store['value']
    """,
    "object that fills another": """
        class Manager:
            def __init__(self, store):
                self.store = store
            def put(self, value):
                self.store['value'] = value
        store = {'value': 0}
        manager = Manager(store)
        def put(value):
            manager.put(value)
        def get():
            return store['value']
    """,
    "namespace": """
        import types
        state = types.SimpleNamespace(value=0)
        def put(value):
            state.value = value
        def get():
            return state.value
    """,
    "weak set": """
        import weakref
        class Key:
            def __init__(self, value):
                self.value = value
        kept, keys = weakref.WeakSet(), []
        def put(value):
            keys[:] = [Key(value)]
            kept.add(keys[0])
        def get():
            return max((key.value for key in kept), default=0)
    """,
    "generator of random numbers": """
        import random
        numbers = random.Random(0)
        first = numbers.getstate()
        def put(value):
            numbers.seed(value)
        def get():
            state = numbers.getstate()
            known = {first: 0} | {random.Random(seed).getstate(): seed for seed in (1, 2, 3)}
            return known[state]
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


def test_a_closure_that_a_job_makes_is_the_job_s(load: Load, in_slot: InSlot) -> None:
    pack = load(KINDS["closure"])
    put, get = in_slot(0, pack.make)
    put(5)
    assert (in_slot(1, get), in_slot(0, pack.get)) == (5, 0)


def test_a_variable_that_is_not_there_yet_is_missing_by_its_name(load: Load, in_slot: InSlot) -> None:
    pack = load(
        """
        def make():
            def put(value):
                nonlocal last
                last = value
            def get():
                return last
            if not get:
                last = 0
            return put, get
        put, get = make()
        """
    )
    with pytest.raises(NameError, match="name 'last' is not defined"):
        in_slot(0, pack.get)
    in_slot(0, pack.put, 1)
    assert in_slot(0, pack.get) == 1
    with pytest.raises(NameError, match="name 'last' is not defined"):
        in_slot(1, pack.get)


def test_a_module_that_a_job_loads_again_begins_anew(load: Load, in_slot: InSlot) -> None:
    pack = load(
        """
        import importlib
        from . import shared
        def put(value):
            shared.rows.append(value)
            return list(shared.rows)
        def again():
            importlib.reload(shared)
        """,
        shared="rows = []",
    )
    assert in_slot(0, pack.put, 1) == [1]
    in_slot(0, pack.again)
    assert in_slot(0, pack.put, 2) == [2]
