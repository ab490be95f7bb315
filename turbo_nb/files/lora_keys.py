"""The spellings of the keys in LoRA files: which part of which module a key is.

Trainers write one key for each part of a module: PREFIX.MODULE.PART. They differ in all three. `PARTS` has a row for
each part, `names.module_name` drops the prefix and knows the conventions of modules, and `WORDS` are for modules in
kohya's keys.
"""

import re
from collections.abc import Iterable

from . import names

FACTOR, ADAPTER = r"[._]lora(?:_linear_layer)?[._]", r"(?:\.(?!(?:weight|bias)$)[^.]+)?"  # an adapter may have a name
# How the key of each part of a module ends, in all spellings. "down" and "up" are the low-rank factors.
PARTS = (
    (rf"{FACTOR}(?:A|down){ADAPTER}(?:\.weight)?", "down"),
    (rf"{FACTOR}(?:B|up){ADAPTER}(?:\.weight)?", "up"),
    (rf"{FACTOR}(?:A|B|down|up){ADAPTER}\.bias", "up_bias"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?", "lora_magnitude_vector"),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (r"\.diff_m", "diff_m"),
)
KEY = re.compile(f"(.+?)(?:{'|'.join(f'({end})' for end, _ in PARTS)})")
# Parts of keys that only LoRAs and their kin have, whatever follows
LORA = re.compile(
    r"lora(?:_linear_layer)?[._](?:A|B|up|down|mid|magnitude_vector)\b"
    r"|\.(?:dora_scale|diff|diff_b|diff_m|w_norm|b_norm)$|\.(?:lokr|hada|b?oft|vera|ia3)_"
)
# Kinds of files that are not merged, and how their keys look
OTHER_KINDS = {
    "a LoKr": r"\.lokr_",
    "a LoHa": r"\.hada_",
    "a LoCon with a core tensor": r"[._]lora[._]mid\b",
    "an OFT or BOFT": r"\.b?oft_",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "a VeRA": r"\.vera_",
    "an (IA)³": r"\.(?:ia3_l\b|on_input$)",
    "a LoRA that replaces weights": r"\.set_weight$",
    "a LoRA that resizes weights": r"\.reshape_weight$",
}
# Words with an underscore in the names of modules, because kohya's keys have an underscore for each dot as well
WORDS = {
    "self_attn", "cross_attn", "k_img", "v_img", "norm_q", "norm_k", "norm_k_img", "img_emb", "patch_embedding",
    "text_embedding", "time_embedding", "time_projection", "condition_embedder", "text_embedder", "time_embedder",
    "image_embedder", "time_proj", "linear_1", "linear_2", "to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj",
    "norm_added_k", "proj_out", "proj_l", "attn_op", "local_attn", "attn_impl", "fc_in", "fc_out", "time_modulation",
    "self_attn_residual_norm", "scale_shift_table",
}  # fmt: skip
TABLE = "scale_shift_table"  # a parameter without a module of its own
# diffusers' names of the modules of Wan's transformers that have parameters
MODULES = re.compile(
    r"blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0|add_[kv]_proj|norm_[qk]|norm_added_k|processor\.sla\.proj_l)"
    r"|ffn\.net\.(?:0\.proj|2)|norm2)"
    rf"|(?:blocks\.\d+\.)?{TABLE}|patch_embedding|proj_out"
    r"|condition_embedder\.(?:(?:text_embedder|time_embedder)\.linear_[12]|time_proj"
    r"|image_embedder\.(?:norm[12]|ff\.net\.(?:0\.proj|2)))"
)


def is_lora(keys: Iterable[str]) -> bool:
    """Return whether a file with these keys is a LoRA, or of a kind that does the same."""
    return any(LORA.search(key) for key in keys)


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the kind of a file that is not merged, and the first key that tells it; None for another file."""
    keys = list(keys)
    found = ((kind, key) for kind, pattern in OTHER_KINDS.items() for key in keys if re.search(pattern, key))
    return next(found, None)


def parse(key: str) -> tuple[str | None, str] | None:
    """Return the module and the part that a key is of; None for a key of another form.

    Returns:
        diffusers' name of the module, None for a module of another model. And the part, as in `PARTS`.
    """
    match = KEY.fullmatch(key)
    if match is None:
        return None
    part = PARTS[match.lastindex - 2][1]
    return _module(match[1], part), part


def _module(name: str, part: str) -> str | None:
    """Return diffusers' name of a module, whatever prefix and convention a key has; None for that of another model"""
    if "." not in name:
        name = _with_dots(name)
    if part == "diff_m":
        name += ".modulation"
    return names.module_name(name, lambda name: MODULES.fullmatch(name) is not None)


def _with_dots(name: str) -> str:
    """Return blocks.0.self_attn.q for blocks_0_self_attn_q"""
    words, result = name.split("_"), []
    while words:
        ends = (end for end in range(min(len(words), 4), 1, -1) if "_".join(words[:end]) in WORDS)
        end = next(ends, 1)
        result.append("_".join(words[:end]))
        words = words[end:]
    return ".".join(result)
