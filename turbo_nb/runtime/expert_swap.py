"""Models that share a GPU: one works there while the weights of the others stay in pinned main memory.

The model offload of diffusers and accelerate copies weights back to main memory, though they have not changed. It also
keeps them in pageable memory, from which copies are several times slower. Here the weights are packed once into a few
pinned pieces. Onloading copies the pieces to the GPU; offloading copies nothing back. Where a transformer does not fit,
some of its blocks are streamed through the GPU. Each model has a hook of accelerate's, so that diffusers finds and
removes it as usual.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from .block_stream import BlockStream
from .packed import pack, tensors_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MARGIN = 1e9  # bytes of the GPU that prefetching leaves free


def enable(
    pipeline: "DiffusionPipeline", modules: Sequence[nn.Module], device: str | torch.device, keep: int | None = None
) -> None:
    """Onload each of the pipeline's modules when it is called, and offload the others.

    While one module works, as much of the next one as fits beside it is prefetched on a stream of its own.
    `pipeline.maybe_free_model_hooks()`, which diffusers calls at the end of a run, offloads all of them. Main memory
    that cannot be pinned warns.

    Args:
        pipeline: whose modules these are.
        modules: in the order of their work.
        device: where they work.
        keep: how many blocks of a transformer stay on the device while it works; the others are streamed through it.
            None: all.
    """
    hooks, pinned = [], torch.device(device).type == "cuda"
    for module in modules:
        hooks.append(ExpertSwapHook(module, device, pinned, keep if hasattr(module, "blocks") else None))
        pinned = hooks[-1].pinned
    for hook, module in zip(hooks, modules, strict=True):
        hook.others = [other for other in hooks if other is not hook]
        add_hook_to_module(module, hook)
    for hook, following in pairwise(hooks):
        hook.following = following

    def free() -> None:
        type(pipeline).maybe_free_model_hooks(pipeline)
        for hook in hooks:
            hook.offload()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    pipeline.maybe_free_model_hooks = free


def disable(pipeline: "DiffusionPipeline") -> None:
    """Undo `enable`, if it was called. All weights are in main memory afterwards."""
    pipeline.remove_all_hooks()
    vars(pipeline).pop("maybe_free_model_hooks", None)


class ExpertSwapHook(ModelHook):
    """Onloads and offloads the weights of one module.

    Args:
        module: whose weights are moved into pinned memory.
        device: where it works.
        pinned: whether to pin main memory. Afterwards: whether the system allowed it.
        keep: as in `enable`; the module's `blocks` are then moved by a `BlockStream`.
    """

    def __init__(self, module: nn.Module, device: str | torch.device, pinned: bool, keep: int | None = None):
        self.execution_device = torch.device(device)  # diffusers reads this name
        self.onloaded = False
        self.others: Sequence[ExpertSwapHook] = ()
        self.following: ExpertSwapHook | None = None
        self._module, self._blocks = module, [] if keep is None else list(module.blocks)
        self._copies: list[Tensor] = []  # of the first ranges, on the device
        self._moved: list[tuple[Tensor, Tensor]] = []  # a tensor on the device, and its data in main memory
        self._stream = self._prefetched = None  # of prefetching, and the event after it
        self._group, *groups = pack([self._tensors(), *map(tensors_of, self._blocks)], pinned)
        self.pinned = pinned and all(part.is_pinned() for group in (self._group, *groups) for part in group.ranges)
        self._block_stream = BlockStream(self._blocks, groups, keep, device) if self._blocks else None

    def _tensors(self) -> list[Tensor]:
        """Return the module's tensors without those of streamed blocks"""
        streamed = {tensor for block in self._blocks for tensor in tensors_of(block)}
        return [tensor for tensor in tensors_of(self._module) if tensor not in streamed]

    def pre_forward(self, module: nn.Module, *args, **kwargs) -> tuple[tuple, dict]:
        """Onload the module, or prefetch the next one. accelerate calls this before the module's forward."""
        for other in self.others:
            if other.onloaded or other is not self.following:
                other.offload()
        if not self.onloaded:
            self._onload()
        elif self.following:  # from the second call on, because only then the peak of memory is known
            self.following.prefetch(free_at_peak(self.execution_device))
        return args, kwargs

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Offload, and let go of the pinned memory. accelerate calls this when the hook is removed."""
        self.offload()
        self.others, self.following = (), None
        if self._block_stream:
            self._block_stream.remove()
        self._group = self._block_stream = None
        return module

    def prefetch(self, room: float) -> None:
        """Begin to copy the next ranges, as many as `room` bytes hold, while the device does other work."""
        if self.execution_device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self.execution_device)
        self._copy(room, self._stream)
        if self._stream and self._copies:
            self._prefetched = self._stream.record_event()

    def _copy(self, room: float = math.inf, stream: "torch.cuda.Stream | None" = None) -> None:
        for part in self._group.ranges[len(self._copies) :]:
            if part.nbytes > room:
                break
            room -= part.nbytes
            copy = torch.empty_like(part, device=self.execution_device)  # owned by the stream that will use it
            if stream:
                stream.wait_stream(torch.cuda.current_stream(self.execution_device))  # its memory may be in use still
            with torch.cuda.stream(stream) if stream else nullcontext():
                copy.copy_(part, non_blocking=True)
            self._copies.append(copy)

    def _wait(self) -> None:
        """Let the device wait for the prefetched ranges"""
        if self._prefetched:
            torch.cuda.current_stream(self.execution_device).wait_event(self._prefetched)
            self._prefetched = None

    def _onload(self) -> None:
        if self._block_stream:
            self._block_stream.begin()
        self._wait()
        self._copy()
        self._group.bind(self._tensors(), self._copies, self.execution_device, self._moved)
        self.onloaded = True

    def offload(self) -> None:
        """Drop the copies on the device, after the device has waited for those being prefetched."""
        self._wait()
        for tensor, data in self._moved:
            tensor.data = data
        self._moved.clear()
        self._copies.clear()
        if self._block_stream:
            self._block_stream.release()
        self.onloaded = False


def free_at_peak(device: torch.device) -> float:
    """Return the bytes of a GPU that were free at this run's peak of memory, less MARGIN. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device) - MARGIN
