"""Images in, mp4 with metadata out (imageio-ffmpeg), several clips in one picture, and previews of latents."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def fit_preview(latents: "torch.Tensor", frames: "np.ndarray") -> list[list[float]]:
    """The linear map latents → RGB that comes nearest to a decoded clip, by least squares.

    latents (1, C, T, h, w) as the transformer makes them; frames (4T − 3, 8h, 8w, 3) uint8, what the VAE makes of them.
    Returns C + 1 rows of 3 in units of 8-bit RGB, the last row what is added: the `factors` of `preview`.
    """
    import torch

    _, channels, count, height, width = latents.shape
    clip = torch.from_numpy(frames).double()
    clip = torch.cat([clip[:1].expand(3, -1, -1, -1), clip])  # the first latent frame stands for one frame, not four
    cells = clip.view(count, 4, height, 8, width, 8, 3).mean((1, 3, 5)).view(-1, 3)
    known = latents[0].double().cpu().permute(1, 2, 3, 0).reshape(-1, channels)
    known = torch.cat([known, torch.ones_like(known[:, :1])], 1)
    return torch.linalg.lstsq(known, cells, driver="gelsd").solution.tolist()


def preview(latents: "torch.Tensor", factors: list[list[float]]) -> "np.ndarray":
    """Latents (1, C, T, h, w) → small frames (T, h, w, 3) uint8, without the VAE. factors: as by `fit_preview`."""
    import torch

    *rows, bias = torch.tensor(factors, dtype=torch.float32)
    colours = torch.einsum("cthw,cr->thwr", latents[0].float().cpu(), torch.stack(rows)) + bias
    return colours.round().clamp(0, 255).to(torch.uint8).numpy()


def animation(frames: "np.ndarray", fps: float) -> bytes:
    """Frames (T, H, W, 3) uint8 as an animated WebP that repeats, for an <img>."""
    from PIL import Image

    first, *rest = map(Image.fromarray, frames)
    out = io.BytesIO()
    first.save(out, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=80)
    return out.getvalue()
