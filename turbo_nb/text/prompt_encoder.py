"""Prompts become embeddings: encoded by umT5, or found in memory or on disk."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import warn
from ..machine.probe import release_memory
from ..values import shown
from .embedding_cache import TEXT_LENGTH, EmbeddingCache

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

REMEMBERED = 64  # prompts; an embedding of umT5-xxl takes 4 MB


@dataclass(frozen=True, kw_only=True)
class Length:
    """The tokens of a prompt, and the words that the text encoder does not read, because they come after 512 tokens."""

    tokens: int
    lost: str


def length(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> Length:
    """Count the tokens of a prompt as the text encoder gets them."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    text = prompt_clean(prompt)
    tokens, lost = tokenizer(text, verbose=False).input_ids, ""
    if len(tokens) > TEXT_LENGTH:
        kept, rest = tokens[: TEXT_LENGTH - 1], tokens[TEXT_LENGTH - 1 :]  # the kept end takes a token
        read = tokenizer.decode(kept, skip_special_tokens=True)
        # not decoded where the text has it, because ByT5's decoder takes minutes for a megabyte
        lost = text[len(read) :] if text.startswith(read) else tokenizer.decode(rest, skip_special_tokens=True)
    return Length(tokens=len(tokens), lost=lost.lstrip())


class Streamed(Protocol):
    """A text encoder in main memory that works on a GPU."""

    module: "torch.nn.Module"

    def release(self) -> None:
        """Give the memory on the GPU back."""


class PromptEncoder:
    """Encodes prompts with diffusers' `encode_prompt`, and remembers the embeddings of the last ones.

    Args:
        pipeline: whose tokenizer and text encoder are used.
        load: returns the text encoder on a device.
        stream: lets a text encoder in main memory work on a device. `True` asks for fast copies, which take seconds to
            prepare.
        cache: of embeddings on disk. None: embeddings are not kept.
        prompts: the prompts to come, if they are known. If the cache has all of them, a resident text encoder is not
            loaded before the first uncached prompt.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        load: "Callable[[str], torch.nn.Module]",
        stream: "Callable[[torch.nn.Module, str, bool], Streamed]",
        cache: "EmbeddingCache | None" = None,
        prompts: Sequence[str] = (),
    ):
        self._pipeline, self._load, self._stream, self._cache = pipeline, load, stream, cache
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._streamed: Streamed | None = None
        self._device = ""
        new = (prompt for prompt in dict.fromkeys(prompts) if cache is None or not cache.has(prompt))
        count = len(list(islice(new, 2)))
        self._all_cached, self._is_single = bool(prompts) and count == 0, count == 1

    def place(self, mode: Literal["resident", "freed", "cpu"], device: str) -> None:
        """Decide where the text encoder is kept from now on. Call this before the first prompt.

        Args:
            mode: "resident" keeps it on the device. "freed" loads it for each new prompt and frees it afterwards.
                "cpu" keeps it in main memory, from which its blocks are streamed through the device.
            device: of the pipeline.
        """
        if (mode, device) != ("cpu", self._device):
            self._streamed = None
        self._mode, self._device = mode, device
        self._pipeline.text_encoder = None
        if mode == "resident" and not self._all_cached:
            self._pipeline.text_encoder = self._load(device)

    def __call__(self, prompt: str) -> "torch.Tensor":
        """Return the embedding (1, 512, text_dim) on the CPU, with zeros after the prompt's own tokens.

        Warns of the words that the text encoder does not read, because they come after its 512 tokens.
        """
        self.warn_of_lost_words(prompt)
        if prompt not in self._known:
            self._known[prompt] = self._find_or_encode(prompt)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt]

    def warn_of_lost_words(self, prompt: str) -> None:
        """Warn of the words that the text encoder does not read."""
        if len(prompt.encode()) < TEXT_LENGTH:  # a token has a byte at least, and one token ends the prompt
            return
        found = length(prompt, self._pipeline.tokenizer)
        if found.lost:
            warn(
                f"the prompt has {found.tokens} tokens, and the text encoder reads {TEXT_LENGTH}. It does not read "
                f"the last {len(found.lost)} characters, which begin with {shown(found.lost)}. Shorten the prompt.",
                stacklevel=3,
            )

    def _find_or_encode(self, prompt: str) -> "torch.Tensor":
        found = self._cache.get(prompt) if self._cache else None
        if found is None:
            found = self._encode(prompt).cpu()
            if self._cache:
                self._cache.put(prompt, found)
        return found

    def _encode(self, prompt: str) -> "torch.Tensor":
        with self.loaded() as device:
            embedding, _ = self._pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH, device=device
            )
            return embedding

    @contextmanager
    def loaded(self) -> Iterator[str]:
        """Give the pipeline its text encoder inside this context, and place it by the plan afterwards.

        Gives the device that it works on.
        """
        pipeline, device = self._pipeline, self._device
        if pipeline.text_encoder is not None:
            yield device
            return
        try:
            if self._mode == "cpu":
                if self._streamed is None:
                    self._streamed = self._stream(self._load("cpu"), device, not self._is_single)
                pipeline.text_encoder = self._streamed.module
            else:
                pipeline.text_encoder = self._load(device)
            yield device
        finally:
            if self._mode != "resident":
                pipeline.text_encoder = None
            if self._streamed:
                self._streamed.release()
            elif self._mode == "freed":
                release_memory()
