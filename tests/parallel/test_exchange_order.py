"""`Direct`: no rank overwrites what another one still reads, and none reads what is not there yet.

The ranks are threads that compute nothing. Each one records what its streams read and write, and which work waits for
which. Where one of two accesses of the same memory is a write, the second one must wait for the first one.
"""

import threading
from collections import defaultdict
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from shared_memory import SharedMemory
from torch import distributed as dist

from turbo_nb import backends
from turbo_nb.parallel.exchanges import Direct
from turbo_nb.parallel.group import shares
from turbo_nb.parallel.peers import FLAG, Peers

DIM = 8


def cells(address, pitch, width, rows):
    """The flags' sizes of memory that an access touches"""
    begins = range(address, address + rows * pitch, pitch) if pitch else [address]
    return {at // FLAG.itemsize for begin in begins for at in range(begin, begin + width, FLAG.itemsize)}


def of(*tensors):
    return set().union(*(cells(x.data_ptr(), 0, x.nbytes, 1) for x in tensors))


class Recorded(SharedMemory):
    """Memory of threads, which records instead of copying once it has begun"""

    def __init__(self):
        super().__init__()
        self.operations, self.begun = [], False

    def note(self, kind, stream=None, reads=(), writes=()):
        if self.begun:
            self.operations.append((kind, stream, set(reads), set(writes)))

    def handle(self, address):
        return str(address).encode()

    def map(self, handle):
        return int(handle)

    def free(self, address, own):
        if own:
            super().free(address, own)

    def fork(self):
        self.note("fork")

    def join(self):
        self.note("join")

    def synchronize(self):
        self.note("meet")

    def copy(self, rank, to, to_pitch, source, pitch, width, rows):
        if not self.begun:
            super().copy(rank, to, to_pitch, source, pitch, width, rows)
        flag = width == FLAG.itemsize
        written = cells(to, to_pitch, width, rows)
        self.note("flag" if flag else "copy", rank, set() if flag else cells(source, pitch, width, rows), written)

    def wait(self, flags):
        if not self.begun:
            super().wait(flags)
        self.note("wait", writes=of(flags))

    def compute(self, reads=(), writes=()):
        """Record a kernel"""
        self.note("kernel", None, reads, writes)


def faults(memories):
    """Run what was recorded, and return the pairs of accesses that nothing orders"""
    size = len(memories)
    clocks = [[defaultdict(int) for _ in range(size + 1)] for _ in range(size)]  # the last stream computes
    at, accesses, raised = [0] * size, [], defaultdict(list)

    def meet(ranks_streams):
        latest = defaultdict(int)
        for clock in ranks_streams:
            for name, count in clock.items():
                latest[name] = max(latest[name], count)
        for clock in ranks_streams:
            clock.update(latest)

    while any(number < len(memory.operations) for number, memory in zip(at, memories, strict=True)):
        moved, meeting = False, []
        for rank, memory in enumerate(memories):
            while at[rank] < len(memory.operations):
                kind, stream, reads, writes = memory.operations[at[rank]]
                streams, main = clocks[rank], clocks[rank][size]
                if kind == "meet":
                    meeting.append(rank)
                    break
                if kind == "wait":
                    if not all(raised[flag] for flag in writes):
                        break
                    for flag in writes:
                        meet([main, dict(raised[flag].pop(0))])
                elif kind == "fork":
                    for clock in streams[:size]:
                        meet([clock, dict(main)])
                elif kind == "join":
                    for clock in streams[:size]:
                        meet([main, dict(clock)])
                number = size if stream is None else stream
                streams[number][rank, number] += 1
                if kind == "flag":
                    raised[next(iter(writes))].append(dict(streams[number]))
                if reads or writes:
                    who = rank, number
                    accesses.append((f"{kind} {at[rank]} of {who}", who, dict(streams[number]), reads, writes))
                at[rank], moved = at[rank] + 1, True
        if len(meeting) == size:
            meet([clock for rank in clocks for clock in rank])
            at, moved = [number + 1 for number in at], True
        assert moved, f"all ranks wait, at {at}"
    touched = defaultdict(list)
    for access in accesses:
        for cell in access[3] | access[4]:
            touched[cell].append(access)
    return {
        (first[0], second[0])
        for cell, both in touched.items()
        for first, second in combinations(both, 2)
        if (cell in first[4] or cell in second[4]) and not (_before(first, second) or _before(second, first))
    }


def _before(first, second):
    _, who, clock, *_ = first
    return second[2].get(who, 0) >= clock[who]


def written(parts, width, rows, item):
    """What a kernel writes to `Parts`: `width` bytes of each token"""
    bounds = [0, rows] * parts.ranks if parts.bounds is None else parts.bounds.tolist()
    step = 2 if parts.bounds is None else 1
    found = set()
    for clip in parts.addresses.tolist():
        for rank, address in enumerate(clip):
            begin, end = bounds[rank * step : rank * step + 2]
            found |= cells(address, parts.pitch * item, width, end - begin)
    return found


class Rank(threading.Thread):
    """A rank that runs the exchanges of some steps"""

    def __init__(self, store, number, size, by_kernels):
        super().__init__(daemon=True)
        self.memory, self.by_kernels, self.kept, self.error = Recorded(), by_kernels, [], None
        self.peers = Peers(store, number, size, self.memory)

    def run(self):
        try:
            assert self.peers.works()
            self.memory.begun = True
            for batch, tokens, layers in STEPS:
                counts = [end - begin for begin, end in pairwise(shares(tokens, self.peers.size, 16))]
                for layer in range(layers):
                    self.layer(batch, counts, sums=layer % 2 == 0)
        except BaseException as error:
            self.error = error

    def computed(self, *shape):
        """A tensor that a kernel has written. It is kept, so that no other thread gets its memory"""
        self.kept.append(torch.zeros(shape, dtype=torch.float16))
        self.memory.compute(writes=of(self.kept[-1]))
        return self.kept[-1]

    def reuse(self, count):
        """Overwrite the last tensors, whose memory is free"""
        self.memory.compute(writes=of(*self.kept[-count:]))

    def layer(self, batch, counts, sums):
        exchange = Direct(SimpleNamespace(peers=self.peers, exchanges=0), counts)
        own, norm = counts[self.peers.rank], SimpleNamespace(weight=None, eps=1e-6)
        v, q, k = (self.computed(batch, own, 2 * self.peers.size, DIM) for _ in range(3))
        exchange.send(v=v)
        for name, x in (("q", q), ("k", k)):
            if "norm" in self.by_kernels:
                exchange.send_normed(name, x, norm, None, None, sums)
                self.memory.compute(writes=of(x))  # by another tensor, which has got its memory
            else:
                exchange.send(**{name: x})
        out = exchange.attend(self.attention)
        assert out.shape == v.shape
        self.memory.compute(reads=of(out))
        self.reuse(4)

    def norm_rope(self, x, weight, cos, sin, heads, eps, sums, to):
        width = x.shape[2] // self.peers.size
        made = written(to[0], width * x.itemsize, x.shape[1], x.itemsize)
        if sums:
            made |= written(to[1], width * 4, -(-x.shape[1] // 16), 4)
        self.memory.compute(of(x), made)

    def attention(self, q, k, v, sums, to):
        self.reuse(3)
        reads = of(q, k, v, *(x for x in sums if x is not None))
        out = None if "attention" in self.by_kernels else self.computed(*q.shape)
        self.memory.compute(reads, of(out) if out is not None else written(to, q[0, 0].nbytes, None, q.itemsize))
        return out


STEPS = [(1, 70, 2), (2, 100, 3), (1, 65, 2)]  # clips, tokens and layers; the second one needs more memory


@pytest.mark.parametrize("by_kernels", [(), ("norm",), ("attention",), ("norm", "attention")], ids=" and ".join)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_access_of_shared_memory_is_in_order(monkeypatch, size, by_kernels):
    monkeypatch.setattr(backends, "kernel", lambda *_, **__: threading.current_thread().norm_rope)
    store = dist.HashStore()
    team = [Rank(store, number, size, by_kernels) for number in range(size)]
    for rank in team:
        rank.start()
    for rank in team:
        rank.join(60)
    assert [rank.error for rank in team] == [None] * size
    assert not faults([rank.memory for rank in team])
