"""Two numbers that say how much one result differs from another."""

import math

import numpy as np
import torch
from torch import Tensor


def relative_error(out: Tensor | np.ndarray, ref: Tensor | np.ndarray) -> float:
    """Return ‖out − ref‖ / ‖ref‖ in float64.

    Args:
        out: the result to judge, of any dtype.
        ref: the reference, of the same shape.

    Returns:
        0.0 where both are equal. NaN where `out` has a NaN. Infinity where only the reference is all zeros.

    Raises:
        ValueError: the shapes differ.
    """
    out, ref = _same_shape(out, ref)
    difference, norm = (out - ref).norm().item(), ref.norm().item()
    if norm == 0:
        return math.inf if difference > 0 else difference
    return difference / norm


def psnr(a: Tensor | np.ndarray, b: Tensor | np.ndarray, peak: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio 10 · log₁₀(peak² / mean((a − b)²)) in dB.

    Args:
        a: a picture or clip, such as uint8 of shape (frames, height, width, 3).
        b: another one of the same shape.
        peak: the largest value that a pixel can have.

    Returns:
        Infinity where both are equal.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = _same_shape(a, b)
    error = (a - b).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _same_shape(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Return both as float64 tensors of one device; refuse shapes that would broadcast."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape:
        raise ValueError(f"shapes are {tuple(a.shape)} and {tuple(b.shape)}. Expected equal shapes.")
    return a.double(), b.to(a.device).double()
