"""Which loader nodes load the files that are named."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.errors import BadRequest
from comfy_parallel.http.preload import make_prompt


def files_of(folder: str) -> list[str]:
    return {"diffusion_models": ["a.safetensors", "a=b.safetensors", "x=default"], "vae": ["v.safetensors"]}[folder]


def inputs(name: str) -> Any:
    (node,) = make_prompt([name], files_of).values()
    return node["inputs"]


@pytest.mark.parametrize(
    ("name", "unet_name", "weight_dtype"),
    [
        ("diffusion_models/a.safetensors", "a.safetensors", "default"),
        ("diffusion_models/a.safetensors=fp8_e4m3fn", "a.safetensors", "fp8_e4m3fn"),
        ("diffusion_models/a=b.safetensors", "a=b.safetensors", "default"),
        ("diffusion_models/a=b.safetensors=fp8_e5m2", "a=b.safetensors", "fp8_e5m2"),
    ],
)
def test_a_diffusion_model_is_loaded_as_the_name_says(name: str, unet_name: str, weight_dtype: str) -> None:
    assert inputs(name) == {"unet_name": unet_name, "weight_dtype": weight_dtype}


@pytest.mark.parametrize("name", ["vae/v.safetensors=fp8_e5m2", "diffusion_models/a.safetensors=fp3"])
def test_others_have_no_such_choice(name: str) -> None:
    with pytest.raises(BadRequest):
        make_prompt([name], files_of)
