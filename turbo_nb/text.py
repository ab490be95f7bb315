"""Prompts become embeddings; the encoder is there only as long as the plan has it, or not at all for known prompts."""

import gc
import hashlib
import json
import os
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import download, environment

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from .plan import Plan

TEXT_LENGTH = 512  # tokens that a prompt is padded to
REMEMBERED = 64  # prompts; an embedding of umT5-xxl takes 4 MB
KEPT = 512e6  # bytes of embeddings on disk; one of 100 tokens takes 0.8 MB


class PromptEncoder:
    """Encodes prompts with diffusers' `encode_prompt`, and remembers the embeddings of the last ones.

    load() gives the text encoder on a device. A resident encoder is the pipeline's own, as diffusers has it; "freed" is
    loaded for a new prompt and let go; "cpu" stays, and works, on the CPU. A prompt that `cache` has needs none;
    where it has all of `prompts`, a resident one is loaded with the first that it has not.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        load: "Callable[[str], torch.nn.Module]",
        cache: "EmbeddingCache | None" = None,
        prompts: Sequence[str] = (),
    ):
        self._pipeline, self._load, self._cache, self._known = pipeline, load, cache, OrderedDict()
        self._unneeded = cache is not None and bool(prompts) and all(map(cache.has, prompts))

    def follow(self, plan: "Plan") -> None:
        """Keep the encoder as `plan` says from now on; called before the first prompt."""
        self.plan = plan
        self._pipeline.text_encoder = self._module = None
        if plan.text_encoder == "resident" and not self._unneeded:
            self._pipeline.text_encoder = self._load(plan.device)

    def __call__(self, prompt: str) -> "torch.Tensor":
        """Embedding (1, 512, text_dim) on the CPU, zeros after the prompt's own tokens."""
        if prompt not in self._known:
            self._known[prompt] = self._find_or_encode(prompt)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt]

    def _find_or_encode(self, prompt: str) -> "torch.Tensor":
        found = self._cache.get(prompt) if self._cache else None
        if found is None:
            found = self._encode(prompt).cpu()
            if self._cache:
                self._cache.put(prompt, found)
        return found

    def _encode(self, prompt: str) -> "torch.Tensor":
        pipeline, kept = self._pipeline, self.plan.text_encoder
        device = "cpu" if kept == "cpu" else self.plan.device
        try:
            if pipeline.text_encoder is None:
                pipeline.text_encoder = self._module or self._load(device)
            embedding, _ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH, device=device
            )
            return embedding
        finally:
            if kept == "cpu":
                self._module = pipeline.text_encoder
            if kept != "resident":
                pipeline.text_encoder = None
                gc.collect()  # the encoder of a freed plan
                empty_cache()


def is_cached(asked: bool | None = None) -> bool:
    """Whether embeddings are kept on disk: as asked, else unless TURBO_NB_TEXT_CACHE is 0."""
    return os.environ.get("TURBO_NB_TEXT_CACHE") != "0" if asked is None else asked


def cache_for(encoder: Path, tokenizer: Path, dtype: "torch.dtype") -> "EmbeddingCache":
    """The embeddings that these files make of prompts, in the package's cache."""
    files = " ".join(map(download.fingerprint, (encoder, tokenizer)))
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


def empty_cache() -> None:
    """Give the GPU's unused memory back, and page-locked main memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()  # torch has no public name for it
