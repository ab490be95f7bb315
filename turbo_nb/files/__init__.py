"""Weight files: their names and formats, LoRAs, conversion, downloads, and the parts that make a model."""
