"""Prompts become embeddings; the encoder is there only as long as the plan has it, or not at all for known prompts."""

import hashlib
import json
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import fingerprint
from ..machine import environment

if TYPE_CHECKING:
    import torch


TEXT_LENGTH = 512  # tokens that a prompt is padded to
KEPT = 512e6  # bytes of embeddings on disk; one of 100 tokens takes 0.8 MB


def is_cached(asked: bool | None = None) -> bool:
    """Whether embeddings are kept on disk: as asked, else unless TURBO_NB_TEXT_CACHE is 0."""
    return os.environ.get("TURBO_NB_TEXT_CACHE") != "0" if asked is None else asked


def cache_for(encoder: Path, tokenizer: Path, dtype: "torch.dtype") -> "EmbeddingCache":
    """The embeddings that these files make of prompts, in the package's cache."""
    files = " ".join(map(fingerprint.fingerprint, (encoder, tokenizer)))
    return EmbeddingCache(environment.text_cache(), files, dtype)


class EmbeddingCache:
    """Embeddings (1, 512, text_dim) in a folder, a file for each prompt with its own tokens, to the bit.

    encoder: what the files that made them are known by. A file that cannot be read is no error, nor is a folder that
    cannot be written; both are said. The least recently used files go, so that KEPT bytes are not exceeded.
    """

    def __init__(self, folder: Path, encoder: str, dtype: "torch.dtype"):
        self._folder, self._dtype, self._made_by = folder, dtype, [encoder, str(dtype), TEXT_LENGTH]

    def path(self, prompt: str) -> Path:
        """The file of a prompt, there or not; the same for prompts that diffusers cleans to the same."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        key = json.dumps([prompt_clean(prompt), *self._made_by])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def has(self, prompt: str) -> bool:
        """Whether there is a file for it."""
        return self.path(prompt).is_file()

    def get(self, prompt: str) -> "torch.Tensor | None":
        """The embedding; None for one that is not here, and with a warning for one that cannot be read."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(prompt)
        try:
            rows = load(path.read_bytes())["embedding"]
            if rows.ndim != 2 or len(rows) > TEXT_LENGTH or rows.dtype != self._dtype or not rows.isfinite().all():
                raise ValueError(f"{rows.dtype} of shape {tuple(rows.shape)}")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            warnings.warn(f"{str(path)!r} cannot be read ({error}); the prompt is encoded again", stacklevel=2)
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return torch.nn.functional.pad(rows, (0, 0, 0, TEXT_LENGTH - len(rows)))[None]

    def put(self, prompt: str, embedding: "torch.Tensor") -> None:
        """Keep a finite embedding (1, 512, text_dim); its file appears when it is whole."""
        from safetensors.torch import save

        path, rows = self.path(prompt), embedding[0]
        if not rows.isfinite().all():
            return
        tokens = 1 + int(rows.any(1).nonzero().max())  # the padding after them is zero
        temporary = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".new")
            with os.fdopen(handle, "wb") as file:
                file.write(save({"embedding": rows[:tokens].contiguous()}))
            os.replace(temporary, path)
            self._make_room()
        except OSError as error:
            warnings.warn(
                f"cannot keep the prompt's embedding in {str(self._folder)!r} ({error}); every start encodes it again. "
                "TURBO_NB_CACHE names another folder, TURBO_NB_TEXT_CACHE=0 keeps none",
                stacklevel=2,
            )
        finally:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)

    def _make_room(self) -> None:
        files = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # gone since it was listed
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > KEPT:
                path.unlink(missing_ok=True)
                total -= size
