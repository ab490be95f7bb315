"""The smallest Triton kernel, compiled and run. Exit code 0 means that Triton works here.

`probe` runs this file as a script of its own, because a crash then ends the script only.

Grid: one program. It loads up to 64 floats, and stores each plus one.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_one(x, out, length, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < length) + 1, mask=at < length)


if __name__ == "__main__":
    x = torch.arange(63, device="cuda", dtype=torch.float32)
    out = torch.full_like(x, torch.nan)
    add_one[(1,)](x, out, len(x), BLOCK=64)
    assert torch.equal(out, x + 1), "a Triton kernel gave a wrong sum"
