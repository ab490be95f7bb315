"""Previews of latents without the VAE: by a linear map from each latent pixel to RGB, or by the tiny decoder."""

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..catalog import ModelSpec
    from ..tiny_decoder import TinyDecoder

DECODED_PIXELS = 208 * 120  # of a frame that the tiny decoder makes; larger ones take too long to encode after a step

# latents_mean of Wan2.1's VAE, by which it is recognised (diffusers, AutoencoderKLWan)
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
# Normalised latents of Wan2.1's VAE → RGB from -1 to 1: a row for each channel, then what is added.
# Source: comfyanonymous/ComfyUI, comfy/latent_formats.py, class Wan21 (latent_rgb_factors and their bias).
WAN21_FACTORS = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
    (-0.1835, -0.0868, -0.3360),
)  # fmt: skip


def factors_for(spec: "ModelSpec", vae_config: Mapping) -> list[list[float]] | None:
    """Return the `factors` of `preview` that are known before a model's first clip.

    Args:
        spec: the model.
        vae_config: the configuration of its VAE, with `latents_mean`.

    Returns:
        The factors that ship with the model, or the published ones for Wan2.1's VAE. None for any other VAE:
        `fit_preview` finds them from the first clip.
    """
    if spec.preview is not None:
        return spec.preview
    if not is_wan21(vae_config):
        return None
    *rows, bias = WAN21_FACTORS
    return [[127.5 * value for value in row] for row in (*rows, [value + 1 for value in bias])]


def is_wan21(vae_config: Mapping) -> bool:
    """Return whether a VAE with this configuration, with `latents_mean`, is Wan2.1's."""
    mean = vae_config["latents_mean"]
    return len(mean) == len(WAN21_MEAN) and all(abs(a - b) <= 1e-3 for a, b in zip(mean, WAN21_MEAN, strict=True))


def fit_preview(latents: "torch.Tensor", frames: "np.ndarray") -> list[list[float]]:
    """Fit the linear map from latents to RGB that comes nearest to a decoded clip, by least squares.

    Args:
        latents: (1, C, T, h, w), as the transformer makes them.
        frames: (4T - 3, 8h, 8w, 3) uint8, as the VAE decodes these latents.

    Returns:
        The `factors` of `preview`: C + 1 rows of 3 in units of 8-bit RGB, the last row is added.
    """
    import torch

    _, channels, count, height, width = latents.shape
    clip = torch.from_numpy(frames).double()
    clip = torch.cat([clip[:1].expand(3, -1, -1, -1), clip])  # because the first latent frame is one frame, not four
    cells = clip.view(count, 4, height, 8, width, 8, 3).mean((1, 3, 5)).view(-1, 3)
    known = latents[0].double().cpu().permute(1, 2, 3, 0).reshape(-1, channels)
    known = torch.cat([known, torch.ones_like(known[:, :1])], 1)
    return torch.linalg.lstsq(known, cells, driver="gelsd").solution.tolist()


def preview(latents: "torch.Tensor", factors: list[list[float]]) -> "np.ndarray":
    """Turn latents into small frames.

    Args:
        latents: (1, C, T, h, w), as the transformer makes them.
        factors: of `factors_for` or `fit_preview`.

    Returns:
        Frames (T, h, w, 3) uint8.
    """
    import torch

    *rows, bias = torch.tensor(factors, dtype=torch.float32)
    colours = torch.einsum("cthw,cr->thwr", latents[0].float().cpu(), torch.stack(rows)) + bias
    return colours.round().clamp(0, 255).to(torch.uint8).numpy()


def decoded(latents: "torch.Tensor", tiny: "TinyDecoder") -> "np.ndarray":
    """Decode latents into small frames.

    Args:
        latents: (1, C, T, h, w), as the transformer makes them.
        tiny: decodes one latent frame at a time, because that takes the least memory.

    Returns:
        Frames (T, H, W, 3) uint8 of at most `DECODED_PIXELS`.
    """
    import torch
    import torch.nn.functional as F

    height, width = (8 * side for side in latents.shape[-2:])
    factor = max(1, math.ceil(math.sqrt(height * width / DECODED_PIXELS)))
    parts = [F.avg_pool2d(part[0, :, -1].float(), factor) for part in tiny.chunks(latents, 1)]
    frames = torch.stack(parts).add(1).mul(127.5).round().clamp(0, 255)
    return frames.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def animation(frames: "np.ndarray", fps: float) -> bytes:
    """Return frames (T, H, W, 3) uint8 as an animated WebP that repeats, for an <img>."""
    from PIL import Image

    first, *rest = map(Image.fromarray, frames)
    out = io.BytesIO()
    first.save(out, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=80, method=0)
    return out.getvalue()
