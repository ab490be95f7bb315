"""Weight files: their names and formats, LoRAs, conversion, downloads, and the parts that make a model."""

from .endpoint import check_variable

check_variable()  # here because the modules of this folder import huggingface_hub
