"""How what a client sent is shown in logs and replies: never longer than a line or two, however long it is."""

from __future__ import annotations

from typing import Any

MOST = 60


def shown(value: Any, most: int = MOST) -> str:
    """`repr(value)`, cut to about `most` characters. Long strings are cut before they are copied."""
    if isinstance(value, str | bytes) and len(value) > most:
        return repr(value[: most - 3]) + "..."
    return clipped(repr(value), most)


def clipped(text: str, most: int) -> str:
    """`text`, or its first part and how many characters were left out."""
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text) - most} more characters)"


def clipped_in_the_middle(text: str, most: int) -> str:
    """Both ends of `text`, and how many characters were left out between them."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}... ({len(text) - 2 * half} more characters) ...{text[-half:]}"
