"""Carry out a memory plan: put a pipeline's transformers and VAE where it says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .plan import Plan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")  # diffusers' names


def transformers(pipeline: "DiffusionPipeline") -> "list[nn.Module]":
    """Return the pipeline's transformer, or its two experts (high-noise, low-noise)."""
    return [t for t in (pipeline.transformer, getattr(pipeline, "transformer_2", None)) if t is not None]


@contextmanager
def held_still(pipeline: "DiffusionPipeline", plan: Plan) -> Iterator[None]:
    """Keep the weights where they can be written inside this context: on the GPU, or in main memory under offload."""
    import torch

    pipeline.maybe_free_model_hooks()
    if plan.offload != "group":
        yield
        return
    torch.cuda.synchronize(plan.device)  # because blocks may still be prefetched
    for transformer in transformers(pipeline):
        remove_group_offload(transformer)
    try:
        yield
    finally:
        place(pipeline, plan)


def remove_group_offload(transformer: "nn.Module") -> None:
    """Undo diffusers' `enable_group_offload`. All weights are in main memory afterwards."""
    from diffusers.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    for name in GROUP_HOOKS:
        registry.remove_hook(name, recurse=True)
    transformer.to("cpu")


def place(pipeline: "DiffusionPipeline", plan: Plan) -> None:
    """Move the transformers and the VAE; `text.PromptEncoder` moves the text encoder.

    An earlier plan is undone first.
    """
    import torch

    from . import expert_swap

    expert_swap.disable(pipeline)
    if plan.vae_tiling:
        pipeline.vae.enable_tiling()
    else:
        pipeline.vae.disable_tiling()
    if plan.offload == "model":
        expert_swap.enable(pipeline, (*transformers(pipeline), pipeline.vae), plan.device)
    elif plan.offload == "group":
        for transformer in transformers(pipeline):
            transformer.to("cpu")
            transformer.enable_group_offload(
                onload_device=torch.device(plan.device),
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=True,
            )
        pipeline.vae.to(plan.device)
    else:
        for module in (*transformers(pipeline), pipeline.vae):
            module.to(plan.device)
