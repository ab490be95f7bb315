"""The torch RoPE against upstream's output, a float64 complex rotation, and its own promises."""

import pytest
import torch
from helpers import assert_close, golden

from turbo_nb.errors import InputError
from turbo_nb.rope import VideoSize, apply_rotary_emb_torch, rope_apply, rope_freqs

SIZES = [VideoSize(1, 7, 9), VideoSize(7, 10, 10), VideoSize(5, 8, 25)]  # 63, 700, 1000 tokens


def rotated_in_complex_float64(x, freqs):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(freqs, dtype=torch.float64), freqs.double())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def test_angles_are_upstreams():
    torch.testing.assert_close(rope_freqs(VideoSize(3, 6, 8), 128), golden("ops")["rope.freqs"], rtol=1e-6, atol=1e-6)


def test_rotation_is_upstreams():
    ops = golden("ops")
    assert_close("rope", ops["rope.out"], rope_apply(ops["rope.x"], VideoSize(3, 6, 8), ops["rope.freqs"]), 1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_rotation_is_the_complex_product(size, head_dim, dtype, bound):
    torch.manual_seed(0)
    x = torch.randn(2, size.T * size.H * size.W, 3, head_dim).to(dtype)
    freqs = rope_freqs(size, head_dim)
    out = rope_apply(x, size, freqs)
    assert out.dtype == dtype
    assert_close(f"{size} {dtype}", rotated_in_complex_float64(x, freqs), out, bound)


def test_halves_form_is_the_same_rotation_of_regrouped_channels():
    torch.manual_seed(0)
    x, freqs = torch.randn(1, 63, 2, 64), rope_freqs(SIZES[0], 64)
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    out = apply_rotary_emb_torch(halves, freqs.cos(), freqs.sin(), interleaved=False)
    expected = rotated_in_complex_float64(x, freqs)
    assert_close("halves", torch.cat([expected[..., 0::2], expected[..., 1::2]], dim=-1), out, 1e-6)


def test_inplace_writes_into_x():
    x, freqs = torch.randn(1, 63, 2, 64), rope_freqs(SIZES[0], 64)
    expected = apply_rotary_emb_torch(x, freqs.cos(), freqs.sin())
    assert not torch.equal(x, expected)
    out = apply_rotary_emb_torch(x, freqs.cos(), freqs.sin(), inplace=True)
    assert out is x and torch.equal(x, expected)


def test_a_token_is_turned_by_its_own_place():
    freqs = rope_freqs(VideoSize(2, 3, 4), 64).view(2, 3, 4, 32)
    t, h, w = freqs.split([12, 10, 10], dim=-1)
    assert torch.equal(t[:, 0, 0], t[:, 2, 3]) and t[1, 0, 0, 0] == 1 and t[0].abs().max() == 0
    assert torch.equal(h[0, :, 0], h[1, :, 3]) and h[0, 2, 0, 0] == 2
    assert torch.equal(w[0, 0], w[1, 2]) and w[0, 0, 3, 0] == 3


@pytest.mark.parametrize(
    ("x", "cos", "sin", "words"),
    [
        ((63, 2, 64), (63, 32), (63, 32), r"\(batch, tokens, heads, head_dim\)"),
        ((1, 63, 2, 63), (63, 31), (63, 31), "even"),
        ((1, 63, 2, 64), (62, 32), (63, 32), r"cos.*\(63, 32\)"),
        ((1, 63, 2, 64), (63, 32), (63, 64), r"sin.*\(63, 32\)"),
    ],
)
def test_wrong_shapes_say_what_is_expected(x, cos, sin, words):
    with pytest.raises(InputError, match=words):
        apply_rotary_emb_torch(torch.zeros(x), torch.zeros(cos), torch.zeros(sin))


def test_wrong_video_size_is_an_error():
    with pytest.raises(InputError, match="64, heads"):
        rope_apply(torch.zeros(1, 63, 2, 64), VideoSize(4, 4, 4), rope_freqs(VideoSize(4, 4, 4), 64))
    with pytest.raises(InputError, match="1 or more"):
        rope_freqs(VideoSize(0, 4, 4), 64)
    with pytest.raises(InputError, match="even"):
        rope_freqs(VideoSize(1, 4, 4), 63)
