"""Share captions as tensors, the learning-rate schedule and a log line among the stages."""

import math
import random
import time

import numpy as np
import torch

from .world import TRAINING_SCENES, caption, indices

TEXT_LENGTH = 512  # tokens, to which WanPipeline pads a prompt
CAPTION_LENGTH = 192  # bytes of the longest training caption, at least
END, OFFSET = 1, 3  # ByT5's end token, and its id of byte 0


def tokens(texts: list[str]) -> torch.Tensor:
    """Return ByT5's byte tokens with the end token, zero-padded, (N, CAPTION_LENGTH) uint8."""
    rows = np.zeros((len(texts), CAPTION_LENGTH), dtype=np.uint8)
    for row, text in zip(rows, texts, strict=True):
        data = text.encode()[: CAPTION_LENGTH - 1]
        row[: len(data)] = np.frombuffer(data, dtype=np.uint8) + OFFSET
        row[len(data)] = END
    return torch.from_numpy(rows)


class Captions:
    """Return tokens and attribute numbers of `count` captions, and which attributes each caption names."""

    def __init__(self, count: int, device: torch.device, seed: int = 0):
        rng = random.Random(seed)
        scenes = rng.choices(TRAINING_SCENES, k=count)
        texts, named = zip(*(caption(scene, rng) for scene in scenes), strict=True)
        self.tokens, self.attributes = tokens(list(texts)).to(device), indices(scenes).to(device)
        self.named = torch.tensor(named, device=device)

    def sample(self, batch: int) -> torch.Tensor:
        return torch.randint(len(self.tokens), (batch,), device=self.tokens.device)


def embed(text_encoder: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return embeddings (B, TEXT_LENGTH, TEXT_DIM) of tokens (B, N), zero after the prompt as in WanPipeline."""
    mask = tokens > 0
    states = text_encoder(tokens.int(), attention_mask=mask.int()).last_hidden_state * mask[..., None]
    return torch.nn.functional.pad(states, (0, 0, 0, TEXT_LENGTH - tokens.shape[1]))


class Average:
    """An exponential moving average of the parameters of some modules."""

    def __init__(self, *modules: torch.nn.Module, decay: float = 0.999):
        self.live = [p for module in modules for p in module.parameters()]
        self.mean, self.decay, self.count = [p.detach().clone() for p in self.live], decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 9))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the averaged parameters into the modules."""
        torch._foreach_copy_(self.live, self.mean)


class Progress:
    """Count steps. The learning rate warms up over `warm_up` steps and falls as a cosine to zero at the last step.

    `seconds` is a brake: on a slower machine the schedule ends there, finished, instead of being cut.
    """

    def __init__(
        self,
        steps: int,
        seconds: float,
        optimizer: torch.optim.Optimizer,
        name: str,
        *,
        warm_up: int = 100,
        every: int = 200,
    ):
        self.warm_up, self.every = warm_up, every
        self.steps, self.seconds, self.optimizer, self.name = steps, seconds, optimizer, name
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.step, self.begin = 0, time.monotonic()

    @property
    def done(self) -> float:
        return max(self.step / self.steps, (time.monotonic() - self.begin) / self.seconds)

    def __iter__(self):
        while (done := self.done) < 1:
            factor = min((self.step + 1) / self.warm_up, 0.5 + 0.5 * math.cos(math.pi * done))
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            yield self.step
            self.step += 1
        print(f"[{self.name}] {self.step} steps in {time.monotonic() - self.begin:.0f} s", flush=True)

    def log(self, **figures: float | torch.Tensor) -> None:
        """Print every `every`-th step, and read the tensors only then, because reading waits for the GPU."""
        if self.step % self.every == 0:
            text = "  ".join(f"{name} {torch.as_tensor(value).detach().item():.4f}" for name, value in figures.items())
            print(f"[{self.name}] {self.step:6d}  {time.monotonic() - self.begin:5.0f} s  {text}", flush=True)
