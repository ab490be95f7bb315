"""What several tests use."""

from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    """Upstream's own outputs: tests/golden/<name>.safetensors"""
    return load_file(GOLDEN / f"{name}.safetensors")


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64"""
    out, ref = out.double(), ref.double()
    return ((out - ref).norm() / ref.norm()).item()


def assert_close(name: str, ref: torch.Tensor, out: torch.Tensor, bound: float) -> None:
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    assert out.isfinite().all(), f"{name}: not finite"
    error = relative_error(out, ref)
    assert error <= bound, f"{name}: rel. L2 {error:.3g} > {bound:.3g}"
