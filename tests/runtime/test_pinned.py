"""Pinned memory where the system allows it, pageable memory with a warning elsewhere."""

import pytest
import torch

from turbo_nb.errors import TurboNbWarning
from turbo_nb.runtime.pinned import pinned_empty


@pytest.fixture
def refused(monkeypatch):
    empty = torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)


def test_a_refusal_warns_and_gives_pageable_memory(refused):
    with pytest.warns(TurboNbWarning, match=r"cannot be pinned .CUDA error: out of memory.\.") as caught:
        memory = pinned_empty((3, 5), torch.float16)
    assert memory.shape == (3, 5) and memory.dtype == torch.float16 and not memory.is_pinned()
    assert caught[0].filename == __file__


def test_pageable_memory_does_not_ask_the_system(refused, recwarn):
    assert pinned_empty(7, pin=False).shape == (7,) and not recwarn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_pinned_on_a_gpu_machine():
    assert pinned_empty((4, 4)).is_pinned()
