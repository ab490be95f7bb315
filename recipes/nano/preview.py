"""Fit the colours of the live preview: a linear map from latents to RGB, written to preview.json."""

import json
import random

import numpy as np
import torch

from turbo_nb.video import preview

from .models import load_vae, write_sums
from .world import ASSET, TRAINING_SCENES, draw, indices


@torch.no_grad()
def main(count: int = 64) -> None:
    """Fit the map over `count` drawn clips, and write it beside the VAE."""
    vae = load_vae().eval()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    scenes = indices(random.Random(3).choices(TRAINING_SCENES, k=count))
    clips = draw(scenes, torch.Generator().manual_seed(3))  # (N, 3, T, H, W)
    latents = torch.cat([(vae.encode(clip[None]).latent_dist.mode() - mean) / std for clip in clips])
    frames = clips.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    # The clips side by side are one wide clip.
    wide = torch.cat(list(latents), dim=3)[None]
    factors = preview.fit_preview(wide, np.concatenate(list(frames), axis=2))
    rounded = [[round(value, 2) for value in row] for row in factors]
    (ASSET / "preview.json").write_text(json.dumps(rounded) + "\n", encoding="utf-8")
    write_sums()
    cells = np.concatenate(list(frames), axis=2)[::4, 3::8, 3::8].astype(float)
    error = np.abs(preview.preview(wide, rounded) - cells).mean()
    print(f"mean difference to the clips' own pixels: {error:.1f} of 255")


if __name__ == "__main__":
    main()
