"""Errors whose own code fails when somebody asks them what they say."""

from __future__ import annotations

from typing import Any


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Unshowable(Exception):
    def __str__(self) -> str:
        raise Unshowable

    __repr__ = __str__


class Leaving(BaseException):
    """Its text ends the thread that asks for it, and it lets nobody write to it."""

    def __str__(self) -> str:
        raise SystemExit("asked for its text")

    __repr__ = __str__

    def __setattr__(self, name: str, value: Any) -> None:
        raise Leaving


KINDS = {kind.__name__: kind for kind in (Unspeakable, Unshowable, Leaving)}


class CPTUnprintable:
    """Fails with an error of one of these kinds."""

    CATEGORY = "comfy_parallel tests"
    FUNCTION = "fail"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(KINDS),)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    def fail(self, kind: str) -> tuple[int]:
        raise KINDS[kind]


NODES = {CPTUnprintable.__name__: CPTUnprintable}
