"""Patches by which slots take turns with a model that a node pack has handed to several of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from comfy_parallel.isolation import model_turns
from comfy_parallel.patching.engine import Patch
from comfy_parallel.slots.slot import current_slot

_WHY = "A model that two jobs use at once gives both wrong images, and unloads under one of them."
_NEEDS = ("comfy.model_management:throw_exception_if_processing_interrupted",)
_UNTIL = "the host keeps what a job does to a model with the job"
Check = Callable[[], None]


def _loading(original: Callable[..., Any], raise_if_interrupted: Check) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_models_gpu(models: Any, *args: Any, **kwargs: Any) -> Any:
        if current_slot() is not None:
            models = list(models)
            _take(models, raise_if_interrupted)
        return original(models, *args, **kwargs)

    return load_models_gpu


def _unloading(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def model_unload(self: Any, *args: Any, **kwargs: Any) -> bool:
        model = getattr(self.model, "model", None)
        if current_slot() is None or model is None:
            return original(self, *args, **kwargs)
        return model_turns.unload(model, lambda: original(self, *args, **kwargs))

    return model_unload


def _encoding(original: Callable[..., Any], raise_if_interrupted: Check) -> Callable[..., Any]:
    """The host sets options on a text encoder before it loads it."""

    @functools.wraps(original)
    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        _take([self.patcher], raise_if_interrupted)
        return original(self, *args, **kwargs)

    return encode


def _sampling(original: Callable[..., Any], raise_if_interrupted: Check) -> Callable[..., Any]:
    """The host sets hooks on a patcher before it loads it."""

    @functools.wraps(original)
    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        _take([self.model_patcher], raise_if_interrupted)
        return original(self, *args, **kwargs)

    return sample


def _take(patchers: Iterable[Any], raise_if_interrupted: Check) -> None:
    if current_slot() is None:
        return
    every = [one for patcher in patchers for one in (patcher, *patcher.model_patches_models())]
    models = list(
        {id(model): model for patcher in every if (model := getattr(patcher, "model", None)) is not None}.values()
    )
    model_turns.take(models, raise_if_interrupted)


def _ending_node(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def get_output_data(*args: Any, **kwargs: Any) -> Any:
        is_going_on = False
        try:
            result = await original(*args, **kwargs)
            is_going_on = bool(result[3])  # Tasks of an async node: they have the turn until the job ends.
            return result
        finally:
            model_turns.node_ended(is_going_on=is_going_on)

    return get_output_data


def _ending_job(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            model_turns.job_ended()

    return execute


PATCHES: tuple[Patch, ...] = (
    Patch(
        target="comfy.model_management:load_models_gpu",
        wrap=_loading,
        needs=_NEEDS,
        params=("models",),
        why=_WHY,
        until=_UNTIL,
    ),
    Patch(
        target="comfy.model_management:LoadedModel.model_unload",
        wrap=_unloading,
        params=("self",),
        why="What another slot has by now is not for this one to unload.",
        until=_UNTIL,
    ),
    *(
        Patch(
            target=f"comfy.sd:CLIP.{name}",
            wrap=_encoding,
            needs=_NEEDS,
            params=("self", "tokens"),
            optional=optional,
            why=_WHY,
            until=_UNTIL,
        )
        for name, optional in (
            ("encode_from_tokens", False),
            ("encode_from_tokens_scheduled", False),
            ("generate", True),
        )
    ),
    Patch(
        target="comfy.samplers:CFGGuider.sample",
        wrap=_sampling,
        needs=_NEEDS,
        params=("self", "noise", "latent_image", "sampler", "sigmas"),
        why=_WHY,
        until=_UNTIL,
    ),
    Patch(
        target="execution:get_output_data",
        wrap=_ending_node,
        params=("prompt_id", "unique_id", "obj", "input_data_all"),
        why="A slot's turn with a model ends with the node that uses it.",
        until=_UNTIL,
    ),
    Patch(
        target="execution:PromptExecutor.execute",
        wrap=_ending_job,
        params=("self", "prompt", "prompt_id"),
        why="A slot's turn with a model ends with its job at the latest.",
        until=_UNTIL,
    ),
)
