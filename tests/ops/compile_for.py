"""Compile the large kernels for GPUs that are not here: `python compile_for.py 86 120:cross 89:conv:96 gluon`.

Prints a line for each launch that fits the card: architecture, kernel, shape and launch, then three numbers. These are
the bytes of shared memory that Triton takes, those that `tuning.shared_memory` gives, and the copies ahead of use.
After the architecture: only this kernel, and of it only the shapes that begin with a number.
A script of its own, because Triton either compiles or interprets in a process.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from turbo_nb.ops import launch, tuning
from turbo_nb.ops.attention import hopper_sla, triton_cross, triton_sage, triton_sla
from turbo_nb.ops.conv import triton_conv
from turbo_nb.ops.linear8 import hopper_rows, triton_rows, triton_tiles

B, F = "*bf16", "*fp32"
ODD = {"length", "rows", "heads", "n", "share", "batches", "keys", "pixels", "frames", "height", "width"}  # of 16
SHAPES = {
    "sla": [(128, 128, 64)],
    "sagesla": [(128, 128, 64)],
    "linear_state": [(128,)],
    "cross": [(128,)],
    "row_product": [(1536, 8960)],
    "conv": [(96, 96), (192, 192), (3, 96), (384, 384), (768, 384)],
}


def blocks(dtype: str, *sides: int) -> str:
    return f"tensordesc<{dtype}[{','.join(map(str, sides))}]>"


def described(kernel: str, shape: tuple, how: tuning.Launch, descriptors: bool) -> tuple:
    """The kernel, the types of its pointers and descriptors, and its constants"""
    tile = how.tile
    if kernel in ("sla", "sagesla"):
        dim, rows, keys = shape
        name, k = ("bf16", None) if kernel == "sla" else ("i8", F)
        types = {"q": B, "kept": "*i32", "state": B, "norm": F, "bias": F, "out": B, "k_scale": k}
        types |= {x: blocks(t, 1, keys, 1, dim) if descriptors else f"*{t}" for x, t in (("k", name), ("v", "bf16"))}
        types |= {"parts": None, "bounds": None}
        constants = {"BLOCK_Q": rows, "BLOCK_K": keys, "D": dim, "PAIRS": tile[0] == 2}
        both = triton_sla._sparse_linear, triton_sla._sparse_linear_by_pointers
    elif kernel == "linear_state":
        types = dict.fromkeys("kv", blocks("bf16", 1, tile[0], 1, shape[0]) if descriptors else B)
        types |= {"state": F, "norm": F}
        constants = {"BLOCK": tile[0], "D": shape[0], "STAGES": how.stages}
        both = triton_sla._linear_state, triton_sla._linear_state_by_pointers
    elif kernel == "cross":
        types = dict.fromkeys(("q", "k", "v", "out"), B) | {"counts": F, "last_weight": "fp32"}
        constants = {"COUNTED": True, "BLOCK_Q": tile[0], "BLOCK_K": tile[1], "D": shape[0]}
        both = triton_cross._cross, triton_cross._cross
    elif kernel == "row_product":
        rows, columns, depth, _ = tile
        types = {"a_scale": F, "b_scale": F, "bias": B} | (
            {"a": blocks("i8", rows, depth), "b": blocks("i8", columns, depth), "out": blocks("bf16", rows, columns)}
            if descriptors
            else {"a": "*i8", "b": "*i8", "out": B}
        )
        constants = {"BIAS": True, "GROUP": 8, "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
        both = triton_rows._row_product, triton_rows._row_product_by_pointers
    else:
        rows, first, second, depth = tile
        sides = {"x": rows, "weight": first, "weight_2": second or first}
        types = {x: blocks("bf16", side, depth) if descriptors else B for x, side in sides.items()}
        types |= {"bias": B, "residual": B, "out": B}
        constants = {"N": shape[0], "C": shape[1], "TAPS_T": 3, "TAPS": 3, "UP": False, "SPLIT": 1, "RESIDUAL": True}
        constants |= {"BM": rows, "BN": first, "BN_2": second, "BK": depth}
        both = triton_conv._conv, triton_conv._conv_by_pointers
    return both[not descriptors], types, constants


# Kernels with one launch for all cards
FIXED = {
    "parts": (
        triton_sla._sparse_linear_by_pointers,
        {"q": B, "k": B, "v": B, "kept": "*i32", "k_scale": None, "state": B, "norm": F, "bias": F, "out": B}
        | {"parts": "*i64", "bounds": "*i64"},
        {"BLOCK_Q": 128, "BLOCK_K": 64, "D": 128, "PAIRS": False}, (8, 3),
    ),
    "project_state": (
        triton_sla._project_state, {"state": F, "norm": F, "weight": B, "out": B, "total": F}, {"D": 128, "ROWS": 16},
        (8, 3),
    ),
    "int8_blocks": (
        triton_sage._int8_blocks, {"x": B, "mean": B, "out": "*i8", "scale": F}, {"BLOCK": 64, "D": 128}, (4, 3),
    ),
    "tile_product": (
        triton_tiles._tile_product_by_pointers, {"a": "*i8", "b": "*i8", "out": B, "a_scale": F, "b_scale": F},
        {"GROUP": triton_tiles.GROUP}, (8, 3),
    ),
}  # fmt: skip
GLUON = {
    "hopper": (
        hopper_sla._sparse_linear,
        dict.fromkeys(("queries", "keys", "values"), f"tensordesc<bf16[64, 128],{hopper_sla.LAYOUT!r}>")
        | {"states": f"tensordesc<bf16[128, 128],{hopper_sla.LAYOUT!r}>", "kept": "*i32"}
        | {"factors": "*fp32", "norm": "*fp32", "bias": "*fp32", "out": B, "parts": "*i64", "bounds": "*i64"},
        {"WIDE": False, "RANKS": 0},
    ),
    "hopper_int8": (
        hopper_rows._row_product,
        {name: f"tensordesc<i8[{rows}, 128],{hopper_rows.LAYOUT!r}>" for name, rows in (("a", 64), ("b", 256))}
        | {"out": f"tensordesc<bf16[64, 64],{hopper_rows.LAYOUT_OUT!r}>"}
        | {"a_scale": "*fp32", "b_scale": "*fp32", "bias": B},
        {"BIAS": True},
    ),
}
# In one kernel, because int8 keys change other lines than `WIDE` and `RANKS`
GLUON["hopper sage, offsets above 2**31, parts of 4 ranks"] = (
    hopper_sla._sparse_linear,
    GLUON["hopper"][1] | {"keys": f"tensordesc<i8[64, 128],{hopper_sla.LAYOUT_INT8!r}>"},
    {"WIDE": True, "RANKS": 4},
)


def compiled(kernel, types: dict, constants: dict, arch: int, warps: int, stages: int, source=ASTSource):
    """Compile with the alignments that `launch.aligned` gives, and with numbers that are multiples of 16"""
    constants = constants | {name: None for name, kind in types.items() if kind is None}
    types = {"scale": "fp32"} | types | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    values = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in ODD)
    }
    described = source(kernel, signature, values, aligned if source is ASTSource else None)
    return triton.compile(
        described, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )


def report(words: str, found, allowed: int) -> None:
    code = found.asm["ttgir"]
    ahead = code.count("async_copy_global_to_local") + code.count("async_tma_copy_global_to_local")
    print(words, found.metadata.shared, allowed, ahead, sep="\t", flush=True)


def main(wanted: str) -> None:
    name, only, first = (*wanted.split(":"), "", "")[:3]
    if name == "gluon":
        for kernel, what in GLUON.items():
            report(f"90\t{kernel}\t\t", compiled(*what, 90, 4, 3, GluonASTSource), 227 * 1024)
        return
    arch = divmod(int(name), 10)
    for kernel, shapes in SHAPES.items():
        for shape in shapes if only in ("", kernel) else ():
            if first not in ("", str(shape[0])):
                continue
            for how in tuning.candidates(kernel, shape, arch):
                what = described(kernel, shape, how, arch[0] >= launch.COPY_ENGINE_FROM)
                allowed = tuning.shared_memory(kernel, shape, how, arch)
                found = compiled(*what, int(name), how.warps, how.stages)
                report(f"{name}\t{kernel}\t{shape}\t{how}", found, allowed)
    for kernel, (*what, options) in FIXED.items() if only in ("", *FIXED) else ():
        if only in ("", kernel) and (arch[0] < launch.COPY_ENGINE_FROM or kernel == "int8_blocks"):
            report(f"{name}\t{kernel}\t\t", compiled(*what, int(name), *options), tuning.SHARED[arch] * 1024)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        main(wanted)
