"""The exchange of one attention: tokens of all heads become all tokens of some heads, and back.

`Direct`    through memory that the ranks share (`peers`): tensors travel while others are computed
`Packed`    through NCCL and gloo: one message to each rank, beside which nothing runs

What `Direct` sends is written once, to where another rank reads it. Kernels write q, k, their sums and the result of
the attention; copy engines write v, and what no kernel of ours computes.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

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
        given = {name: x.contiguous() for name, x in tensors.items() if x is not None}
        self._peers.memory.fork()  # after all that computes what is copied
        for name, x in given.items():
            window, pitch, begins = self._heads(name, x.shape, x.dtype)
            for rank, rows in self._by_rank(x.unflatten(2, (self._peers.size, -1)).unbind(2)):
                for begin, own in zip(begins, rows.flatten(2), strict=True):
                    self._peers.send(window, rank, begin, pitch, own)
            self._copied.append(x)

    def send_normed(self, name: str, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor, sums: bool = True) -> None:
        """Compute and exchange q or k, as `Alone.send_normed`."""
        kernel, shape = backends.kernel("norm_rope", x, writes_parts=True), [*x.shape]
        if kernel is None or not self._fits(x[0, 0].nbytes):
            super().send_normed(name, x, norm, cos, sin, sums)
            return
        to = [self._parts_of_heads(name, shape, x.dtype), None]
        if sums:
            to[1] = self._parts_of_heads(f"{name}_sums", shape, torch.float32)
        kernel(x.flatten(2), norm.weight, cos, sin, x.shape[2], norm.eps, sums, tuple(to))

    def attend(self, attention: Attention) -> Tensor:
        """As `Packed.attend`. The result is overwritten by the next attention."""
        self._group.exchanges += 2
        self._peers.deliver(self.HEADS)
        self._copied.clear()
        q, k, v, *sums = (self._arriving.get(name) for name in ("q", "k", "v", "q_sums", "k_sums"))
        window, pitch, begins = self._tokens(q)
        bounds = [0, *accumulate(self._counts)]
        to = self._peers.parts(window, begins, pitch // q.element_size(), bounds) if self._fits(pitch) else None
        x = attention(q, k, v, tuple(sums), to)
        if x is not None:
            x = x.contiguous()
            self._peers.memory.fork()
            for rank, rows in self._by_rank(x.flatten(2).split(self._counts, 1)):
                for begin, own in zip(begins, rows, strict=True):
                    self._peers.send(window, rank, begin[rank], pitch, own)
        self._peers.deliver(self.TOKENS)
        own, heads = self._counts[self._peers.rank], q.shape[2] * self._peers.size
        return window.view(q.dtype, q.shape[0], own, heads, q.shape[3])

    def _heads(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[Window, int, list[int]]:
        """Return the window of all tokens of a rank's heads, the bytes of a token, and where each clip's begin"""
        (batch, _, heads, dim), rank = shape, self._peers.rank
        counts = [-(-count // SUM_TOKENS) for count in self._counts] if name.endswith("_sums") else self._counts
        own, total, begin = heads // self._peers.size, sum(counts), sum(counts[:rank])
        pitch = own * dim * dtype.itemsize
        window = self._peers.window(name, batch * total * pitch)
        self._arriving[name] = window.view(dtype, batch, total, own, dim)
        return window, pitch, [(clip * total + begin) * pitch for clip in range(batch)]

    def _parts_of_heads(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Parts:
        window, pitch, begins = self._heads(name, shape, dtype)
        return self._peers.parts(window, [[begin] * self._peers.size for begin in begins], pitch // dtype.itemsize)

    def _tokens(self, q: Tensor) -> tuple[Window, int, list[list[int]]]:
        """Return the window of a rank's tokens of all heads, the bytes of a token, and where these heads begin"""
        (batch, _, own, dim), size, rank = q.shape, self._peers.size, self._peers.rank
        width = own * dim * q.element_size()
        window = self._peers.window("out", batch * max(self._counts) * size * width)
        begins = [[(clip * count * size + rank) * width for count in self._counts] for clip in range(batch)]
        return window, size * width, begins

    def _by_rank(self, parts: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Return the parts with their ranks, the next rank first and this one last, so that not all send to one"""
        parts, own = [*enumerate(parts)], self._peers.rank + 1
        return parts[own:] + parts[:own]

    def _fits(self, pitch: int) -> bool:
        """Return whether a rank's heads of a token are aligned for a kernel. pitch: the bytes of all heads"""
        return pitch // self._peers.size % ALIGNMENT == 0


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
