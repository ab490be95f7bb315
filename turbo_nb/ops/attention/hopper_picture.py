"""Dense attention within pictures for one head of 384 channels, in Triton: the one of Wan's VAE.

    kernel     grid               a program loads                                  and stores
    _attend    ⌈L/128⌉, B         128 rows of q, all k and v of a picture by 32    128 rows of out (8 warps)

FlashAttention takes at most 256 channels, so PyTorch's own choice is a kernel for older GPUs. The 384 channels are 256
and 128, because a block has a power of two. Tiles come by tensor descriptors. The 200 KiB of shared memory fit Hopper.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import aligned, launch
from . import reference
from .triton_sla import LOG2_E

WIDE, NARROW = 256, 128
CHANNELS = WIDE + NARROW
BLOCK_Q, BLOCK_K = 128, 32


@triton.jit(do_not_specialize=["length"])
def _attend(
    rows, rows_2, keys, keys_2, out, length, scale,
    WIDE: tl.constexpr, NARROW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = WIDE + NARROW
    first, start = tl.program_id(0) * BLOCK_Q, tl.program_id(1) * length
    q, q_2 = rows.load([start + first, 0]), rows_2.load([start + first, WIDE])
    largest, total = tl.full((BLOCK_Q,), -float("inf"), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    result, result_2 = tl.zeros((BLOCK_Q, WIDE), tl.float32), tl.zeros((BLOCK_Q, NARROW), tl.float32)
    for at in range(0, length, BLOCK_K):
        score = tl.dot(q, tl.trans(keys.load([start + at, C])))
        score = tl.dot(q_2, tl.trans(keys_2.load([start + at, C + WIDE])), score) * scale
        score = tl.where(at + tl.arange(0, BLOCK_K)[None] < length, score, -float("inf"))  # the rest is another picture
        larger = tl.maximum(largest, tl.max(score, 1))
        weight, fade = tl.exp2(score - larger[:, None]), tl.exp2(largest - larger)
        largest, total = larger, total * fade + tl.sum(weight, 1)
        weight = weight.to(q.dtype)
        result = tl.dot(weight, keys.load([start + at, 2 * C]), result * fade[:, None])
        result_2 = tl.dot(weight, keys_2.load([start + at, 2 * C + WIDE]), result_2 * fade[:, None])
    row = first + tl.arange(0, BLOCK_Q)
    to = out + (start + row).to(tl.int64)[:, None] * C + tl.arange(0, NARROW)[None]
    inside = row[:, None] < length
    wide = out + (start + row).to(tl.int64)[:, None] * C + tl.arange(0, WIDE)[None]
    tl.store(wide, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(to + WIDE, (result_2 / total[:, None]).to(out.dtype.element_ty), mask=inside)


def picture_attention(qkv: Tensor) -> Tensor:
    """Compute `reference.picture_attention` for 384 channels; others go to the reference."""
    batch, length, channels = qkv.shape
    if channels != 3 * CHANNELS:
        return reference.picture_attention(qkv)
    matrix = aligned(qkv).reshape(-1, channels)
    out = torch.empty(batch, length, CHANNELS, dtype=qkv.dtype, device=qkv.device)
    blocks = ((BLOCK_Q, WIDE), (BLOCK_Q, NARROW), (BLOCK_K, WIDE), (BLOCK_K, NARROW))
    launch(
        _attend, (triton.cdiv(length, BLOCK_Q), batch),
        *(TensorDescriptor.from_tensor(matrix, list(block)) for block in blocks), out, length,
        CHANNELS**-0.5 * LOG2_E, WIDE=WIDE, NARROW=NARROW, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
