"""What makes previews: the tiny decoder where it is on disk, else colours that are known for a VAE or learned."""

from typing import TYPE_CHECKING

from .. import generation
from ..errors import TurboNbError
from ..files.resolve import ResolvedModel
from ..pipeline import LoadedModel
from ..video import preview

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..tiny_decoder import TinyDecoder

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

    def frames(self, model: LoadedModel, denoised: "torch.Tensor") -> "np.ndarray | None":
        """Return small frames (T, H, W, 3) of latents (1, C, T, h, w). None: the model has no preview yet."""
        if tiny := _tiny_decoder(model):
            return preview.decoded(denoised, tiny)
        factors = self.guess(model, denoised)
        return preview.preview(denoised, factors) if factors else None

    def guess(self, model: LoadedModel, denoised: "torch.Tensor") -> Factors | None:
        """Return colours from a decoded part of the first frame of latents (1, C, T, h, w), where none are known.

        A plan that offloads models would move the transformer for it, so there the first clip has no preview.
        """
        if (known := self.of(model)) or model.plan.offload != "none":
            return known
        top, left = (max(0, (side - PART) // 2) for side in denoised.shape[-2:])
        part = denoised[:, :, :1, top : top + PART, left : left + PART]
        return preview.fit_preview(part, generation.decode(model.pipeline, part))


def _tiny_decoder(model: LoadedModel) -> "TinyDecoder | None":
    """Return the tiny decoder where it costs little: on a GPU with all models on it, and without a download"""
    if model.device == "cpu" or model.plan.offload != "none":
        return None
    try:
        return None if model.resolved.decoding("tiny").downloads else model.tiny_decoder()
    except TurboNbError:  # another VAE, or a damaged file, of which the setting `decoder` tells
        return None


def are_known(resolved: ResolvedModel) -> bool:
    """Return whether previews need no clip to learn from: the released models have Wan2.1's VAE."""
    return resolved.spec.preview is not None or bool(resolved.spec.files and resolved.options.vae is None)
