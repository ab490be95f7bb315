"""Run the reference of each operation of `turbo_nb.ops`, and its kernels: one entry of `OPERATIONS` each.

The check compares each kernel with the reference in float32 on the same bf16 numbers. A kernel may err 1.1 times as
much as the reference in bf16 does. SageSLA is compared with the reference of SLA, which shows what its 8 bits cost.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turbo_nb import linear, rope
from turbo_nb.errors import InputError
from turbo_nb.machine import probe
from turbo_nb.ops import registry
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.ops.linear8 import reference as linear8_reference
from turbo_nb.ops.norms import reference as norms_reference
from turbo_nb.sla import BLOCK_K, BLOCK_Q

from . import harness
from .harness import Check, Job

ATTENTION = {"cuda": ((32760, 12, 128),), "cpu": ((700, 2, 64),)}  # the GPU's: 1.3B at 480p×81
LINEAR = {"cuda": ((32760, 1536, 8960), (32760, 8960, 1536)), "cpu": ((700, 256, 960),)}
DTYPES = ("bfloat16", "float16", "float32")
TOPK = 0.1


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation to measure.

    Attributes:
        make_inputs: (shape, device, dtype) → the arguments of every implementation.
        reference: the plain function.
        exact: what runs in float32 for the check. None: `reference`.
        spellings: name → function, beside the rows of the registry.
        shapes: those measured on "cuda" and on "cpu" by default.
        rows: the operation of `turbo_nb.ops.registry` whose implementations are measured on a GPU.
    """

    make_inputs: Callable[[tuple[int, int, int], str, torch.dtype], tuple]
    reference: Callable
    exact: Callable | None = None
    spellings: dict[str, Callable] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, int, int], ...]]
    rows: str | None = None


def _noise(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def rope_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """x (1, L, H, D), and cos and sin (L, D/2) in float32"""
    length, heads, dim = shape
    (x,) = _noise(device, dtype, (1, length, heads, dim))
    (angles,) = _noise(device, torch.float32, (length, dim // 2))
    return x, angles.cos(), angles.sin()


def qkv_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """Return q, k and v, each (1, L, H, D), whose block map does not depend on rounding.

    Every q block looks for +u or -u. In each head the share `TOPK` of the k blocks has +u, and another such share
    has -u. So the last kept block and the next block are never a near tie.
    """
    length, heads, dim = shape
    q, k, v = _noise(device, torch.float32, *[(1, length, heads, dim)] * 3)
    u = torch.full((dim,), 4 / dim**0.5, device=device)  # of length 4
    columns = -(-length // BLOCK_K)
    generator = torch.Generator().manual_seed(1)
    levels = torch.zeros(columns, heads)
    count = max(1, int(TOPK * columns))
    for head in range(heads):
        order = torch.randperm(columns, generator=generator)
        levels[order[:count], head], levels[order[count : 2 * count], head] = 1, -1
    signs = torch.randint(0, 2, (-(-length // BLOCK_Q), heads), generator=generator) * 2.0 - 1
    for x, level, block in ((k, levels, BLOCK_K), (q, signs, BLOCK_Q)):
        x += level.to(device).repeat_interleave(block, 0)[None, :length, :, None] * u
    return tuple(x.to(dtype) for x in (q, k, v))


def sla_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """The arguments of `attention_reference.sparse_linear_attention`"""
    dim = shape[2]
    weight, bias = _noise(device, torch.float32, (dim, dim), (dim,))
    return *qkv_inputs(shape, device, dtype), weight / dim**0.5, 0.02 * bias, TOPK, BLOCK_Q, BLOCK_K


def block_map_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """The arguments of `attention_reference.block_map`"""
    q, k, _ = qkv_inputs(shape, device, dtype)
    return q, k, TOPK, BLOCK_Q, BLOCK_K


def every_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sparse attention that keeps every block, which is dense attention: what sparse attention has to beat."""
    batch, length, heads, _ = q.shape
    kept = torch.ones(batch, heads, -(-length // BLOCK_Q), -(-length // BLOCK_K), dtype=torch.bool, device=q.device)
    return attention_reference.sparse_attention(q, k, v, kept, BLOCK_Q, BLOCK_K)


def norm_rope_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """The arguments of `norms_reference.rms_norm_rope`: x (1, L, H·D), weight, cos, sin, heads"""
    x, cos, sin = rope_inputs(shape, device, dtype)
    (weight,) = _noise(device, torch.float32, (shape[1] * shape[2],))
    return x.flatten(2), 1 + 0.1 * weight, cos, sin, shape[1]


def gated_norm_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """The arguments of `reference.gated_norm` with everything it can do: x and branch (1, L, H·D), the rest (1, H·D)"""
    length, width = shape[0], shape[1] * shape[2]
    x, branch = _noise(device, dtype, *[(1, length, width)] * 2)
    gate, scale, shift = _noise(device, torch.float32, *[(1, width)] * 3)
    return x, branch, gate, scale, shift


def linear_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """The arguments of `linear8_reference.int8_linear`; the weight is quantised beforehand, as a checkpoint has it"""
    rows, inputs, outputs = shape
    x, weight, bias = _noise(device, dtype, (rows, inputs), (outputs, inputs), (outputs,))
    return x, *linear8_reference.int8_quantize(weight / inputs**0.5), bias


def row_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple:
    """The arguments of `linear8_reference.row_linear`"""
    rows, inputs, outputs = shape
    x, weight, bias = _noise(device, dtype, (rows, inputs), (outputs, inputs), (outputs,))
    q, scale, _ = linear8_reference.row_quantize(weight / inputs**0.5)
    return x, q, scale, bias


# A kernel of the registry needs no line here. "chosen" is what the package chooses on this machine.
OPERATIONS = {
    "apply_rotary_emb": Operation(
        make_inputs=rope_inputs,
        reference=norms_reference.apply_rotary_emb,
        spellings={"chosen": rope.apply_rotary_emb},
        shapes=ATTENTION,
    ),
    "rms_norm_rope": Operation(
        make_inputs=norm_rope_inputs, reference=norms_reference.rms_norm_rope, shapes=ATTENTION, rows="norm_rope"
    ),
    "gated_norm": Operation(
        make_inputs=gated_norm_inputs, reference=norms_reference.gated_norm, shapes=ATTENTION, rows="gated_norm"
    ),
    "block_map": Operation(make_inputs=block_map_inputs, reference=attention_reference.block_map, shapes=ATTENTION),
    "dense_attention": Operation(
        make_inputs=qkv_inputs,
        reference=every_block,
        spellings={"sdpa": attention_reference.cross_attention},
        shapes=ATTENTION,
    ),
    "sparse_linear_attention": Operation(
        make_inputs=sla_inputs,
        reference=attention_reference.sparse_linear_attention,
        shapes=ATTENTION,
        rows="sla",
    ),
    "sage_linear_attention": Operation(
        make_inputs=sla_inputs,
        reference=attention_reference.sage_linear_attention,
        exact=attention_reference.sparse_linear_attention,
        shapes=ATTENTION,
        rows="sagesla",
    ),
    "row_linear": Operation(
        make_inputs=row_inputs,
        reference=linear8_reference.row_linear,
        spellings={"chosen": linear.row_linear},
        shapes=LINEAR,
    ),
    "int8_linear": Operation(
        make_inputs=linear_inputs,
        reference=linear8_reference.int8_linear,
        spellings={"chosen": linear.int8_linear},
        shapes=LINEAR,
    ),
}


def jobs(
    only: list[str] | None, shape: str | None, dtype: str, device: str, *, runs: int, warmup: int
) -> Iterator[Job]:
    """A job for each spelling, the reference first. Raises InputError for an unknown operation, shape or dtype."""
    for name in only or ():
        if name not in OPERATIONS:
            raise InputError(f"operation is {name!r}; it is one of {', '.join(OPERATIONS)}")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    if shape and not re.fullmatch(r"\d+x\d+x\d+", shape):
        raise InputError(f"shape is {shape!r}; it is three numbers, such as 32760x12x128")
    asked = shape and (tuple(map(int, shape.split("x"))),)
    for name in only or OPERATIONS:
        operation = OPERATIONS[name]
        for sides in asked or operation.shapes[device.split(":")[0]]:
            inputs = operation.make_inputs(sides, device, getattr(torch, dtype))
            ref = (operation.exact or operation.reference)(*_in_float32(inputs))
            own = _error(operation.reference(*inputs), ref)
            for mode, function in spellings(name, device).items():

                def run(mode=mode, function=function, inputs=inputs, ref=ref, own=own):
                    check = Check(
                        error=_error(function(*inputs), ref),
                        limit=harness.limit(None if mode == "reference" else own),
                        what=f"against float32; the reference itself in {dtype} {own:.2e}",
                    )
                    return harness.measure(lambda: function(*inputs), device, runs=runs, warmup=warmup), check

                yield Job(work=name, shape=f"{'x'.join(map(str, sides))} {dtype}", mode=mode, weights="random", run=run)


def spellings(name: str, device: str) -> dict[str, Callable]:
    """Return name → function of all that can run an operation on the device, the reference first."""
    operation, machine = OPERATIONS[name], probe.probe().on(device)
    found = {"reference": operation.reference, **operation.spellings}
    for row in registry.implementations(operation.rows):
        if not row.is_reference and not row.requires(machine):
            found[row.name] = row.load()
    return found


def _in_float32(inputs: tuple) -> tuple:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _error(out: Tensor | tuple[Tensor, ...], ref: Tensor | tuple[Tensor, ...]) -> float:
    """The largest relative error of the outputs"""
    if isinstance(ref, Tensor):
        out, ref = (out,), (ref,)
    return max(harness.relative_error(a, b) for a, b in zip(out, ref, strict=True))
