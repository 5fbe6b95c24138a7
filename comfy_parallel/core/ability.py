"""Which jobs another ComfyUI can run, by what it answers to `GET /object_info`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

WEIGHT_FILE = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".gguf")

_COMBO = "COMBO"
_PARTS = ("required", "optional")
_MOST = 200  # characters of a value in a reason

Choices = Mapping[str, frozenset[str]]


class Ability:
    """The node classes that it has, and what their inputs offer where they offer a choice."""

    def __init__(self, object_info: Any) -> None:
        known = object_info.items() if isinstance(object_info, dict) else ()
        self._choices: dict[str, Choices] = {name: dict(_choices(info)) for name, info in known}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ability) and self._choices == other._choices

    __hash__ = None  # type: ignore[assignment]

    def why_not(self, prompt: Any, is_excused: Callable[[str, str, str], bool]) -> str | None:
        """Why it cannot run this workflow; None when it can, as far as can be told.

        Args:
            is_excused: whether a value need not be among the choices, by its node's class, its input and itself.
        """
        for node in prompt.values() if isinstance(prompt, dict) else ():
            kind = node.get("class_type") if isinstance(node, dict) else None
            if kind not in self._choices:
                return f"no node class {str(kind)[:_MOST]}"
            for name, value in self._missing(kind, node.get("inputs")):
                if not is_excused(kind, name, value):
                    if value.lower().endswith(WEIGHT_FILE):
                        return f"no model {value[:_MOST]}"
                    return f"{kind} does not offer {value[:_MOST]!r} as its {name}"
        return None

    def is_choice(self, kind: str, name: str) -> bool:
        """Whether this input of a node class offers a choice."""
        return name in self._choices.get(kind, ())

    def _missing(self, kind: str, inputs: Any) -> Iterator[tuple[str, str]]:
        """The inputs of a node whose values are not offered."""
        for name, offered in self._choices[kind].items():
            value = inputs.get(name) if isinstance(inputs, dict) else None
            if type(value) is str and value not in offered:
                yield name, value


def _choices(info: Any) -> Iterator[tuple[str, frozenset[str]]]:
    inputs = info.get("input") if isinstance(info, dict) else None
    for part in _PARTS:
        declared = inputs.get(part) if isinstance(inputs, dict) else None
        for name, spec in declared.items() if isinstance(declared, dict) else ():
            offered = _offered(spec)
            if offered is not None and all(type(one) in (str, int, float, bool) for one in offered):
                yield name, frozenset(str(one) for one in offered)


def _offered(spec: Any) -> list[Any] | None:
    """What an input offers, in the older form and in the newer; None when it is no choice, or one made elsewhere."""
    if not isinstance(spec, list) or not spec:
        return None
    if isinstance(spec[0], list):
        return spec[0]
    more = spec[1] if len(spec) > 1 else None
    options = more.get("options") if spec[0] == _COMBO and isinstance(more, dict) else None
    return options if isinstance(options, list) else None
