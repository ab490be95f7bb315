"""What the other ranks do: rank 0's commands, one after the other."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..machine import probe
from ..runtime import warm_up
from ..runtime.graphs import StepGraphs
from ..runtime.place import transformers
from ..runtime.stages import current_device
from ..runtime.steps import Tally
from . import strips, ulysses
from .ranks import Member, Team

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def device_of(rank: int) -> str:
    """Return the device of a rank: the GPU with its number, or the CPU where ranks share it."""
    return "cpu" if probe.ranks_share_cpu() else f"cuda:{rank}"


def split(pipeline: "DiffusionPipeline", link: Team | Member) -> Team | None:
    """Let a pipeline's steps and its VAE run on all ranks. Call it on every rank, before `runtime.place`.

    Returns:
        The link where it is the team, None on the other ranks.
    """
    for number, transformer in enumerate(transformers(pipeline)):
        ulysses.split(transformer, ulysses.Ulysses(link, number))
    if isinstance(link, Member):
        return None
    pipeline.vae.strips = strips.Strips(link)
    return link


def follow(model: Any, member: Member) -> None:
    """Run rank 0's commands with this rank's copy of the model (a `LoadedModel`), until rank 0 ends this rank."""
    pipeline = model.pipeline
    models, graphs = transformers(pipeline), StepGraphs()
    replaced, compiling, clips = ExitStack(), ExitStack(), {}
    with torch.inference_mode(), current_device(member.device):
        for command, arguments in member.commands():
            match command:
                case "step":
                    number, *told = arguments
                    models[number].ulysses.follow(models[number], *told)
                case "strips":
                    apply_forward_hook(strips.follow)(pipeline.vae, clips, *arguments, member.group)
                case "chunk":
                    (number,) = arguments
                    clips[number]()
                case "compile":  # the commands up to "compiled" only compile
                    compiling.enter_context(warm_up.compiling())
                case "compiled":
                    compiling.close()
                    member.say_ready()
                case "graphs":  # a clip begins: with the bytes that later stages need
                    later, attentions, live = arguments
                    strips.keep(clips, live)
                    replaced.close()
                    for transformer, attention in zip(models, attentions, strict=True):
                        transformer.ulysses.take(transformer, attention)
                    replaced.enter_context(graphs.replacing(models, model.plan, Tally(), later=later))
                case "drop_graphs":
                    graphs.out_of_memory()
                case "follow":
                    (plan,) = arguments
                    graphs.release()
                    model.follow(plan.for_rank(member.device))
                case "merge":
                    (loras,) = arguments
                    model.merge(model.resolved.with_loras(loras))
