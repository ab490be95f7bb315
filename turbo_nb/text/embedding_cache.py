"""Embeddings of prompts on disk, so that a known prompt needs no text encoder."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import warn
from ..files import fingerprint
from ..machine import atomic, environment

if TYPE_CHECKING:
    import torch


TEXT_LENGTH = 512  # tokens that a prompt is padded to
MOST = 512e6  # bytes of embeddings on disk; one of 100 tokens takes 0.8 MB


def uses_cache(asked: bool | None = None) -> bool:
    """Return whether embeddings are kept on disk: as asked, else unless TURBO_NB_TEXT_CACHE is 0."""
    return environment.switch(environment.TEXT_CACHE) is not False if asked is None else asked


def open_cache(encoder: Path, tokenizer: Path, dtype: "torch.dtype") -> "EmbeddingCache":
    """Return the cache of the embeddings that these files make of prompts."""
    files = " ".join(map(fingerprint.fingerprint, (encoder, tokenizer)))
    return EmbeddingCache(environment.text_cache(), files, dtype)


class EmbeddingCache:
    """Embeddings (1, 512, text_dim) in a folder: one file for each prompt, with the prompt's own tokens and a checksum.

    A file that cannot be read, or a folder that cannot be written, warns. The least recently used files are deleted
    when all files exceed MOST bytes.

    Args:
        folder: of the files.
        encoder: identifies the files of the text encoder and the tokenizer.
        dtype: of the embeddings.
    """

    def __init__(self, folder: Path, encoder: str, dtype: "torch.dtype"):
        self._folder, self._dtype = folder, dtype
        self._made_by = [encoder, str(dtype), TEXT_LENGTH, "sha256"]  # files of earlier versions have no checksum

    def path(self, prompt: str) -> Path:
        """Return the path of a prompt's file. Prompts that diffusers cleans to the same text share it."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        key = json.dumps([prompt_clean(prompt), *self._made_by])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def has(self, prompt: str) -> bool:
        """Return whether the prompt has a file."""
        return environment.is_file(self.path(prompt))

    def get(self, prompt: str) -> "torch.Tensor | None":
        """Return the embedding (1, 512, text_dim). None for a prompt without a file, and for a damaged file."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(prompt)
        try:
            if environment.exists(path) and not environment.is_file(path):  # a pipe or a device would not end
                raise ValueError("it is not a file")
            data = path.read_bytes()
            rows = load(data)["embedding"]
            if rows.ndim != 2 or len(rows) > TEXT_LENGTH or rows.dtype != self._dtype or not rows.isfinite().all():
                raise ValueError(f"{rows.dtype} of shape {tuple(rows.shape)}")
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            if (header.get("__metadata__") or {}).get("sha256") != _checksum(rows):
                raise ValueError("its checksum is wrong")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            warn(f"{str(path)!r} cannot be read ({error}). The prompt is encoded again.")
            return None
        with suppress(OSError):
            os.utime(path)  # the most recently used file now
        return torch.nn.functional.pad(rows, (0, 0, 0, TEXT_LENGTH - len(rows)))[None]

    def put(self, prompt: str, embedding: "torch.Tensor") -> None:
        """Keep an embedding (1, 512, text_dim), unless it is not finite or is zero."""
        from safetensors.torch import save

        rows = embedding[0]
        if not rows.isfinite().all() or not rows.any():
            return
        tokens = 1 + int(rows.any(1).nonzero().max())  # the padding after the tokens is zero
        rows = rows[:tokens].contiguous()
        try:
            atomic.write(self.path(prompt), save({"embedding": rows}, {"sha256": _checksum(rows)}))
            self._make_room()
        except OSError as error:
            warn(
                f"cannot keep the prompt's embedding in {str(self._folder)!r} ({error}). Every start encodes it again. "
                "Set TURBO_NB_CACHE to another folder, or TURBO_NB_TEXT_CACHE=0 to keep none."
            )

    def _make_room(self) -> None:
        """Delete the least recently used embeddings, and nothing that another process is writing"""
        atomic.sweep(self._folder)
        files = []
        for path in self._folder.glob("[!.]*.safetensors"):
            with suppress(FileNotFoundError):  # deleted since it was listed
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > MOST:
                path.unlink(missing_ok=True)
                total -= size


def _checksum(rows: "torch.Tensor") -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes"""
    import torch

    digest = hashlib.sha256(f"{rows.dtype} {tuple(rows.shape)}".encode())
    digest.update(rows.view(torch.uint8).numpy())
    return digest.hexdigest()
