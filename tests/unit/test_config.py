"""The configuration: every variable, and errors that name the variable, its value and the fix."""

from __future__ import annotations

import dataclasses

import pytest

from comfy_parallel.config import Config, PackModes, known_variables, misspelt
from comfy_parallel.errors import ConfigError

ON = {"COMFY_MULTI_GPU_SCHED": "1"}
PACKS = (("my pack", "alone"), ("b", "trust"))


def read(**variables: str) -> Config:
    return Config.from_env({**ON, **variables})


@pytest.mark.parametrize("value", [None, "", "0", " 0 "])
def test_off_by_default_and_then_nothing_else_is_read(value: str | None) -> None:
    env = {} if value is None else {"COMFY_MULTI_GPU_SCHED": value}
    assert Config.from_env({**env, "COMFY_NUM_GPUS": "nonsense"}) == Config(enabled=False)


def test_on_alone_leaves_every_choice_to_the_machine() -> None:
    assert Config.from_env(ON) == Config(
        enabled=True, num_gpus=None, devices=None, slots_per_gpu=1, default_slot=None, strict=False, weights=None
    )


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("COMFY_MULTI_GPU_SCHED", " 1 ", "enabled", True),
        ("COMFY_PARALLEL_MAX_NODES", "", "max_nodes", None),
        ("COMFY_PARALLEL_MAX_NODES", "50000", "max_nodes", 50_000),
        ("COMFY_NUM_GPUS", "4", "num_gpus", 4),
        ("COMFY_NUM_GPUS", " 16 ", "num_gpus", 16),
        ("COMFY_NUM_GPUS", "", "num_gpus", None),
        ("COMFY_PARALLEL_DEVICES", "cuda:0,cuda:2", "devices", ("cuda:0", "cuda:2")),
        ("COMFY_PARALLEL_DEVICES", " cpu , cpu ", "devices", ("cpu", "cpu")),
        ("COMFY_PARALLEL_DEVICES", "xpu:0", "devices", ("xpu:0",)),
        ("COMFY_PARALLEL_DEVICES", "mps", "devices", ("mps",)),
        ("COMFY_PARALLEL_DEVICES", "cuda:10", "devices", ("cuda:10",)),
        ("COMFY_PARALLEL_DEVICES", " ", "devices", None),
        ("COMFY_PARALLEL_SLOTS_PER_GPU", "2", "slots_per_gpu", 2),
        ("COMFY_PARALLEL_SLOTS_PER_GPU", "", "slots_per_gpu", 1),
        ("COMFY_PARALLEL_DEFAULT_GPU", "0", "default_slot", 0),
        ("COMFY_PARALLEL_DEFAULT_GPU", "3", "default_slot", 3),
        ("COMFY_PARALLEL_DEFAULT_GPU", "auto", "default_slot", None),
        ("COMFY_PARALLEL_DEFAULT_GPU", "", "default_slot", None),
        ("COMFY_PARALLEL_STRICT", "1", "strict", True),
        ("COMFY_PARALLEL_STRICT", "0", "strict", False),
        ("COMFY_PARALLEL_WEIGHTS", "map", "weights", "map"),
        ("COMFY_PARALLEL_WEIGHTS", " copy ", "weights", "copy"),
        ("COMFY_PARALLEL_WEIGHTS", "off", "weights", "off"),
        ("COMFY_PARALLEL_WEIGHTS", " ", "weights", None),
        ("COMFY_PARALLEL_RAM_GB", "64", "ram_gb", 64.0),
        ("COMFY_PARALLEL_RAM_GB", " 12.5 ", "ram_gb", 12.5),
        ("COMFY_PARALLEL_RAM_GB", "0.001", "ram_gb", 0.001),
        ("COMFY_PARALLEL_RAM_GB", "", "ram_gb", None),
        ("COMFY_PARALLEL_DRAIN_S", "", "drain_s", 0.0),
        ("COMFY_PARALLEL_DRAIN_S", "0", "drain_s", 0.0),
        ("COMFY_PARALLEL_DRAIN_S", " 2.5 ", "drain_s", 2.5),
        ("COMFY_PARALLEL_DRAIN_S", "3600", "drain_s", 3600.0),
        ("COMFY_PARALLEL_PACKS", "", "packs", PackModes("auto")),
        ("COMFY_PARALLEL_PACKS", "trust", "packs", PackModes("trust")),
        ("COMFY_PARALLEL_PACKS", " auto , My Pack = alone,b=trust", "packs", PackModes("auto", PACKS)),
        ("COMFY_PARALLEL_PACKS", "my pack=alone,B=trust", "packs", PackModes("auto", PACKS)),
    ],
)
def test_good_values(name: str, value: str, field: str, expected: object) -> None:
    assert getattr(read(**{name: value}), field) == expected


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("COMFY_MULTI_GPU_SCHED", "true", "1 (on) or 0 (off)"),
        ("COMFY_MULTI_GPU_SCHED", "2", "1 (on) or 0 (off)"),
        ("COMFY_PARALLEL_MAX_NODES", "0", "from 1 to 9999999"),
        ("COMFY_PARALLEL_MAX_NODES", "off", "leave it unset"),
        ("COMFY_NUM_GPUS", "0", "from 1 to 999"),
        ("COMFY_NUM_GPUS", "-1", "from 1 to 999"),
        ("COMFY_NUM_GPUS", "1.5", "from 1 to 999"),
        ("COMFY_NUM_GPUS", "1000", "from 1 to 999"),
        ("COMFY_NUM_GPUS", "all", "leave it unset"),
        ("COMFY_NUM_GPUS", "٤", "from 1 to 999"),
        ("COMFY_NUM_GPUS", "²", "from 1 to 999"),
        ("COMFY_PARALLEL_DEVICES", "0,1", "cuda:0,cuda:1"),
        ("COMFY_PARALLEL_DEVICES", "cuda", "cuda:0,cuda:1"),
        ("COMFY_PARALLEL_DEVICES", "cuda:", "cuda:0,cuda:1"),
        ("COMFY_PARALLEL_DEVICES", "cuda:-1", "cuda:0,cuda:1"),
        ("COMFY_PARALLEL_DEVICES", "cuda:0,", "cuda:0,cuda:1"),
        ("COMFY_PARALLEL_DEVICES", "cuda:00", "cuda:0,cuda:1"),
        ("COMFY_PARALLEL_DEVICES", "cuda:٠", "cuda:0,cuda:1"),
        ("COMFY_PARALLEL_DEVICES", "CPU", "cpu,cpu"),
        ("COMFY_PARALLEL_DEVICES", "cpu:0", "cpu,cpu"),
        ("COMFY_PARALLEL_DEVICES", "cpu,cuda:0", "one kind"),
        ("COMFY_PARALLEL_SLOTS_PER_GPU", "0", "from 1 to 999"),
        ("COMFY_PARALLEL_SLOTS_PER_GPU", "two", "from 1 to 999"),
        ("COMFY_PARALLEL_DEFAULT_GPU", "-1", "auto"),
        ("COMFY_PARALLEL_DEFAULT_GPU", "AUTO", "auto"),
        ("COMFY_PARALLEL_DEFAULT_GPU", "1,2", "counted from 0"),
        ("COMFY_PARALLEL_DEFAULT_GPU", "٣", "auto"),
        ("COMFY_PARALLEL_STRICT", "yes", "1 (on) or 0 (off)"),
        ("COMFY_PARALLEL_WEIGHTS", "mmap", "map, copy or off"),
        ("COMFY_PARALLEL_WEIGHTS", "Copy", "map, copy or off"),
        ("COMFY_PARALLEL_WEIGHTS", "1", "map, copy or off"),
        ("COMFY_PARALLEL_PACKS", "off", "write auto, trust or alone"),
        ("COMFY_PARALLEL_PACKS", "Auto", "write auto, trust or alone"),
        ("COMFY_PARALLEL_PACKS", "auto,my_nodes", "my_nodes=trust"),
        ("COMFY_PARALLEL_PACKS", "auto,=alone", "the name of their folder"),
        ("COMFY_PARALLEL_PACKS", "auto,a=1", "'a=1' is no choice"),
        ("COMFY_PARALLEL_PACKS", "auto,trust", "leave one of them"),
        ("COMFY_PARALLEL_PACKS", "a=alone,A=trust", "leave one of them"),
        ("COMFY_PARALLEL_DRAIN_S", "-1", "a number of seconds like 60 or 2.5"),
        ("COMFY_PARALLEL_DRAIN_S", "60s", "a number of seconds"),
        ("COMFY_PARALLEL_DRAIN_S", "inf", "or to 0"),
        ("COMFY_PARALLEL_DRAIN_S", "٦", "a number of seconds"),
        ("COMFY_PARALLEL_RAM_GB", "0", "a number of GiB like 64 or 12.5"),
        ("COMFY_PARALLEL_RAM_GB", "0.0", "leave it unset"),
        ("COMFY_PARALLEL_RAM_GB", "-1", "a number of GiB"),
        ("COMFY_PARALLEL_RAM_GB", "64GB", "a number of GiB"),
        ("COMFY_PARALLEL_RAM_GB", "half", "a number of GiB"),
        ("COMFY_PARALLEL_RAM_GB", "inf", "a number of GiB"),
        ("COMFY_PARALLEL_RAM_GB", "1e3", "a number of GiB"),
        ("COMFY_PARALLEL_RAM_GB", "1.2345", "a number of GiB"),
        ("COMFY_PARALLEL_RAM_GB", ".5", "a number of GiB"),
        ("COMFY_PARALLEL_RAM_GB", "٦٤", "a number of GiB"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_the_value_and_the_fix(name: str, value: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(**{name: value})
    message = str(refusal.value)
    assert message.startswith(f"{name}={value!r}: ")
    assert fix in message


def test_it_cannot_be_changed() -> None:
    config = read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strict = True  # type: ignore[misc]


# Misspelt variables.


def test_every_variable_is_known() -> None:
    assert known_variables() >= {
        "COMFY_MULTI_GPU_SCHED",
        "COMFY_NUM_GPUS",
        "COMFY_PARALLEL_DEVICES",
        "COMFY_PARALLEL_WEIGHTS",
        "COMFY_PARALLEL_PACKS",
    }
    assert misspelt(dict.fromkeys(known_variables(), "1")) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("COMFY_PARALLEL_WEIGHT", "COMFY_PARALLEL_WEIGHTS"),
        ("COMFY_PARALLEL_STRIKT", "COMFY_PARALLEL_STRICT"),
        ("COMFY_PARALLEL_SLOTS", "COMFY_PARALLEL_SLOTS_PER_GPU"),
        ("COMFY_PARALLEL_DEVICE", "COMFY_PARALLEL_DEVICES"),
        ("COMFY_PARALLEL_RAM", "COMFY_PARALLEL_RAM_GB"),
        ("COMFY_PARALEL_GRAPHS", "COMFY_PARALLEL_GRAPHS"),
        ("COMFYUI_PARALLEL_DEVICES", "COMFY_PARALLEL_DEVICES"),
        ("comfy_parallel_devices", "COMFY_PARALLEL_DEVICES"),
        ("COMFY_NUM_GPU", "COMFY_NUM_GPUS"),
        ("COMFY_NUMGPUS", "COMFY_NUM_GPUS"),
        ("COMFY_NUM_GPUs", "COMFY_NUM_GPUS"),
        ("COMFYUI_NUM_GPUS", "COMFY_NUM_GPUS"),
        ("COMFY_MULTIGPU_SCHED", "COMFY_MULTI_GPU_SCHED"),
        ("COMFY_MULTI_GPU", "COMFY_MULTI_GPU_SCHED"),
        ("COMFY_MULTI_GPU_SCHEDULER", "COMFY_MULTI_GPU_SCHED"),
        ("COMFYUI_MULTI_GPU_SCHED", "COMFY_MULTI_GPU_SCHED"),
    ],
)
@pytest.mark.parametrize("others", [{}, ON])
def test_a_misspelt_variable_is_named_with_the_nearest(name: str, meant: str, others: dict[str, str]) -> None:
    expected = [f"{name} is no variable of comfy_parallel and has no effect; did you mean {meant}?"]
    assert misspelt({**others, name: "1"}) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("COMFYUI_PATH", "COMFYUI_DIR", "COMFYUI_PYTHON", "COMFYUI_ARGS", "COMFYUI_PORT", "COMFY_CLI_ARGS"),
        *("COMFY_ORG_API_KEY", "COMFY_PARALLEL_CACHE", "CUDA_VISIBLE_DEVICES", "NUM_GPUS", "COMPUTERNAME", "PATH"),
    ],
)
def test_what_others_use_is_left_alone(name: str) -> None:
    assert misspelt({**ON, name: "1"}) == []


def test_switched_off_nothing_is_said() -> None:
    assert misspelt({"COMFY_MULTI_GPU_SCHED": "0", "COMFY_NUM_GPU": "1"}) == []


@pytest.mark.parametrize(
    ("env", "devices", "kinds"),
    [
        ({"COMFY_PARALLEL_DEVICES": "cpu,cpu=process"}, ("cpu", "cpu"), ("thread", "process")),
        ({"COMFY_PARALLEL_DEVICES": "cpu=thread, cpu", "COMFY_PARALLEL_WORKERS": "processes"}, ("cpu", "cpu"),
         ("thread", "process")),
        ({"COMFY_PARALLEL_DEVICES": "cuda:1=process", "COMFY_PARALLEL_SLOTS_PER_GPU": "2"}, ("cuda:1",),
         ("process", "process")),
        ({"COMFY_PARALLEL_WORKERS": "threads"}, None, ("thread", "thread")),
        ({"COMFY_PARALLEL_WORKERS": "processes", "COMFY_PARALLEL_SLOTS_PER_GPU": "2"}, None, ("process", "process")),
    ],
)  # fmt: skip
def test_slots_may_have_processes_of_their_own(
    env: dict[str, str], devices: tuple[str, ...] | None, kinds: tuple[str, ...]
) -> None:
    config = Config.from_env({"COMFY_MULTI_GPU_SCHED": "1", **env})
    assert config.devices == devices
    assert config.slot_kinds(len(kinds)) == kinds
    assert not config.shares_gpus


@pytest.mark.parametrize(
    "env",
    [
        {"COMFY_PARALLEL_DEVICES": "cpu=fork"},
        {"COMFY_PARALLEL_DEVICES": "cpu="},
        {"COMFY_PARALLEL_WORKERS": "process"},
        {"COMFY_PARALLEL_WORKER_LOST": "retry"},
        {"COMFY_PARALLEL_WORKER_SILENT_S": "soon"},
    ],
)
def test_a_wrong_choice_of_processes_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(env))):
        Config.from_env({"COMFY_MULTI_GPU_SCHED": "1", **env})
