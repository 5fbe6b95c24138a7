"""A device that a node chooses holds for its call and its thread only."""

from __future__ import annotations

import threading

import pytest
import torch

from comfy_parallel.slots.choice import instead_of, loading_on


def host_device() -> torch.device:
    return torch.device("cuda:0")


choose = instead_of(host_device)


def test_the_choice_holds_for_the_call() -> None:
    with loading_on("cpu"):
        assert choose() == torch.device("cpu")
    assert choose() == torch.device("cuda:0")


def test_no_choice_leaves_it_to_the_host() -> None:
    with loading_on("cpu"), loading_on(None):
        assert choose() == torch.device("cuda:0")


def test_an_error_ends_the_choice() -> None:
    with pytest.raises(KeyError), loading_on("cpu"):
        raise KeyError
    assert choose() == torch.device("cuda:0")


def test_threads_do_not_see_each_others_choice() -> None:
    seen = {}
    both = threading.Barrier(2, timeout=60)

    def load(device: str) -> None:
        with loading_on(device):
            both.wait()
            seen[device] = str(choose())
            both.wait()

    threads = [threading.Thread(target=load, args=(device,)) for device in ("cuda:1", "cuda:2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"cuda:1": "cuda:1", "cuda:2": "cuda:2"}
