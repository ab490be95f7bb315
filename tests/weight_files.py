"""Write one random model as the weight files that people have: by naming convention and by number format."""

import json
import re

import torch
from torch import Tensor

from turbo_nb import catalog
from turbo_nb.linear import int8_quantize, row_quantize

ARCH = catalog.Arch(dim=256, num_heads=4, num_layers=2, ffn_dim=320)
TEXT_DIM = 192
FP8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}

# diffusers' names → the names of a convention, longest first
UPSTREAM = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.processor.sla.proj_l", "self_attn.attn_op.local_attn.proj_l"),
    ("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("to_out.0.", "o."), ("to_q.", "q."), ("to_k.", "k."),
    ("to_v.", "v."), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"), (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
]  # fmt: skip
FASTVIDEO = [
    ("attn1.processor.sla.proj_l", "attn1.attn_impl.proj_l"), ("attn1.to_out.0", "to_out"),
    ("attn2.to_out.0", "attn2.to_out"),
    ("attn1.to_", "to_"), ("attn1.norm_", "norm_"), (".norm2.", ".self_attn_residual_norm.norm."),
    ("ffn.net.0.proj", "ffn.fc_in"), ("ffn.net.2", "ffn.fc_out"),
    ("text_embedder.linear_1", "text_embedder.fc_in"), ("text_embedder.linear_2", "text_embedder.fc_out"),
    ("time_embedder.linear_1", "time_embedder.mlp.fc_in"), ("time_embedder.linear_2", "time_embedder.mlp.fc_out"),
    ("condition_embedder.time_proj", "condition_embedder.time_modulation.linear"),
]  # fmt: skip
SGLANG = [("attn1.processor.sla.proj_l", "attn1.attn_op.local_attn.proj_l")]
CONVENTIONS = {"diffusers": [], "upstream": UPSTREAM, "SGLang": SGLANG, "FastVideo": FASTVIDEO}


def named(name: str, convention: str) -> str:
    """A tensor's name in a convention, from diffusers' name"""
    for ours, theirs in CONVENTIONS[convention]:
        name = name.replace(ours, theirs)
    if convention == "upstream" and name.endswith("scale_shift_table"):
        name = name.replace("scale_shift_table", "modulation" if name.startswith("blocks") else "head.modulation")
    return name


def linears(state: dict[str, Tensor]) -> list[str]:
    """The weights that quantised files have in 8 bits, without their end `weight`"""
    found = [
        n for n, t in state.items() if re.search(r"blocks\.\d+\..*\.weight$", n) and t.ndim == 2 and "proj_l" not in n
    ]
    return [name.removesuffix("weight") for name in found]


def tile_int8(state: dict[str, Tensor], data: str = "int8_weight", scale: str = "scale") -> dict[str, Tensor]:
    """int8 with a scale for each tile of 128×128"""
    return _replaced(state, lambda weight: dict(zip((data, scale), int8_quantize(weight), strict=True)))


def row_int8(state: dict[str, Tensor], data: str = "weight", scale: str = "weight_scale") -> dict[str, Tensor]:
    """int8 with a scale (N, 1) for each row"""

    def rows(weight: Tensor) -> dict[str, Tensor]:
        q, s, _ = row_quantize(weight)
        return {data: q, scale: s[:, None].contiguous()}

    return _replaced(state, rows)


def tensor_int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's int8_tensorwise: int8 with one scale, and a note in JSON"""

    def one(weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().max() / 127
        q = (weight / scale).round().to(torch.int8)
        return {"weight": q, "weight_scale": scale, "comfy_quant": note({"format": "int8_tensorwise"})}

    return _replaced(state, one)


def scaled_fp8(
    state: dict[str, Tensor], kind: str = "e4m3", scale: str = "scale_weight", rows: bool = False, comfy: bool = False
) -> dict[str, Tensor]:
    """fp8 with one scale, or a scale for each row, of a weight"""
    dtype, most = FP8[kind]

    def one(weight: Tensor) -> dict[str, Tensor]:
        amax = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
        parts = {"weight": (weight / (amax / most)).to(dtype), scale: amax / most}
        return parts | ({"comfy_quant": note({"format": f"float8_{kind}{'fn' * (kind == 'e4m3')}"})} if comfy else {})

    marked = {} if comfy or rows else {"scaled_fp8": torch.empty(0, dtype=dtype)}
    return _replaced(state, one) | marked


def plain_fp8(state: dict[str, Tensor], kind: str = "e4m3") -> dict[str, Tensor]:
    """Matrices cast to fp8"""
    return _replaced(state, lambda weight: {"weight": weight.to(FP8[kind][0])})


def note(layer: dict) -> Tensor:
    """ComfyUI's `comfy_quant`: JSON in a tensor of bytes"""
    return torch.tensor(list(json.dumps(layer).encode()), dtype=torch.uint8)


def _replaced(state: dict[str, Tensor], quantise) -> dict[str, Tensor]:
    """Replace the weight of each linear in the blocks by what `quantise` makes of it"""
    result = dict(state)
    for name in linears(state):
        weight = result.pop(f"{name}weight")
        result |= {f"{name}{end}": tensor for end, tensor in quantise(weight.float()).items()}
    return result


FORMATS = {
    "bf16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
    "fp16": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "fp32": dict,
    "TurboDiffusion int8": tile_int8,
    "SGLang int8": lambda state: tile_int8(state, "weight", "weight_scale_inv"),
    "LightX2V int8": row_int8,
    "LightX2V fp8": lambda state: scaled_fp8(state, scale="weight_scale", rows=True),
    "quanto int8": lambda state: row_int8(state, "weight._data", "weight._scale"),
    "ComfyUI int8": tensor_int8,
    "ComfyUI fp8, scale_weight": scaled_fp8,
    "ComfyUI fp8 e5m2, scale_weight": lambda state: scaled_fp8(state, "e5m2"),
    "ComfyUI fp8, comfy_quant": lambda state: scaled_fp8(state, scale="weight_scale", comfy=True),
    "fp8 e4m3": plain_fp8,
    "fp8 e5m2": lambda state: plain_fp8(state, "e5m2"),
}


# Where the fp16 scales stand in a block of the formats that the gguf package reads and does not write
SCALES_OF_BLOCKS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}


def gguf_file(path, state: dict[str, Tensor], type_name: str = "Q8_0", arch: str = "wan") -> dict:
    """Write a GGUF file: the matrices of blocks in `type_name`, the rest in float32.

    The gguf package does not write every format that it reads. The matrices of such formats have random bytes.

    Returns:
        The numbers of the quantised matrices as the gguf package decodes them, by name.
    """
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[type_name]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(str(path), arch)
    quantised, decoded = {f"{name}weight" for name in linears(state)}, {}
    random = np.random.default_rng(0)
    for name, tensor in state.items():
        array = tensor.float().contiguous().numpy()
        if name not in quantised or array.shape[-1] % block:
            writer.add_tensor(name, array)
            continue
        try:
            data = gguf.quants.quantize(array, kind)
        except NotImplementedError:
            blocks = random.integers(0, 256, (array.size // block, width), dtype=np.uint8)
            for place in SCALES_OF_BLOCKS[type_name]:  # fp16 scales of about 0.001
                blocks[:, place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
            data = blocks.reshape(array.shape[0], -1)
        decoded[name] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded
