"""Launch configurations of the Triton kernels: the candidates of each GPU architecture, and which of them is used.

A `Launch` changes how fast a kernel is, not what it computes: the blocks of SLA's map are never part of it. For each
kernel and architecture the first candidate that fits in the GPU's shared memory is used, unless another one was faster
on this GPU. `runtime.tune` measures that once, and `machine.recall` keeps it.

    kernel         shape                       tile of a Launch
    sla, sagesla   head_dim, block_q, block_k  blocks of keys in an iteration: 1 or 2
    linear_state   head_dim                    tokens
    cross          head_dim                    rows of q, rows of k
    row_product    columns, depth              rows, columns, depth, programs on a multiprocessor
    conv           columns, channels           rows, columns of the first and of the second product, depth

On sm_90 the first candidates are those that were measured there. The others come from the sizes of tiles and of shared
memory alone. Those cards could not be measured, so a warm-up on the card itself has to choose.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..machine import environment, probe, recall

Arch = tuple[int, int]
Shape = tuple[int, ...]
KIB = 1024
# Shared memory that a block of threads can have, in KiB (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability")
SHARED = {
    (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99, (12, 1): 99,
}  # fmt: skip
MARGIN = 2048  # bytes for barriers and small tiles
NEAR = 1.03  # an earlier candidate stays the choice unless a later one is faster by more than this factor


class Launch(NamedTuple):
    """How a kernel is launched: the tile of a program, its warps, and the stages of its pipelined loop."""

    tile: tuple[int, ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.tile))}, {self.warps} warps, {self.stages} stages"


def _launches(*rows: tuple) -> tuple[Launch, ...]:
    return tuple(Launch(tuple(tile), warps, stages) for *tile, warps, stages in rows)


SLA = {
    9: _launches((2, 8, 2), (1, 8, 3), (1, 4, 3)),
    8: _launches((2, 8, 2), (1, 8, 3), (1, 4, 2), (1, 4, 3)),
    12: _launches((2, 8, 2), (1, 8, 3), (1, 4, 2), (1, 4, 3)),
}
LINEAR_STATE = {
    9: _launches((64, 4, 3), (64, 8, 3), (128, 8, 2)),
    8: _launches((64, 4, 3), (64, 4, 2), (64, 8, 3), (128, 8, 2)),
    12: _launches((64, 4, 3), (64, 4, 2), (64, 8, 3), (128, 8, 2)),
}
CROSS = {
    9: _launches((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
    8: _launches((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 3)),
    12: _launches((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 3)),
}
ROW_PRODUCT = {
    9: _launches((128, 256, 128, 1, 8, 3), (128, 128, 128, 1, 8, 4), (128, 128, 64, 2, 8, 4)),
    8: _launches((128, 128, 64, 2, 8, 3), (128, 256, 64, 1, 8, 3), (128, 128, 64, 2, 4, 3), (64, 128, 128, 2, 4, 3)),
    12: _launches((128, 128, 64, 2, 8, 3), (128, 128, 64, 2, 4, 3), (64, 128, 128, 2, 4, 3), (128, 128, 128, 1, 8, 2)),
}
# Columns → candidates; 0 for every other number of columns
CONV = {
    9: {
        96: _launches((256, 64, 32, 32, 8, 4), (128, 64, 32, 32, 4, 4)),
        192: _launches((128, 128, 64, 64, 8, 3), (128, 128, 64, 32, 8, 4)),
        3: _launches((256, 16, 0, 32, 8, 3), (128, 16, 0, 32, 4, 4)),
        0: _launches((256, 128, 0, 64, 8, 3), (128, 128, 0, 64, 4, 4), (128, 128, 0, 64, 8, 3)),
    },
    8: {
        96: _launches((256, 64, 32, 32, 8, 4), (128, 64, 32, 32, 4, 4), (128, 64, 32, 32, 8, 3)),
        192: _launches((128, 128, 64, 64, 8, 3), (64, 128, 64, 64, 4, 3), (128, 128, 64, 32, 8, 4)),
        3: _launches((256, 16, 0, 32, 8, 3), (128, 16, 0, 32, 4, 4)),
        0: _launches((256, 128, 0, 64, 8, 3), (128, 128, 0, 64, 8, 3), (128, 128, 0, 32, 4, 4), (64, 128, 0, 64, 4, 3)),
    },
}  # fmt: skip
CONV[12] = CONV[8]
OTHER = 0
FAMILIES = {8: 8, 9: 9, 10: 9, 12: 12}  # major compute capability → the candidates that it takes
TABLES = {"sla": SLA, "sagesla": SLA, "linear_state": LINEAR_STATE, "cross": CROSS, "row_product": ROW_PRODUCT}


def shared_memory(kernel: str, shape: Shape, launch: Launch, arch: Arch) -> int:
    """Return an upper bound of the shared memory that Triton takes for a launch, in bytes.

    A loop of n stages keeps n − 1 tiles of each operand, because products read the last one from registers. On sm_90
    and sm_100 products read shared memory, so n tiles are kept. The epilogue reuses the loop's memory, except in a
    loop over tiles (row_product). tests/ops compares this with what Triton reports.
    """
    tile, _, stages = launch
    buffers = max(1, stages if arch[0] in (9, 10) else stages - 1)
    if kernel in ("sla", "sagesla"):
        dim, rows, keys = shape
        width = 2 if kernel == "sla" else 1  # bytes of an element of q and k
        blocks = tile[0] * keys * dim * (width + 2) * buffers
        if tile[0] == 1 or arch[0] in (9, 10):  # else q is in registers
            blocks += rows * dim * width
        return max(blocks, 2 * dim * (rows + dim) // (3 - tile[0])) + MARGIN
    if kernel == "linear_state":
        (dim,) = shape
        return 2 * tile[0] * dim * (2 * buffers + 1) + MARGIN
    if kernel == "cross":
        (dim,), (rows, keys) = shape, tile
        return 2 * (rows * dim + rows * keys + 2 * keys * dim * buffers) + MARGIN
    if kernel == "row_product":
        rows, columns, depth, _ = tile
        return (rows + columns) * depth * buffers + 2 * rows * columns + MARGIN
    rows, first, second, depth = tile
    return max(2 * (rows + first + second) * depth * buffers, 2 * rows * max(first, second)) + MARGIN


def candidates(kernel: str, shape: Shape, arch: Arch, shared: int | None = None) -> tuple[Launch, ...]:
    """Return the launches of a kernel that fit on an architecture, the preferred one first.

    Args:
        kernel, shape: as in the module's table.
        arch: the GPU's compute capability.
        shared: bytes of shared memory that a block of threads can have. None: those of `SHARED`.
    """
    family = FAMILIES.get(arch[0], 12)
    if kernel == "conv":
        table = CONV[family]
        rows = table.get(shape[0], table[OTHER])
        deepest = min(64, shape[1] & -shape[1])  # because a tile's depth divides the channels
        rows = [row._replace(tile=(*row.tile[:3], min(row.tile[3], deepest))) for row in rows]
    else:
        rows = TABLES[kernel][family]
    limit = shared or SHARED.get(arch, min(SHARED.values())) * KIB
    needs = {row: shared_memory(kernel, shape, row, arch) for row in rows}
    return tuple(row for row in needs if needs[row] <= limit) or (min(needs, key=needs.get),)


# GPU → (kernel, shape) → the launch that was fastest there; and what was measured of it
_winners: dict[int, dict[tuple[str, Shape], "Measured"]] = {}
Output = Tensor | tuple[Tensor, ...]
Trial = Callable[[str, Shape, tuple[Launch, ...], Callable[[Launch], Output]], Output]
_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


class Measured(NamedTuple):
    """The launches of a kernel that were timed on a GPU, in ms of the clip's calls together, and the best of them."""

    launch: Launch
    times: dict[Launch, float]


def run(kernel: str, shape: Shape, x: Tensor, launched: Callable[[Launch], Output]) -> Output:
    """Launch a kernel in the way that was chosen for x's GPU, or in every way inside `trying`.

    Args:
        kernel, shape: as in the module's table.
        x: a tensor on that GPU.
        launched: launches the kernel once, and returns its output.
    """
    trial = _trial.get()
    if trial is not None:
        return trial(kernel, shape, _candidates_on(kernel, shape, x), launched)
    return launched(chosen(kernel, shape, x))


def chosen(kernel: str, shape: Shape, x: Tensor) -> Launch:
    """Return the launch that is used on x's GPU: the fastest one that was measured there, else the first candidate."""
    gpu = x.get_device()
    found = (_winners[gpu] if gpu in _winners else winners(gpu)).get((kernel, shape))
    return _candidates_on(kernel, shape, x)[0] if found is None else found.launch


@contextmanager
def trying(trial: Trial | None) -> Iterator[None]:
    """Let `run` call trial(kernel, shape, candidates, launched) in this thread; it returns the output.

    trial: None: launch in the chosen way.
    """
    token = _trial.set(trial)
    try:
        yield
    finally:
        _trial.reset(token)


@cache
def _card(gpu: int) -> tuple[Arch, int | None]:
    """Return the compute capability of a GPU and the shared memory of a block. The interpreter (-1) has no limit."""
    if gpu < 0:
        return (9, 0), None
    card = torch.cuda.get_device_properties(gpu)
    return (card.major, card.minor), getattr(card, "shared_memory_per_block_optin", None)


@cache
def _candidates(kernel: str, shape: Shape, gpu: int) -> tuple[Launch, ...]:
    return candidates(kernel, shape, *_card(gpu))


def _candidates_on(kernel: str, shape: Shape, x: Tensor) -> tuple[Launch, ...]:
    return _candidates(kernel, shape, x.get_device())


def winners(gpu: int) -> dict[tuple[str, Shape], Measured]:
    """Return what was measured on a GPU: by this process, or by an earlier one under the same circumstances."""
    if gpu not in _winners:
        kept = None if gpu < 0 else recall.recall("launches", _circumstances(gpu))
        _winners[gpu] = _read(kept)
    return _winners[gpu]


def remember(gpu: int, measured: Mapping[tuple[str, Shape], Measured]) -> None:
    """Use the best launches on a GPU from now on, and keep them for later processes."""
    _winners[gpu] = winners(gpu) | measured
    rows = [[*key, one.launch, list(one.times.items())] for key, one in _winners[gpu].items()]
    if probe.probe(gpu).driver is not None:
        recall.remember("launches", _circumstances(gpu), rows)


def best(times: Mapping[Launch, float]) -> Launch:
    """Return the fastest launch; an earlier one that is within `NEAR` of it, so that noise does not decide."""
    limit = min(times.values()) * NEAR
    return next(launch for launch, ms in times.items() if ms <= limit)


def _circumstances(gpu: int) -> dict:
    machine = probe.probe(gpu)
    table = repr((TABLES, CONV)).encode()
    return probe.circumstances(machine) | {
        "gpu": [machine.gpu, machine.arch],
        "turbo_nb": environment.version("turbo_nb"),
        "candidates": hashlib.sha256(table).hexdigest(),
    }


def _read(kept: Any) -> dict[tuple[str, Shape], Measured]:
    """Return what `remember` kept; nothing of a damaged file"""
    try:
        return {
            (kernel, tuple(shape)): Measured(_launch(launch), {_launch(one): float(ms) for one, ms in times})
            for kernel, shape, launch, times in kept or ()
        }
    except (TypeError, ValueError):
        return {}


def _launch(row: Any) -> Launch:
    tile, warps, stages = row
    return Launch(tuple(map(int, tile)), int(warps), int(stages))
