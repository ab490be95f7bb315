"""Stage 4: sparse-linear attention, and one to four steps.

The teacher is stage 3's transformer with dense attention. From pure noise it walks the probability-flow ODE in small
steps past the four noise levels of the rCM schedule; what it passed there, and where it ended, is kept. The student,
the same weights with SLA, learns to jump from each of the four levels straight to that end (a consistency model on
the rCM levels, taught by the teacher's whole path). A quarter of the steps run dense attention on the same weights,
so that both attentions stay usable.
"""

import argparse
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from turbo_nb.sla import set_attention_type

from .evaluate import prompts, score
from .models import load_text_encoder, load_vae, save
from .train_transformer import Data, rcm_sigmas, timesteps
from .training import Average, Progress, embed, tokens
from .world import ASSET

TOPK = 0.15
SUBSTEPS = (6, 6, 8, 10)  # of the teacher, from each rCM level to the next


def load(attention_type: str, device: torch.device) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel.from_pretrained(ASSET / "transformer", torch_dtype=torch.float32)
    set_attention_type(transformer, attention_type, TOPK)
    transformer.to(device)
    if device.type == "cuda":
        transformer.compile_repeated_blocks(fullgraph=True)
    return transformer


def share_parameters(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """`target` computes with the parameters of `source`."""
    for name in dict(target.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        target.get_submodule(owner)._parameters[leaf] = source.get_parameter(name)


@torch.no_grad()
def walk(teacher, text: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher's ODE from `noise` (B, …) → states at the rCM levels (B, 4, …), and the end (B, …)"""
    levels = [*rcm_sigmas(noise.device).tolist(), 0.0]
    x, passed = noise * levels[0], []
    for (high, low), substeps in zip(pairwise(levels), SUBSTEPS, strict=True):
        passed.append(x)
        grid = torch.linspace(high, low, substeps + 1, device=noise.device)
        for sigma, following in pairwise(grid):
            velocity = teacher(x.bfloat16().float(), timesteps(sigma).expand(len(x)), text, return_dict=False)[0]
            x = x - (sigma - following) * velocity.float()
    return torch.stack(passed, 1), x


@torch.no_grad()
def jump(student, text: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """The rCM sampler (SDE) in few lines: latents (B, …) after `steps` steps."""
    levels = [*rcm_sigmas(noise.device)[:steps], torch.zeros((), device=noise.device)]
    x = noise * levels[0]
    for sigma, following in pairwise(levels):
        velocity = student(x.bfloat16().float(), timesteps(sigma).expand(len(x)), text, return_dict=False)[0]
        x = (1 - following) * (x - sigma * velocity.float()) + following * torch.randn_like(x)
    return x


class Judge:
    """Detector scores of latents for the prompts of evaluate.py, decoded by the shipped VAE."""

    def __init__(self, text_encoder, data: Data, device: torch.device, count: int = 240):
        self.scenes, texts = zip(*prompts(count), strict=True)
        self.text = embed(text_encoder, tokens(list(texts)).to(device)).detach()
        self.vae, self.mean, self.std = load_vae().to(device), data.mean, data.std
        self.noise = torch.randn(count, 16, 7, 16, 16, device=device)

    @torch.no_grad()
    def __call__(self, name: str, sampler) -> None:
        clips = []
        for text, noise in zip(self.text.split(60), self.noise.split(60), strict=True):
            clips.append(self.vae.decode(sampler(text, noise) * self.std + self.mean).sample)
        frames = ((torch.cat(clips) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
        print(f"[judge] {name}:", {k: round(100 * v, 1) for k, v in score(frames, self.scenes).items()}, flush=True)


def main(paths: int, steps: int, batch: int, lr: float, device: torch.device, seconds: float) -> None:
    torch.manual_seed(4)
    text_encoder = load_text_encoder().to(device).eval().requires_grad_(False)
    data = Data(device, captions=paths, seed=4)
    judge = Judge(text_encoder, data, device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    teacher = load("original", device).eval().requires_grad_(False)
    chunk = min(240, paths)
    with amp:
        judge("teacher, 30 ODE steps, dense", lambda text, noise: walk(teacher, text, noise)[1])
        judge("teacher, 4 rCM steps, dense", lambda text, noise: jump(teacher, text, noise, 4))
        states, ends = [], []
        for rows in torch.arange(paths, device=device).split(chunk):
            text = embed(text_encoder, data.captions.tokens[rows])
            noise = torch.randn(len(rows), 16, 7, 16, 16, device=device)
            passed, end = walk(teacher, text, noise)
            states.append(passed.bfloat16())
            ends.append(end.bfloat16())
    states, ends = torch.cat(states), torch.cat(ends)
    print(f"[fewstep] {paths} teacher paths", flush=True)

    student, dense = load("sla", device).train(), load("original", device).train()
    share_parameters(student, dense)
    average = Average(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    rcm = rcm_sigmas(device)
    progress = Progress(steps, seconds, optimizer, "fewstep")
    for step in progress:
        rows, level = torch.randint(paths, (batch,), device=device), torch.randint(4, (batch,), device=device)
        x, sigma = states[rows, level].float(), rcm[level]
        target = (x - ends[rows].float()) / sigma.view(-1, 1, 1, 1, 1)
        with amp:
            text = embed(text_encoder, data.captions.tokens[rows])
            velocity = (dense if step % 4 == 3 else student)(x, timesteps(sigma), text, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update()
        progress.log(loss=loss)

    average.apply()
    with amp:
        for count in (4, 2, 1):
            judge(f"student, {count} steps, SLA", lambda text, noise, n=count: jump(student, text, noise, n))
        judge("student, 4 steps, dense", lambda text, noise: jump(dense, text, noise, 4))
    save(student, "transformer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", type=torch.device, default="cuda")
    main(**vars(parser.parse_args()))
