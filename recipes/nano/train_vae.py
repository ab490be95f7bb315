"""Stage 2: train the VAE over whole clips of 25 frames. The encoder learns the fixed latents, the decoder the clips.

Half of the decoder's batch comes from the encoder, and its gradient reaches the encoder too. The other half is the
exact latents with a little noise, because the transformer's latents will not be perfect either.
"""

import argparse
import random

import torch
import torch.nn.functional as F

from turbo_nb.ops.compare import psnr

from .latents import Basis, decode, encode, whole_clip
from .models import LATENT_CHANNELS, load_vae, new_vae, save
from .training import Progress
from .world import ASSET, HELD_OUT_SCENES, TRAINING_SCENES, draw, indices


@torch.no_grad()
def evaluate(vae, device: torch.device, count: int = 64) -> dict[str, float]:
    """Return the PSNR (dB) of unseen clips by diffusers' encode and decode, and the latents' mean and std."""
    generator = torch.Generator(device).manual_seed(99)
    scenes = indices(random.Random(99).choices(HELD_OUT_SCENES, k=count)).to(device)
    clips, latents, rebuilt = [], [], []
    for part in scenes.split(16):
        clips.append(draw(part, generator))
        latents.append(vae.encode(clips[-1]).latent_dist.mode())
        rebuilt.append(vae.decode(latents[-1]).sample)
    clips, latents, rebuilt = torch.cat(clips), torch.cat(latents), torch.cat(rebuilt)
    frames = {name: psnr(rebuilt[:, :, i], clips[:, :, i], peak=2) for name, i in (("first", 0), ("last", -1))}
    worst = min(psnr(a, b, peak=2) for a, b in zip(rebuilt, clips, strict=True))
    return {"all": psnr(rebuilt, clips, peak=2), **frames, "worst clip": worst, "latent std": latents.std().item()}


def statistics(device: torch.device, basis: Basis, count: int = 512) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel over training clips."""
    generator, rng = torch.Generator(device).manual_seed(98), random.Random(98)
    parts = [basis(draw(indices(rng.choices(TRAINING_SCENES, k=32)).to(device), generator)) for _ in range(count // 32)]
    latents = torch.cat(parts).transpose(0, 1).flatten(1)
    return latents.mean(1).tolist(), latents.std(1).tolist()


def main(steps: int, batch: int, lr: float, resume: bool, compile: bool, device: torch.device, seconds: float) -> None:
    torch.manual_seed(2)
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator(device).manual_seed(2)
    basis = Basis(device)
    scenes = indices(TRAINING_SCENES).to(device)
    vae = (load_vae() if resume else new_vae(*statistics(device, basis))).to(device).train()
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)

    def losses(clips: torch.Tensor, target: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = encode(vae, clips).split(LATENT_CHANNELS, dim=1)
        half = len(clips) // 2
        seen = torch.cat([mean[:half], target[half:] + noise[half:]]).to(clips.dtype)
        rebuilt = decode(vae, seen).float()
        paint = F.mse_loss(rebuilt, clips) + 0.1 * F.l1_loss(rebuilt, clips)
        agree = F.mse_loss(mean.float(), target) + 1e-4 * F.mse_loss(log_variance.float(), torch.full_like(target, -6))
        return paint, agree

    if compile:
        losses = torch.compile(losses, dynamic=False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    progress = Progress(steps, seconds, optimizer, "vae")
    with whole_clip():
        for _ in progress:
            rows = torch.randint(len(scenes), (batch,), device=device, generator=generator)
            clips = draw(scenes[rows], generator)
            target = basis(clips)
            level = 0.3 * torch.rand(batch, 1, 1, 1, 1, device=device, generator=generator)
            noise = level * torch.randn(target.shape, device=device, generator=generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                paint, agree = losses(clips, target, noise)
            optimizer.zero_grad()
            (paint + 0.1 * agree).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            progress.log(paint=paint, agree=agree)

    vae.eval()
    save(vae, "vae")
    print("reconstruction PSNR in dB:", {k: round(v, 2) for k, v in evaluate(load_vae().to(device), device).items()})
    print("written to", ASSET.name, "/ vae")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--resume", action="store_true", help="start from the shipped weights")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--device", type=torch.device, default="cuda")
    main(**vars(parser.parse_args()))
