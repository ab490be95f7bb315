"""Models that share a GPU: one works there while the weights of the others stay in pinned main memory.

The model offload of diffusers and accelerate copies weights back to main memory, though they have not changed. It also
keeps them in pageable memory, from which copies are several times slower. Here the weights are packed once into a few
pinned pieces. Onloading copies the pieces to the GPU; offloading copies nothing back. Each model has a hook of
accelerate's, so that diffusers finds and removes it as usual.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from .pinned import pinned_empty

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PIECE = 2**29  # bytes; a power of two, because torch rounds pinned memory up to one
ALIGNED = 512  # bytes; each tensor begins at a multiple, as in memory of CUDA's allocator
MARGIN = 1e9  # bytes of the GPU that prefetching leaves free


def enable(pipeline: "DiffusionPipeline", modules: Sequence[nn.Module], device: str | torch.device) -> None:
    """Onload each of the pipeline's modules when it is called, and offload the others.

    While one module works, as much of the next one as fits beside it is prefetched on a stream of its own.
    `pipeline.maybe_free_model_hooks()`, which diffusers calls at the end of a run, offloads all of them. Main memory
    that cannot be pinned warns.

    Args:
        pipeline: whose modules these are.
        modules: in the order of their work.
        device: where they work.
    """
    hooks, pinned = [], torch.device(device).type == "cuda"
    for module in modules:
        hooks.append(ExpertSwapHook(module, device, pinned))
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
    """

    def __init__(self, module: nn.Module, device: str | torch.device, pinned: bool):
        self.execution_device = torch.device(device)  # diffusers reads this name
        self.pinned, self.onloaded = pinned, False
        self.others: Sequence[ExpertSwapHook] = ()
        self.following: ExpertSwapHook | None = None
        self._module = module
        self._pieces: list[Tensor] = []  # bytes in main memory
        self._copies: list[Tensor] = []  # of the first pieces, on the device
        self._packed: list[tuple[Tensor, Tensor, int, int]] = []  # tensor, its data in main memory, its piece, offset
        self._moved: list[tuple[Tensor, Tensor]] = []  # a tensor on the device, and its data in main memory
        self._stream = self._prefetched = None  # of prefetching, and the event after it
        self._pack()

    def _tensors(self) -> list[Tensor]:
        return list(dict.fromkeys((*self._module.parameters(), *self._module.buffers())))

    def _pack(self) -> None:
        """Move every tensor of the module into a piece"""
        groups, size = [[]], 0
        for tensor in self._tensors():
            room = math.ceil(tensor.nbytes / ALIGNED) * ALIGNED
            if groups[-1] and size + room > PIECE:
                groups.append([])
                size = 0
            extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if tensor.numel() == extent:  # dense, in whatever order of strides
                groups[-1].append((tensor, size))
                size += room
        for group in filter(None, groups):
            last, start = group[-1]
            self._pieces.append(pinned_empty(start + last.nbytes, pin=self.pinned))
            self.pinned = self._pieces[-1].is_pinned()  # where the system refused once, it is not asked again
            for tensor, start in group:  # this frees the old memory before the next piece is allocated
                data = _part(self._pieces[-1], start, tensor)
                data.copy_(tensor.data)
                tensor.data = data
                self._packed.append((tensor, data, len(self._pieces) - 1, start))

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
        """Offload, and let go of the pinned pieces. accelerate calls this when the hook is removed."""
        self.offload()
        self.others, self.following = (), None
        self._pieces, self._packed = [], []
        return module

    def prefetch(self, room: float) -> None:
        """Begin to copy the next pieces, as many as `room` bytes hold, while the device does other work."""
        if self.execution_device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self.execution_device)
        self._copy(room, self._stream)
        if self._stream and self._copies:
            self._prefetched = self._stream.record_event()

    def _copy(self, room: float = math.inf, stream: "torch.cuda.Stream | None" = None) -> None:
        for piece in self._pieces[len(self._copies) :]:
            if piece.nbytes > room:
                break
            room -= piece.nbytes
            copy = torch.empty_like(piece, device=self.execution_device)  # owned by the stream that will use it
            if stream:
                stream.wait_stream(torch.cuda.current_stream(self.execution_device))  # its memory may be in use still
            with torch.cuda.stream(stream) if stream else nullcontext():
                copy.copy_(piece, non_blocking=True)
            self._copies.append(copy)

    def _wait(self) -> None:
        """Let the device wait for the prefetched pieces"""
        if self._prefetched:
            torch.cuda.current_stream(self.execution_device).wait_event(self._prefetched)
            self._prefetched = None

    def _onload(self) -> None:
        self._wait()
        self._copy()
        places = {tensor: (data, piece, start) for tensor, data, piece, start in self._packed}
        for tensor in self._tensors():
            self._moved.append((tensor, tensor.data))
            data, piece, start = places.get(tensor, (None, None, None))
            if data is not None and data.data_ptr() == tensor.data_ptr():
                tensor.data = _part(self._copies[piece], start, tensor)
            else:  # added or replaced after packing, such as a LoRA's
                tensor.data = tensor.data.to(self.execution_device)
        self.onloaded = True

    def offload(self) -> None:
        """Drop the copies on the device, after the device has waited for those being prefetched."""
        self._wait()
        for tensor, data in self._moved:
            tensor.data = data
        self._moved.clear()
        self._copies.clear()
        self.onloaded = False


def _part(piece: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the bytes of a piece from `start` on as a tensor of this dtype, shape and strides"""
    return piece[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())


def free_at_peak(device: torch.device) -> float:
    """Return the bytes of a GPU that were free at this run's peak of memory, less MARGIN. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device) - MARGIN
