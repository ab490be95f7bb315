"""Every implementation of every operation: one row each.

`backends.choose` reads the rows of an operation from top to bottom and takes the first one whose requirement this
machine meets. A faster implementation is a function with the reference's signature in a file of its own, and one row
here; CONTRIBUTING.md shows the steps.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

from ..machine.probe import LIBRARIES, Machine

Arch = tuple[int, int]
KERNELS_FROM = (8, 0)  # because older GPUs have no 8-bit product in Triton, and 64 KiB of shared memory are too little
HALF_FROM = (7, 0)  # the first GPUs with Tensor Cores; older ones are slow in 16 bits
KERNELS_TRITON = (3, 4)  # the first with tensor descriptors made outside a kernel; it comes with torch 2.8
GLUON_ARCH = (9, 0)
GLUON_TRITON, GLUON_TRITON_LAST = (3, 6), (3, 9)  # versions that compile our Gluon kernels; Gluon's names still change
HEAD_DIMS = (64, 128)  # of the attention kernels
CHANNELS = 16  # the convolution kernels read channels in multiples of it
SPARGEATTN_TOKENS = 128  # fewest that SpargeAttn takes


def sm(arch: Arch) -> str:
    """Return the name of a compute capability: (9, 0) → "sm_90"."""
    return "sm_{}{}".format(*arch)


def no_cuda(machine: Machine) -> str | None:
    """Return why torch has no GPU to use, None where it has one."""
    if machine.arch is not None:
        return None
    return "no CUDA GPU" if machine.gpu is None else f"torch cannot use the {machine.gpu}: {machine.cuda_error}"


def no_library(machine: Machine, name: str) -> str | None:
    """Return why a library of `LIBRARIES` cannot be used, None where it works."""
    title, _ = LIBRARIES[name]
    library = machine.libraries.get(name)
    if library is None:
        return f"{title} not installed"
    return library.error and f"{title} {library.version or ''} found but {library.error}".replace("  ", " ")


def no_triton(machine: Machine) -> str | None:
    """Return why no Triton kernel runs on this machine, None where they run."""
    return no_cuda(machine) or no_library(machine, "triton")


def no_kernels(machine: Machine) -> str | None:
    """Return why our Triton kernels do not run on this machine, None where they run."""
    if reason := no_triton(machine):
        return reason
    if machine.arch < KERNELS_FROM:
        return f"the kernels need {sm(KERNELS_FROM)} or newer, and this GPU is {sm(machine.arch)}"
    return _old_triton(machine, KERNELS_TRITON)


def no_tensor_cores(machine: Machine) -> str | None:
    """Return why the released models are too slow on a machine's GPU, None where they are not, or without a GPU."""
    if machine.arch is None or machine.arch >= HALF_FROM:
        return None
    return f"this GPU ({sm(machine.arch)}) has no Tensor Cores; float16 needs {sm(HALF_FROM)} or newer"


def no_bfloat16(machine: Machine) -> str | None:
    """Return why a machine's GPU computes in float16, None where it computes in bfloat16, or without a GPU.

    PyTorch emulates bfloat16 before sm_80, and runs its convolutions without cuDNN.
    """
    if machine.arch is None or machine.arch >= KERNELS_FROM:
        return None
    return f"this GPU ({sm(machine.arch)}) has no bfloat16, and the kernels need {sm(KERNELS_FROM)} or newer"


def no_gluon(machine: Machine) -> str | None:
    """Return why our Gluon kernels do not run on this machine, None where they run."""
    if reason := no_kernels(machine):
        return reason
    if machine.arch != GLUON_ARCH:
        return f"made for {sm(GLUON_ARCH)}, and this GPU is {sm(machine.arch)}"
    version = machine.libraries["triton"].version
    if version and _number(version) > GLUON_TRITON_LAST:
        return f"tried with Triton up to {'.'.join(map(str, GLUON_TRITON_LAST))}, and this is {version}"
    return _old_triton(machine, GLUON_TRITON)


def _old_triton(machine: Machine, needed: tuple[int, int]) -> str | None:
    version = machine.libraries["triton"].version
    if version and _number(version) < needed:
        return f"the kernels need Triton {'.'.join(map(str, needed))} or newer, and this is {version}"
    return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def _no_flash_attn(machine: Machine) -> str | None:
    # Triton too, because flash_attn's rotary embedding is a Triton kernel
    return no_cuda(machine) or no_library(machine, "flash_attn") or no_triton(machine)


def _no_spargeattn(machine: Machine) -> str | None:
    if reason := no_cuda(machine):
        return reason
    if not (8, 0) <= machine.arch <= (10, 0):
        return f"SpargeAttn is made for sm_80 to sm_100, and this GPU is {sm(machine.arch)}"
    return no_library(machine, "spas_sage_attn")


def _nothing(machine: Machine) -> None:
    return None


def _any_tensors(*tensors) -> bool:
    return True


def _head_dim(q, *others) -> bool:
    return q.shape[-1] in HEAD_DIMS


def _spargeattn_tensors(q, *others) -> bool:
    return q.shape[-1] in HEAD_DIMS and q.shape[1] >= SPARGEATTN_TOKENS


def _channels(x, *others) -> bool:
    return x.shape[-1] % CHANNELS == 0


@dataclass(frozen=True)
class Implementation:
    """One row: a function that computes an operation.

    Attributes:
        operation: what it computes, such as "sla".
        name: what `TURBO_NB_…` variables and overrides call it.
        requires: machine → the reason why it cannot run there, None where it can.
        function: "module:attribute", imported on first use; same signature as the reference's, and maybe
            `to`.
        takes: tensors → whether it computes these. It is asked about bf16 and fp16 tensors of a GPU only; the
            reference computes all others.
        uses_triton: whether it is one of our Triton or Gluon kernels.
        by_name_only: never chosen unless somebody asks for it by name.
        blocks: GPU architecture → tokens of a query block and of a key block, where the kernel fixes them.
        writes_parts: whether it has an argument `to` for `parts.Parts`, where its result goes.
    """

    operation: str
    name: str
    requires: Callable[[Machine], str | None]
    function: str
    takes: Callable[..., bool] = _any_tensors
    uses_triton: bool = False
    by_name_only: bool = False
    blocks: Mapping[Arch, tuple[int, int]] = field(default_factory=dict)
    writes_parts: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether it runs anywhere, on any tensors."""
        return self.requires is _nothing

    def load(self) -> Callable:
        """Return the function; import its module if this is the first use."""
        module, _, attribute = self.function.partition(":")
        found = sys.modules.get(module)  # first, because torch.compile cannot follow an import
        if found is None or getattr(getattr(found, "__spec__", None), "_initializing", False):  # by another thread
            found = import_module(module)
        return getattr(found, attribute)


def _gluon(operation: str, function: str, **more) -> Implementation:
    return Implementation(operation, "gluon", no_gluon, f"turbo_nb.ops.{function}", uses_triton=True, **more)


def _triton(operation: str, function: str, **more) -> Implementation:
    return Implementation(operation, "triton", no_kernels, f"turbo_nb.ops.{function}", uses_triton=True, **more)


def _reference(operation: str, function: str, **more) -> Implementation:
    return Implementation(operation, "reference", _nothing, f"turbo_nb.ops.{function}", **more)


# The preferred implementation of an operation comes first, its reference last.
IMPLEMENTATIONS = [
    Implementation("rope", "flash_attn", _no_flash_attn, "flash_attn.layers.rotary:apply_rotary_emb"),
    _reference("rope", "norms.reference:apply_rotary_emb"),
    _gluon("sla", "attention.hopper_sla:sparse_linear_attention", takes=_head_dim, writes_parts=True),
    _triton("sla", "attention.triton_sla:sparse_linear_attention", takes=_head_dim, writes_parts=True),
    Implementation("sla", "gathered", no_cuda, "turbo_nb.ops.attention.gathered:sparse_linear_attention"),
    _reference("sla", "attention.reference:sparse_linear_attention"),
    _gluon("sagesla", "attention.hopper_sla:sage_linear_attention", takes=_head_dim, writes_parts=True),
    _triton("sagesla", "attention.triton_sage:sage_linear_attention", takes=_head_dim, writes_parts=True),
    Implementation(  # after Triton, because a whole step on an H100 takes longer with SpargeAttn than with Triton's SLA
        "sagesla", "spargeattn", _no_spargeattn, "turbo_nb.ops.attention.spargeattn:sage_linear_attention",
        takes=_spargeattn_tensors, blocks={(9, 0): (64, 128)},
    ),
    _reference("sagesla", "attention.reference:sage_linear_attention", by_name_only=True),
    Implementation("original", "sdpa", _nothing, "turbo_nb.ops.attention.reference:cross_attention"),
    _gluon("linear", "linear8.hopper_rows:row_product"),
    _triton("linear", "linear8.triton_rows:row_product"),
    _reference("linear", "linear8.reference:row_product"),
    Implementation("tile_linear", "dequantized", no_cuda, "turbo_nb.ops.linear8.dequantized:int8_linear"),
    _reference("tile_linear", "linear8.reference:int8_linear"),
    _triton("row_quantize", "linear8.triton_rows:row_quantize"),
    _reference("row_quantize", "linear8.reference:row_quantize"),
    _triton("tile_quantize", "linear8.triton_tiles:int8_quantize"),
    _reference("tile_quantize", "linear8.reference:int8_quantize"),
    _triton("tile_product", "linear8.triton_tiles:tile_product"),
    _reference("tile_product", "linear8.reference:tile_product"),
    _triton("gated_norm", "norms.triton_norms:gated_norm"),
    _reference("gated_norm", "norms.reference:gated_norm"),
    _triton("norm_rope", "norms.triton_norms:rms_norm_rope", writes_parts=True),
    _reference("norm_rope", "norms.reference:rms_norm_rope"),
    _triton("cross_attention", "attention.triton_cross:cross_attention"),
    _reference("cross_attention", "attention.reference:cross_attention"),
    _gluon("picture_attention", "attention.hopper_picture:picture_attention"),
    _reference("picture_attention", "attention.reference:picture_attention"),
    _triton("rms_norm_silu", "conv.triton_conv:rms_norm_silu"),
    _reference("rms_norm_silu", "conv.reference:rms_norm_silu"),
    _gluon("rimmed_conv", "conv.hopper_conv:rimmed_conv", takes=_channels),
    _triton("rimmed_conv", "conv.triton_conv:rimmed_conv", takes=_channels),
    _reference("rimmed_conv", "conv.reference:rimmed_conv"),
    _gluon("normed_conv", "conv.hopper_conv:normed_conv", takes=_channels),
    _triton("normed_conv", "conv.triton_conv:normed_conv", takes=_channels),
    _reference("normed_conv", "conv.reference:normed_conv"),
    _gluon("upsample_conv", "conv.hopper_conv:upsample_conv", takes=_channels),
    _triton("upsample_conv", "conv.triton_conv:upsample_conv", takes=_channels),
    _reference("upsample_conv", "conv.reference:upsample_conv"),
]  # fmt: skip

# Environment variable → the operations that it chooses an implementation for
VARIABLES = {
    "TURBO_NB_ROPE": ("rope",),
    "TURBO_NB_ATTENTION": ("sla", "sagesla", "original"),
    "TURBO_NB_LINEAR": ("linear", "tile_linear", "row_quantize", "tile_quantize", "tile_product"),
    "TURBO_NB_BLOCK": ("gated_norm", "norm_rope", "cross_attention"),
    "TURBO_NB_VAE": ("rms_norm_silu", "rimmed_conv", "normed_conv", "upsample_conv", "picture_attention"),
}


def implementations(operation: str) -> tuple[Implementation, ...]:
    """Return the rows of an operation, the preferred one first; empty for an unknown operation."""
    return tuple(row for row in IMPLEMENTATIONS if row.operation == operation)


def find(operation: str, name: str) -> Implementation:
    """Return the row of an operation and a name."""
    return next(row for row in IMPLEMENTATIONS if (row.operation, row.name) == (operation, name))
