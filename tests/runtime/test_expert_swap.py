"""Models that share a GPU: onloaded while they work, offloaded afterwards, without a copy back."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from turbo_nb.runtime import expert_swap, packed


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(24, 100), nn.Tanh(), nn.Linear(100, 24, bias=False))
    made[0].int8_weight = nn.Parameter(torch.randint(-9, 9, (7, 5), dtype=torch.int8), requires_grad=False)
    made.register_buffer("table", torch.rand(3, 4).to(torch.complex64), persistent=False)
    made.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))
    made.register_buffer("strided", torch.rand(6, 4).T)
    made.register_buffer("channels_last", torch.rand(3, 4, 2, 2).to(memory_format=torch.channels_last))
    made.register_buffer("expanded", torch.rand(5, 1).expand(5, 4))
    made.register_buffer("none", torch.zeros(0, 3))
    return made.requires_grad_(False)


class Pipeline:
    def __init__(self, count: int):
        self.modules, self.freed = [model(seed) for seed in range(count)], 0

    def maybe_free_model_hooks(self):
        self.freed += 1

    def remove_all_hooks(self):
        from accelerate.hooks import remove_hook_from_module

        for module in self.modules:
            remove_hook_from_module(module)

    @property
    def onloaded(self) -> list[bool]:
        return [module._hf_hook.onloaded for module in self.modules]


@pytest.fixture
def small(monkeypatch):
    """Pieces that hold a few of the tensors"""
    monkeypatch.setattr(packed, "PIECE", 10_000)


X = torch.linspace(-1, 1, 24)


def pointers(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("inference", [False, True])
def test_one_module_is_onloaded_at_a_time(small, inference):
    pipeline, expected = Pipeline(3), [model(seed)(X) for seed in range(3)]
    states = [model(seed).state_dict() for seed in range(3)]
    with torch.inference_mode(inference):
        expert_swap.enable(pipeline, pipeline.modules, "cpu")
        homes = [pointers(module) for module in pipeline.modules]
        for turn in (0, 0, 1, 2, 0):
            assert torch.equal(pipeline.modules[turn](X), expected[turn])
            assert pipeline.onloaded == [turn == index for index in range(3)]
            away = [pointers(module) != home for module, home in zip(pipeline.modules, homes, strict=True)]
            assert away == pipeline.onloaded
        pipeline.maybe_free_model_hooks()
        assert pipeline.onloaded == [False] * 3 and pipeline.freed == 1
        assert [pointers(module) for module in pipeline.modules] == homes
    for module, state in zip(pipeline.modules, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
        assert module.strided.stride() == (1, 4) and module.channels_last.stride() == (16, 1, 8, 4)
        assert len(module._hf_hook._group.places) == len(state)  # with the table, without what is expanded


def test_a_hook_has_the_execution_device_that_diffusers_reads(small):
    pipeline = Pipeline(1)
    expert_swap.enable(pipeline, pipeline.modules, "cpu")
    assert pipeline.modules[0]._hf_hook.execution_device == torch.device("cpu")  # diffusers asks for it
    assert len(pipeline.modules[0]._hf_hook._group.ranges) == 4


def test_the_second_expert_is_prefetched_in_the_firsts_second_step_as_far_as_it_fits(small, monkeypatch):
    pipeline, expected = Pipeline(2), [model(seed)(X) for seed in range(2)]
    expert_swap.enable(pipeline, pipeline.modules, "cpu")
    first, second = pipeline.modules
    copies, room = second._hf_hook._copies, second._hf_hook._group.ranges[0].nbytes + 1
    monkeypatch.setattr(expert_swap, "free_at_peak", lambda device: room)
    first(X)
    assert copies == []  # what the first takes is not known yet
    first(X)
    ahead = copies[:]
    assert len(ahead) == 1 and not second._hf_hook.onloaded
    assert torch.equal(second(X), expected[1]) and pipeline.onloaded == [False, True]
    assert copies[0] is ahead[0] and len(copies) == 4  # the rest came when it was called
    assert torch.equal(first(X), expected[0]) and torch.equal(first(X), expected[0])
    pipeline.maybe_free_model_hooks()
    assert copies == []


def test_weights_that_a_user_changes_or_adds_are_used(small):
    pipeline = Pipeline(2)
    expert_swap.enable(pipeline, pipeline.modules, "cpu")
    module = pipeline.modules[0]
    module(X)
    pipeline.modules[1](X)
    module[2].weight.data = module[2].weight.data * 2  # as a LoRA is fused
    module[0].weight.data += 1
    module.added = nn.Parameter(torch.ones(3))  # as one is added
    plain = model(0)
    plain[2].weight.data *= 2
    plain[0].weight.data += 1
    for _ in range(2):
        assert torch.equal(module(X), plain(X))
        pipeline.modules[1](X)
    assert torch.equal(module[2].weight, plain[2].weight) and module.added.sum() == 3


def test_disable_restores_the_modules(small):
    pipeline = Pipeline(2)
    expert_swap.enable(pipeline, pipeline.modules, "cpu")
    homes = pointers(pipeline.modules[0])
    pipeline.modules[0](X)
    expert_swap.disable(pipeline)
    assert pointers(pipeline.modules[0]) == homes and not hasattr(pipeline.modules[0], "_hf_hook")
    pipeline.maybe_free_model_hooks()
    assert pipeline.freed == 1 and torch.equal(pipeline.modules[0](X), model(0)(X))


def test_memory_that_cannot_be_pinned_warns_once_and_is_pageable(small, monkeypatch):
    empty, asked = torch.empty, []

    def refused(*args, pin_memory=False, **kwargs):
        if pin_memory:
            asked.append(args)
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return empty(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))

    monkeypatch.setattr(torch, "empty", refused)
    pipeline = Pipeline(2)
    with pytest.warns(UserWarning, match="cannot be pinned .CUDA error: out of memory.. Copies") as told:
        expert_swap.enable(pipeline, pipeline.modules, "cuda")
    assert len(asked) == len(told) == 1 and not pipeline.modules[1]._hf_hook.pinned


def test_free_at_peak_is_what_the_run_left_free(monkeypatch):
    told = {"mem_get_info": (30e9, 80e9), "memory_reserved": 40e9, "max_memory_allocated": 36e9}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert expert_swap.free_at_peak(SimpleNamespace(type="cuda")) == 33e9
    assert expert_swap.free_at_peak(torch.device("cpu")) == 0
