"""Decode random latents, or encode a random clip, with Wan's VAE.

The check compares a mode's bf16 result for a small clip with two results of the plain modules. Against float32 it may
err 1.1 times as much as the plain bf16 result does, which is 0.8 dB of PSNR. Against plain bf16 its PSNR is at least
45 dB. The column `check` gives both, for a range of [-1, 1].
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from turbo_nb.checkpoint import load_vae
from turbo_nb.errors import InputError
from turbo_nb.fused import vae as fused_vae
from turbo_nb.ops.compare import psnr

from . import harness
from .harness import Check, Job

# Name → a function that changes the VAE
MODES = {"eager": lambda vae: None, "channels_last": fused_vae.channels_last, "fused": fused_vae.fuse}
PSNR = 45  # dB, the least of a mode's result against the plain bf16 result


def jobs(
    size: tuple[int, int, int], modes: list[str], path: Path | None, *,
    encoding: bool = False, base_dim: int, check_size: tuple[int, int, int], device: str, runs: int, warmup: int,
) -> Iterator[Job]:  # fmt: skip
    """Yield a job for each mode, of decoding or of encoding.

    Args:
        size: width, height in pixels and frames of the timed clip. check_size: the same of the checked clip.
        modes: names of `MODES`.
        path: weights of a VAE. None: random weights of width base_dim.

    Raises:
        InputError: a mode is unknown.
    """
    work, make_input = (encode, pictures) if encoding else (decode, latents)
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}. Expected one of {', '.join(MODES)}.")
    exact = load_vae(path, device=device) if path else random_vae(base_dim, device)
    plain = nn.Module.to(
        copy.deepcopy(exact), torch.bfloat16
    )  # not diffusers' `to`, because it warns without reason here
    small = make_input(plain, check_size)
    ref = work(exact, small)
    usual = work(plain, small)
    own = harness.relative_error(usual, ref)
    del exact

    def job(mode: str) -> Job:
        def run():
            vae = copy.deepcopy(plain)
            MODES[mode](vae)
            out = work(vae, small)
            to_bf16 = psnr(out, usual, peak=2)
            check = Check(
                error=harness.relative_error(out, ref) if to_bf16 >= PSNR else math.inf,
                limit=harness.limit(None if mode == "eager" else own),
                what=f"PSNR {psnr(out, ref, peak=2):.1f} dB against float32, {to_bf16:.1f} against plain bf16 (at "
                f"least {PSNR}), {'x'.join(map(str, check_size))}; plain bf16 {own:.2e}",
            )
            clip = make_input(vae, size)
            return harness.measure(lambda: work(vae, clip), device, runs=runs, warmup=warmup), check

        weights, width = (str(path.name), "") if path else ("random", f", base_dim {base_dim}")
        shape = "x".join(map(str, size))
        return Job(work=f"vae {work.__name__}{width}, bf16", shape=shape, mode=mode, weights=weights, run=run)

    yield from map(job, modes)


def random_vae(base_dim: int, device: str) -> AutoencoderKLWan:
    """Return Wan2.1's VAE (base_dim 96), or a narrower VAE, with random float32 weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoencoderKLWan(base_dim=base_dim).requires_grad_(False).eval()


def latents(vae: AutoencoderKLWan, size: tuple[int, int, int]) -> Tensor:
    """Return random latents of a clip, (1, z_dim, T, H/8, W/8), bf16."""
    width, height, frames = size
    generator = torch.Generator(vae.device).manual_seed(1)
    shape = (1, vae.config.z_dim, 1 + (frames - 1) // 4, height // 8, width // 8)
    return torch.randn(shape, generator=generator, device=vae.device).to(torch.bfloat16)


@torch.inference_mode()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return frames (1, 3, 4T − 3, H, W) in [-1, 1], in the VAE's dtype."""
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def pictures(vae: AutoencoderKLWan, size: tuple[int, int, int]) -> Tensor:
    """Return a clip as image-to-video encodes it: a random picture, then grey ones; (1, 3, T, H, W), bf16."""
    width, height, frames = size
    generator = torch.Generator(vae.device).manual_seed(1)
    clip = torch.zeros(1, 3, frames, height, width, device=vae.device)
    clip[:, :, 0].uniform_(-1, 1, generator=generator)
    return clip.to(torch.bfloat16)


@torch.inference_mode()
def encode(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """Return the mean of the latents of a clip, (1, z_dim, T, H/8, W/8), in the VAE's dtype."""
    return vae.encode(clip.to(vae.dtype)).latent_dist.mean
