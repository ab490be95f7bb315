"""Models that take turns on the GPU, their weights in page-locked main memory.

diffusers' and accelerate's model offload copies weights back when a model leaves, though they have not changed, and
from pageable memory, which the driver copies at a fraction of the bus's speed. Here the weights are packed once into a
few page-locked pieces: coming is a copy of these, leaving is none. Everything else is as accelerate has it: a hook of
its kind on each model, which diffusers heeds and removes.
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

PIECE = 2**29  # bytes; page-locked memory is handed out in powers of two
ALIGNED = 512  # bytes between the tensors of a piece, as the allocator of CUDA has it
MARGIN = 1e9  # bytes of the GPU that an expert which is fetched ahead leaves free


def take_turns(pipeline: "DiffusionPipeline", modules: Sequence[nn.Module], device: str | torch.device) -> None:
    """Have each of the pipeline's modules come to `device` when it is called, and the others leave.

    Modules stand in the order of their work: while the first expert works, as much of the second as fits beside it is
    fetched on a stream of its own. `pipeline.maybe_free_model_hooks()`, which diffusers calls at the end of a run, has
    all of them leave; `pipeline.remove_all_hooks()` ends it. Main memory that cannot be page-locked is told.
    """
    turns, pinned = [], torch.device(device).type == "cuda"
    for module in modules:
        turns.append(Turn(module, device, pinned))
        pinned = turns[-1].pinned
    for turn, module in zip(turns, modules, strict=True):
        turn.others = [other for other in turns if other is not turn]
        add_hook_to_module(module, turn)
    for turn, following in pairwise(turns):
        turn.following = following

    def free() -> None:
        type(pipeline).maybe_free_model_hooks(pipeline)
        for turn in turns:
            turn.leave()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    pipeline.maybe_free_model_hooks = free


def end_turns(pipeline: "DiffusionPipeline") -> None:
    """Undo `take_turns`, if that was done: all weights are in main memory."""
    pipeline.remove_all_hooks()
    vars(pipeline).pop("maybe_free_model_hooks", None)


class Turn(ModelHook):
    """The weights of one module: at home in main memory, on the device while it is `there`.

    pinned: whether to page-lock main memory; afterwards, whether that went well.
    """

    def __init__(self, module: nn.Module, device: str | torch.device, pinned: bool):
        self.execution_device = torch.device(device)
        self.pinned, self.there = pinned, False
        self.others: Sequence[Turn] = ()
        self.following: Turn | None = None
        self._module = module
        self._pieces: list[Tensor] = []  # bytes, at home
        self._copies: list[Tensor] = []  # of the first pieces, on the device
        self._packed: list[tuple[Tensor, Tensor, int, int]] = []  # a tensor, its data at home, its piece, and where
        self._away: list[tuple[Tensor, Tensor]] = []  # a tensor on the device, and its data at home
        self._stream = self._fetched = None  # on which pieces are fetched ahead, and when they are there
        self._pack()

    def _tensors(self) -> list[Tensor]:
        return list(dict.fromkeys((*self._module.parameters(), *self._module.buffers())))

    def _pack(self) -> None:
        """Give every tensor of the module its place in a piece"""
        groups, size = [[]], 0
        for tensor in self._tensors():
            room = math.ceil(tensor.nbytes / ALIGNED) * ALIGNED
            if groups[-1] and size + room > PIECE:
                groups.append([])
                size = 0
            extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if tensor.numel() == extent:  # dense, in whatever order
                groups[-1].append((tensor, size))
                size += room
        for group in filter(None, groups):
            last, start = group[-1]
            self._pieces.append(pinned_empty(start + last.nbytes, pin=self.pinned))
            self.pinned = self._pieces[-1].is_pinned()  # where the system refused once, it is not asked again
            for tensor, start in group:  # what held it is given back before the next piece is taken
                home = _part(self._pieces[-1], start, tensor)
                home.copy_(tensor.data)
                tensor.data = home
                self._packed.append((tensor, home, len(self._pieces) - 1, start))

    def pre_forward(self, module: nn.Module, *args, **kwargs) -> tuple[tuple, dict]:
        """accelerate's hook: before the module works."""
        for other in self.others:
            if other.there or other is not self.following:
                other.leave()
        if not self.there:
            self._come()
        elif self.following:  # what the first call took at most is known now
            self.following.fetch(room_on(self.execution_device))
        return args, kwargs

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """accelerate's hook: it is taken off, and lets go of the page-locked memory: the weights move to other."""
        self.leave()
        self.others, self.following = (), None
        self._pieces, self._packed = [], []
        return module

    def fetch(self, room: float) -> None:
        """Begin to copy the next pieces, as many as `room` bytes hold, beside what the device is at."""
        if self.execution_device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self.execution_device)
        self._copy(room, self._stream)
        if self._stream and self._copies:
            self._fetched = self._stream.record_event()

    def _copy(self, room: float = math.inf, stream: "torch.cuda.Stream | None" = None) -> None:
        for piece in self._pieces[len(self._copies) :]:
            if piece.nbytes > room:
                break
            room -= piece.nbytes
            copy = torch.empty_like(piece, device=self.execution_device)  # of the stream that will use it
            if stream:
                stream.wait_stream(torch.cuda.current_stream(self.execution_device))  # its memory may be in use yet
            with torch.cuda.stream(stream) if stream else nullcontext():
                copy.copy_(piece, non_blocking=True)
            self._copies.append(copy)

    def _wait(self) -> None:
        """Have the device wait for what was fetched ahead"""
        if self._fetched:
            torch.cuda.current_stream(self.execution_device).wait_event(self._fetched)
            self._fetched = None

    def _come(self) -> None:
        self._wait()
        self._copy()
        places = {tensor: (home, piece, start) for tensor, home, piece, start in self._packed}
        for tensor in self._tensors():
            self._away.append((tensor, tensor.data))
            home, piece, start = places.get(tensor, (None, None, None))
            if home is not None and home.data_ptr() == tensor.data_ptr():
                tensor.data = _part(self._copies[piece], start, tensor)
            else:  # a LoRA's, or one that was changed
                tensor.data = tensor.data.to(self.execution_device)
        self.there = True

    def leave(self) -> None:
        """Forget the copies on the device; what fetched them ahead is waited for there."""
        self._wait()
        for tensor, home in self._away:
            tensor.data = home
        self._away.clear()
        self._copies.clear()
        self.there = False


def _part(piece: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of a piece from `start` on, as a tensor of this dtype, shape and order"""
    return piece[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())


def room_on(device: torch.device) -> float:
    """Bytes of a GPU that are free when as much is in use as was at most in this run; none on a CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device) - MARGIN
