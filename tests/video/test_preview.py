"""The preview's colours: a model's own, the published ones for Wan2.1's VAE, or those of the first clip."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from turbo_nb import catalog
from turbo_nb.video import preview

WAN21 = {name: inspect.signature(AutoencoderKLWan).parameters[name].default for name in ("latents_mean", "latents_std")}
RELEASED = next(spec for spec in catalog.MODELS.values() if spec.files)


def test_wan21s_vae_has_the_published_factors():
    factors = preview.factors_for(RELEASED, WAN21)
    assert np.array(factors).shape == (17, 3)
    latents = torch.zeros(1, 16, 2, 3, 4)
    gray = preview.preview(latents, factors)
    assert gray.shape == (2, 3, 4, 3) and (gray == [104, 116, 85]).all()  # (bias + 1) * 127.5
    latents[:, 2] = 1.0
    assert (preview.preview(latents, factors) == [150, 149, 107]).all()


@pytest.mark.parametrize("mean", [[0.0] * 16, WAN21["latents_mean"][:8], [*WAN21["latents_mean"][:15], 0.0]])
def test_another_vae_has_none_before_its_first_clip(mean):
    assert preview.factors_for(RELEASED, {"latents_mean": mean}) is None


def test_a_models_own_factors_come_first():
    assert preview.factors_for(catalog.NANO, WAN21) == catalog.NANO.preview
