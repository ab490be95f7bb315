"""Sparse-linear attention: against upstream's output, a brute-force softmax, and at awkward lengths."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import assert_close, golden
from torch.multiprocessing.reductions import StorageWeakRef

from turbo_nb.errors import InputError
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.sla import SLAProcessor, SparseLinearAttention, attention_type, block_map, set_attention_type


def qkv(length, dtype=torch.float32, heads=2, head_dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, length, heads, head_dim, generator=generator).to(dtype) for _ in range(3))


def test_upstreams_map_and_output():
    ops = golden("ops")
    q, k, v = (ops[f"attn_a.{name}"] for name in "qkv")
    layer = SparseLinearAttention(128, float(ops["attn_a.topk"]))
    layer.proj_l.load_state_dict({"weight": ops["attn_a.proj_w"], "bias": ops["attn_a.proj_b"]})
    agree = block_map(q, k, layer.topk, 128, 64) == ops["attn_a.map"].bool()
    assert agree.float().mean() >= 0.99
    assert_close("sla", ops["attn_a.sla"], layer(q, k, v), 4e-3)


@pytest.mark.parametrize("length", [63, 700, 1000, 1536])
@pytest.mark.parametrize("topk", [0.05, 0.3, 1.0])
def test_sparse_part_is_softmax_over_the_kept_keys(length, topk):
    q, k, v = qkv(length)
    kept = block_map(q, k, topk, 128, 64)
    assert (kept.sum(-1) == max(1, int(topk * kept.shape[-1]))).all()
    query, key = torch.arange(length) // 128, torch.arange(length) // 64
    score = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) / 8
    weight = score.masked_fill(~kept[:, :, query][..., key], -torch.inf).softmax(-1)
    expected = torch.einsum("bhlm,bmhd->blhd", weight, v.double())
    assert_close(f"{length} {topk}", expected, attention_reference.sparse_attention(q, k, v, kept, 128, 64), 1e-5)


@pytest.mark.parametrize("length", [63, 700, 1000])
def test_linear_part_is_the_formula(length):
    q, k, v = (x.double() for x in qkv(length))
    weight = torch.einsum("blhd,bmhd->bhlm", q.softmax(-1), k.softmax(-1))
    expected = torch.einsum("bhlm,bmhd->blhd", weight / (1e-5 + weight.sum(-1, keepdim=True)), v)
    assert_close(str(length), expected, attention_reference.linear_attention(q.float(), k.float(), v.float()), 1e-4)


@pytest.mark.parametrize("length", [63, 700, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_the_layer_is_sparse_plus_projected_linear(length, dtype, bound):
    q, k, v = qkv(length, dtype)
    layer = SparseLinearAttention(64, topk=0.3)
    torch.nn.init.normal_(layer.proj_l.weight, std=0.1)
    kept = block_map(q, k, 0.3, 128, 64)
    q64, k64, v64 = q.double(), k.double(), v.double()
    linear = attention_reference.linear_attention(q64, k64, v64) @ layer.proj_l.weight.double().T
    expected = attention_reference.sparse_attention(q64, k64, v64, kept, 128, 64) + linear
    out = layer(q, k, v)
    assert out.dtype == dtype
    assert_close(f"{length} {dtype}", expected, out, bound)


@pytest.mark.parametrize("length", [63, 700, 1000])
def test_map_keeps_the_best_scored_blocks(length):
    q, k, _ = qkv(length)
    pooled_q, pooled_k = (
        torch.stack([part.double().mean(1) for part in x.split(block, dim=1)], dim=2)
        for x, block in ((q, 128), (k, 64))
    )
    score = pooled_q @ pooled_k.transpose(-1, -2)  # k's mean shifts a whole row alike: the choice is the same
    kept = block_map(q, k, 0.3, 128, 64)
    worst_kept = score.masked_fill(~kept, torch.inf).amin(-1)
    best_passed_over = score.masked_fill(kept, -torch.inf).amax(-1)
    assert (worst_kept >= best_passed_over - 1e-6).all()


@pytest.mark.parametrize("topk", [1.0, 2.0])
def test_from_topk_1_on_every_block_is_kept(topk):
    q, k, v = qkv(700)
    kept = block_map(q, k, topk, 128, 64)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert kept.all()
    assert_close("dense", dense, attention_reference.sparse_attention(q, k, v, kept, 128, 64), 1e-6)


@pytest.mark.parametrize("length", [63, 700])
def test_block_means_count_a_ragged_block_by_its_own_tokens(length):
    q, _, _ = qkv(length)
    expected = torch.stack([part.mean(1) for part in q.split(64, dim=1)], dim=2)
    assert_close(str(length), expected, attention_reference.block_means(q, 64), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 100])
def test_a_clip_too_short_for_one_block_is_finite(length, dtype):
    q, k, v = qkv(length, dtype)
    out = SparseLinearAttention(64, topk=0.1)(q, k, v)
    assert out.dtype == dtype and out.shape == q.shape and out.isfinite().all()


def test_slabs_give_the_same(monkeypatch):
    q, k, v = qkv(1000)
    kept = block_map(q, k, 0.3, 128, 64)
    whole = attention_reference.sparse_attention(q, k, v, kept, 128, 64)
    monkeypatch.setitem(attention_reference.MASK_ELEMENTS, "cpu", 1)
    assert_close("slabs", whole, attention_reference.sparse_attention(q, k, v, kept, 128, 64), 1e-6)


def test_everything_trains():
    layer = SparseLinearAttention(64, topk=0.3)
    q, k, v = (x.requires_grad_() for x in qkv(300))
    layer(q, k, v).square().sum().backward()
    for name, tensor in {"q": q, "k": k, "v": v, "proj_l": layer.proj_l.weight}.items():
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize("topk", [0, -0.1, 1.5])
def test_topk_is_checked(topk):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        SparseLinearAttention(64, topk)


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=32, ffn_dim=128,
        num_layers=2,
    ).eval()  # fmt: skip


def forward(model):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 3, 16, 16, generator=generator), torch.randn(1, 20, 32, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([988.0]), text, return_dict=False)[0]


def test_in_a_transformer_all_blocks_kept_is_dense_attention(transformer):
    dense = forward(transformer)
    set_attention_type(transformer, "sla", topk=1.0)
    assert attention_type(transformer) == "sla"
    assert_close("topk 1", dense, forward(transformer), 1e-6)
    set_attention_type(transformer, "sla", topk=0.2)
    assert (forward(transformer) - dense).abs().max() > 1e-4
    set_attention_type(transformer, "original")
    assert attention_type(transformer) == "original"
    assert_close("back", dense, forward(transformer), 1e-6)


def test_attention_and_the_projection_after_it_hold_no_earlier_tensors(transformer):
    """Each holds as much memory as the model's width times all tokens"""
    set_attention_type(transformer, "sla", topk=0.3)
    attn, made, held = transformer.blocks[0].attn1, {}, {}

    def watch(name):
        def keep(_, __, out):
            made[name] = StorageWeakRef(out.untyped_storage())

        getattr(attn, name).register_forward_hook(keep)

    def look(where):
        return lambda *_: held.update({where: [name for name, made_by in made.items() if not made_by.expired()]})

    for name in ("to_q", "to_k", "to_v"):
        watch(name)
    attn.processor.sla.register_forward_pre_hook(look("attention"))
    attn.to_out[0].register_forward_pre_hook(look("to_out"))
    forward(transformer)
    assert held == {"attention": ["to_v"], "to_out": []}


def test_proj_l_is_a_parameter_of_the_transformer_and_survives_a_new_topk(transformer):
    set_attention_type(transformer, "sla")
    key = "blocks.1.attn1.processor.sla.proj_l.weight"
    assert key in transformer.state_dict()
    transformer.blocks[1].attn1.processor.sla.proj_l.weight.data.fill_(0.5)
    set_attention_type(transformer, "sla", topk=0.3)
    assert (transformer.state_dict()[key] == 0.5).all()
    assert isinstance(transformer.blocks[1].attn1.processor, SLAProcessor)


def test_a_transformer_trains_under_bf16_autocast(transformer):
    set_attention_type(transformer, "sla", topk=0.3)
    x, text = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = transformer(x, torch.tensor([988.0]), text, return_dict=False)[0]
    out.float().square().mean().backward()
    for name, parameter in transformer.named_parameters():
        if "proj_l" in name or "attn1.to_" in name:
            assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    for block in transformer.blocks:
        assert block.attn1.processor.sla.proj_l.weight.grad.abs().max() > 0


def test_an_unknown_type_lists_the_known_ones(transformer):
    with pytest.raises(InputError, match="sla, sagesla, original"):
        set_attention_type(transformer, "flash")
