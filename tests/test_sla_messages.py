"""SageSLA: what it says where it cannot run, and that its reference computes what upstream's compiled kernel does."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    assert_close,
    choose_triton,
    command_line,
    golden,
    interpret_kernels,
    relative_error,
    set_machine,
)

import turbo_nb
from turbo_nb import backends
from turbo_nb.errors import BackendError
from turbo_nb.machine import probe
from turbo_nb.machine.probe import Library, Machine
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.ops.attention import spargeattn
from turbo_nb.sla import SageSparseLinearAttention, SparseLinearAttention, attention_type, set_attention_type

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run SageSLA")


@NO_GPU
@pytest.mark.parametrize(
    "call",
    [
        lambda: SageSparseLinearAttention(64, 0.1),
        lambda: turbo_nb.load_pipeline("nano", attention_type="sagesla", device="cpu"),
    ],
    ids=["module", "pipeline"],
)
def test_sagesla_on_a_cpu_says_what_it_takes_and_names_sla(call):
    with pytest.raises(BackendError) as caught:
        call()
    for words in (
        "no CUDA GPU",
        "sm_80 or newer with a working Triton",
        "SpargeAttn",
        "pip install git+https://github.com/thu-ml/SpargeAttn",
        "--attention_type sla",
    ):
        assert words in str(caught.value)


@NO_GPU
def test_the_command_line_says_so_in_one_line_and_exits_with_2(tmp_path):
    result = command_line("t2v", "--prompt", "a red circle", "--attention_type", "sagesla", cwd=tmp_path)
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert (
        result.stderr.strip().startswith("error: attention_type 'sagesla'") and "--attention_type sla" in result.stderr
    )


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(BackendError, match=r"'cuda' is unknown.*reference.*spargeattn"):
        SageSparseLinearAttention(64, backend="cuda")


def test_spargeattn_is_called_as_it_wants_to_be(monkeypatch, attention):
    asked = {}

    def kernel(q, k, v, mask_id, pvthreshd):
        asked.update(shape=q.shape, map=mask_id, pvthreshd=pvthreshd)
        return attention_reference.sage_sparse_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask_id.bool(), 64, 128
        ).transpose(1, 2)

    here = Machine(gpu="H100", arch=(9, 0), libraries={"spas_sage_attn": Library(version="0.1")})
    monkeypatch.setattr(probe, "probe", lambda device: here)
    set_machine(monkeypatch, here)
    monkeypatch.setitem(sys.modules, "spas_sage_attn", SimpleNamespace(block_sparse_sage2_attn_cuda=kernel))
    slow, q, k, v, ref = attention
    sage = SageSparseLinearAttention(128, slow.topk)
    assert (sage.block_q, sage.block_k) == (64, 128)
    sage.load_state_dict(slow.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_half_on_gpu", lambda tensors: True)
        patch.setattr(Machine, "on", lambda self, device: self)
        assert_close("sagesla", ref, sage(q, k, v), 1e-2)
        assert asked.pop("pvthreshd") == spargeattn.NEVER
        short = (x[:, :100] for x in (q, k, v))
        sage(*short)  # too short for SpargeAttn
    assert asked["shape"] == (1, 2, 700, 128) and asked["map"].shape == (1, 2, 11, 6)
    asked.clear()
    assert_close("on a CPU", ref, sage(q, k, v), 1e-2)
    assert not asked


@pytest.fixture(scope="module")
def attention():
    ops = golden("ops")
    q, k, v = (ops[f"attn_a.{name}"] for name in "qkv")
    sage = SageSparseLinearAttention(128, ops["attn_a.topk"].item(), 64, 128, backend="reference")  # as sm_90 has it
    sage.load_state_dict({"proj_l.weight": ops["attn_a.proj_w"], "proj_l.bias": ops["attn_a.proj_b"]})
    return sage, q, k, v, ops["attn_a.sagesla"]


def test_the_reference_is_upstreams_compiled_kernel(attention):
    sage, q, k, v, ref = attention
    assert_close("sagesla", ref, sage(q, k, v), 1e-2)


def test_the_8_bits_are_really_there(attention):
    sage, q, k, v, _ = attention
    exact = SparseLinearAttention(128, sage.topk, sage.block_q, sage.block_k)
    exact.load_state_dict(sage.state_dict())
    error = relative_error(sage(q, k, v), exact(q, k, v))
    assert 0.02 < error < 0.05  # upstream's compiled kernel: 0.036


@NO_GPU
def test_the_triton_kernel_is_taken_and_is_nearer_to_the_exact_one(attention, monkeypatch):
    pytest.importorskip("triton")
    sage, *qkv, _ = attention
    q, k, v = (x.half() for x in qkv)  # interpreted, a bf16 product is wrong
    plain = SparseLinearAttention(128, sage.topk, sage.block_q, sage.block_k)
    plain.load_state_dict(sage.state_dict())
    exact = plain(q, k, v)
    choose_triton(monkeypatch)
    interpret_kernels(monkeypatch)
    monkeypatch.setattr(sage, "backend", None)
    assert 0.004 < relative_error(sage(q, k, v), exact) < 0.015  # the reference, in 8 bits throughout: 0.036
    monkeypatch.setattr(sage, "backend", "reference")
    assert relative_error(sage(q, k, v), exact) > 0.02


@pytest.mark.parametrize("length", [1, 63, 129, 700])
def test_odd_lengths(length):
    q, k, v = torch.randn(3, 2, length, 2, 64).bfloat16()
    sage = SageSparseLinearAttention(64, 0.3, backend="reference")
    exact = SparseLinearAttention(64, 0.3, sage.block_q, sage.block_k)
    assert_close("sagesla", exact(q, k, v), sage(q, k, v), 6e-2)


def test_padding_never_counts():
    q, k = torch.randn(2, 1, 70, 1, 64)
    sage = SageSparseLinearAttention(64, 1.0, backend="reference")
    assert_close("constant", torch.full((1, 70, 1, 64), 2.0), sage(q, k - 100, torch.full_like(k, 2.0)), 0.05)


def test_a_transformer_keeps_proj_l_from_sla_to_sagesla(nano):
    weight = nano.transformer.blocks[0].attn1.processor.sla.proj_l.weight
    set_attention_type(nano.transformer, "sagesla", 0.15, backend="reference")
    try:
        assert attention_type(nano.transformer) == "sagesla"
        assert nano.transformer.blocks[0].attn1.processor.sla.proj_l.weight is weight
    finally:
        set_attention_type(nano.transformer, "sla", 0.15)
