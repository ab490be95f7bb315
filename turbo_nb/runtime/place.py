"""Carry out a memory plan: put a pipeline's transformers and VAE where it says."""

from typing import TYPE_CHECKING

from ..machine import probe
from .plan import Plan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


def transformers(pipeline: "DiffusionPipeline") -> "list[nn.Module]":
    """Return the pipeline's transformer, or its two experts (high-noise, low-noise)."""
    return [t for t in (pipeline.transformer, getattr(pipeline, "transformer_2", None)) if t is not None]


def place(pipeline: "DiffusionPipeline", plan: Plan) -> None:
    """Move the transformers and the VAE; `text.PromptEncoder` moves the text encoder.

    An earlier plan is undone first.
    """
    from . import expert_swap

    if plan.device != "cpu" and plan.offload != "none":
        probe.avoid_fragments()

    expert_swap.disable(pipeline)
    if plan.vae_tiling:
        pipeline.vae.enable_tiling()
    else:
        pipeline.vae.disable_tiling()
    modules = *transformers(pipeline), pipeline.vae
    if plan.offload == "none":
        for module in modules:
            module.to(plan.device)
    else:
        expert_swap.enable(pipeline, modules, plan.device, plan.keep if plan.offload == "group" else None)
