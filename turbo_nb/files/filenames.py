"""The names that the files and folders of models have, here and in repositories of the Hub."""

import re

CONFIG = "config.json"

WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt")  # how the names of weight files end
INDEX = ".index.json"  # follows the name that the set of shards would have as one file
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
# Of several files in a folder, the first of these is what diffusers and transformers load
USUAL = (
    "diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin"
)  # fmt: skip
# The same names with a variant, such as .fp16, and as shards: stem, variant, shard, format
STANDARD = re.compile(r"(diffusion_pytorch_model|model|pytorch_model)(\.[\w-]+?)?(-\d{5}-of-\d{5})?\.(safetensors|bin)")

# Folders of a model's two transformers, the high-noise expert first: diffusers' names, then Wan-AI's
EXPERTS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))

SPIECE = "spiece.model"  # SentencePiece's
VOCABULARIES = ("tokenizer.json", SPIECE)
TOKENIZER_CONFIG = "tokenizer_config.json"  # makes a tokenizer with one of the vocabularies
TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", SPIECE)
TOKENIZER_FOLDERS = ("tokenizer", "google/umt5-xxl")  # diffusers' name, then Wan-AI's


def as_one_file(name: str) -> str:
    """Return the name that a shard's set would have as one file; another name as it is."""
    match = SHARD.fullmatch(name)
    return match["stem"] + match["suffix"] if match else name
