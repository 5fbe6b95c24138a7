"""What nodes say of themselves: everything is translated, and nothing that is not said."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "comfy_parallel"
CHINESE = json.loads((PACKAGE / "ui" / "dashboard" / "nodes.zh.json").read_text(encoding="utf-8"))
NAMES = re.compile(r"DESCRIPTION|tooltip|tip|_\w*TIP|_ON_A_DEVICE|_SPREAD")
TRANSLATED = 0.9  # What is new may come in English first; ComfyUI's page then shows that.


def said(tree: ast.AST) -> Iterator[str]:
    """Each text that a file of nodes gives one of these names, or has under one in a dictionary."""
    for part in ast.walk(tree):
        pairs: list[tuple[object, ast.AST | None]] = []
        if isinstance(part, ast.Dict):
            pairs = [(getattr(key, "value", None), value) for key, value in zip(part.keys, part.values, strict=True)]
        elif isinstance(part, ast.Assign):
            pairs = [(getattr(target, "id", None), part.value) for target in part.targets]
        for name, value in pairs:
            is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
            if is_text and isinstance(name, str) and NAMES.fullmatch(name):
                yield value.value  # type: ignore[union-attr]


def test_tooltips_and_descriptions_are_in_chinese_too() -> None:
    english = {
        text
        for path in (PACKAGE / "nodes").rglob("*.py")
        for text in said(ast.parse(path.read_text(encoding="utf-8")))
        if text
    }
    assert len(english) > 25
    missing = sorted(english - CHINESE.keys())
    assert len(missing) <= (1 - TRANSLATED) * len(english), f"add these to nodes.zh.json: {missing}"
    assert [text for text in CHINESE.values() if not re.search("[\u4e00-\u9fff]", text)] == []


def test_no_sentence_is_a_part_of_another_which_would_be_translated_in_pieces() -> None:
    assert [(one, other) for one in CHINESE for other in CHINESE if one != other and one in other] == []
