"""Fused blocks compute what diffusers' blocks compute, take LoRA and come out again."""

import copy
import gc
from collections import Counter

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed, WanTransformerBlock
from helpers import choose_triton, int8_of, interpret_kernels, set_machine
from torch import nn

from turbo_nb import sla
from turbo_nb.fused import transformer as fused_transformer
from turbo_nb.machine.probe import Gpu, Library, Machine


def tiny(dtype=torch.float32, **config) -> WanTransformer3DModel:
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "ffn_dim": 192,
        "num_layers": 2,
        "text_dim": 32,
    } | config
    transformer = WanTransformer3DModel(**config).to(dtype).eval().requires_grad_(False)
    sla.set_attention_type(transformer, "sla", 1.0)
    for block in transformer.blocks:
        nn.init.normal_(block.attn1.processor.sla.proj_l.weight, std=0.1)
    return transformer


def run(transformer):
    generator = torch.Generator().manual_seed(1)
    dtype = transformer.blocks[0].norm2.weight.dtype
    latents = torch.randn(2, 16, 2, 6, 8, generator=generator).to(dtype)
    text = torch.randn(2, 8, 32, generator=generator).to(dtype)
    return transformer(latents, torch.tensor([932.0, 608.0]), text, return_dict=False)[0].float()


@pytest.fixture
def triton_chosen(monkeypatch):
    choose_triton(monkeypatch)


def test_where_no_kernel_runs_nothing_is_fused_and_the_report_says_why():
    transformer = tiny()
    report = fused_transformer.fuse(transformer)
    if not torch.cuda.is_available():
        assert str(report) == "0 of 2 blocks fused; triton: no CUDA GPU"
        assert type(transformer.blocks[0]) is WanTransformerBlock


@pytest.mark.parametrize("device", ["cuda:1", None])
def test_rows_are_quantised_on_the_gpu_that_will_run_them(monkeypatch, device):
    old, new = Gpu("T4", (7, 5)), Gpu("RTX 3090", (8, 6))
    libraries = {"triton": Library(version="3.9")}
    set_machine(monkeypatch, Machine(gpu="T4", gpu_count=2, arch=(7, 5), libraries=libraries, gpus=(old, new)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(fused_transformer, "to_per_row_scales", lambda blocks, where: asked.append(where))
    report = fused_transformer.fuse(tiny(), device)
    if device:
        assert asked == ["cuda:1"] and report.fused == 2
    else:  # the first GPU, which is too old
        assert asked == [] and report.reasons == ("triton: the kernels need sm_80 or newer, and this GPU is sm_75",)


def test_what_the_kernels_do_not_take_runs_as_before(triton_chosen):
    transformer = tiny()
    before, names = run(transformer), list(transformer.state_dict())
    assert str(fused_transformer.fuse(transformer)) == "2 of 2 blocks fused"
    assert torch.equal(run(transformer), before)  # float32
    assert list(transformer.state_dict()) == names


@pytest.mark.parametrize("linears", ["plain", "int8", "lora"])
def test_fused_blocks_compute_the_same(triton_chosen, monkeypatch, linears):
    transformer = tiny(torch.float16)
    if linears == "int8":
        for block in transformer.blocks:
            for parent, name in (
                (block.ffn.net[0], "proj"),
                (block.ffn.net, "2"),
                (block.attn1, "to_q"),
                (block.attn2, "to_k"),
            ):
                setattr(parent, name, int8_of(getattr(parent, name)))
            for name in ("to_k", "to_v"):
                setattr(block.attn1, name, int8_of(getattr(block.attn1, name)))
    elif linears == "lora":
        from peft import LoraConfig

        transformer.add_adapter(LoraConfig(target_modules=["to_q", "proj"], init_lora_weights=False))
    before = run(transformer)
    fused_transformer.fuse(transformer)
    interpret_kernels(monkeypatch)
    with torch.no_grad():
        error = (run(transformer) - before).norm() / before.norm()
        assert 0 < error < 5e-3


def test_the_prompt_is_projected_once_for_all_steps(triton_chosen, monkeypatch):
    transformer = tiny(torch.float16)
    fused_transformer.fuse(transformer)
    interpret_kernels(monkeypatch)
    calls = Counter()
    for name in ("condition_embedder.text_embedder.linear_1", "blocks.0.attn2.to_k", "blocks.1.attn2.to_v"):
        module = transformer.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    text = torch.randn(1, 8, 32).half()

    def step(text):
        return transformer(torch.ones(1, 16, 2, 6, 8).half(), torch.tensor([932.0]), text, return_dict=False)[0]

    with torch.no_grad():
        first = step(text)
        assert torch.equal(step(text), first) and set(calls.values()) == {1}
        text.zero_()  # the same tensor with something else in it
        other = step(text)
        assert not torch.equal(other, first) and set(calls.values()) == {2}
        assert torch.equal(step(text.clone()), other) and set(calls.values()) == {3}
        transformer.blocks[1].attn2.to_v.weight.mul_(2)  # as merging a LoRA does
        assert not torch.equal(step(text), other)
    copied = copy.deepcopy(transformer)
    kept = transformer.blocks[0].attn2.processor.keys
    del text
    gc.collect()
    assert kept._result is None and copied.blocks[0].attn2.processor.keys is not kept


def test_warming_up_runs_a_block_and_the_angles_are_made_once(triton_chosen, monkeypatch):
    transformer = tiny(torch.float16, num_layers=1)
    fused_transformer.warm_up(transformer, (2, 6, 8))  # nothing to do
    fused_transformer.fuse(transformer)
    interpret_kernels(monkeypatch)
    calls = []
    transformer.blocks[0].register_forward_hook(lambda block, arguments, out: calls.append((arguments[0].shape, out)))
    fused_transformer.warm_up(transformer, (2, 6, 8))
    (shape, out), tables = calls[0], transformer.rope.tables[1]
    assert shape == (1, 24, 128) and out.isfinite().all() and tables[0].dtype == torch.float32
    with torch.no_grad():
        run(transformer)  # of the same size
        assert transformer.rope.tables[1] is tables
        assert transformer.rope(torch.empty(1, 16, 4, 6, 8).half())[0].shape == (1, 48, 1, 64)


def test_unfuse_gives_diffusers_blocks_back(triton_chosen):
    transformer = tiny()
    before = run(transformer)
    fused_transformer.fuse(transformer)
    fused_transformer.unfuse(transformer)
    assert type(transformer.blocks[1]) is WanTransformerBlock
    assert type(transformer.blocks[1].attn2.processor) is WanAttnProcessor
    assert type(transformer.condition_embedder.text_embedder) is PixArtAlphaTextProjection
    assert type(transformer.rope) is WanRotaryPosEmbed
    assert torch.equal(run(transformer), before)


def test_blocks_it_does_not_know_stay_and_are_named(triton_chosen):
    transformer = tiny(cross_attn_norm=False)
    transformer.blocks[1] = tiny().blocks[1]
    assert str(fused_transformer.fuse(transformer)) == "1 of 2 blocks fused; cross-attention without a norm"
    assert str(fused_transformer.fuse(transformer)).startswith("1 of 2")  # twice is once


def test_the_padding_of_a_prompt_is_no_coarser_in_8_bits(triton_chosen, monkeypatch):
    """An 8-bit tile that holds prompt and padding makes the padding in it coarse, which then must not stand for all"""
    monkeypatch.setenv("TURBO_NB_LINEAR", "reference")  # because only this keeps the tiles beside fused blocks
    torch.manual_seed(2)
    text = torch.cat([5 * torch.randn(1, 20, 32), torch.zeros(1, 300, 32)], 1)
    latents = torch.randn(1, 16, 2, 6, 8)

    def step(transformer, dtype):
        return transformer(latents.to(dtype), torch.tensor([932.0]), text.to(dtype), return_dict=False)[0].float()

    exact, transformer = step(tiny(num_layers=1), torch.float32), tiny(torch.float16, num_layers=1)
    for block in transformer.blocks:
        for name in ("to_k", "to_v"):
            setattr(block.attn2, name, int8_of(getattr(block.attn2, name)))
    plain = (step(transformer, torch.float16) - exact).norm()
    fused_transformer.fuse(transformer)
    interpret_kernels(monkeypatch)
    assert (step(transformer, torch.float16) - exact).norm() < 1.1 * plain
