"""Every Triton kernel against its reference: on a GPU in bf16, without one interpreted in fp16."""

import math
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from turbo_nb.ops import tuning
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.ops.compare import relative_error
from turbo_nb.ops.conv import reference as conv_reference
from turbo_nb.ops.linear8 import reference as linear8_reference
from turbo_nb.ops.norms import reference as norms_reference
from turbo_nb.ops.parts import Parts

pytest.importorskip("triton")
from turbo_nb.ops.attention import hopper_picture, triton_cross, triton_sage, triton_sla
from turbo_nb.ops.conv import triton_conv
from turbo_nb.ops.linear8 import triton_rows, triton_tiles
from turbo_nb.ops.norms import triton_norms

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)  # the interpreter's bf16 dot is wrong
ROUNDING = 4e-3 if CUDA else 6e-4
on_hopper = pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() != (9, 0), reason="Gluon kernel of sm_90")
LENGTHS = [63, 700, 1000, 32760] if CUDA else [63, 300]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What torch.empty gives is NaN, or −128 in int8, until a kernel writes it"""
    empty, empty_like = torch.empty, torch.empty_like
    poison = lambda t: t.fill_(float("nan") if t.is_floating_point() else -128)  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


GENERATOR = torch.Generator().manual_seed(0)


def random(*shape, dtype=DTYPE):
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE, dtype)


def assert_close(name, out, expected, ratio=ROUNDING):
    assert out.shape == expected.shape and out.dtype == expected.dtype, name
    error = relative_error(out, expected)
    assert error <= ratio, f"{name}: rel. L2 {error:.2e}, allowed {ratio:.0e}"  # NaN fails too


def smooth(batch, length, heads, dim):
    """q, k, v whose neighbours are alike, so that block scores differ by more than rounding"""
    blocks = [random(batch, -(-length // 64), heads, dim).repeat_interleave(64, 1)[:, :length] for _ in range(2)]
    q, k = (block + 0.3 * random(batch, length, heads, dim) for block in blocks)
    return q, k, random(batch, length, heads, dim)


def use_the_map_of_the_kernels(monkeypatch, args):
    """In the reference, too, which must not decide ties in another way"""
    q, k, *_, topk, block_q, block_k = args
    kept = triton_sla.kept_blocks(q, k, topk, block_q, block_k)
    chosen = torch.zeros(*kept.shape[:3], -(-k.shape[1] // block_k), dtype=torch.bool, device=DEVICE)
    chosen.scatter_(-1, kept.long(), True)
    monkeypatch.setattr(attention_reference, "block_map", lambda *_: chosen)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (3, 128)])
def test_sparse_linear_attention(length, heads, dim, monkeypatch):
    q, k, v = smooth(1, length, heads, dim)
    weight, bias = random(dim, dim, dtype=torch.float32), random(dim, dtype=torch.float32)
    for topk, block_q, block_k in [(0.2, 128, 64), (0.4, 64, 64), (1.0, 128, 64)]:
        args = (q, k, v, weight, bias, topk, block_q, block_k)
        use_the_map_of_the_kernels(monkeypatch, args)
        exact = attention_reference.sparse_linear_attention(*(t.float() for t in args[:5]), *args[5:]).to(DTYPE)
        assert_close(f"topk {topk}", triton_sla.sparse_linear_attention(*args), exact)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (3, 128)])
def test_sage_linear_attention(length, heads, dim, monkeypatch):
    q, k, v = smooth(1, length, heads, dim)
    k = k + 2  # which does not change a softmax
    weight, bias = random(dim, dim, dtype=torch.float32), random(dim, dtype=torch.float32)
    for topk, block_q, block_k in [(0.2, 128, 64), (0.4, 64, 64), (1.0, 128, 64)]:
        args = (q, k, v, weight, bias, topk, block_q, block_k)
        use_the_map_of_the_kernels(monkeypatch, args)
        wide = *(t.float() for t in args[:5]), *args[5:]
        meant = attention_reference.sparse_linear_attention(*wide, attend=in_8_bits).to(DTYPE)
        assert_close(f"topk {topk}", triton_sage.sage_linear_attention(*args), meant)
        wide, args = ((*a[:3], 0 * a[3], 0 * a[4], *a[5:]) for a in (wide, args))
        exact = attention_reference.sparse_linear_attention(*wide).to(DTYPE)
        assert_close(f"topk {topk}, exact", triton_sage.sage_linear_attention(*args), exact, 1.5e-2)


def test_the_state_of_a_head_has_the_same_bits_beside_any_other_heads():
    """As on several GPUs, which have some of the heads each"""
    length, heads, dim = 3000, 6, 64
    k, v, weight = random(2, length, heads, dim), random(2, length, heads, dim), random(dim, dim, dtype=torch.float32)
    whole = [x.unflatten(0, (2, heads)) for x in triton_sla.linear_state(k, v, weight)]
    phi = k.float().softmax(-1)
    exact = torch.einsum("blhc,blhd->bhcd", phi.to(DTYPE).float(), v.float()) @ weight.T
    assert_close("state", exact.to(DTYPE), whole[0])
    assert_close("norm", phi.sum(1), whole[1], 1e-3)
    for clips, own in ((slice(2), slice(2, 3)), (slice(1), slice(3, 6))):
        part = triton_sla.linear_state(k[clips, :, own], v[clips, :, own], weight)
        for alone, beside in zip(part, whole, strict=True):
            assert torch.equal(alone.view(beside[clips, own].shape), beside[clips, own])


def in_8_bits(q, k, v, block_map, block_q, block_k, q_rows=None):
    """`reference.sage_sparse_attention` with v and the probabilities as they are; q_rows: of q with a scale each"""
    q, k = q.to(DTYPE), k.to(DTYPE)
    q, k = dequantised(q, q_rows or block_q), dequantised(k - k.mean(1, keepdim=True), block_k)
    return attention_reference.sparse_attention(q, k, v, block_map, block_q, block_k)


def dequantised(x, block):
    integers, scale = attention_reference._int8_blocks(x, block)
    return (integers * scale[..., None, None]).flatten(2, 3)[:, :, : x.shape[1]].transpose(1, 2)


@pytest.mark.parametrize("length", LENGTHS)
def test_int8_blocks_are_exact(length):
    x = random(2, length, 3, 64) + 1
    mean = x.mean(1, keepdim=True)
    expected, expected_scale = attention_reference._int8_blocks(
        (x - mean).cpu(), 64
    )  # PyTorch divides inexactly on a GPU
    out, scale = triton_sage.int8_blocks(x, mean.transpose(1, 2), 64)
    assert torch.equal(out.cpu(), expected.flatten(2, 3)[:, :, :length].transpose(1, 2).to(torch.int8))
    assert torch.equal(scale.cpu(), expected_scale)


@on_hopper
@pytest.mark.parametrize("length", LENGTHS)
def test_the_gluon_kernel_is_the_triton_one(length, monkeypatch):
    q, k, v = (x.repeat(2, 1, 1, 1) for x in smooth(1, length, 3, 128))
    q[1], v[1] = random(length, 3, 128), random(length, 3, 128)
    weight, bias = random(128, 128, dtype=torch.float32), random(128, dtype=torch.float32)
    from turbo_nb.ops.attention import hopper_sla

    for topk in (0.01, 0.2, 0.4, 1.0):
        args = (q, k, v, weight, bias, topk, 128, 64)
        expected = triton_sla.sparse_linear_attention(*args)
        for _ in range(3):  # a race would show now and then
            assert_close(f"topk {topk}", hopper_sla.sparse_linear_attention(*args), expected)
        use_the_map_of_the_kernels(monkeypatch, args)
        wide = *(t.float() for t in args[:5]), *args[5:]
        expected = attention_reference.sparse_linear_attention(*wide, attend=partial(in_8_bits, q_rows=64)).to(DTYPE)
        for _ in range(3):
            assert_close(f"SageSLA, topk {topk}", hopper_sla.sage_linear_attention(*args), expected)


def test_a_batch_of_strided_operands():
    fused = random(2, 200, 3 * 2 * 64)
    q, k, v = (part.unflatten(2, (2, 64)) for part in fused.chunk(3, dim=2))
    args = (random(64, 64, dtype=torch.float32), random(64, dtype=torch.float32), 1.0, 128, 64)
    exact = attention_reference.sparse_linear_attention(q.float(), k.float(), v.float(), *args).to(DTYPE)
    assert_close("strided", triton_sla.sparse_linear_attention(q, k, v, *args), exact)
    assert_close("SageSLA, strided", triton_sage.sage_linear_attention(q, k, v, *args), exact, 1.5e-2)


@pytest.mark.parametrize("length", LENGTHS)
def test_kept_blocks_are_those_of_the_block_map(length):
    q, k, _ = smooth(1, length, 2, 64)
    kept = triton_sla.kept_blocks(q, k, 0.3, 128, 64)
    expected = attention_reference.block_map(q, k, 0.3, 128, 64)
    found = torch.zeros_like(expected).scatter(-1, kept.long(), True)
    assert kept.diff(dim=-1).gt(0).all()
    assert (found == expected).float().mean() > 0.995  # a tie may fall either way


@pytest.mark.parametrize("length", LENGTHS[:2])
def test_block_means_from_sums(length):
    x = random(2, length, 2, 64)
    sums = torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, -length % 16)).unflatten(1, (-1, 16)).sum(2)
    for block in (64, 128):
        assert_close("means", triton_sla.block_means(x, block, sums), attention_reference.block_means(x, block), 1e-5)


@pytest.mark.parametrize("columns", [1, 63, 512, 1182])
def test_keep_largest(columns):
    score = random(2, 1, 5, columns)
    score[0, 0, 0] = 0.25 * torch.arange(columns).remainder(3)  # full of ties
    score[0, 0, 1] = -score[0, 0, 0] - 1
    for topk in (0.01, 0.1, 0.5, 1.0):
        kept = triton_sla.keep_largest(score, topk).long()
        n = attention_reference.kept_count(topk, columns)
        assert kept.shape == (2, 1, 5, n) and (kept >= 0).all() and (kept < columns).all()
        assert kept.diff(dim=-1).gt(0).all()
        best = score.topk(n, dim=-1).values
        assert torch.equal(score.gather(-1, kept).sort(-1, descending=True).values, best)


@pytest.mark.parametrize("shape", [(1, 63, 256), (2, 100, 1536)], ids=str)
def test_gated_norm(shape):
    batch, _, width = shape
    x, branch = random(*shape) + 0.3, random(*shape)
    gate, scale, shift = (random(batch, width, dtype=torch.float32) for _ in range(3))
    cases = {
        "norm": (x, None, None, scale, shift),
        "branch, gate and norm": (x, branch, gate, scale, shift),
        "branch, no gate, weights of a module": (x, branch, None, scale[0], shift[0]),
        "residual alone": (x, branch, gate, None, None),
    }
    for name, args in cases.items():
        for out, expected in zip(triton_norms.gated_norm(*args), norms_reference.gated_norm(*args), strict=True):
            if expected is None:
                assert out is None, name
            else:
                assert_close(name, out, expected)


@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (12, 128)])
def test_rms_norm_rope(heads, dim):
    x, weight = random(2, 63, heads * dim), random(heads * dim, dtype=torch.float32)
    angles = random(63, dim // 2, dtype=torch.float32)
    repeated = angles.repeat_interleave(2, 1)
    for cos, sin in [(angles.cos(), angles.sin()), (repeated.cos()[:, 0::2], repeated.sin()[:, 0::2]), (None, None)]:
        expected = norms_reference.rms_norm_rope(x.float(), weight, cos, sin, heads).to(DTYPE)
        assert_close("rms_norm_rope", triton_norms.rms_norm_rope(x, weight, cos, sin, heads), expected)
        out, sums = triton_norms.rms_norm_rope(x, weight, cos, sin, heads, sums=True)
        assert_close("with sums", out, expected)
        padded = torch.nn.functional.pad(out.float(), (0, 0, 0, 0, 0, 1)).unflatten(1, (4, 16)).sum(2)
        assert_close("sums", sums, padded, 1e-5)


def parts_of(outs, bounds=None):
    """`Parts` for tensors (B, L, …) with one dtype"""
    addresses = torch.tensor([[out[clip].data_ptr() for out in outs] for clip in range(len(outs[0]))], device=DEVICE)
    bounds = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    return Parts(addresses, outs[0].stride(1), bounds)


@pytest.mark.parametrize(("ranks", "heads", "dim"), [(2, 4, 16), (3, 6, 32), (4, 12, 128)])
@pytest.mark.parametrize("length", [16, 49])
def test_rms_norm_rope_writes_the_heads_of_each_rank(ranks, heads, dim, length):
    x, weight = random(2, length, heads * dim), random(heads * dim)
    cos, sin = random(2, length, dim // 2)
    expected, expected_sums = triton_norms.rms_norm_rope(x, weight, cos, sin, heads, sums=True)
    outs = [torch.empty(2, length, heads // ranks, dim, dtype=DTYPE, device=DEVICE) for _ in range(ranks)]
    sums = [torch.empty(2, -(-length // 16), heads // ranks, dim, device=DEVICE) for _ in range(ranks)]
    to = parts_of(outs), parts_of(sums)
    assert triton_norms.rms_norm_rope(x, weight, cos, sin, heads, sums=True, to=to) is None
    assert_close("heads", torch.cat(outs, 2), expected)  # a compiler rounds another kernel in another way
    assert_close("sums", torch.cat(sums, 2), expected_sums)
    for out in outs:
        out.zero_()
    assert triton_norms.rms_norm_rope(x, weight, cos, sin, heads, to=(to[0], None)) is None
    assert_close("heads without sums", torch.cat(outs, 2), expected)


KERNELS_OF_PARTS = [
    (triton_sla.sparse_linear_attention, 64),
    (triton_sage.sage_linear_attention, 64),
    *(pytest.param(name, 128, marks=on_hopper) for name in ("sparse_linear_attention", "sage_linear_attention")),
]


@pytest.mark.parametrize(("attend", "dim"), KERNELS_OF_PARTS)
@pytest.mark.parametrize("bounds", [(0, 96, 200), (0, 16, 64, 144, 200), (0, 100, 100, 200)], ids=len)
def test_attention_writes_the_tokens_of_each_rank(attend, dim, bounds):
    if isinstance(attend, str):
        from turbo_nb.ops.attention import hopper_sla

        attend = getattr(hopper_sla, attend)
    args = *smooth(2, bounds[-1], 2, dim), random(dim, dim), random(dim), 0.4, 128, 64
    expected = attend(*args)
    outs = [torch.empty(2, end - begin, 6, dim, dtype=DTYPE, device=DEVICE) for begin, end in pairwise(bounds)]
    assert attend(*args, to=parts_of([out[:, :, 2:] for out in outs], bounds)) is None
    whole = torch.cat(outs, 1)
    assert torch.equal(whole[:, :, 2:4], expected)
    assert whole[:, :, :2].isnan().all() and whole[:, :, 4:].isnan().all()  # heads of other ranks


@pytest.mark.parametrize("prompts", [(5, 5), (70, 10), (100, 3)], ids="{} tokens of 100".format)
def test_cross_attention(prompts):
    text, (k, v) = random(2, 100, 32), (random(2, 100, 2, 64) for _ in range(2))
    for b, prompt in enumerate(prompts):
        for x in (text, k, v):
            x[b, prompt:] = x[b, -1:].clone()
    repeats = triton_cross.repeats(text)
    assert repeats == max(1, 100 - max(prompts))
    q = random(2, 130, 2, 64)
    exact = attention_reference.cross_attention(q.float(), k.float(), v.float()).to(DTYPE)
    counted = triton_cross.cross_attention(q, k, v, triton_cross.counts(text))
    k, v = (triton_cross.without_repeats(x, repeats) for x in (k, v))
    assert k.shape[1] == 101 - repeats
    out = triton_cross.cross_attention(q, k, v, repeats)
    assert_close("cross", out, exact)
    assert torch.equal(counted, out)  # numbers from memory give the bits of numbers from the launch


def test_counts_have_the_bits_of_launch_arguments():
    text = random(1, 512, 4)
    for number in (1, 2, 3, 100, 409, 511, 512):
        text[:, -number:] = 0
        expected = torch.tensor([513 - number, math.log2(number)], dtype=torch.float32)
        assert torch.equal(triton_cross.counts(text).cpu(), expected)


def test_the_last_row_stands_for_the_padding():
    x = random(1, 100, 2)
    assert torch.equal(triton_cross.without_repeats(x, 30), torch.cat([x[:, :70], x[:, 99:]], 1))
    assert triton_cross.without_repeats(x, 1) is x


def assert_rows(out, expected):
    assert torch.equal(out.scale, expected.scale) or torch.allclose(out.scale, expected.scale, rtol=1e-6)
    difference = (out.q.int() - expected.q.int()).abs()
    assert out.q.dtype == torch.int8 and difference.max() <= 1 and difference.float().mean() < 3e-3  # near a half


@pytest.mark.parametrize("shape", [(63, 100), (2, 30, 1536)], ids=str)
def test_row_quantize(shape):
    x = random(*shape)
    x[..., 1, :] = 0
    out = triton_rows.row_quantize(x)
    assert out.dtype == DTYPE and out.scale.shape == shape[:-1]
    assert_rows(out, linear8_reference.row_quantize(x))
    assert_rows(triton_rows.row_quantize(x, gelu=True), linear8_reference.row_quantize(x, gelu=True))


def test_gated_norm_in_8_bits():
    x, branch = random(2, 63, 256) + 0.3, random(2, 63, 256)
    gate, scale, shift = (random(2, 256, dtype=torch.float32) for _ in range(3))
    args = (x, branch, gate, scale, shift, 1e-6, True)
    (summed, out), (expected_sum, expected) = triton_norms.gated_norm(*args), norms_reference.gated_norm(*args)
    assert_close("sum", summed, expected_sum)
    assert out.dtype == expected.dtype == DTYPE
    close = (out.q.float() * out.scale[..., None], expected.q.float() * expected.scale[..., None])
    assert_close("norm", *close, ratio=5e-3)  # a value near a half falls either way


@pytest.mark.parametrize("shape", [(63, 128, 72), (150, 384, 264), (20, 100, 70)], ids=str)
def test_row_linear(shape):
    rows, depth, columns = shape
    x, bias = random(2, rows, depth), random(columns)
    weight = linear8_reference.row_quantize(random(columns, depth))
    quantized = triton_rows.row_quantize(x)
    for name, options in {"bias": {"bias": bias}, "no bias": {}}.items():
        expected = linear8_reference.row_product(quantized, weight.q, weight.scale, **options)
        assert_close(name, triton_rows.row_product(quantized, weight.q, weight.scale, **options), expected)


@pytest.mark.parametrize("shape", [(63, 128, 72), (150, 384, 264), (20, 100, 70)], ids=str)
def test_tile_linear(shape):
    rows, depth, columns = shape
    x, weight = random(rows, depth), random(columns, depth)
    x[1] = 0
    (q, scale), (expected, expected_scale) = triton_tiles.int8_quantize(x), linear8_reference.int8_quantize(x)
    difference = (q.int() - expected.int()).abs()
    assert q.dtype == torch.int8 and torch.allclose(scale, expected_scale, rtol=1e-6)
    assert difference.max() <= 1 and difference.float().mean() < 1e-4  # near a half
    args = (q, scale, *linear8_reference.int8_quantize(weight), DTYPE)
    assert_close(str(shape), triton_tiles.tile_product(*args), linear8_reference.tile_product(*args))


@on_hopper
@pytest.mark.parametrize("shape", [(63, 128, 72), (700, 1536, 1536), (9000, 144, 1096), (32760, 1536, 8960)], ids=str)
def test_the_gluon_product_is_the_triton_one(shape):
    from turbo_nb.ops.linear8 import hopper_rows

    rows, depth, columns = shape
    x, bias = triton_rows.row_quantize(random(rows, depth)), random(columns)
    weight = linear8_reference.row_quantize(random(columns, depth))
    for options in ({"bias": bias}, {}):
        args = x, weight.q, weight.scale
        expected = triton_rows.row_product(*args, **options)
        for _ in range(3):  # a race would show now and then
            assert_close(str(shape), hopper_rows.row_product(*args, **options), expected)


def rimmed(batch, frames, height, width, channels, strip=True):
    """A clip (B, T, H + 2, W + 2, C) with a rim of zeros, or of other ranks' rows above and below"""
    rows = random(batch, frames, height + 2 * strip, width, channels)
    return torch.nn.functional.pad(rows, (0, 0, 1, 1, *(() if strip else (1, 1))))


def weights(columns, channels, *taps):
    return random(columns, channels, *taps) / (channels * math.prod(taps)) ** 0.5, random(columns)


@pytest.mark.parametrize(
    ("channels", "columns", "taps", "split"),
    [(96, 96, (3, 3, 3), 1), (16, 192, (3, 3, 3), 1), (32, 3, (3, 3, 3), 1), (48, 64, (1, 1, 1), 1),
     (32, 64, (3, 1, 1), 2), (16, 400, (3, 1, 1), 2)],
    ids=str,
)  # fmt: skip
def test_rimmed_conv(channels, columns, taps, split):
    x, (weight, bias) = rimmed(2, 2 + taps[0] - 1, 5, 11, channels), weights(columns, channels, *taps)
    residual = rimmed(2, 2 * split, 5, 11, columns // split, strip=False)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        args = x, weight.contiguous(memory_format=layout), bias, residual if split == 1 else None, split
        exact = conv_reference.rimmed_conv(*(t.float() if isinstance(t, torch.Tensor) else t for t in args)).to(DTYPE)
        out = triton_conv.rimmed_conv(*args)
        assert_close("conv", out, exact)
        assert out[:, :, [0, -1]].count_nonzero() == out[:, :, :, [0, -1]].count_nonzero() == 0


def test_normed_conv():
    x, (weight, bias), gamma = rimmed(2, 3, 5, 11, 32), weights(96, 32, 3, 3, 3), random(96, 1, 1, 1)
    args = x, weight, bias, gamma, rimmed(2, 2, 5, 11, 96)
    exact = conv_reference.normed_conv(*(t.float() for t in args)).to(DTYPE)
    assert_close("norm", triton_conv.normed_conv(*args), exact)


def test_the_frames_before_keep_their_rim(monkeypatch):
    """In the Gluon convolution, whose kernel writes no rim"""
    from turbo_nb.ops.conv import hopper_conv

    monkeypatch.setattr(hopper_conv, "_launch", lambda *_: None)
    (weight, bias), before = weights(96, 32, 3, 3, 3), rimmed(2, 2, 5, 11, 96)
    out = hopper_conv.normed_conv(rimmed(2, 3, 5, 11, 32), weight, bias, random(96, 1, 1, 1), before)
    assert torch.equal(out[:, :2], before)
    assert out[:, 2:, [0, -1]].count_nonzero() == out[:, 2:, :, [0, -1]].count_nonzero() == 0


@on_hopper
@pytest.mark.parametrize(
    ("channels", "columns", "size"),
    [(96, 96, (1, 30, 50)), (96, 192, (3, 17, 35)), (192, 3, (2, 15, 26)), (32, 96, (5, 8, 48)), (64, 192, (1, 1, 1)),
     (96, 96, (4, 61, 97))],
    ids=str,
)  # fmt: skip
def test_the_gluon_convolution_is_the_triton_one(channels, columns, size):
    from turbo_nb.ops.conv import hopper_conv

    frames, *picture = size
    x, (weight, bias) = rimmed(2, frames + 2, *picture, channels), weights(columns, channels, 3, 3, 3)
    residual, gamma = rimmed(2, frames, *picture, columns, strip=False), random(columns, 1, 1, 1)
    before = rimmed(2, 2, *picture, columns)
    for _ in range(3):  # a race would show now and then
        for args in ((x, weight, bias), (x, weight, bias, residual)):  # fewer than 16 channels are a view
            out = hopper_conv.rimmed_conv(*args)
            assert_close("conv", out, triton_conv.rimmed_conv(*args))
            assert out[:, :, [0, -1]].count_nonzero() == out[:, :, :, [0, -1]].count_nonzero() == 0
        args = x, weight, bias, gamma, before
        out = hopper_conv.normed_conv(*args)
        assert_close("norm", out, conv_reference.normed_conv(*(t.float() for t in args)).to(DTYPE))
        assert torch.equal(out[:, :2], before)
        assert out[:, 2:, [0, -1]].count_nonzero() == out[:, 2:, :, [0, -1]].count_nonzero() == 0
        args = x, weight[:, :, 0], bias
        out = hopper_conv.upsample_conv(*args)
        assert_close("upsample", out, triton_conv.upsample_conv(*args))
        assert out[:, :, [0, -1]].count_nonzero() == out[:, :, :, [0, -1]].count_nonzero() == 0


@pytest.mark.skipif(CUDA and torch.cuda.get_device_capability() != (9, 0), reason="takes Hopper's shared memory")
@pytest.mark.parametrize(("pictures", "pixels"), [(2, 150), (1, 31), (3, 128)] + [(3, 6240)] * CUDA, ids=str)
def test_picture_attention(pictures, pixels):
    qkv = random(pictures, pixels, 3 * hopper_picture.CHANNELS)
    exact = attention_reference.picture_attention(qkv.float()).to(DTYPE)
    assert_close("attention", hopper_picture.picture_attention(qkv), exact)
    narrow = qkv[..., : 3 * 64]
    assert torch.equal(hopper_picture.picture_attention(narrow), attention_reference.picture_attention(narrow))


@pytest.mark.parametrize("columns", [3, 96])
def test_upsample_conv(columns):
    x, (weight, bias) = rimmed(2, 2, 3, 7, 32), weights(columns, 32, 3, 3)
    exact = conv_reference.upsample_conv(x.float(), weight.float(), bias.float()).to(DTYPE)
    out = triton_conv.upsample_conv(x, weight, bias)
    assert_close("upsample", out, exact)
    assert out[:, :, [0, -1]].count_nonzero() == out[:, :, :, [0, -1]].count_nonzero() == 0


@pytest.mark.parametrize("channels", [16, 96, 384])
def test_rms_norm_silu(channels):
    x, gamma, before = rimmed(2, 3, 5, 7, channels), random(channels, 1, 1, 1), random(2, 2, 7, 9, channels)
    for args in [(x, gamma), (x, gamma, before), (x, gamma, None, False), (x, gamma, before[:, :1])]:
        exact = conv_reference.rms_norm_silu(*(t.float() if isinstance(t, torch.Tensor) else t for t in args)).to(DTYPE)
        assert_close("norm", triton_conv.rms_norm_silu(*args), exact)


@pytest.mark.skipif(CUDA, reason="descriptors in a kernel need scratch memory on a GPU that has them")
def test_kernels_by_pointers_give_the_bits_of_those_by_descriptors(monkeypatch):
    q, k, v = (x.unflatten(2, (2, 64)) for x in random(2, 200, 3 * 2 * 64).chunk(3, dim=2))
    more = random(64, 64, dtype=torch.float32), random(64, dtype=torch.float32), 0.4, 128, 64
    x, weight = triton_rows.row_quantize(random(2, 50, 144)), linear8_reference.row_quantize(random(72, 144))
    tiles = (*linear8_reference.int8_quantize(random(70, 144)), *linear8_reference.int8_quantize(random(72, 144)))
    clip, (kernel, bias), up = rimmed(1, 3, 5, 11, 32), weights(192, 32, 3, 3, 3), weights(96, 32, 3, 3)

    def outputs():
        yield triton_sla.sparse_linear_attention(q, k, v, *more)
        yield triton_sage.sage_linear_attention(q, k, v, *more)
        yield triton_rows.row_product(x, weight.q, weight.scale, random(72))
        yield triton_tiles.tile_product(*tiles, DTYPE)
        yield triton_conv.rimmed_conv(clip, kernel, bias)
        yield triton_conv.upsample_conv(clip, *up)

    def noted(launch, kernel, *arguments, **options):
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    state = GENERATOR.get_state()
    expected = list(outputs())
    GENERATOR.set_state(state)
    launched = []
    for module in (triton_sla, triton_rows, triton_tiles, triton_conv):
        monkeypatch.setattr(module, "takes_descriptors", lambda x: False)
        monkeypatch.setattr(module, "launch", partial(noted, module.launch))
    assert all(torch.equal(*pair) for pair in zip(outputs(), expected, strict=True))
    assert {name for name in launched if name.endswith("_by_pointers")} == {
        "_sparse_linear_by_pointers", "_linear_state_by_pointers", "_row_product_by_pointers",
        "_tile_product_by_pointers", "_conv_by_pointers",
    }  # fmt: skip


def test_every_tile_of_a_launch_computes_the_same(monkeypatch):
    """Of every card; the interpreter does not know warps and stages"""
    q, k, v = smooth(1, 300, 2, 128)
    weight, bias = random(128, 128, dtype=torch.float32), random(128, dtype=torch.float32)
    x, matrix = triton_rows.row_quantize(random(200, 256)), linear8_reference.row_quantize(random(264, 256))
    clips = [(rimmed(1, 3, 4, 9, channels), *weights(columns, channels, 3, 1, 1))
             for columns, channels in [(96, 32), (192, 64), (3, 32), (400, 64)]]  # fmt: skip
    tried = []

    def trial(kernel, shape, launches, launched):
        cards = launches if CUDA else {how for arch in tuning.SHARED for how in tuning.candidates(kernel, shape, arch)}
        expected = None
        for how in {how.tile: how for how in cards}.values():
            out = launched(how)
            out = [y.clone() for y in (out if isinstance(out, tuple) else (out,))]
            expected = expected or out
            for y, ref in zip(out, expected, strict=True):
                assert_close(f"{kernel} {shape} {how}", y, ref)
            tried.append((kernel, how.tile))
        return launched(how)

    with tuning.trying(trial):
        triton_sla.sparse_linear_attention(q, k, v, weight, bias, 0.4, 128, 64)
        triton_sage.sage_linear_attention(q, k, v, weight, bias, 0.4, 128, 64)
        triton_cross.cross_attention(q, k[:, :90], v[:, :90], 5)
        triton_rows.row_product(x, matrix.q, matrix.scale)
        for clip in clips:
            triton_conv.rimmed_conv(*clip)
    assert all(sum(kernel == name for kernel, _ in tried) >= 2 for name in (*tuning.TABLES, "conv"))


# All launches of these cards take minutes: TURBO_NB_COMPILE=all. The few are of each kind of kernel and of card.
FEW = ["80:conv:192", "80:project_state", "86:row_product", "89:linear_state", "120:cross"]
CARDS = ["80", "86", "89", "90", "120"] if os.environ.get("TURBO_NB_COMPILE") == "all" else FEW


def test_kernels_compile_for_cards_that_are_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for.py")), *CARDS, "gluon"],
        capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    of_gluon = [line for line in lines if line[1].startswith("hopper")]
    assert len(of_gluon) >= 3 and len(lines) - len(of_gluon) >= 3 * len(CARDS), result.stdout
    for line in lines:
        *_, taken, allowed, ahead = line
        assert int(taken) <= int(allowed), f"{line}: more shared memory than expected"
        if line not in of_gluon and "int8_blocks" not in line:
            assert int(ahead) >= 4, f"{line}: its loop does not load tiles ahead of their use"


@pytest.mark.parametrize(("arrived", "given_up"), [([1, 1, 1], 0), ([0, 1, 0], 1)], ids=["arrived", "given up"])
def test_a_wait_for_flags_ends_and_clears_them(arrived, given_up):
    from turbo_nb.ops.triton_flags import wait

    flags = torch.tensor(arrived, dtype=torch.int32, device=DEVICE)
    stop = torch.tensor([given_up], dtype=torch.int32)
    wait(flags, stop.pin_memory() if CUDA else stop)
    assert not flags.any()
