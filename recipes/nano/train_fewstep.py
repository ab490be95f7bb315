"""Stage 4: sparse-linear attention, and one to four steps.

A few-step student has to say from pure noise which clip it will paint. The prompt leaves much open (place, exact size,
speed; a short one even more), and a student taught by many clips for one noise paints their mean, where a small shape
is nothing at all. So here the noise is given a meaning: the means of its channels, standard normal each, say through
the normal distribution function what the prompt leaves open. Every start noise then has one exact clip, and over all
noises the clips are spread as the training clips are.

The student, stage 3's transformer with SLA, learns to jump from each of the four rCM levels straight to that clip: from
the start noise, from the clip under fresh noise, and, after the first quarter, in half of each batch from the states
that its own sampling passes, so that it learns to go on from what it really painted.

A quarter of the steps run dense attention on the same weights, so that both attentions stay usable.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from turbo_nb.checkpoint import load_transformer

from .evaluate import LATENT_SHAPE, prompts, score
from .models import load_text_encoder, load_vae, save
from .train_transformer import Data, rcm_sigmas, timesteps
from .training import CAPTION_LENGTH, TEXT_LENGTH, Average, Progress, embed, tokens
from .world import ASSET, ATTRIBUTES, TRAINING_SCENES, indices, paint

TOPK = 0.15
SHARES = (0.4, 0.25, 0.15, 0.2)  # of the lessons, by rCM level
FREE = 5  # numbers that `paint` takes beside the attributes


def load(attention_type: str, device: torch.device) -> WanTransformer3DModel:
    transformer = load_transformer(
        ASSET / "transformer", attention_type=attention_type, sla_topk=TOPK, device=device, dtype=torch.float32
    )
    if device.type == "cuda":
        torch._dynamo.config.automatic_dynamic_shapes = False  # few sizes, each worth its own kernels
        torch._dynamo.config.recompile_limit = 64
        transformer.compile_repeated_blocks(fullgraph=True)
    return transformer


def share_parameters(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """`target` computes with the parameters of `source`."""
    for name in dict(target.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        target.get_submodule(owner)._parameters[leaf] = source.get_parameter(name)


def velocity(model, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Model's velocity at states x (B, …) of noise level sigma, () or (B,); inputs as the sampler gives them."""
    text = F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1])).float()  # zeros, as the pipeline pads it
    return model(x.bfloat16().float(), timesteps(sigma).expand(len(x)), text, return_dict=False)[0].float()


@torch.no_grad()
def sample(student, text: torch.Tensor, noise: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rCM sampler (SDE) from noise (B, …) → the states that it passes (B, steps, …), and its end (B, …)"""
    levels, passed = [*rcm_sigmas(noise.device)[:steps], torch.zeros((), device=noise.device)], []
    x = noise * levels[0]
    for sigma, following in pairwise(levels):
        passed.append(x)
        end = x - sigma * velocity(student, x, sigma, text)
        x = (1 - following) * end + following * torch.randn_like(x)
    return torch.stack(passed, 1), x


@torch.no_grad()
def ode(teacher, text: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Rectified flow from noise (B, …) to its end in equal steps (Euler)"""
    x = noise
    for sigma, following in pairwise(torch.linspace(1, 0, steps + 1, device=noise.device)):
        x = x - (sigma - following) * velocity(teacher, x, sigma, text)
    return x


def meaning(noise: torch.Tensor, attributes: torch.Tensor, named: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the clip of a start noise (B, …) shows: its attributes (B, 5), and the free numbers of `paint` (B, 5).

    The first five channel means choose the free numbers, the next five the attributes that are not `named` (B, 5); of
    these, the training scene nearest to what they choose.
    """
    count = noise[0, 0].numel()
    uniform = torch.special.ndtr(noise[:, : FREE + len(ATTRIBUTES)].mean((2, 3, 4)) * count**0.5)
    sizes = torch.tensor([len(values) for values in ATTRIBUTES.values()], device=noise.device)
    chosen = torch.where(named, attributes, (uniform[:, FREE:] * sizes).long().minimum(sizes - 1))
    scenes = indices(TRAINING_SCENES).to(noise.device)
    distance = ((chosen[:, None] - scenes).abs() * torch.where(named, 100, 1)[:, None]).sum(-1)  # (B, scenes)
    return scenes[distance.argmin(1)], uniform[:, :FREE]


class Lessons:
    """Batches of what to learn from: text, rCM level, state at this level, and the latents to end at from there."""

    REPEAT = 8  # batches from one run of the student's own sampling

    def __init__(self, data: Data, text: torch.Tensor):
        self.data, self.text, self.left = data, text, 0  # text: (captions, CAPTION_LENGTH, TEXT_DIM)
        self.sigmas = rcm_sigmas(text.device)

    def start(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Text, start noise, and the latents of the clip that the noise means."""
        captions = self.data.captions
        rows = captions.sample(batch)
        noise = torch.randn(batch, *LATENT_SHAPE, device=rows.device)
        clips = paint(*meaning(noise, captions.attributes[rows], captions.named[rows]))
        return self.text[rows], noise, self.data.normalised(clips)

    def levels(self, batch: int) -> torch.Tensor:
        return torch.multinomial(torch.tensor(SHARES, device=self.text.device), batch, replacement=True)

    def exact(self, batch: int) -> tuple[torch.Tensor, ...]:
        """States of exact clips."""
        text, noise, end = self.start(batch)
        level = self.levels(batch)
        sigma = self.sigmas[level].view(-1, 1, 1, 1, 1)
        fresh = (1 - sigma) * end + sigma * torch.randn_like(end)
        return text, level, torch.where(level.view(-1, 1, 1, 1, 1) == 0, sigma * noise, fresh), end

    def practice(self, student, batch: int) -> tuple[torch.Tensor, ...]:
        """States that the student's own sampling passed."""
        if not self.left:
            text, noise, end = self.start(batch)
            self.own, self.left = (text, sample(student, text, noise, len(SHARES))[0], end), self.REPEAT
        self.left -= 1
        text, passed, end = self.own
        level = self.levels(batch)
        return text, level, passed[torch.arange(batch, device=level.device), level], end


class Judge:
    """Detector scores of latents for the prompts of evaluate.py, decoded by the shipped VAE."""

    def __init__(self, text_encoder, data: Data, device: torch.device, count: int, chunk: int):
        self.scenes, texts = zip(*prompts(count), strict=True)
        self.text = embed(text_encoder, tokens(list(texts)).to(device))[:, :CAPTION_LENGTH]
        self.noise = torch.randn(count, *LATENT_SHAPE, device=device)
        self.vae, self.data, self.chunk = load_vae().to(device), data, chunk

    @torch.no_grad()
    def __call__(self, name: str, sampler: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        clips = []
        for text, noise in zip(self.text.split(self.chunk), self.noise.split(self.chunk), strict=True):
            clips.append(self.vae.decode(self.data.raw(sampler(text, noise).float())).sample)
        frames = ((torch.cat(clips) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
        print(f"[judge] {name}:", {k: round(100 * v, 1) for k, v in score(frames, self.scenes).items()}, flush=True)


def main(seconds: float, batch: int, lr: float, captions: int, resume: bool, judged: int, device: torch.device) -> None:
    torch.manual_seed(5 if resume else 4)
    half = batch // 2
    text_encoder = load_text_encoder().to(device).eval().requires_grad_(False)
    data = Data(device, captions, seed=5 if resume else 4)
    text = torch.cat(
        [embed(text_encoder, rows)[:, :CAPTION_LENGTH].bfloat16() for rows in data.captions.tokens.split(500)]
    )
    judge, lessons = Judge(text_encoder, data, device, judged, half), Lessons(data, text)
    student, dense = load("sla", device).train(), load("original", device).train()
    share_parameters(student, dense)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    if not resume:
        with amp:
            judge("teacher, 24 steps", lambda text, noise: ode(dense, text, noise, 24))
    average = Average(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    progress = Progress(100_000, seconds, optimizer, "fewstep")
    for step in progress:
        with amp:
            own = resume or progress.done > 0.25
            parts = [lessons.exact(half), lessons.practice(student, half) if own else lessons.exact(half)]
            words, level, x, end = (torch.cat(part) for part in zip(*parts, strict=True))
            sigma = lessons.sigmas[level]
            out = velocity(dense if step % 4 == 3 else student, x, sigma, words)
        error = (out - (x - end) / sigma.view(-1, 1, 1, 1, 1)).square().mean((1, 2, 3, 4))
        optimizer.zero_grad(set_to_none=True)
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update()
        progress.log(loss=error.mean(), first=error[level == 0].mean(), second=error[level == 1].mean())
    average.apply()
    with amp:
        for model, attention in ((student, "SLA"), (dense, "dense")):
            for count in (4, 2, 1):
                judge(f"{attention}, {count} steps", lambda text, noise: sample(model, text, noise, count)[1])  # noqa: B023
    save(student, "transformer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--captions", type=int, default=50_000)
    parser.add_argument("--resume", action="store_true", help="go on from the shipped student")
    parser.add_argument("--judged", type=int, default=192, help="prompts that the detector judges")
    parser.add_argument("--device", type=torch.device, default="cuda")
    main(**vars(parser.parse_args()))
