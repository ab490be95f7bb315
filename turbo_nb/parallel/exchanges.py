"""The exchange of one attention: tokens of all heads become all tokens of some heads, and back.

`Direct`    through memory that the ranks share (`peers`): tensors travel while others are computed
`Packed`    through NCCL and gloo: one message to each rank, beside which nothing runs

What `Direct` sends is written once, to where another rank reads it. Kernels write q, k, their sums and the result of
the attention; copy engines write v, and what no kernel of ours computes.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.attention.reference import Sums
from ..ops.norms.reference import SUM_TOKENS
from ..ops.parts import ALIGNMENT, Parts
from ..sla import Alone
from .group import Group
from .peers import Window

# of q, k, v (B, L, h, D) and sums; a kernel may write the result to the parts and return None
Attention = Callable[[Tensor, Tensor, Tensor, Sums, Parts | None], Tensor | None]


class _Places(NamedTuple):
    """Where this rank's parts of a tensor go, one into a window of each rank.

    Attributes:
        window: of the same name on all ranks.
        begins: clip → rank → the byte of its window at which the part begins.
        pitch: bytes from token to token.
        dtype: of the tensor.
    """

    window: Window
    begins: list[list[int]]
    pitch: int
    dtype: torch.dtype


class Direct(Alone):
    """The exchange of one attention, through memory that the other GPUs write (`peers`).

    Args:
        group: the ranks.
        counts: tokens of each rank.
    """

    HEADS, TOKENS = 0, 1  # channels of the two exchanges

    def __init__(self, group: Group, counts: list[int]):
        super().__init__()
        self._group, self._peers, self._counts = group, group.peers, counts
        self._arriving: dict[str, Tensor] = {}
        self._copied: list[Tensor] = []  # must live until they have arrived

    def send(self, **tensors: Tensor | None) -> None:
        """Begin to exchange q, k, v (B, l, H, D) or the sums of q and k, of this rank's tokens."""
        for name, x in tensors.items():
            if x is not None:
                parts = x.contiguous().unflatten(2, (self._peers.size, -1)).unbind(2)
                self._copy(parts, self._heads(name, x.shape, x.dtype))

    def send_normed(self, name: str, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor, sums: bool = True) -> None:
        """Compute and exchange q or k, as `Alone.send_normed`."""
        kernel = backends.kernel("norm_rope", x, writes_parts=True)
        to = kernel and self._parts(self._heads(name, x.shape, x.dtype))
        if not to:
            super().send_normed(name, x, norm, cos, sin, sums)
            return
        sums_to = self._parts(self._heads(f"{name}_sums", x.shape, torch.float32)) if sums else None
        kernel(x.flatten(2), norm.weight, cos, sin, x.shape[2], norm.eps, sums, (to, sums_to))

    def attend(self, attention: Attention) -> Tensor:
        """As `Packed.attend`. The result is overwritten by the next attention."""
        self._group.exchanges += 2
        self._deliver(self.HEADS)
        q, k, v, *sums = (self._arriving.get(name) for name in ("q", "k", "v", "q_sums", "k_sums"))
        places = self._tokens(q)
        x = attention(q, k, v, tuple(sums), self._parts(places, [0, *accumulate(self._counts)]))
        if x is not None:
            self._copy(x.contiguous().split(self._counts, 1), places)
        self._deliver(self.TOKENS)
        own, heads = self._counts[self._peers.rank], q.shape[2] * self._peers.size
        return places.window.view(q.dtype, q.shape[0], own, heads, q.shape[3])

    def _heads(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> _Places:
        """Return where this rank's tokens of q, k, v or sums (B, l, H, D) go: to the rank of their heads"""
        (batch, _, heads, dim), rank, size = shape, self._peers.rank, self._peers.size
        counts = [-(-count // SUM_TOKENS) for count in self._counts] if name.endswith("_sums") else self._counts
        own, total, begin = heads // size, sum(counts), sum(counts[:rank])
        pitch = own * dim * dtype.itemsize
        window = self._peers.window(name, batch * total * pitch)
        self._arriving[name] = window.view(dtype, batch, total, own, dim)
        return _Places(window, [[(clip * total + begin) * pitch] * size for clip in range(batch)], pitch, dtype)

    def _tokens(self, q: Tensor) -> _Places:
        """Return where the result for q (B, L, h, D) goes: to the rank of its tokens"""
        (batch, _, own, dim), size, rank = q.shape, self._peers.size, self._peers.rank
        width = own * dim * q.element_size()
        window = self._peers.window("out", batch * max(self._counts) * size * width)
        begins = [[(clip * count * size + rank) * width for count in self._counts] for clip in range(batch)]
        return _Places(window, begins, size * width, q.dtype)

    def _copy(self, parts: Sequence[Tensor], places: _Places) -> None:
        """Begin to copy the part of each rank, (B, tokens, heads, D), after what computes it"""
        self._peers.memory.fork()
        after = self._peers.rank + 1
        for rank in (*range(after, self._peers.size), *range(after)):  # so that not all send to one at a time
            for begins, rows in zip(places.begins, parts[rank].flatten(2), strict=True):
                self._peers.send(places.window, rank, begins[rank], places.pitch, rows)
        self._copied += parts

    def _deliver(self, channel: int) -> None:
        """Let later work wait for what all ranks have sent"""
        self._peers.deliver(channel)
        self._copied.clear()

    def _parts(self, places: _Places, bounds: Sequence[int] = ()) -> Parts | None:
        """Return where a kernel writes the parts, None where they are not aligned for it"""
        if any(at % ALIGNMENT for at in (places.pitch, *chain(*places.begins))):
            return None
        return self._peers.parts(places.window, places.begins, places.pitch // places.dtype.itemsize, bounds)


class Packed(Alone):
    """The exchange of one attention, in one message to each rank.

    Args:
        group: the ranks.
        counts: tokens of each rank.
    """

    def __init__(self, group: Group, counts: list[int]):
        super().__init__()
        self._group, self._counts = group, counts

    def attend(self, attention: Attention) -> Tensor:
        """Compute an attention over all tokens with this rank's heads: this rank's tokens of all heads."""
        pooled, sums = None, [self._sent.pop(name, None) for name in ("q_sums", "k_sums")]
        if sums[0] is not None:
            pooled = self._to_heads(sums, [-(-count // SUM_TOKENS) for count in self._counts])
        arrived = self._to_heads([self._sent.pop(name) for name in "qkv"], self._counts)()
        out = self._to_tokens(attention(*arrived, pooled() if pooled else (None, None)))
        return torch.stack(out, dim=2).flatten(2, 3)

    def _to_heads(self, tensors: Sequence[Tensor], counts: list[int]) -> Callable[[], list[Tensor]]:
        """Begin to exchange tensors of equal shape: (B, counts[rank], H, D) → (B, sum of counts, H / ranks, D).

        Returns a function that waits for the results, views with all tokens of this rank's heads.
        """
        (batch, length, heads, dim), ranks = tensors[0].shape, self._group.size
        own = heads // ranks
        sent = tensors[0].new_empty(ranks - 1, length, batch, len(tensors), own, dim)
        received = sent.new_empty(sum(counts), batch, len(tensors), own, dim)
        from_ranks, to_ranks = [*received.split(counts)], [*sent.unbind(0)]
        to_ranks.insert(self._group.rank, from_ranks[self._group.rank])  # a rank's own part is there at once
        for number, x in enumerate(tensors):
            for to, part in zip(to_ranks, x.unflatten(2, (ranks, own)).unbind(2), strict=True):
                to[:, :, number] = part.transpose(0, 1)
        from_ranks[self._group.rank] = to_ranks[self._group.rank] = received[:0]
        arrival = self._group.exchange(from_ranks, to_ranks)

        def arrived(sent: Tensor = sent) -> list[Tensor]:  # which must live as long as the exchange
            arrival.wait()
            return [received[:, :, number].transpose(0, 1) for number in range(len(tensors))]

        return arrived

    def _to_tokens(self, x: Tensor) -> list[Tensor]:
        """Exchange a result (B, L, h, D) for this rank's tokens of each rank's heads, (B, l, h, D)"""
        (batch, _, own, dim), rank = x.shape, self._group.rank
        sent = x.transpose(0, 1).contiguous()  # a view for one clip
        to_ranks = [*sent.split(self._counts)]
        received = sent.new_empty(self._group.size - 1, self._counts[rank], batch, own, dim)
        from_ranks = [*received.unbind(0)]
        results = [*from_ranks[:rank], to_ranks[rank], *from_ranks[rank:]]
        from_ranks.insert(rank, sent[:0])
        to_ranks[rank] = sent[:0]
        self._group.exchange(from_ranks, to_ranks).wait()
        return [one.transpose(0, 1) for one in results]
