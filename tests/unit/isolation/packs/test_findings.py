"""What a look at a pack's source finds, kind by kind."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from comfy_parallel.isolation.packs.finding import ALONE, IN_TURN, PER_SLOT, SHARED
from comfy_parallel.isolation.packs.findings import findings

NODE = """
class Node:
    @classmethod
    def INPUT_TYPES(cls):
        return {}

    def run(self, key, value):
        work(self, key, value)
"""


def treatments(folder: Path, text: str, **others: str) -> dict[str, str]:
    """Name -> treatment, of a pack whose node calls `work`."""
    for name, source in {"__init__": NODE + textwrap.dedent(text), **others}.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return {found.name: found.treatment for found in findings(folder)}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("last = None\ndef work(node, key, value):\n    global last\n    last = value", "last"),
        ("store = {}\ndef work(node, key, value):\n    store[key] = value", "store"),
        ("store = [1]\ndef work(node, key, value):\n    store.append(value)", "store"),
        ("store = {'a': []}\ndef work(node, key, value):\n    store['a'].append(value)", "store"),
        ("store = {}\ndef work(node, key, value):\n    fill(store, value)", "store"),
        ("store = [0]\ndef work(node, key, value):\n    mine = store\n    mine[0] += 1", "store"),
        ("class S:\n    images = {}\ndef work(node, key, value):\n    S.images[key] = value", "S.images"),
        (
            "class S:\n    @classmethod\n    def put(cls, v):\n        cls.v = v\ndef work(n, k, v):\n    S.put(v)",
            "S.v",
        ),
        (
            "class S:\n    n = 0\n    def put(self):\n        type(self).n += 1\ndef work(n, k, v):\n    S().put()",
            "S.n",
        ),
        (
            "class S:\n    n = 0\n    def put(self):\n        self.__class__.n += 1\ndef work(n, k, v):\n    S().put()",
            "S.n",
        ),
        (
            "class S:\n    all = []\n    def put(self):\n        self.all.append(1)\ndef work(n, k, v):\n    S().put()",
            "S.all",
        ),
        ("class S: pass\ns = S()\ndef work(node, key, value):\n    s.value = value", "s"),
        ("class S:\n    def put(self, v):\n        self.v = v\ns = S()\ndef work(n, k, v):\n    s.put(v)", "s"),
    ],
)
def test_state_that_only_jobs_use_is_per_slot(tmp_path: Path, text: str, name: str) -> None:
    assert treatments(tmp_path, text) == {name: PER_SLOT}


def test_state_of_another_file_is_found_where_it_is_defined(tmp_path: Path) -> None:
    text = (
        "from . import shared\nfrom .shared import rows\ndef work(n, k, v):\n    shared.batch = v\n    rows.append(v)"
    )
    assert treatments(tmp_path, text, shared="batch = None\nrows = []") == {"batch": PER_SLOT, "rows": PER_SLOT}
    assert {(found.name, found.file, found.defined_in) for found in findings(tmp_path)} == {
        ("batch", "__init__.py", "shared.py"),
        ("rows", "__init__.py", "shared.py"),
    }


ROUTE = """
@PromptServer.instance.routes.post("/answer")
async def answer(request):
    waiting[request.id] = True
"""


def test_entries_that_a_route_answers_stay_one(tmp_path: Path) -> None:
    text = "waiting = {}\n" + ROUTE + "\ndef work(node, key, value):\n    waiting[key] = value\n    waiting.pop(key)"
    assert treatments(tmp_path, text) == {"waiting": SHARED}


ASKS = """
class Asks:
    @classmethod
    def INPUT_TYPES(cls):
        return {"hidden": {"id": "HIDDEN"}}
    def run(self, id):
        CHANGE
"""


def asks(change: str, hidden: str = "PROMPT") -> str:
    return ASKS.replace("HIDDEN", hidden).replace("CHANGE", change.replace("\n", "\n        "))


def test_a_value_that_a_route_reads_and_jobs_replace_is_one_job_s_at_a_time(tmp_path: Path) -> None:
    text = ROUTE + asks("global waiting\nwaiting = id")
    assert treatments(tmp_path, text) == {"waiting": IN_TURN}
    assert findings(tmp_path)[0].classes == {"Asks"}


def test_such_a_value_that_no_node_s_code_uses_lets_the_jobs_run_alone(tmp_path: Path) -> None:
    """Whoever calls that function may do so in any job."""
    hooked = "\ndef hook(x):\n    return waiting\nimport nodes\nnodes.hooked = hook"
    text = ROUTE + asks("global waiting\nwaiting = id") + hooked
    assert treatments(tmp_path, text) == {"waiting": ALONE}


def test_answers_by_a_node_s_number_are_one_job_s_at_a_time(tmp_path: Path) -> None:
    """Two jobs of one workflow have the same numbers."""
    text = "waiting = {}\n" + ROUTE + asks("return waiting.pop(id)", "UNIQUE_ID")
    assert treatments(tmp_path, text) == {"waiting": IN_TURN}
    text = "waiting = {}\n" + ROUTE + asks("return waiting.pop(id)")
    assert treatments(tmp_path, text) == {"waiting": SHARED}


def test_what_jobs_and_the_server_note_by_the_same_function_is_no_answer(tmp_path: Path) -> None:
    note = "def note(text):\n    seen[text] = True\n"
    text = "seen = {}\n" + note + ROUTE.replace("waiting[request.id] = True", "note(1)") + asks("note(id)", "UNIQUE_ID")
    assert treatments(tmp_path, text) == {"seen": SHARED}


def test_a_flag_that_a_job_takes_back_is_not_made_once(tmp_path: Path) -> None:
    for take_back in ("if waiting:\n    waiting = False", "if waiting:\n    waiting = False\n    raise ValueError"):
        assert treatments(tmp_path, ROUTE + asks(f"global waiting\n{take_back}")) == {"waiting": IN_TURN}


def test_a_set_that_a_route_uses_entry_by_entry_stays_one(tmp_path: Path) -> None:
    text = "waiting = set()\n" + ROUTE.replace("waiting[request.id] = True", "waiting.discard(request.id)")
    assert treatments(tmp_path, text + "\ndef work(n, k, v):\n    waiting.add(k)") == {"waiting": SHARED}


def test_what_is_made_once_may_be_shared_with_a_route(tmp_path: Path) -> None:
    text = (
        ROUTE
        + "\nwaiting = None\ndef work(n, k, v):\n    global waiting\n    if waiting is None:\n        waiting = {}"
    )
    assert treatments(tmp_path, text) == {"waiting": SHARED}


def test_what_only_the_import_fills_is_no_finding(tmp_path: Path) -> None:
    text = "names = {}\ndef register(f):\n    names[f.__name__] = f\n    return f\n@register\ndef work(n, k, v): pass"
    assert treatments(tmp_path, text) == {}


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("import io\nstore = io.BytesIO()", "store.write(v)"),
        ("import torch\nstore = torch.nn.Linear(1, 1)", "store.weight.fill_(v)"),
        ("import library\nstore = library.Model()", "store.set_scale(v)"),
        ("def numbers():\n    while True:\n        yield 1\nstore = numbers()", "next(store)"),
        ("store = {}\ndef make(where):\n    return lambda: where\nget = make(store)", "store[k] = get()"),
    ],
)
def test_what_cannot_be_copied_is_one_job_s_at_a_time(tmp_path: Path, text: str, change: str) -> None:
    assert treatments(tmp_path, f"{text}\ndef work(n, k, v):\n    {change}")["store"] == IN_TURN


@pytest.mark.parametrize("made", ["State.create()", "make()"])
def test_an_object_that_a_function_of_the_pack_made_is_per_slot(tmp_path: Path, made: str) -> None:
    text = """
        class State:
            @classmethod
            def create(cls):
                return cls()
            def set_value(self, value):
                self.value = value
        def make():
            return State()
        state = MADE
        def work(n, k, v):
            state.set_value(v)
        """.replace("MADE", made)
    assert treatments(tmp_path, text) == {"state": PER_SLOT}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("n.context.rand.seed(v)", {"n.context.rand.seed": IN_TURN}),
        ("Draws().draw(v)", {"self.library.seed": IN_TURN}),
        ("own = random.Random()\n    own.seed(v)", {}),
        ("random.seed(v)", {}),
        ("torch.Generator().manual_seed(v)", {}),
    ],
)
def test_seeding_a_generator_that_may_be_a_library_s(tmp_path: Path, change: str, found: dict[str, str]) -> None:
    draws = """
        import random, torch
        class Draws:
            def __init__(self):
                self.own = random.Random()
                self.library = find_it()
            def draw(self, v):
                self.own.seed(v)
                self.library.seed(v)
        """
    told = treatments(tmp_path, f"{textwrap.dedent(draws)}\ndef work(n, k, v):\n    {change}")
    assert {name: treatment for name, treatment in told.items() if treatment == IN_TURN} == found


def test_an_attribute_of_a_function_is_one_job_s_at_a_time(tmp_path: Path) -> None:
    text = "def keep(): pass\ndef work(n, k, v):\n    keep.last = v"
    assert treatments(tmp_path, text) == {"keep.last": IN_TURN}


@pytest.mark.parametrize(
    "change",
    [
        "buffer.fill_(v)",
        "buffer[0] = v",
        "torch.add(v, v, out=buffer)",
        "np.copyto(buffer, v)",
        "random.shuffle(buffer)",
    ],
)
def test_an_array_that_is_changed_in_place_is_per_slot(tmp_path: Path, change: str) -> None:
    text = f"import random, torch\nimport numpy as np\nbuffer = torch.zeros(4)\ndef work(n, k, v):\n    {change}"
    assert treatments(tmp_path, text) == {"buffer": PER_SLOT}


@pytest.mark.parametrize(
    "use",
    [
        "names = list(table)\n    names.append(v)",
        "row = [table, v]\n    row.append(k)",
        "torch.add_one_(v, k)",
        "for name in table:\n        print(name)",
        "logger.setLevel(v)",
        "next(numbers)",
    ],
)
def test_what_is_only_read_is_no_finding(tmp_path: Path, use: str) -> None:
    made = "import itertools, logging, torch\nlogger = logging.getLogger()\nnumbers = itertools.count()\n"
    assert treatments(tmp_path, f"{made}table = {{1: 2}}\ndef work(n, k, v):\n    {use}") == {}


def test_a_table_that_the_server_reads_as_well_and_jobs_pass_on_is_no_finding(tmp_path: Path) -> None:
    text = "table = {1: 2}\nclass Offers(Node):\n    @classmethod\n    def INPUT_TYPES(cls):\n        return table\n"
    assert treatments(tmp_path, text + "def show(x): pass\ndef work(n, k, v):\n    show(table)") == {}


def test_names_of_the_function_itself_are_no_finding(tmp_path: Path) -> None:
    text = "store = {1: 2}\ndef work(node, key, value):\n    store = {}\n    store[key] = [store for store in value]"
    assert treatments(tmp_path, text) == {}


def test_a_list_s_method_is_not_that_of_a_node_which_is_called_so(tmp_path: Path) -> None:
    text = NODE.replace("class Node", "class Appends").replace("def run", "def append").replace("work(", "flip(")
    text += "\ndef flip(n, k, v):\n    torch.backends.flag = v\ndef work(n, k, v):\n    made = []\n    made.append(v)\n"
    (tmp_path / "__init__.py").write_text("import torch\n" + NODE + text)
    (found,) = findings(tmp_path)
    assert (found.treatment, found.classes) == (ALONE, {"Appends"})


def test_locks_and_queues_stay_one(tmp_path: Path) -> None:
    text = "import queue\nq = queue.Queue()\ndef work(node, key, value):\n    q.put_nowait(value)"
    assert treatments(tmp_path, text) == {}


@pytest.mark.parametrize(
    ("imports", "change", "name", "treatment"),
    [
        ("import comfy.sample", "comfy.sample.prepare_noise = v", "comfy.sample.prepare_noise", PER_SLOT),
        ("from comfy import sample as s", "s.prepare_noise = v", "comfy.sample.prepare_noise", PER_SLOT),
        ("from comfy.cli_args import args", "args.fast = v", "comfy.cli_args.args.fast", PER_SLOT),
        ("import torch", "torch.nn.GroupNorm.forward = v", "torch.nn.GroupNorm.forward", PER_SLOT),
        ("import comfy.sd", "setattr(comfy.sd, 'load', v)", "comfy.sd.load", PER_SLOT),
        ("import torch", "torch.backends.cudnn.benchmark = v", "torch.backends.cudnn.benchmark", ALONE),
        ("import torch", "torch.set_default_dtype(v)", "torch.set_default_dtype", ALONE),
        ("import nodes", "nodes.NODES[k] = v", "nodes.NODES", ALONE),
        ("import comfy.sd", "comfy.sd.load.__code__ = v", "comfy.sd.load.__code__", ALONE),
        ("import os", "os.environ[k] = v", "os.environ", ALONE),
        ("import os", "os.environ['A'] = '1'", "os.environ", SHARED),
        ("import os", "if k not in os.environ:\n        os.environ[k] = v", "os.environ", SHARED),
        ("import sys", "sys.modules[k] = v", "sys.modules", ALONE),
        ("import builtins", "builtins.open = v", "builtins.open", ALONE),
        ("import random", "random.random = v", "random.random", PER_SLOT),
        ("import sys", "sys.stdout = v", "sys.stdout", PER_SLOT),
        ("import folder_paths", "folder_paths.set_output_directory(v)", "folder_paths.set_output_directory", ALONE),
        ("from server import PromptServer as P", "P.instance.mine = v", "server.PromptServer.instance.mine", IN_TURN),
        ("from server import PromptServer as P", "P.instance.mine = 1", "server.PromptServer.instance.mine", SHARED),
    ],
)
def test_changes_of_the_host(tmp_path: Path, imports: str, change: str, name: str, treatment: str) -> None:
    assert treatments(tmp_path, f"{imports}\ndef work(n, k, v):\n    {change}") == {name: treatment}


def test_what_is_written_at_import_is_no_finding(tmp_path: Path) -> None:
    assert treatments(tmp_path, "import comfy.sample\ncomfy.sample.x = 1\ndef work(n, k, v): pass") == {}


def test_a_device_chosen_at_import(tmp_path: Path) -> None:
    text = "import comfy.model_management as mm\ndevice = mm.get_torch_device()\ndef work(n, k, v): pass"
    assert treatments(tmp_path, text) == {"device": PER_SLOT}


def test_a_finding_names_the_node_classes_that_get_there(tmp_path: Path) -> None:
    treatments(tmp_path, "store = {}\ndef work(node, key, value):\n    store[key] = value")
    assert [(found.line, found.classes) for found in findings(tmp_path)] == [(11, frozenset({"Node"}))]


def test_one_file_is_a_pack_too(tmp_path: Path) -> None:
    treatments(tmp_path, "store = {}\ndef work(node, key, value):\n    store[key] = value")
    assert [found.file for found in findings(tmp_path / "__init__.py")] == ["__init__.py"]


def test_a_file_that_is_no_python_is_left_out(tmp_path: Path) -> None:
    text = "store = {}\ndef work(node, key, value):\n    store[key] = value"
    assert treatments(tmp_path, text, broken="def (") == {"store": PER_SLOT}
