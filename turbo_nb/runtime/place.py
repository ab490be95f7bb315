"""What goes where in memory, decided before anything is loaded.

`choose(sizes, arch, …)` takes the first plan whose peak fits the budget; they go from all on the GPU to one block at a
time. A plan is data: print it, or ask for another by name. `apply` carries it out, by `offload` or diffusers' own.
"""

from typing import TYPE_CHECKING

from .plan import Plan

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def transformers(pipeline: "DiffusionPipeline") -> "list[torch.nn.Module]":
    """The pipeline's transformer, or its two experts."""
    return [t for t in (pipeline.transformer, getattr(pipeline, "transformer_2", None)) if t is not None]


def apply(plan: Plan, pipeline: "DiffusionPipeline") -> None:
    """Put the pipeline's transformers and VAE where the plan has them; `text.PromptEncoder` has the text encoder."""
    from . import expert_swap

    device = plan.device
    expert_swap.end_turns(pipeline)
    if plan.vae_tiling:
        pipeline.vae.enable_tiling()
    else:
        pipeline.vae.disable_tiling()
    if plan.offload == "model":
        expert_swap.take_turns(pipeline, (*transformers(pipeline), pipeline.vae), device)
    elif plan.offload == "group":
        import torch

        for transformer in transformers(pipeline):
            transformer.to("cpu")
            transformer.enable_group_offload(
                onload_device=torch.device(device),
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=True,
            )
        pipeline.vae.to(device)
    else:
        for module in (*transformers(pipeline), pipeline.vae):
            module.to(device)
