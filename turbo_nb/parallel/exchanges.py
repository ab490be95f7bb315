"""The exchange of one attention: tokens of all heads become all tokens of some heads, and back.

`Direct`    through memory that the ranks share (`peers`): tensors travel while the next ones are computed
`Packed`    through NCCL and gloo: one message to each rank, beside which nothing runs
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops.attention.reference import Sums
from ..ops.norms.reference import SUM_TOKENS
from ..sla import Alone
from .group import Group

Attention = Callable[[Tensor, Tensor, Tensor, Sums], Tensor]  # of q, k, v (B, L, h, D)


class Direct:
    """The exchange of one attention, through memory that the other GPUs write (`peers`).

    Args:
        group: the ranks.
        counts: tokens of each rank.
    """

    HEADS, TOKENS = 0, 1  # channels of the two exchanges

    def __init__(self, group: Group, counts: list[int]):
        self._group, self._peers, self._counts = group, group.peers, counts
        self._arriving: dict[str, Tensor] = {}
        self._sent: list[Tensor] = []  # must live until they have arrived

    def send(self, **tensors: Tensor | None) -> None:
        """Begin to exchange q, k, v (B, l, H, D) or the sums of q and k, of this rank's tokens."""
        given = {name: x.contiguous() for name, x in tensors.items() if x is not None}
        self._peers.memory.fork()  # after all that computes what is copied
        for name, x in given.items():
            self._to_heads(name, x)

    def _to_heads(self, name: str, x: Tensor) -> None:
        (batch, _, heads, dim), size, rank = x.shape, self._peers.size, self._peers.rank
        counts = [-(-count // SUM_TOKENS) for count in self._counts] if name.endswith("_sums") else self._counts
        own, total, begin = heads // size, sum(counts), sum(counts[:rank])
        row = own * dim * x.element_size()
        window = self._peers.window(name, batch * total * row)
        for other in (*range(rank + 1, size), *range(rank + 1)):
            rows = x[:, :, other * own : (other + 1) * own].flatten(2)
            for clip in range(batch):
                self._peers.send(window, other, (clip * total + begin) * row, row, rows[clip])
        self._sent.append(x)
        self._arriving[name] = window.view(x.dtype, batch, total, own, dim)

    def attend(self, attention: Attention) -> Tensor:
        """As `Packed.attend`. The result is overwritten by the next attention."""
        self._group.exchanges += 2
        self._peers.deliver(self.HEADS)
        self._sent.clear()
        q, k, v, *sums = (self._arriving.get(name) for name in ("q", "k", "v", "q_sums", "k_sums"))
        return self._to_tokens(attention(q, k, v, tuple(sums)).contiguous())

    def _to_tokens(self, x: Tensor) -> Tensor:
        """Exchange a result (B, L, h, D) for this rank's tokens of all heads, (B, l, H, D)"""
        (batch, _, own, dim), size, rank = x.shape, self._peers.size, self._peers.rank
        row = own * dim * x.element_size()
        window = self._peers.window("out", batch * max(self._counts) * size * row)
        self._peers.memory.fork()
        parts = x.flatten(2).split(self._counts, 1)
        for other in (*range(rank + 1, size), *range(rank + 1)):
            for clip in range(batch):
                at = clip * self._counts[other] * size * row + rank * row
                self._peers.send(window, other, at, size * row, parts[other][clip])
        self._peers.deliver(self.TOKENS)
        return window.view(x.dtype, batch, self._counts[rank], size * own, dim)


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
