"""The operations against formulas in float64 that share no code with them.

Each check returns (passed, detail). The reference runs on the CPU, the implementation on the device under test.
"""

from typing import TYPE_CHECKING

from .. import backends

if TYPE_CHECKING:
    from torch import Tensor

# Largest relative error of an operation, by dtype
BOUNDS = {"float32": 1e-4, "float16": 0.005, "bfloat16": 0.02}
INT8_BOUND, SAGE_BOUND = 0.02, 0.08  # what rounding to 8 bits costs


def close(out: "Tensor", ref: "Tensor", bound: float) -> tuple[bool, str]:
    """Return whether the relative error ‖out − ref‖ / ‖ref‖ is at most `bound`, and the error in words."""
    from ..ops.compare import relative_error

    error = relative_error(out.detach().cpu(), ref.detach().cpu())
    return error <= bound, f"relative error {error:.1e}, at most {bound:.1e}"  # NaN fails


def noise(*shape: int, seed: int = 0, device: str = "cpu", dtype: str = "float32") -> "Tensor":
    """Return normal noise that is the same on every device."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, getattr(torch, dtype))


def rope(device: str, dtype: str) -> tuple[bool, str]:
    """Check the rotary embedding against complex numbers."""
    import torch

    from ..rope import VideoSize, rope_apply, rope_freqs

    size, head_dim = VideoSize(3, 4, 5), 128
    x = noise(2, 3 * 4 * 5, 3, head_dim, device=device, dtype=dtype)
    out = rope_apply(x, size, rope_freqs(size, head_dim).to(device))
    places = torch.cartesian_prod(*map(torch.arange, size)).double()  # (tokens, 3): frame, row, column
    pairs = (22, 21, 21)  # of the 64, for the frame, the row and the column
    angles = [places[:, axis, None] / 10_000 ** (torch.arange(n).double() / n) for axis, n in enumerate(pairs)]
    turn = torch.polar(torch.ones(1).double(), torch.cat(angles, dim=1))  # (tokens, 64)
    ref = torch.view_as_complex(x.double().cpu().unflatten(-1, (-1, 2))) * turn[:, None]
    return close(out, torch.view_as_real(ref).flatten(-2), BOUNDS[dtype])


def sparse(device: str, dtype: str, sage: str | None = None) -> tuple[bool, str]:
    """Check sparse attention that keeps every block, without its linear branch, against dense attention.

    Args:
        device: where it runs.
        dtype: of q, k and v.
        sage: the backend of SageSLA to check instead of SLA.
    """
    from .. import sla

    q, k, v = (noise(1, 700, 2, 128, seed=seed, device=device, dtype=dtype) for seed in range(3))
    if sage:
        module = sla.SageSparseLinearAttention(128, topk=1.0, backend=sage)
    else:
        module = sla.SparseLinearAttention(128, topk=1.0)
    out = module.to(device)(q, k, v)
    q, k, v = (x.double().cpu().transpose(1, 2) for x in (q, k, v))
    ref = (q @ k.mT / 128**0.5).softmax(-1) @ v
    return close(out, ref.transpose(1, 2), SAGE_BOUND if sage else BOUNDS[dtype])


def linear_branch() -> tuple[bool, str]:
    """Check linear attention against its quadratic form."""
    from ..ops.attention import reference as attention_reference

    q, k, v = (noise(1, 300, 2, 64, seed=seed) for seed in range(3))
    out = attention_reference.linear_attention(q, k, v)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = q.softmax(-1) @ k.softmax(-1).mT  # (B, H, L, L)
    ref = weights @ v / (1e-5 + weights.sum(-1, keepdim=True))
    return close(out, ref.transpose(1, 2), BOUNDS["float32"])


def int8(device: str, dtype: str) -> tuple[bool, str]:
    """Check an 8-bit linear against the plain one. It uses per-row scales where the kernels run, else tiles."""
    from ..linear import int8_linear, int8_quantize, row_linear, row_quantize

    shapes = enumerate(((200, 320), (264, 320), (264,)))
    x, weight, bias = (noise(*shape, seed=seed, device=device, dtype=dtype) for seed, shape in shapes)
    if device != "cpu" and backends.choose("linear", device).uses_triton:
        q, scale, _ = row_quantize(weight)
        out = row_linear(x, q, scale, bias)
    else:
        out = int8_linear(x, *int8_quantize(weight), bias)
    return close(out, x.double() @ weight.double().T + bias.double(), INT8_BOUND)
