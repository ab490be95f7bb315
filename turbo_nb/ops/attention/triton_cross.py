"""Cross-attention to a padded prompt in Triton: the equal keys of the padding count as one key of more weight.

    kernel   grid                a program loads                        and stores
    _cross   ⌈L/64⌉, B·H         64 rows of q, all k and v by 64        64 rows of out (4 warps)

A prompt fills a small part of its 512 tokens, and all rows of the padding are equal. The softmax over `repeats` equal
keys is the softmax over one of them whose score has log₂(repeats) added. Both numbers are launch arguments, or the
kernel reads them from memory (COUNTED): a CUDA graph then serves prompts of any length.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InputError
from .. import tuning
from ..launch import channels_inside, launch
from .triton_sla import LOG2_E, attend

MAX_ELEMENTS = 2**31  # of one prompt's keys, whose offsets are int32 because int64 takes too many registers


@triton.jit(do_not_specialize=["keys"])  # because every prompt has another number of keys
def _cross(
    q, k, v, out, counts, length, keys, heads, scale, last_weight,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    COUNTED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    last = keys - 1  # the row that stands for the padding
    if COUNTED:
        keys, last_weight = tl.load(counts).to(tl.int32), tl.load(counts + 1)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    rows, columns = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    queries = tl.load(q + rows.to(tl.int64)[:, None] * q_l + columns, mask=rows[:, None] < length, other=0.0)
    result, total = tl.zeros((BLOCK_Q, D), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    for first in range(0, keys, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        valid = at[:, None] < keys
        row = tl.where(at < keys - 1, at, last) if COUNTED else at
        key = tl.load(k + row[:, None] * k_l + columns, mask=valid, other=0.0)
        value = tl.load(v + row[:, None] * v_l + columns, mask=valid, other=0.0)
        added = tl.where(at < keys - 1, 0.0, tl.where(at < keys, last_weight, -float("inf")))
        score = tl.dot(queries, tl.trans(key)) * scale + added[None]
        largest, total, result = attend(score, 1.0, value, largest, total, result)
    at = ((batch * length + rows[:, None]) * heads + head) * D + columns
    tl.store(out + at, (result / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < length)


def repeats(text: Tensor) -> int:
    """Return how many equal rows end every prompt's embedding (B, S, C); 1 where the last row differs from the rest."""
    return int(_repeats(text))


def counts(text: Tensor) -> Tensor:
    """Return the keys that differ and log₂(repeats), (2,) float32, without waiting for the GPU."""
    number = _repeats(text).double()
    return torch.stack([text.shape[1] + 1 - number, number.log2()]).float()


def _repeats(text: Tensor) -> Tensor:
    same = (text == text[:, -1:]).all(-1).flip(1)  # (B, S), the last row first
    return same.int().cumprod(1).sum(1).min()


def without_repeats(x: Tensor, repeats: int) -> Tensor:
    """Return x (B, S, …) with one row in place of its last `repeats` rows: (B, S - repeats + 1, …).

    It keeps the last row, because an 8-bit tile that holds prompt and padding makes the first padding rows coarser.
    """
    return x if repeats == 1 else torch.cat([x[:, : x.shape[1] - repeats], x[:, -1:]], 1)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, repeats: int | Tensor = 1) -> Tensor:
    """Compute `reference.cross_attention` for bf16 or fp16: (B, L, H, D) contiguous.

    repeats: as in the reference, for k and v `without_repeats`; or `counts`, for k and v with all their rows.

    Raises:
        InputError: one prompt's keys have 2³¹ elements or more.
    """
    batch, length, heads, dim = q.shape
    if k[0].numel() >= MAX_ELEMENTS:
        raise InputError(
            f"the prompt has {k.shape[1]:,} tokens. Expected fewer than {MAX_ELEMENTS // (heads * dim):,}. "
            "Use a shorter prompt."
        )
    q, k, v = channels_inside(q), k.contiguous(), v.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    counted = isinstance(repeats, Tensor)

    def launched(how: tuning.Launch) -> Tensor:
        rows, keys = how.tile
        launch(
            _cross, (triton.cdiv(length, rows), batch * heads), q, k, v, out, repeats if counted else None, length,
            k.shape[1], heads, dim**-0.5 * LOG2_E, 0.0 if counted else math.log2(repeats), *strides,
            COUNTED=counted, BLOCK_Q=rows, BLOCK_K=keys, D=dim, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        return out

    return tuning.run("cross", (dim,), q, launched)
