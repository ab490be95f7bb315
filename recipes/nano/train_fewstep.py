"""Stage 4: sparse-linear attention, and one to four steps.

The teacher is stage 3's transformer with dense attention. It walks the probability-flow ODE from pure noise in small
steps, past the four noise levels of the rCM schedule. Where it ends, its shapes are in the right place but not quite
round or straight, so the end is made exact: the place, size and speed that it painted are measured, and the clip of
the prompt with these numbers is painted anew. What the teacher chose stays, what it got wrong goes.

In the first round the student, the same weights with SLA, learns to jump from each of the four levels straight to
that exact end: a consistency model on the rCM levels, taught by the teacher's whole path. In the second round half of
each batch is practice: the student samples as it will be used, and each of its own jumps is made exact in the same
way, so that it learns to go on from what it really paints.

A quarter of the steps run dense attention on the same weights, so that both attentions stay usable.
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
from .training import CAPTION_LENGTH, TEXT_LENGTH, Average, Progress, embed, tokens
from .world import ASSET, measure, paint

TOPK = 0.15
CHUNK = 120  # clips that are sampled at once
SHAPE = (16, 7, 16, 16)  # of one clip's latents
SUBSTEPS = (4, 4, 5, 7)  # of the teacher, from each rCM level to the next


def load(attention_type: str, device: torch.device) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel.from_pretrained(ASSET / "transformer", torch_dtype=torch.float32)
    set_attention_type(transformer, attention_type, TOPK)
    transformer.to(device)
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


def full(text: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, CAPTION_LENGTH, TEXT_DIM), zero-padded to TEXT_LENGTH as the pipeline does"""
    return F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1])).float()


def velocity(model, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Model's velocity at states x (B, …) of noise level sigma, () or (B,); inputs as the sampler gives them."""
    return model(x.bfloat16().float(), timesteps(sigma).expand(len(x)), text, return_dict=False)[0].float()


@torch.no_grad()
def walk(teacher, text: torch.Tensor, x: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher's ODE from x (B, …) at rCM level `start` → states at this and later levels (B, n, …), and the end"""
    levels, passed = [*rcm_sigmas(x.device).tolist(), 0.0], []
    for (high, low), substeps in list(zip(pairwise(levels), SUBSTEPS, strict=True))[start:]:
        passed.append(x)
        for sigma, following in pairwise(torch.linspace(high, low, substeps + 1, device=x.device)):
            x = x - (sigma - following) * velocity(teacher, x, sigma, text)
    return torch.stack(passed, 1), x


@torch.no_grad()
def jump(student, text: torch.Tensor, noise: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rCM sampler (SDE) from noise (B, …) → its states, and where it jumped from each (B, steps, …)"""
    levels, passed, ends = [*rcm_sigmas(noise.device)[:steps], torch.zeros((), device=noise.device)], [], []
    x = noise * levels[0]
    for sigma, following in pairwise(levels):
        end = x - sigma * velocity(student, x, sigma, text)
        passed.append(x)
        ends.append(end)
        x = (1 - following) * end + following * torch.randn_like(x)
    return torch.stack(passed, 1), torch.stack(ends, 1)


@torch.no_grad()
def exact(data: Data, rows: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """latents (B, …) of clips that try to show the captions `rows` → latents of the clips that do, as near as can be.

    A caption that leaves attributes open says too little to paint from: its latents stay as they are.
    """
    attributes = data.captions.attributes[rows]
    clips = paint(attributes, measure(data.basis.clips(data.raw(latents)), attributes))
    complete = data.captions.named[rows].all(1).view(-1, 1, 1, 1, 1)
    return torch.where(complete, data.normalised(clips), latents)


class Lessons:
    """What to learn from: a state at an rCM level, that level, and where to end from there."""

    def __init__(self, text: torch.Tensor):
        self.text = text  # (captions, CAPTION_LENGTH, TEXT_DIM)
        self.rows, self.levels, self.states, self.ends = [], [], [], []

    def add(self, rows: torch.Tensor, level: int, states: torch.Tensor, ends: torch.Tensor) -> None:
        self.rows.append(rows)
        self.levels.append(torch.full_like(rows, level))
        self.states.append(states.bfloat16())
        self.ends.append(ends.bfloat16())

    def close(self) -> "Lessons":
        for name in ("rows", "levels", "states", "ends"):
            setattr(self, name, torch.cat(getattr(self, name)))
        return self

    def sample(self, batch: int) -> tuple[torch.Tensor, ...]:
        pick = torch.randint(len(self.rows), (batch,), device=self.rows.device)
        return self.text[self.rows[pick]], self.levels[pick], self.states[pick].float(), self.ends[pick].float()


class Practice:
    """Lessons from the student's own sampling: new ones after every REPEAT batches."""

    REPEAT = 4

    def __init__(self, student, data: Data, text: torch.Tensor):
        self.student, self.data, self.text, self.left = student, data, text, 0

    @torch.no_grad()
    def sample(self, batch: int) -> tuple[torch.Tensor, ...]:
        if not self.left:
            self.lessons, self.left = Lessons(self.text), self.REPEAT
            rows = torch.randint(len(self.text), (batch,), device=self.text.device)
            noise = torch.randn(batch, *SHAPE, device=self.text.device)
            passed, ends = jump(self.student, full(self.text[rows]), noise, 4)
            for level in range(4):
                self.lessons.add(rows, level, passed[:, level], exact(self.data, rows, ends[:, level]))
            self.lessons.close()
        self.left -= 1
        return self.lessons.sample(batch)


class Judge:
    """Detector scores of latents for the prompts of evaluate.py, decoded by the shipped VAE."""

    def __init__(self, text_encoder, data: Data, device: torch.device, count: int = CHUNK):
        self.scenes, texts = zip(*prompts(count), strict=True)
        self.text = embed(text_encoder, tokens(list(texts)).to(device)).detach()
        self.vae, self.data = load_vae().to(device), data
        self.noise = torch.randn(count, *SHAPE, device=device)

    @torch.no_grad()
    def __call__(self, name: str, sampler) -> None:
        clips = []
        for text, noise in zip(self.text.split(CHUNK), self.noise.split(CHUNK), strict=True):
            clips.append(self.vae.decode(self.data.raw(sampler(text, noise).float())).sample)
        frames = ((torch.cat(clips) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
        print(f"[judge] {name}:", {k: round(100 * v, 1) for k, v in score(frames, self.scenes).items()}, flush=True)


def main(paths: int, seconds: float, batch: int, lr: float, device: torch.device) -> None:
    torch.manual_seed(4)
    text_encoder = load_text_encoder().to(device).eval().requires_grad_(False)
    data = Data(device, captions=paths, seed=4)
    judge = Judge(text_encoder, data, device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    rcm = rcm_sigmas(device)
    teacher = load("original", device).eval().requires_grad_(False)
    student, dense = load("sla", device).train(), load("original", device).train()
    share_parameters(student, dense)

    def judge_sampler(name: str, model, steps: int) -> None:
        judge(f"{name}, {steps} rCM steps", lambda text, noise: jump(model, text, noise, steps)[1][:, -1])

    def train(sources: list[Lessons | Practice], lr: float, name: str) -> None:
        average = Average(student)
        optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        progress = Progress(100_000, seconds, optimizer, name)
        for step in progress:
            with amp:
                parts = zip(*(source.sample(batch // len(sources)) for source in sources), strict=True)
                text, level, x, end = (torch.cat(part) for part in parts)
                sigma = rcm[level]
                out = velocity(dense if step % 4 == 3 else student, x, sigma, full(text))
            loss = F.mse_loss(out, (x - end) / sigma.view(-1, 1, 1, 1, 1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            average.update()
            progress.log(loss=loss)
        average.apply()
        with amp:
            for count in (4, 2, 1):
                judge_sampler("student, SLA", student, count)
            judge_sampler("student, dense", dense, 4)

    with amp:
        judge("teacher, 20 ODE steps", lambda text, noise: walk(teacher, text, noise * rcm[0])[1])
        judge_sampler("teacher", teacher, 4)
        chunks = torch.arange(paths, device=device).split(min(CHUNK, paths))
        text = torch.cat(
            [embed(text_encoder, data.captions.tokens[rows])[:, :CAPTION_LENGTH].bfloat16() for rows in chunks]
        )
        taught, moved = Lessons(text), 0.0
        for rows in chunks:
            passed, end = walk(teacher, full(text[rows]), torch.randn(len(rows), *SHAPE, device=device) * rcm[0])
            better = exact(data, rows, end)
            moved += F.mse_loss(better, end).item() / len(chunks)
            for level in range(4):
                taught.add(rows, level, passed[:, level], better)
    taught.close()
    print(f"[fewstep] {paths} paths of the teacher; mean square from its ends to exact ones {moved:.3f}", flush=True)
    train([taught], lr, "round 1")
    train([taught, Practice(student, data, text)], lr / 2, "round 2")
    save(student, "transformer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=24_000, help="of the teacher")
    parser.add_argument("--seconds", type=float, default=150, help="of training, in each round")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", type=torch.device, default="cuda")
    main(**vars(parser.parse_args()))
