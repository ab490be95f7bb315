"""8-bit linears against upstream's CUDA quantiser and GEMM, and in the odd shapes."""

import pytest
import torch
from helpers import assert_close, golden, int8_of, relative_error
from torch import nn

from turbo_nb.errors import InputError
from turbo_nb.linear import (
    Int8Linear,
    empty_linears,
    has_per_row_scales,
    int8_dequantize,
    int8_linear,
    int8_quantize,
    is_quantized,
    row_linear,
    row_quantize,
    to_per_row_scales,
    to_tile_scales,
)
from turbo_nb.ops.linear8 import reference as linear8_reference


@pytest.fixture(scope="module")
def ops():
    return golden("ops")


@pytest.mark.parametrize(("x", "q", "scale"), [("x", "xq", "xs"), ("w", "wq", "ws")])
def test_the_quantiser_is_upstreams(ops, x, q, scale):
    ours, ours_scale = int8_quantize(ops[f"int8.{x}"])
    assert torch.equal(ours_scale, ops[f"int8.{scale}"])
    assert (ours == ops[f"int8.{q}"]).float().mean() >= 0.9999


def test_the_product_is_upstreams(ops):
    assert_close("int8", ops["int8.y"], int8_linear(ops["int8.x"], ops["int8.wq"], ops["int8.ws"]), 3e-3)


@pytest.mark.parametrize("shape", [(1, 1), (63, 700), (128, 128), (300, 1000), (129, 1536)])
def test_quantising_is_close_in_any_shape(shape):
    x = torch.randn(shape)
    q, scale = int8_quantize(x)
    assert q.shape == shape and q.dtype == torch.int8 and q.is_contiguous()
    assert scale.shape == tuple(-(-side // 128) for side in shape)
    assert (int8_dequantize(q, scale) - x).abs().max() <= scale.max() * 1.001  # the largest entry saturates at 127


def test_zeros_stay_zero():
    q, scale = int8_quantize(torch.zeros(130, 5))
    assert not q.any() and torch.isfinite(scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_keeps_dtype_and_leading_dimensions(dtype):
    linear = nn.Linear(200, 72).to(dtype)
    quantised = int8_of(linear)
    x = torch.randn(2, 3, 200).to(dtype)
    out = quantised(x)
    assert out.dtype == dtype and out.shape == (2, 3, 72)
    assert relative_error(out, linear(x)) < 0.02


def test_many_rows_are_worked_through_in_parts(monkeypatch):
    x, (w_q, scale) = torch.randn(300, 256), int8_quantize(torch.randn(64, 256))
    whole = int8_linear(x, w_q, scale)
    monkeypatch.setattr(linear8_reference, "LINEAR_ROWS", 128)
    assert torch.equal(int8_linear(x, w_q, scale), whole)


def test_the_bias_is_added_in_the_output_dtype():
    x, bias = torch.ones(1, 128, dtype=torch.bfloat16), torch.tensor([1 / 512], dtype=torch.bfloat16)
    w_q, scale = int8_quantize(torch.ones(1, 128) / 128)
    assert int8_linear(x, w_q, scale, bias).item() == int8_linear(x, w_q, scale).add(bias).item()


def test_the_blocks_linears_change_their_kind_but_proj_l():
    model, block = nn.Module(), nn.ModuleDict({"to_q": nn.Linear(128, 256), "proj_l": nn.Linear(64, 64)})
    model.blocks, model.proj_out = nn.ModuleList([block]), nn.Linear(128, 8)
    assert empty_linears(model, True, torch.bfloat16) == 1 and is_quantized(model)
    assert isinstance(block["to_q"], Int8Linear)
    assert type(block["proj_l"]) is type(model.proj_out) is nn.Linear
    assert {"to_q.int8_weight", "to_q.scale", "to_q.bias"} < set(block.state_dict())
    assert empty_linears(model, False, torch.float16) == 1 and not is_quantized(model)
    assert block["to_q"].weight.dtype == torch.float16 and block["to_q"].weight.is_meta


def test_a_scale_for_each_row():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 40, 256), torch.randn(130, 256), torch.randn(130)
    x[0, 3, 5] = 100  # which makes its whole tile coarse, and only its own row
    exact = torch.nn.functional.linear(x, weight, bias)
    q, scale, _ = row_quantize(weight)
    rows, tiles = row_linear(x, q, scale, bias), int8_linear(x, *int8_quantize(weight), bias)
    away = [i for i in range(40) if i != 3]
    assert (rows - exact)[:, away].norm() < 0.013 * exact[:, away].norm()
    assert (tiles - exact)[:, away].norm() > 0.1 * exact[:, away].norm()


def test_per_row_scales_and_back():
    torch.manual_seed(0)
    linear = nn.Linear(256, 130)
    module = nn.Sequential(int8_of(linear), nn.Linear(2, 2))
    x, tiled = torch.randn(5, 256), module[0].int8_weight.clone()
    expected, exact = module[0](x), linear(x)
    to_per_row_scales(module)
    assert (
        module[0].scale.shape == (130,)
        and has_per_row_scales([module[0]])
        and not has_per_row_scales([module[0], module[1]])
    )
    assert (module[0](x) - exact).norm() < 1.1 * (expected - exact).norm()
    to_per_row_scales(module)  # twice is once
    to_tile_scales(module)
    assert module[0].scale.shape == (2, 2) and (module[0].int8_weight.int() - tiled.int()).abs().max() <= 1


def test_shapes_that_do_not_fit_are_errors():
    w_q, scale = int8_quantize(torch.randn(256, 128))
    with pytest.raises(InputError, match="last dimensions"):
        int8_linear(torch.randn(4, 64), w_q, scale)
    with pytest.raises(InputError, match=r"Expected \(2, 1\)"):
        int8_linear(torch.randn(4, 128), w_q, scale.T)
    with pytest.raises(InputError, match="matrix"):
        int8_quantize(torch.randn(2, 3, 4))
