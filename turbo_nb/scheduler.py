"""The rCM scheduler: 1 to 4 steps without guidance (rCM, arXiv:2510.08431; TurboDiffusion).

It works in diffusers' `WanPipeline` and `WanImageToVideoPipeline`:

    scheduler.seed(0)
    pipeline(prompt, latents=scheduler.start_latents(shape), num_inference_steps=4, guidance_scale=1.0)

The scheduler keeps the generator, because the pipelines never pass one to `step`. Without one, the noise of the steps
comes from the latents of the first step, so that equal starts give equal clips. Latents stay float64 between steps,
except the start, which the pipelines cast to float32.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .errors import InputError

MAX_STEPS = 4
MIDDLE_TIMES = (1.5, 1.4, 1.0)  # trig-flow times after the first


class RCMScheduler(SchedulerMixin, ConfigMixin):
    """Few-step sampling of a TurboDiffusion model.

    Args:
        sigma_max: the first noise level, as tan of the trig-flow time; 80 for text-to-video, 200 for image-to-video.
            Larger is sharper and less diverse.
        ode: follow the ODE instead of drawing new noise each step. Sharper and less robust.
        num_train_timesteps: scale of a timestep; the two-expert pipelines read it.

    Attributes:
        sigmas: after `set_timesteps(n)` (n + 1,) float64, the noise levels sin t / (sin t + cos t), the last one 0.
        timesteps: (n,) float32, sigma · 1000 rounded to bf16, because the models saw that in training.
        denoised: after each step the latents without noise, as the model estimates them; for previews.

    Raises:
        InputError: sigma_max is not a number above tan(1.5).
    """

    order = 1
    init_noise_sigma = 1.0  # because start_latents() scales the noise

    @register_to_config
    def __init__(self, sigma_max: float = 80.0, ode: bool = False, num_train_timesteps: int = 1000):
        if not (math.isfinite(sigma_max) and sigma_max > math.tan(MIDDLE_TIMES[0])):
            least = math.tan(MIDDLE_TIMES[0])
            raise InputError(
                f"sigma_max is {sigma_max}. Expected a number above {least:.1f}. Use 80 for T2V or 200 for I2V."
            )
        self.generator: torch.Generator | Sequence[torch.Generator] | None = None
        self._from_start: torch.Generator | None = None
        self.sigmas = self.timesteps = None
        self.num_inference_steps: int | None = None
        self.denoised: Tensor | None = None
        self._index = 0

    def seed(self, seed: int, device: str | torch.device = "cpu") -> None:
        """Start a new sequence of noise. "cpu" gives the same on every machine; "cuda" repeats upstream's seeds."""
        self.generator = torch.Generator(device).manual_seed(seed)

    @contextmanager
    def drawing_from(self, generator: torch.Generator | Sequence[torch.Generator] | None) -> Iterator[None]:
        """Draw noise from a generator, or from one for each clip, inside this context. None changes nothing."""
        before = self.generator
        self.generator = before if generator is None else generator
        try:
            yield
        finally:
            self.generator = before

    def _noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        generator = self.generator or self._from_start
        each = generator if isinstance(generator, Sequence) else [generator]
        part = (shape[0] // len(each), *shape[1:])
        drawn = [_drawn(part, one, device) for one in each]
        return torch.cat(drawn) if len(drawn) > 1 else drawn[0]

    def start_latents(self, shape: tuple[int, ...], device: str | torch.device = "cpu") -> Tensor:
        """Return noise of the first level: shape (B, C, T, H, W), float64."""
        self._from_start = None
        first = math.atan(self.config.sigma_max)
        return self._noise(shape, device) * (math.sin(first) / (math.sin(first) + math.cos(first)))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the noise levels of 1 to 4 steps. Raises InputError for any other number."""
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= MAX_STEPS:
            raise InputError(f"num_steps is {num_inference_steps}. Expected 1 to {MAX_STEPS} for an rCM model.")
        times = [math.atan(self.config.sigma_max), *MIDDLE_TIMES][:num_inference_steps]
        t = torch.tensor([*times, 0.0], dtype=torch.float64)
        self.sigmas = t.sin() / (t.sin() + t.cos())
        self.timesteps = (
            (self.sigmas[:-1] * self.config.num_train_timesteps).to(torch.bfloat16).to(device, torch.float32)
        )
        self.num_inference_steps = num_inference_steps
        self._index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the next step; the pipelines call this before the first one."""
        self._index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step (rCM, arXiv:2510.08431).

        SDE: x ← (1 − σ′)·(x − σ·v) + σ′·noise. ODE: x ← x − (σ − σ′)·v. The last SDE step draws noise and multiplies
        it by σ′ = 0, because upstream's generator advances there, too.

        Args:
            model_output: the velocity v, (B, C, T, H, W).
            timestep: not used; the scheduler counts the steps.
            sample: x, of the same shape.
            return_dict: return a `SchedulerOutput` and not a tuple.

        Returns:
            The next x in float64, in a `SchedulerOutput` or a tuple.
        """
        sigma, following = self.sigmas[self._index].item(), self.sigmas[self._index + 1].item()
        self._index += 1
        if self._index == 1 and self.generator is None:
            self._from_start = torch.Generator().manual_seed(_seed_of(sample))
        sample, velocity = sample.double(), model_output.double()
        self.denoised = sample - sigma * velocity
        if self.config.ode:
            sample = sample - (sigma - following) * velocity
        else:
            noise = self._noise(sample.shape, sample.device)
            sample = (1 - following) * self.denoised + following * noise
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


def _seed_of(latents: Tensor) -> int:
    """Return a seed that depends on every bit of the latents"""
    data = latents.detach().float().cpu().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:7])


def _drawn(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return noise in float64 on a device, drawn in float32 where the generator is"""
    drawn_on = generator.device if generator else torch.device("cpu")
    from_cpu = drawn_on.type == "cpu" and torch.device(device).type == "cuda"
    try:  # pinned, because a copy from pageable memory waits for all earlier steps
        noise = torch.empty(shape, dtype=torch.float32, device=drawn_on, pin_memory=from_cpu)
    except RuntimeError:  # the system refuses to pin more
        noise = torch.empty(shape, dtype=torch.float32, device=drawn_on)
    return noise.normal_(generator=generator).to(device, non_blocking=True).double()
