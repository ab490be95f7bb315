"""Stage 4: train sparse-linear attention, and sampling in one to four steps.

A few-step student must choose a clip from pure noise. The prompt leaves the place, the exact size and the speed open,
and a short prompt leaves even more open. A student that sees many clips for one noise paints their mean, and in that
mean a small shape disappears. So the noise chooses: the means of its channels are standard normal, and the normal
distribution function maps them to what the prompt leaves open. Every start noise then has one exact clip, and the clips
of all noises are spread as the training clips are.

The student is the transformer of stage 3 with SLA. It learns to jump from each of the four rCM levels straight to that
clip. It starts from the start noise and from the clip under fresh noise. After the first quarter of the training it
also starts from the states of its own sampling, because it must continue from its own pictures.

Much fresh noise hides a faint shape, and the mean over all its possible places is an empty picture again. So when a
later jump is far from the clip or only faint, place, size and speed are measured in the picture that it painted. The
clip of these numbers is then the target: the student learns to keep its best guess.

`--resume` continues from the shipped student. `--further 0.2` moves the final weights a fifth of their way further than
they were trained (model extrapolation, arXiv:2404.16792).

A quarter of the steps run dense attention on the same weights, so that both attentions stay usable.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from .evaluate import LATENT_SHAPE, prompts, score
from .models import load_text_encoder, load_transformer, load_vae, save
from .train_transformer import Data, rcm_sigmas, timesteps
from .training import CAPTION_LENGTH, TEXT_LENGTH, Average, Progress, embed, tokens
from .world import ATTRIBUTES, TRAINING_SCENES, colours, indices, measure, paint

SHARES = (0.25, 0.35, 0.2, 0.2)  # of the lessons for each rCM level
ASTRAY = 0.5  # of the contrast between shape and background: a jump with a larger error shows another clip
FREE = 5  # numbers that `paint` takes beside the attributes


def compiled(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    if next(transformer.parameters()).is_cuda:
        torch._dynamo.config.automatic_dynamic_shapes = False  # because the few sizes run faster with their own kernels
        torch._dynamo.config.recompile_limit = 64
        transformer.compile_repeated_blocks(fullgraph=True)
    return transformer


def share_parameters(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Let `target` compute with the parameters of `source`."""
    for name in dict(target.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        target.get_submodule(owner)._parameters[leaf] = source.get_parameter(name)


def velocity(model, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the velocity at states x (B, …) of noise level sigma, () or (B,), with the inputs of the sampler."""
    text = F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1])).float()  # zeros, as the pipeline pads it
    return model(x.bfloat16().float(), timesteps(sigma).expand(len(x)), text, return_dict=False)[0].float()


@torch.no_grad()
def sample(student, text: torch.Tensor, noise: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample with rCM (SDE) from noise (B, …). Returns its states, and the jump from each (B, steps, …).

    The last jump is the clip.
    """
    end, states, jumps = torch.zeros_like(noise), [], []
    for sigma in rcm_sigmas(noise.device)[:steps]:
        states.append((1 - sigma) * end + sigma * noise)
        end = states[-1] - sigma * velocity(student, states[-1], sigma, text)
        jumps.append(end)
        noise = torch.randn_like(noise)
    return torch.stack(states, 1), torch.stack(jumps, 1)


@torch.no_grad()
def ode(teacher, text: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Follow the rectified flow from noise (B, …) to its end in equal steps (Euler)."""
    x = noise
    for sigma, following in pairwise(torch.linspace(1, 0, steps + 1, device=noise.device)):
        x = x - (sigma - following) * velocity(teacher, x, sigma, text)
    return x


def meaning(noise: torch.Tensor, attributes: torch.Tensor, named: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attributes (B, 5) and the free numbers of `paint` (B, 5) that a start noise (B, …) stands for.

    The first five channel means choose the free numbers. The next five choose the attributes that are not `named`
    (B, 5). The nearest training scene gives the attributes.
    """
    count = noise[0, 0].numel()
    uniform = torch.special.ndtr(noise[:, : FREE + len(ATTRIBUTES)].mean((2, 3, 4)) * count**0.5)
    sizes = torch.tensor([len(values) for values in ATTRIBUTES.values()], device=noise.device)
    chosen = torch.where(named, attributes, (uniform[:, FREE:] * sizes).long().minimum(sizes - 1))
    scenes = indices(TRAINING_SCENES).to(noise.device)
    distance = ((chosen[:, None] - scenes).abs() * torch.where(named, 100, 1)[:, None]).sum(-1)  # (B, scenes)
    return scenes[distance.argmin(1)], uniform[:, :FREE]


def power(x: torch.Tensor) -> torch.Tensor:
    """Return the mean square (B,) of x (B, …)."""
    return x.square().flatten(1).mean(1)


@dataclass
class Batch:
    """Lessons: jump from a state at an rCM level to the latents `end`. All (B, …)."""

    text: torch.Tensor
    level: torch.Tensor
    state: torch.Tensor
    end: torch.Tensor
    blank: torch.Tensor  # one cell of the clip's background

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def error(self, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the mean square error (B,) of the velocity, weighted down for large and bright shapes."""
        exact = (self.state - self.end) / sigma.view(-1, 1, 1, 1, 1)
        return power(velocity - exact) / power(self.end - self.blank).sqrt()


class Lessons:
    """Endless batches, from exact clips and from the student's own sampling."""

    REPEAT = 8  # batches from one run of the student

    def __init__(self, data: Data, text: torch.Tensor):
        self.data, self.text, self.left = data, text, 0  # text: (captions, CAPTION_LENGTH, TEXT_DIM)
        self.sigmas = rcm_sigmas(text.device)

    def start(self, batch: int) -> tuple[torch.Tensor, ...]:
        """Return text, attributes, start noise, latents of its clip, and latents of a cell of the background."""
        captions = self.data.captions
        rows = captions.sample(batch)
        noise = torch.randn(batch, *LATENT_SHAPE, device=rows.device)
        attributes, free = meaning(noise, captions.attributes[rows], captions.named[rows])
        blank = colours(attributes)[1].expand(-1, 3, 1, 8, 8)
        end = self.data.normalised(paint(attributes, free))
        return self.text[rows], attributes, noise, end, self.data.normalised(blank)

    def levels(self, batch: int) -> torch.Tensor:
        return torch.multinomial(torch.tensor(SHARES, device=self.text.device), batch, replacement=True)

    def exact(self, batch: int) -> Batch:
        """Return lessons from start noises, and from exact clips under fresh noise."""
        text, _, noise, end, blank = self.start(batch)
        level = self.levels(batch)
        sigma = self.sigmas[level].view(-1, 1, 1, 1, 1)
        fresh = (1 - sigma) * end + sigma * torch.randn_like(end)
        state = torch.where(level.view(-1, 1, 1, 1, 1) == 0, sigma * noise, fresh)
        return Batch(text, level, state, end, blank)

    def practice(self, student, batch: int) -> Batch:
        """Return lessons from the states of the student's own sampling; a jump that is lost gets the clip it shows."""
        if not self.left:
            text, attributes, noise, end, blank = self.start(batch)
            states, jumps = sample(student, text, noise, len(SHARES))
            ends = [end]
            for jump in jumps.unbind(1)[1:]:
                shown = paint(attributes, measure(self.data.basis.clips(self.data.raw(jump)), attributes))
                astray = power(jump - end) > ASTRAY * power(end - blank)
                ends.append(torch.where(astray.view(-1, 1, 1, 1, 1), self.data.normalised(shown), end))
            self.own, self.left = (text, states, torch.stack(ends, 1), blank), self.REPEAT
        self.left -= 1
        text, states, ends, blank = self.own
        level = self.levels(batch)
        row = torch.arange(batch, device=level.device)
        return Batch(text, level, states[row, level], ends[row, level], blank)


class Judge:
    """Score latents for the prompts of evaluate.py with the detector, decoded by the shipped VAE."""

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


def main(
    seconds: float,
    batch: int,
    lr: float,
    captions: int,
    resume: bool,
    further: float,
    seed: int,
    judged: int,
    device: torch.device,
) -> None:
    torch.manual_seed(seed)
    half = batch // 2
    text_encoder = load_text_encoder().to(device).eval().requires_grad_(False)
    data = Data(device, captions, seed=seed)
    text = torch.cat(
        [embed(text_encoder, rows)[:, :CAPTION_LENGTH].bfloat16() for rows in data.captions.tokens.split(500)]
    )
    judge, lessons = Judge(text_encoder, data, device, judged, half), Lessons(data, text)
    student, dense = (compiled(load_transformer(kind).to(device)).train() for kind in ("sla", "original"))
    share_parameters(student, dense)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    if not resume:
        with amp:
            judge("teacher, 24 steps", lambda text, noise: ode(dense, text, noise, 24))
    average, start = Average(student), [p.detach().clone() for p in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    progress = Progress(100_000, seconds, optimizer, "fewstep")
    for step in progress:
        with amp:
            own = resume or progress.done > 0.25
            lesson = lessons.practice(student, batch) if own else lessons.exact(batch)
            sigma = lessons.sigmas[lesson.level]
            out = velocity(dense if step % 4 == 3 else student, lesson.state, sigma, lesson.text)
        error = lesson.error(out, sigma)
        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update()
        progress.log(**{f"level {level}": error[lesson.level == level].mean() for level in range(len(SHARES))})
    average.apply()
    with torch.no_grad():
        torch._foreach_lerp_(list(student.parameters()), start, -further)
    with amp:
        for model, attention, count in ((student, "SLA", 4), (student, "SLA", 1), (dense, "dense", 4)):
            judge(f"{attention}, {count} steps", lambda text, noise: sample(model, text, noise, count)[1][:, -1])  # noqa: B023
    save(student, "transformer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--captions", type=int, default=50_000)
    parser.add_argument("--resume", action="store_true", help="continue from the shipped student")
    parser.add_argument("--further", type=float, default=0.0, help="extrapolate the weights by this share of their way")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--judged", type=int, default=192, help="number of prompts that the detector judges")
    parser.add_argument("--device", type=torch.device, default="cuda")
    main(**vars(parser.parse_args()))
