"""The VAE on several GPUs: each rank decodes, or encodes, a strip of the pictures' rows.

    rows of the latents        rank 0: 0 … 29 │ rank 1: 30 … 59 │ rank 2: 60 … 89, and the rows of pixels they stand for
    before each convolution    the first and the last row of each strip go into the rims of its neighbours
    middle attention           every rank gets the rows of all ranks and computes it for the whole picture
    after each chunk           rank 0 gathers the frames, or the latents

A fused convolution reads a rim of one pixel around each picture. On one GPU the rim is zero. Here the upper and the
lower rim are a neighbour's row. Our convolutions and norms compute each pixel alike, wherever it is. cuBLAS and cuDNN
choose a kernel by the number of rows, so what calls them gets all rows. Only the encoder's convolutions with stride 2
get a strip. On H100s the result has the bits of one GPU (docs/gpus.md). On a CPU it differs by rounding, because the
convolutions of a CPU sum in an order that depends on the size of the picture.
"""

from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..fused.vae import FusedDecoder, FusedEncoder, coded, takes
from .group import Group, shares

if TYPE_CHECKING:
    from .ranks import Team


class Strip:
    """This rank's rows of a clip that is decoded or encoded.

    Args:
        group: the ranks.
        rows: of the clip's latents. Each of them is one row or several rows of the tensors that the methods take.
    """

    def __init__(self, group: Group, rows: int):
        self.group, self.bounds = group, shares(rows, group.size)

    def fill(self, x: Tensor) -> None:
        """Put the neighbours' rows into the upper and lower rim of x (B, T, h + 2, W + 2, C)."""
        rank, size = self.group.rank, self.group.size
        neighbours = [other for other in (rank - 1, rank + 1) if 0 <= other < size]
        rows = {other: x[:, :, 1 if other < rank else -2].contiguous() for other in neighbours}
        received, none = {other: torch.empty_like(row) for other, row in rows.items()}, x.new_empty(0)
        self.group.exchange(*([given.get(other, none) for other in range(size)] for given in (received, rows))).wait()
        for other, row in received.items():
            x[:, :, 0 if other < rank else -1] = row

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's rows of x, whose dimension `dim` has all rows, or all pixels in the order of the rows."""
        begin, end = (bound * x.shape[dim] // self.bounds[-1] for bound in self._ends)
        return x.narrow(dim, begin, end - begin)

    def gather(self, x: Tensor, dim: int, everywhere: bool = False) -> Tensor | None:
        """Return all ranks' rows of x, whose dimension `dim` has this rank's: on rank 0, with everywhere on all ranks.

        On the other ranks it is None.
        """
        begin, end = self._ends
        counts = [(stop - start) * x.shape[dim] // (end - begin) for start, stop in pairwise(self.bounds)]
        whole = self.group.gather(x.movedim(dim, 0).contiguous(), counts, everywhere)
        return None if whole is None else whole.movedim(0, dim)

    @property
    def _ends(self) -> list[int]:
        return self.bounds[self.group.rank : self.group.rank + 2]


class Strips:
    """Decodes and encodes clips with all ranks, as rank 0 sees it; `fused.vae` calls it.

    Args:
        team: tells the other ranks.
    """

    def __init__(self, team: "Team"):
        self.team, self._numbers = team, count()

    def __reduce__(self):  # a copy of the VAE works on one GPU
        return type(None), ()

    def share(self, vae: nn.Module, name: str, x: Tensor) -> float:
        """Return the largest share of x's rows that a rank has; the arguments are those of `fused.vae.coded`.

        It is 1 where rank 0 works alone: in tiles, without our kernels, with fewer rows of latents than ranks, in
        grad mode, or in autocast.
        """
        part, group = getattr(vae, name), self.team.group
        rows, rest = divmod(x.shape[3], _factor(vae, name))
        if group is None or vae.use_tiling or not isinstance(part, FusedDecoder | FusedEncoder) or not takes(part, x):
            return 1
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return 1  # because the other ranks have neither
        if (x.device, x.dtype) != (group.device, part.conv_in.weight.dtype):
            return 1  # because an error that only rank 0 raises leaves the others at work
        return 1 if rest or rows < group.size else -(-rows // group.size) / rows

    def coded(self, vae: nn.Module, name: str, x: Tensor, length: int) -> Iterator[Tensor]:
        """Compute `fused.vae.coded` with all ranks."""
        team, number, x = self.team, next(self._numbers), x.contiguous()
        try:
            with team.together():
                team.tell("strips", name, length, tuple(x.shape), x.dtype, number, team.clips.copy())
                team.clips.add(number)
                parts = strip_parts(vae, name, team.group.broadcast(x), length, team.group)
            while True:
                with team.together():
                    team.tell("chunk", number)
                    part = next(parts, None)
                if part is None:  # the other ranks have ended theirs, too, and keep no frames
                    return
                yield part
        finally:
            team.clips.discard(number)


def follow(
    vae: nn.Module, clips: dict[int, Callable], name: str, length: int, shape: tuple[int, ...], dtype: torch.dtype,
    number: int, live: set[int], group: Group,
) -> None:  # fmt: skip
    """Begin what rank 0 begins in `Strips.coded`, and put a function for this rank's part of a chunk into clips."""
    keep(clips, live)
    x = group.broadcast(torch.empty(shape, dtype=dtype, device=group.device))
    parts = strip_parts(vae, name, x, length, group)
    clips[number] = lambda: next(parts, None)


def keep(clips: dict[int, Callable], live: set[int]) -> None:
    """Drop the clips that rank 0 has not kept, because they were cancelled."""
    for number in clips.keys() - live:
        del clips[number]


def strip_parts(vae: nn.Module, name: str, x: Tensor, length: int, group: Group) -> Iterator[Tensor | None]:
    """Compute `fused.vae.coded` of x on this rank's rows. Yields all ranks' rows on rank 0, None on other ranks."""
    strip = Strip(group, x.shape[3] // _factor(vae, name))
    for part in coded(vae, name, strip.own(x, 3), length, strip):
        yield strip.gather(part, 3)


def _factor(vae: nn.Module, name: str) -> int:
    """Return how many rows of what a part of the VAE takes are one row of latents"""
    return 1 if name == "decoder" else vae.spatial_compression_ratio
