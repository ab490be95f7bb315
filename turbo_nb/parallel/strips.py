"""The VAE on several GPUs: each rank decodes a strip of the pictures' rows.

    rows of the latents        rank 0: 0 … 29 │ rank 1: 30 … 59 │ rank 2: 60 … 89
    before each convolution    the first and the last row of each strip go into the rims of its neighbours
    middle attention           every rank gets the rows of all ranks and computes it for the whole picture
    after each chunk           rank 0 gathers the frames

A fused convolution reads a rim of one pixel around each picture. On one GPU the rim is zero. Here the upper and the
lower rim are a neighbour's row. Our convolutions and norms compute each pixel alike, wherever it is. cuBLAS and cuDNN
choose a kernel by the number of rows, so what calls them gets all rows. The result is therefore that of one GPU,
without seams, at any height.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..fused.vae import FusedDecoder, chunk_length, decoded, takes
from .group import Group, shares

if TYPE_CHECKING:
    from .ranks import Team


class Strip:
    """This rank's rows of a clip that is decoded.

    Args:
        group: the ranks.
        bounds: of all ranks' rows of the latents.
    """

    def __init__(self, group: Group, bounds: Sequence[int]):
        self.group, self.bounds = group, bounds

    def fill(self, x: Tensor) -> None:
        """Put the neighbours' rows into the upper and lower rim of x (B, T, h + 2, W + 2, C)."""
        rank, size = self.group.rank, self.group.size
        neighbours = [other for other in (rank - 1, rank + 1) if 0 <= other < size]
        rows = {other: x[:, :, 1 if other < rank else -2].contiguous() for other in neighbours}
        received, none = {other: torch.empty_like(row) for other, row in rows.items()}, x.new_empty(0)
        self.group.exchange(*([given.get(other, none) for other in range(size)] for given in (received, rows))).wait()
        for other, row in received.items():
            x[:, :, 0 if other < rank else -1] = row

    def all_rows(self, x: Tensor) -> Tensor:
        """Return all ranks' rows of x (N, h · W, C): (N, H · W, C)."""
        width = x.shape[1] // (self.bounds[self.group.rank + 1] - self.bounds[self.group.rank])
        counts = [(end - begin) * width for begin, end in pairwise(self.bounds)]
        whole = self.group.gather(x.transpose(0, 1).contiguous(), counts, everywhere=True)
        return whole.transpose(0, 1).contiguous()

    def own_rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of x (N, H · W, C): (N, h · W, C)."""
        begin, end = self.bounds[self.group.rank : self.group.rank + 2]
        return x.unflatten(1, (self.bounds[-1], -1))[:, begin:end].flatten(1, 2)

    def gather(self, x: Tensor) -> Tensor | None:
        """Return all ranks' rows of x (B, C, T, h, W) on rank 0: (B, C, T, H, W). None on the other ranks."""
        begin, end = self.bounds[self.group.rank : self.group.rank + 2]
        factor = x.shape[3] // (end - begin)
        rows = x.permute(3, 0, 1, 2, 4).contiguous()
        whole = self.group.gather(rows, [(end - begin) * factor for begin, end in pairwise(self.bounds)])
        return None if whole is None else whole.permute(1, 2, 3, 0, 4)


class Strips:
    """Decodes clips with all ranks, as rank 0 sees it; `fused.vae.chunks` calls it.

    Args:
        team: tells the other ranks.
    """

    def __init__(self, team: "Team"):
        self.team = team

    def __reduce__(self):  # a copy of the VAE decodes on one GPU
        return type(None), ()

    def takes(self, vae: nn.Module, z: Tensor) -> bool:
        """Return whether the ranks share the decoding of z (B, C, T, h, w): it has a row for each of them."""
        group = self.team.group
        whole = group is not None and not vae.use_tiling and isinstance(vae.decoder, FusedDecoder)
        return whole and z.shape[3] >= group.size and takes(vae.decoder, z)

    def chunks(self, vae: nn.Module, z: Tensor, length: int | None) -> Iterator[Tensor]:
        """Decode as `fused.vae.chunks`."""
        group = self.team.group
        rows = -(-z.shape[3] // group.size)
        length = length or chunk_length(vae, z, rows * z.shape[4] * vae.spatial_compression_ratio**2) or 1
        z = vae.post_quant_conv(z).contiguous()  # of all rows, because cuDNN's choice depends on their number
        with self.team.together():
            self.team.tell("decode", tuple(z.shape), z.dtype, length)
            parts = strip_chunks(vae, group.broadcast(z), length, group)
        for _ in range(count(z, length)):
            with self.team.together():
                self.team.tell("chunk")
                frames = next(parts)
            yield frames


def count(z: Tensor, length: int) -> int:
    """Return the number of chunks that latents (B, C, T, h, w) are decoded in."""
    return 1 + -(-(z.shape[2] - 1) // length)


def follow(vae: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, length: int, group: Group) -> Callable:
    """Begin to decode what rank 0 decodes. Returns a function that decodes the next chunk."""
    z = group.broadcast(torch.empty(shape, dtype=dtype, device=group.device))
    parts = strip_chunks(vae, z, length, group)
    return lambda: next(parts)


def strip_chunks(vae: nn.Module, z: Tensor, length: int, group: Group) -> Iterator[Tensor | None]:
    """Decode this rank's rows of z (B, C, T, h, w) in chunks. Yields whole frames on rank 0, None on other ranks."""
    bounds = shares(z.shape[3], group.size)
    strip = Strip(group, bounds)
    own = z[:, :, :, bounds[group.rank] : bounds[group.rank + 1]]
    for x in decoded(vae, own, length, strip):
        yield strip.gather(x)
