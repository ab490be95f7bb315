"""Prompts become embeddings; the encoder is there only as long as the plan has it, or not at all for known prompts."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .embedding_cache import TEXT_LENGTH, EmbeddingCache

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..runtime.plan import Plan
REMEMBERED = 64  # prompts; an embedding of umT5-xxl takes 4 MB


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


def empty_cache() -> None:
    """Give the GPU's unused memory back, and page-locked main memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()  # torch has no public name for it
