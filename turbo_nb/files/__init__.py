"""Weight files: their names and formats, LoRAs, conversion, downloads, and the parts that make a model."""

from .endpoint import check_variables

check_variables()  # here because the modules of this folder import huggingface_hub
