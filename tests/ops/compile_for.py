"""Compile the large kernels for GPUs that are not here: `python compile_for.py 80 90`. "gluon" is that of Hopper alone.

Prints shared memory in bytes. A script of its own, because Triton either compiles or interprets in a process.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from turbo_nb.ops.attention import hopper_sla, triton_cross, triton_sage, triton_sla
from turbo_nb.ops.conv import triton_conv
from turbo_nb.ops.linear8 import hopper_rows, triton_rows, triton_tiles

B = "*bf16"
BLOCK = "tensordesc<bf16[1,64,1,128]>"
SPARSE = {"q": B, "k": BLOCK, "v": BLOCK, "kept": "*i32", "state": B, "norm": "*fp32", "bias": "*fp32", "out": B}
SIZES = {"BLOCK_Q": 128, "BLOCK_K": 64, "D": 128}
SPARSE_OPTIONS = {"num_warps": 8, "num_stages": 2}
KERNELS = {
    "sparse_linear": (triton_sla._sparse_linear, SPARSE, SIZES | {"k_scale": None}, SPARSE_OPTIONS),
    "sage": (
        triton_sla._sparse_linear,
        SPARSE | {"k": "tensordesc<i8[1,64,1,128]>", "k_scale": "*fp32"},
        SIZES,
        SPARSE_OPTIONS,
    ),
    "int8_blocks": (
        triton_sage._int8_blocks,
        {"x": B, "mean": B, "out": "*i8", "scale": "*fp32"},
        {"BLOCK": 64, "D": 128},
        {"num_warps": 4},
    ),
    "linear_state": (
        triton_sla._linear_state,
        {"k": BLOCK, "v": BLOCK, "state": "*fp32", "norm": "*fp32"},
        {"BLOCK": triton_sla.STATE_BLOCK, "D": 128, "STAGES": triton_sla.STATE_STAGES},
        {"num_warps": triton_sla.STATE_WARPS},
    ),
    "cross": (
        triton_cross._cross,
        {"q": B, "k": B, "v": B, "out": B, "counts": "*fp32", "last_weight": "fp32"},
        {"COUNTED": True, "BLOCK_Q": triton_cross.BLOCK_Q, "BLOCK_K": triton_cross.BLOCK_K, "D": 128},
        {"num_warps": 4, "num_stages": 3},
    ),
    "int8": (
        triton_rows._row_product,
        {"a": "tensordesc<i8[128,64]>", "b": "tensordesc<i8[128,64]>", "out": "tensordesc<bf16[128,128]>"}
        | {"a_scale": "*fp32", "b_scale": "*fp32", "bias": B},
        {"BIAS": True, "GROUP": 8, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
        {"num_warps": 8, "num_stages": 3},
    ),
    "tile_product": (
        triton_tiles._tile_product,
        {"a": "tensordesc<i8[128,128]>", "b": "tensordesc<i8[128,128]>", "out": "tensordesc<bf16[128,128]>"}
        | {"a_scale": "*fp32", "b_scale": "*fp32"},
        {"GROUP": triton_tiles.GROUP},
        {"num_warps": 8, "num_stages": 3},
    ),
    "conv": (
        triton_conv._conv,
        {
            "x": "tensordesc<bf16[128,64]>",
            "weight": "tensordesc<bf16[128,64]>",
            "weight_2": "tensordesc<bf16[64,64]>",
            "bias": B,
            "residual": B,
            "out": B,
        },
        {
            "N": 192,
            "C": 192,
            "TAPS_T": 3,
            "TAPS": 3,
            "UP": False,
            "SPLIT": 1,
            "RESIDUAL": True,
            "BM": 128,
            "BN": 128,
            "BN_2": 64,
            "BK": 64,
        },
        {"num_warps": 8, "num_stages": 2},
    ),
}

GLUON = {
    "hopper": (
        hopper_sla._sparse_linear,
        dict.fromkeys(("queries", "keys", "values"), f"tensordesc<bf16[64, 128],{hopper_sla.LAYOUT!r}>")
        | {"states": f"tensordesc<bf16[128, 128],{hopper_sla.LAYOUT!r}>", "kept": "*i32"}
        | {"factors": "*fp32", "norm": "*fp32", "bias": "*fp32", "out": B},
        {"WIDE": False},
        {"num_warps": 4},
    ),
    "hopper_int8": (
        hopper_rows._row_product,
        {name: f"tensordesc<i8[{rows}, 128],{hopper_rows.LAYOUT!r}>" for name, rows in (("a", 64), ("b", 256))}
        | {"out": f"tensordesc<bf16[64, 64],{hopper_rows.LAYOUT_OUT!r}>"}
        | {"a_scale": "*fp32", "b_scale": "*fp32", "bias": B},
        {"BIAS": True},
        {"num_warps": 4},
    ),
}
GLUON["hopper sage"] = (
    hopper_sla._sparse_linear,
    GLUON["hopper"][1] | {"keys": f"tensordesc<i8[64, 128],{hopper_sla.LAYOUT_INT8!r}>"},
    {"WIDE": False},
    {"num_warps": 4},
)
GLUON["hopper, offsets above 2**31"] = (*GLUON["hopper"][:2], {"WIDE": True}, {"num_warps": 4})


def shared_memory(kernel, pointers: dict, constants: dict, options: dict, arch: int, source=ASTSource) -> int:
    types = {"scale": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    values = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source(kernel, signature, values), target=target, options=options).metadata.shared


if __name__ == "__main__":
    for arch in sys.argv[1:]:
        if arch == "gluon":
            for name, described in GLUON.items():
                print("90", name, shared_memory(*described, 90, GluonASTSource))
            continue
        for name, described in KERNELS.items():
            print(arch, name, shared_memory(*described, int(arch)))
