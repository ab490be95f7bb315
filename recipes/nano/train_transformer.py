"""Stage 3: train the transformer on rectified flow with dense attention, and the text encoder at a lower rate.

Half of the noise levels are the four of the rCM schedule. The other half is uniform, because many-step sampling is the
reference for the few-step model.
"""

import argparse
import math

import torch

from .latents import Basis
from .models import load_text_encoder, load_transformer, load_vae, new_transformer, save
from .training import Average, Captions, Progress, embed
from .world import draw


def rcm_sigmas(device: torch.device) -> torch.Tensor:
    """Return the four noise levels of the rCM schedule at sigma_max 80."""
    t = torch.tensor([math.atan(80), 1.5, 1.4, 1.0], device=device)
    return t.sin() / (t.sin() + t.cos())


def timesteps(sigmas: torch.Tensor) -> torch.Tensor:
    """Return the timestep of a noise level, as the model sees it: sigma · 1000 in bf16."""
    return (sigmas * 1000).bfloat16().float()


class Data:
    """Endless batches of (latents, text embeddings) on a device, drawn as they are needed."""

    def __init__(self, device: torch.device, captions: int, seed: int):
        self.captions, self.basis = Captions(captions, device, seed), Basis(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        config = load_vae().config
        self.mean, self.std = (
            torch.tensor(t, device=device).view(1, -1, 1, 1, 1) for t in (config.latents_mean, config.latents_std)
        )

    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the normalised latents of the captions' scenes (B, 16, 7, 16, 16)."""
        return self.normalised(draw(self.captions.attributes[rows], self.generator))

    def normalised(self, clips: torch.Tensor) -> torch.Tensor:
        return (self.basis(clips) - self.mean) / self.std

    def raw(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of a clip by the shipped VAE, and back."""
        return latents * self.std + self.mean


def main(steps: int, batch: int, lr: float, captions: int, resume: bool, device: torch.device, seconds: float) -> None:
    torch.manual_seed(3)
    data = Data(device, captions, seed=3)
    text_encoder = load_text_encoder().to(device).train()
    transformer = load_transformer() if resume else new_transformer()
    transformer.to(device).train()
    if device.type == "cuda":
        transformer.compile_repeated_blocks(fullgraph=True)
    average = Average(transformer, text_encoder)
    groups = [{"params": transformer.parameters()}, {"params": text_encoder.parameters(), "lr": 0.2 * lr}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    rcm = rcm_sigmas(device)
    progress = Progress(steps, seconds, optimizer, "transformer")
    for _ in progress:
        rows = data.captions.sample(batch)
        latents = data.latents(rows)
        sigma = torch.rand(batch, device=device)
        sigma[: batch // 2] = rcm[torch.randint(4, (batch // 2,), device=device)]
        level = sigma.view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = ((1 - level) * latents + level * noise).bfloat16().float()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text = embed(text_encoder, data.captions.tokens[rows])
            velocity = transformer(noisy, timesteps(sigma), text, return_dict=False)[0]
        error = (velocity.float() - (noise - latents)).square().mean((1, 2, 3, 4))
        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        average.update()
        progress.log(rcm=error[: batch // 2].mean(), uniform=error[batch // 2 :].mean())

    average.apply()
    save(transformer, "transformer")
    save(text_encoder, "text_encoder")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--resume", action="store_true", help="start from the shipped weights")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--device", type=torch.device, default="cuda")
    main(**vars(parser.parse_args()))
