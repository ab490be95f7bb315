"""The colours of previews: those known for a VAE, or those learned from its first clip."""

from typing import TYPE_CHECKING

from .. import generation
from ..files.resolve import ResolvedModel
from ..pipeline import LoadedModel
from ..video import preview

if TYPE_CHECKING:
    import numpy as np
    import torch

PART = 32  # sides of the part of a latent frame from which colours are learned before the first clip is decoded
Factors = list[list[float]]  # as `video.preview` has them


class Colours:
    """Factors that turn the latents of loaded models into colours."""

    def __init__(self):
        self._learned: dict[tuple, Factors] = {}  # by the VAE's means

    def of(self, model: LoadedModel) -> Factors | None:
        """Return what is known or learned of a model's latents; None: nothing yet."""
        config = model.pipeline.vae.config
        return preview.factors_for(model.spec, config) or self._learned.get(tuple(config.latents_mean))

    def learn(self, model: LoadedModel, denoised: "torch.Tensor", frames: "np.ndarray") -> None:
        """Learn from the latents and the frames of a model's first clip."""
        if self.of(model) is None:
            self._learned[tuple(model.pipeline.vae.config.latents_mean)] = preview.fit_preview(denoised, frames)

    def guess(self, model: LoadedModel, denoised: "torch.Tensor") -> Factors | None:
        """Return colours from a decoded part of the first frame of latents (1, C, T, h, w), where none are known.

        A plan that offloads models would move the transformer for it, so there the first clip has no preview.
        """
        if (known := self.of(model)) or model.plan.offload != "none":
            return known
        top, left = (max(0, (side - PART) // 2) for side in denoised.shape[-2:])
        part = denoised[:, :, :1, top : top + PART, left : left + PART]
        return preview.fit_preview(part, generation.decode(model.pipeline, part))


def are_known(resolved: ResolvedModel) -> bool:
    """Return whether previews need no clip to learn from: the released models have Wan2.1's VAE."""
    return resolved.spec.preview is not None or bool(resolved.spec.files and resolved.options.vae is None)
