"""Define nano's latents, and run the VAE over a whole clip for training.

Encoder and decoder are trained apart, towards fixed latents. A latent is the projection of a cell of 4×8×8 pixels on
the first 16 principal components of such cells. The first frame is repeated four times for cells of its own. So the
latents are well conditioned from the first step, and encoder, decoder and transformer can be trained at the same time.
`python -m recipes.nano.latents` measures the components on drawn clips and writes them beside this file.

`AutoencoderKLWan` goes through a clip in chunks of four frames with a cache, which costs seven times the launches on a
GPU. Its `decode` clamps to [-1, 1], where saturated colours get no gradient. Inside `whole_clip()` its modules run over
all frames at once, without the clamp. The result is the same, because the modules are causal.
"""

import random
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from safetensors.torch import load_file, save_file

from .models import LATENT_CHANNELS, VAE
from .world import TRAINING_SCENES, draw, indices

BASIS = Path(__file__).with_name("basis.safetensors")


def cells(clips: torch.Tensor) -> torch.Tensor:
    """Return the cells of clips (B, 3, 4n+1, H, W) → (B, n+1, H/8, W/8, 768)."""
    clips = torch.cat([clips[:, :, :1].expand(-1, -1, 3, -1, -1), clips], dim=2)
    b, c, t, h, w = clips.shape
    x = clips.view(b, c, t // 4, 4, h // 8, 8, w // 8, 8)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t // 4, h // 8, w // 8, c * 4 * 64)


def clips_of(cells: torch.Tensor) -> torch.Tensor:
    """Return the clips of cells; the inverse of `cells`."""
    b, n, h, w, _ = cells.shape
    x = cells.view(b, n, h, w, 3, 4, 8, 8).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(b, 3, 4 * n, 8 * h, 8 * w)[:, :, 3:]


class Basis:
    """Map clips (B, 3, 4n+1, H, W) to the principal components (B, 16, n+1, H/8, W/8), each of variance 1."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.mean, self.project = (t.to(device) for t in map(load_file(BASIS).get, ("mean", "project")))
        self.back = torch.linalg.pinv(self.project)

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        return ((cells(clips) - self.mean) @ self.project).permute(0, 4, 1, 2, 3)

    def clips(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the clips (B, 3, 4n+1, H, W) that the components stand for: blurred, but cheap."""
        return clips_of(latents.permute(0, 2, 3, 4, 1) @ self.back + self.mean)


def measure_basis(count: int = 1024) -> None:
    """Write the principal components of `count` training clips, each of variance 1, to basis.safetensors."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    total, outer, number = torch.zeros(768).double(), torch.zeros(768, 768).double(), 0
    for _ in range(count // 32):
        x = cells(draw(indices(rng.choices(TRAINING_SCENES, k=32)), generator)).reshape(-1, 768).double()
        total, outer, number = total + x.sum(0), outer + x.T @ x, number + len(x)
    mean = total / number
    values, vectors = torch.linalg.eigh(outer / number - mean.outer(mean))
    project = vectors[:, -LATENT_CHANNELS:] / values[-LATENT_CHANNELS:].sqrt()
    save_file({"mean": mean.float(), "project": project.flip(1).float().contiguous()}, BASIS)
    print(f"variance kept: {values[-LATENT_CHANNELS:].sum() / values.sum():.5f}")


def _resample_whole_clip(self, x, feat_cache=None, feat_idx=None):
    """Run `WanResample.forward` over all frames (B, C, T, H, W). The first frame skips the temporal convolution"""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], self.time_conv(x[:, :, 1:])
        b, _, t, h, w = rest.shape
        rest = rest.view(b, 2, -1, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, -1, 2 * t, h, w)
        x = torch.cat([first, rest], dim=2)
    b, c, t, h, w = x.shape
    x = self.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
    x = x.view(b, t, *x.shape[1:]).transpose(1, 2)
    if self.mode == "downsample3d" and t > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


@contextmanager
def whole_clip():
    """Let `encode` and `decode` process a clip in one pass inside this context."""
    chunked, WanResample.forward = WanResample.forward, _resample_whole_clip
    try:
        yield
    finally:
        WanResample.forward = chunked


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Return mean and log variance (B, 32, n+1, H/8, W/8) of the latents of clips (B, 3, 4n+1, H, W)."""
    return vae.quant_conv(vae.encoder(patchify(clips, VAE["patch_size"])))


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Return the clips (B, 3, 4n+1, 8h, 8w) of latents (B, 16, n+1, h, w), not clamped."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), VAE["patch_size"])


if __name__ == "__main__":
    measure_basis()
