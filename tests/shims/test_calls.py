"""Each replaced call, through the names and signatures that upstream's code uses, against upstream's own outputs."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, choose_triton, golden, interpret_kernels

from turbo_nb import backends, shims
from turbo_nb.errors import BackendError, TurboNbError
from turbo_nb.ops.attention import reference
from turbo_nb.shims import UnsupportedCall
from turbo_nb.shims.spas_sage_attn import FP8, FP16, SM_90


@pytest.fixture(autouse=True)
def installed():
    with pytest.warns(UserWarning, match="stand-ins"):
        shims.install()
    yield
    shims.uninstall()


def theirs(module, name):
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def ops():
    return golden("ops")


# --- flash_attn ---


def test_rotary_embedding_is_upstreams(ops):
    from flash_attn.layers.rotary import apply_rotary_emb

    x, freqs = ops["rope.x"], ops["rope.freqs"]
    out = apply_rotary_emb(x.to(torch.float32), freqs.cos(), freqs.sin(), interleaved=True, inplace=False)
    assert out.dtype == torch.float32
    assert_close("rope", ops["rope.out"], out.to(x.dtype), 1e-3)


def test_rotary_embedding_has_flash_attns_defaults(ops):
    from flash_attn.layers.rotary import apply_rotary_emb

    x, freqs = ops["rope.x"].float(), ops["rope.freqs"]
    longer = torch.cat([freqs, freqs])  # flash_attn takes tables of more tokens than x has
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    out = apply_rotary_emb(halves, longer.cos(), longer.sin())
    assert_close("halves", ops["rope.out"], torch.stack(out.chunk(2, -1), -1).flatten(-2).bfloat16(), 1e-3)
    written = x.clone()
    assert apply_rotary_emb(written, freqs.cos(), freqs.sin(), True, True) is written
    assert_close("in place", ops["rope.out"], written.bfloat16(), 1e-3)


def test_rotary_embedding_has_a_gradient(ops):
    from flash_attn.layers.rotary import apply_rotary_emb

    x, freqs = ops["rope.x"].float().requires_grad_(), ops["rope.freqs"]
    out = apply_rotary_emb(x, freqs.cos(), freqs.sin(), interleaved=True)
    out.backward(out.detach())
    torch.testing.assert_close(x.grad, x.detach(), rtol=1e-4, atol=1e-5)  # a rotation back


def attention(q, k, v, scale=None, causal=False):
    q, k, v = (x.double() for x in (q, k.repeat_interleave(q.shape[-2] // k.shape[-2], -2), v))
    v = v.repeat_interleave(q.shape[-2] // v.shape[-2], -2)
    score = torch.einsum("...qhd,...khd->...hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if causal:
        score = score + torch.full(score.shape[-2:], -torch.inf, dtype=score.dtype).triu(1)
    return torch.einsum("...hqk,...khd->...qhd", score.softmax(-1), v).float()


@pytest.mark.parametrize("heads", [4, 2], ids=["heads", "shared"])
@pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.3}, {"causal": True}], ids=str)
def test_flash_attention_is_softmax_attention(heads, options):
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 37, 4, 32), torch.randn(2, 37, heads, 32), torch.randn(2, 37, heads, 32)
    expected = attention(q, k, v, options.get("softmax_scale"), options.get("causal"))
    assert_close("batch", expected, flash_attn_func(q, k, v, **options), 1e-5)
    starts = torch.tensor([0, 37, 74], dtype=torch.int32)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(*flat, starts, starts, 37, 37, dropout_p=0.0, window_size=(-1, -1), **options)
    assert_close("sequences", expected.flatten(0, 1), out, 1e-5)


def test_sequences_have_lengths_of_their_own():
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    torch.manual_seed(0)
    q, k, v = torch.randn(30, 2, 16), torch.randn(50, 2, 16), torch.randn(50, 2, 16)
    starts = torch.tensor([0, 20, 30], dtype=torch.int32), torch.tensor([0, 11, 50], dtype=torch.int32)
    out = flash_attn_varlen_func(q=q, k=k, v=v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1],
                                 max_seqlen_q=20, max_seqlen_k=39)  # fmt: skip
    expected = [attention(q[:20], k[:11], v[:11]), attention(q[20:], k[11:], v[11:])]
    assert_close("sequences", torch.cat(expected), out, 1e-5)


# --- turbo_diffusion_ops ---


@pytest.mark.parametrize("name", ["x", "w"])
def test_quantised_tiles_are_upstreams(ops, name):
    from turbo_diffusion_ops import quant_cuda

    q, scale = quant_cuda(ops[f"int8.{name}"], None, None)
    wanted, wanted_scale = ops[f"int8.{name}q"], ops[f"int8.{name}s"]
    assert q.dtype == torch.int8 and torch.equal(scale, wanted_scale) and scale.dtype == torch.float32
    assert (q != wanted).float().mean() < 1e-4 and (q.int() - wanted.int()).abs().max() <= 1
    into = torch.empty_like(wanted), torch.empty_like(wanted_scale)
    assert all(out is given for out, given in zip(quant_cuda(ops[f"int8.{name}"], *into), into, strict=True))
    assert torch.equal(into[0], q) and torch.equal(into[1], scale)


def test_product_of_tiles_is_upstreams_and_written_in_place(ops):
    from turbo_diffusion_ops import gemm_cuda

    y = torch.zeros_like(ops["int8.y"])
    assert gemm_cuda(*(ops[f"int8.{name}"] for name in ("xq", "xs", "wq", "ws")), y) is None
    assert_close("int8", ops["int8.y"], y, 3e-3)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_are_upstreams(ops, affine):
    from turbo_diffusion_ops import layer_norm_cuda, rms_norm_cuda

    x, weight = ops["norm256.x"].float().flatten(0, 1), ops["norm256.w"]
    into = torch.empty_like(x)
    assert rms_norm_cuda(x, 1e-6, weight, into) is into
    assert_close("rms", ops["norm256.rms"].flatten(0, 1), into.bfloat16(), 1e-3)
    assert_close("ln", ops["norm256.ln"].flatten(0, 1), layer_norm_cuda(x, 1e-6, None, None, None).bfloat16(), 1e-3)
    if affine:
        bias = weight.flip(0)
        assert layer_norm_cuda(x, 1e-6, weight, bias, into) is into
        assert_close("affine", F.layer_norm(x, (256,)) * weight + bias, into, 1e-4)
    else:
        assert_close(
            "no weight", rms_norm_cuda(x, 1e-6, weight, None) / weight, rms_norm_cuda(x, 1e-6, None, None), 1e-5
        )


def test_norms_keep_their_range_at_a_width_that_is_no_power_of_two():
    from turbo_diffusion_ops import layer_norm_cuda, rms_norm_cuda

    x = torch.randn(5, 1536) + 3  # upstream's own kernels count padded columns, and read past the weight's end
    weight = torch.ones(1536)
    assert_close(
        "ln", F.layer_norm(x.double(), (1536,)).float(), layer_norm_cuda(x, 1e-5, weight, weight * 0, None), 1e-5
    )
    assert_close("rms", F.rms_norm(x.double(), (1536,)).float(), rms_norm_cuda(x, 1e-9, weight, None), 1e-5)


# --- spas_sage_attn ---


def sparse(q, k, v, block_map, block_q, block_k, function=SM_90):
    """The sparse part of SageSLA, call by call as upstream's core makes it: q, k, v (B, H, L, D)"""
    import spas_sage_attn._fused as fused
    import spas_sage_attn._qattn as qattn
    from spas_sage_attn.utils import block_map_lut_triton, get_vanilla_qk_quant

    km, out = k.mean(dim=-2, keepdim=True), torch.empty_like(q)
    q8, q_scale, k8, k_scale = get_vanilla_qk_quant(q, k, km, block_q, block_k)
    lut, count = block_map_lut_triton(block_map)
    assert q8.shape == q.shape and q8.dtype == k8.dtype == torch.int8 and lut.dtype == count.dtype == torch.int32
    threshold, scale = torch.full((q.shape[1],), 1e6), q.shape[-1] ** -0.5
    if function == FP16:
        args = q8, k8, v.half(), out, lut, count, threshold, q_scale, k_scale, 1, False, 1, scale, 0
        assert getattr(qattn, function)(*args) is None
        return out
    batch, heads, length, dim = v.shape
    turned = torch.empty(batch, heads, dim, -(-length // 128) * 128, dtype=v.dtype)
    fused.transpose_pad_permute_cuda(v, turned, 1)
    v8, v_scale = torch.empty(turned.shape, dtype=torch.float8_e4m3fn), torch.empty(batch, heads, dim)
    fused.scale_fuse_quant_cuda(turned, v8, v_scale, length, 2.25, 1)
    assert v8.float().abs().max() <= 2.25
    more = (threshold,) if function == FP8 else ()
    last = (0,) if function == FP8 else ()
    args = q8, k8, v8, out, lut, count, *more, q_scale, k_scale, v_scale, 1, False, 1, scale, *last
    assert getattr(qattn, function)(*args) is None
    return out


@pytest.mark.parametrize("function", [SM_90, FP8, FP16])
def test_sagesla_is_upstreams(ops, function, monkeypatch):
    monkeypatch.setenv("TURBO_NB_ATTENTION", "reference")
    q, k, v = (ops[f"attn_a.{name}"] for name in "qkv")
    block_map = reference.block_map(q, k, ops["attn_a.topk"].item(), 64, 128)
    heads_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    part = sparse(*heads_first, block_map.to(torch.int8), 64, 128, function).transpose(1, 2)
    linear = F.linear(
        reference.linear_attention(q, k, v), ops["attn_a.proj_w"].bfloat16(), ops["attn_a.proj_b"].bfloat16()
    )
    assert_close(function, ops["attn_a.sagesla"], (part + linear).to(q.dtype), 4e-2)


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 128), (128, 64)])
def test_sagesla_by_our_kernels_is_its_reference(block_q, block_k, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 64).half() for _ in range(3))  # the last block of 128 is not half full
    block_map = reference.block_map(q.transpose(1, 2), k.transpose(1, 2), 0.7, block_q, block_k).to(torch.int8)
    monkeypatch.setenv("TURBO_NB_ATTENTION", "reference")
    expected = sparse(q, k, v, block_map, block_q, block_k)
    monkeypatch.delenv("TURBO_NB_ATTENTION")
    interpret_kernels(monkeypatch)
    choose_triton(monkeypatch)
    assert backends.choose("sagesla").chosen == "triton"
    assert_close("kernels", expected, sparse(q, k, v, block_map, block_q, block_k), 2e-3)


def test_linears_in_tiles_use_our_kernels(ops, monkeypatch):
    from turbo_diffusion_ops import gemm_cuda, quant_cuda

    interpret_kernels(monkeypatch)
    choose_triton(monkeypatch)
    x, w = (ops[f"int8.{name}"][:150].half() for name in "xw")
    assert backends.kernel("tile_quantize", x).__module__ == "turbo_nb.ops.linear8.triton_tiles"
    y, expected = torch.zeros(150, 150, dtype=torch.float16), torch.zeros(150, 150, dtype=torch.float16)
    gemm_cuda(*quant_cuda(x, None, None), *quant_cuda(w, None, None), y)
    monkeypatch.setattr(backends, "_half_on_gpu", lambda tensors: False)
    gemm_cuda(*quant_cuda(x, None, None), *quant_cuda(w, None, None), expected)
    assert not torch.equal(expected, torch.zeros_like(expected))
    assert_close("kernels", expected, y, 1e-3)


def test_kept_blocks_are_distances(ops):
    from spas_sage_attn.utils import block_map_lut_triton

    lut, count = block_map_lut_triton(torch.tensor([[[[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]]]], dtype=torch.int8))
    assert lut.tolist() == [[[[1, 2, 1, 0, 0], [0, 4, 0, 0, 0]]]] and count.tolist() == [[[3, 2]]]


# --- What they do not compute ---

X, C = torch.zeros(1, 8, 2, 8), torch.zeros(8, 4)
STARTS = torch.tensor([0, 8], dtype=torch.int32)
ROTARY, FLASH, OPS = "flash_attn.layers.rotary", "flash_attn", "turbo_diffusion_ops"
HALF, SCALE = torch.zeros(4, 4, dtype=torch.int8), torch.zeros(1, 1)


@pytest.mark.parametrize(
    ("module", "name", "arguments", "named", "words"),
    [
        (ROTARY, "apply_rotary_emb", (X, C, C), {"seqlen_offsets": 3}, "seqlen_offsets is 3"),
        (ROTARY, "apply_rotary_emb", (X, C, C), {"cu_seqlens": STARTS}, "cu_seqlens is tensor"),
        (ROTARY, "apply_rotary_emb", (X, C), {}, "sin"),
        (FLASH, "flash_attn_func", (X, X, X, 0.1), {}, "dropout_p is 0.1"),
        (FLASH, "flash_attn_func", (X, X, X), {"window_size": (8, 8)}, "window_size"),
        (FLASH, "flash_attn_func", (X, X[:, :4], X[:, :4]), {"causal": True}, "causal is True"),
        (FLASH, "flash_attn_func", (X, X, X), {"heads": 3}, "heads"),
        (FLASH, "flash_attn_varlen_func", (X[0], X[0], X[0], STARTS, STARTS, 8, 8), {"block_table": 1}, "block_table"),
        (OPS, "quant_cuda", (torch.zeros(4, 4), None, None), {}, "dtype is torch.float32"),
        (OPS, "quant_cuda", (X,), {}, "output"),
        (OPS, "gemm_cuda", (HALF, SCALE, HALF, SCALE, torch.zeros(4, 4)), {}, "dtype is torch.float32"),
        (OPS, "rms_norm_cuda", (torch.zeros(4, 4).half(), 1e-6, None, None), {}, "dtype is torch.float16"),
        (OPS, "layer_norm_cuda", (torch.zeros(4, 4).half(), 1e-6, None, None, None), {}, "dtype is torch.float16"),
        ("spas_sage_attn._fused", "transpose_pad_permute_cuda", (X, X, 0), {}, "tensor_layout is 0"),
    ],
)  # fmt: skip
def test_other_calls_are_an_error_with_their_name(module, name, arguments, named, words):
    with pytest.raises(UnsupportedCall, match=rf"^{module}\.{name}: .*{words}"):
        theirs(module, name)(*arguments, **named)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"causal": True}, "is_causal is True"),
        ({"scale": 0.5}, "sm_scale is 0.5"),
        ({"count": torch.tensor([[[1, 2]]])}, r"valid_block_num is \(1, 2\)"),
    ],
)
def test_other_calls_of_sparse_attention_are_an_error(change, words, monkeypatch):
    monkeypatch.setenv("TURBO_NB_ATTENTION", "reference")
    given = {"causal": False, "scale": 0.125, "count": torch.ones(1, 1, 2, dtype=torch.int32)} | change
    x8, x, ones = torch.zeros(1, 1, 128, 64, dtype=torch.int8), torch.zeros(1, 1, 128, 64).half(), torch.ones(1, 1, 2)
    args = (
        x8,
        x8,
        x,
        x,
        ones[..., None].int(),
        given["count"],
        None,
        ones,
        ones,
        1,
        given["causal"],
        1,
        given["scale"],
        0,
    )
    with pytest.raises(UnsupportedCall, match=rf"^spas_sage_attn\._qattn\.{FP16}: .*{words}"):
        theirs("spas_sage_attn._qattn", FP16)(*args)


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        (OPS, "quant_cuda", (torch.zeros(4, 4).half().requires_grad_(), None, None)),
        ("spas_sage_attn.utils", "get_vanilla_qk_quant", (X.clone().requires_grad_(), X, None)),
    ],
)
def test_training_through_8_bits_is_an_error(module, name, arguments):
    with pytest.raises(UnsupportedCall, match=rf"^{module}\.{name}: .*gradient.*SparseLinearAttention"):
        theirs(module, name)(*arguments)
    if module == OPS:
        with torch.no_grad():
            theirs(module, name)(*arguments)


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn.layers.rotary", "turbo_diffusion_ops", "spas_sage_attn"])
def test_a_missing_name_is_an_error_with_its_name(module):
    with pytest.raises(UnsupportedCall, match=rf"^{module}\.other is missing"):
        theirs(module, "other")
    assert not hasattr(importlib.import_module(module), "__version__")  # other libraries ask
    with pytest.raises(ImportError, match="other"):
        exec(f"from {module} import other")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{module}.other")


def test_sagesla_that_cannot_run_says_what_can():
    from spas_sage_attn._qattn import qk_int8_sv_f16_accum_f16_block_sparse_attn_inst_buf_with_pv_threshold as attend

    x8, x = torch.zeros(1, 1, 64, 64, dtype=torch.int8), torch.zeros(1, 1, 64, 64).half()
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    if torch.cuda.is_available():
        pytest.skip("the CPU of a machine with a GPU")
    with pytest.raises(BackendError, match=r"--attention_type sla.*SpargeAttn") as caught:
        attend(x8, x8, x, x, one[None] * 0, one, None, one, one, 1, False, 1, 0.125, 0)
    assert isinstance(caught.value, TurboNbError)
