"""A step on several GPUs: each rank has some tokens, and during attention some heads (Ulysses, arXiv:2309.14509).

    rank 0                     tells the others the step, and sends them latents, timestep and prompt
    every rank                 embeds its tokens, and runs all blocks on them
      in each block            v, q, k of its tokens, all heads
        an exchange       ──►  v, q, k of all tokens, its heads; attention as on one GPU
        an exchange       ──►  the result for its tokens, all heads
    rank 0                     gathers the velocity of all tokens

`exchanges` has both exchanges. v travels while q is computed. Kernels write q, k and the result to where another rank
reads them.

A head's attention sees the whole sequence, so block maps, scales of 8-bit keys and the linear branch are those of one
GPU. Ranks split the tokens at multiples of 16, so the sums that block maps are pooled from are the same, too.

diffusers' own context parallelism (`enable_parallelism`) does not carry fused blocks. Its Ulysses is in
`dispatch_attention_fn`, which SLA does not call. For uneven lengths it exchanges the lengths through the host, which a
CUDA graph cannot.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel as WholeTransformer
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from .. import backends
from ..fused import transformer as fused
from ..linear import project
from ..ops.attention.reference import Sums
from ..ops.launch import only_compiles
from ..ops.norms.reference import SUM_TOKENS
from ..ops.parts import Parts
from ..sla import SLAProcessor, SparseSettings, attention_type, set_attention_type
from .exchanges import Direct, Packed
from .group import Group, shares

if TYPE_CHECKING:
    from .ranks import Member, Team


class Ulysses:
    """The exchange of one transformer.

    Args:
        link: on rank 0 the team, which tells the other ranks; on these the member.
        number: of the transformer among those of the pipeline.
    """

    def __init__(self, link: "Team | Member", number: int):
        self.link, self.number = link, number
        self.bounds: list[int] | None = None  # of the ranks' tokens, while a step is split
        self.shared = False  # whether the other ranks know of the step that runs
        self._text: weakref.ref | None = None
        self._text_version = None
        self._received: Tensor | None = None  # the prompt that rank 0 sent last

    def __reduce__(self):  # a copy of the transformer runs on one GPU
        return type(None), ()

    @property
    def group(self) -> Group | None:
        """The ranks; None before they are connected."""
        return self.link.group

    @property
    def grown(self) -> int:
        """How often memory that the ranks share has moved, so that CUDA graphs with its addresses are outdated."""
        return self.group.peers.grown if self.group and self.group.peers else 0

    @property
    def counts(self) -> list[int]:
        """Tokens of each rank."""
        return [end - begin for begin, end in pairwise(self.bounds)]

    # Steps: rank 0 tells, the other ranks follow

    def tell(self, model: nn.Module, inputs: Sequence[Tensor], recorded: bool) -> None:
        """Tell the other ranks a step, and send them its inputs."""
        split(model, self)  # again, because the user may have changed the attention
        latents, timestep, text = (x.to(self.group.device).contiguous() for x in inputs)
        version = None if inputs[2].is_inference() else inputs[2]._version
        known = self._text is not None and self._text() is inputs[2] and self._text_version == version
        described = [(tuple(x.shape), x.dtype) for x in (latents, timestep, text)]
        kind = self.group.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        how = attention_of(model), recorded, backends.variables(), autocast
        self.link.tell("step", self.number, described, known, *how)
        for x in (latents, timestep) if known else (latents, timestep, text):
            self.group.broadcast(x)
        self._text, self._text_version = weakref.ref(inputs[2]), version

    def follow(
        self, model: nn.Module, described: list, known: bool, attention: tuple, recorded: bool,
        variables: dict[str, str | None], autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        """Run a step that rank 0 told. The arguments are those of `tell`."""
        backends.take_variables(variables)
        self.take(model, attention)
        count = 2 if known else 3
        inputs = [torch.empty(shape, dtype=dtype, device=self.group.device) for shape, dtype in described[:count]]
        for x in inputs:
            self.group.broadcast(x)
        if not known:
            self._received = inputs.pop()
        run = model if recorded else getattr(vars(model).get("forward"), "plain", model)
        self.shared = True
        try:
            with torch.autocast(self.group.device.type, autocast, enabled=autocast is not None):
                run(*inputs, self._received, return_dict=False)
        finally:
            self.shared = False

    def take(self, model: nn.Module, attention: tuple[str, SparseSettings | None]) -> None:
        """Give this rank's transformer the attention of rank 0, as `attention_of` returns it."""
        if attention != attention_of(model):
            kind, settings = attention
            set_attention_type(model, kind, backend=settings and settings.backend, device=self.group.device)
            for block in model.blocks if settings else ():
                block.attn1.processor.sla.settings = settings
            split(model, self)

    @contextmanager
    def sharing(self, model: nn.Module, inputs: Sequence[Tensor], recorded: bool = False) -> Iterator[None]:
        """Let the other ranks run the step of this context, too, unless they do already."""
        if self.shared:
            yield
            return
        with self.link.together():
            self.tell(model, inputs, recorded)
            self.shared = True
            try:
                yield
            finally:
                self.shared = False

    def can_share(self, model: nn.Module, latents: Tensor, timestep: Tensor) -> bool:
        """Return whether the ranks share a step; rank 0 computes it alone otherwise."""
        return splits(model, latents, timestep)

    def agree(self, reason: str) -> str:
        """Return a reason that any rank has, so that all ranks decide alike; empty if none has one."""
        with nullcontext() if self.group.rank or self.shared else self.link.together():
            refusals = self.group.sum(torch.tensor([float(bool(reason))], device=self.group.device))
        return reason or ("another GPU cannot" if refusals.item() else "")

    def begin(self) -> Packed | Direct:
        """Begin the exchange of one attention."""
        return (Direct if self.group.peers else Packed)(self.group, self.counts)


class DenseProcessor(WanAttnProcessor):
    """diffusers' dense self-attention, with the exchange."""

    def __init__(self, exchange: Ulysses):
        super().__init__()
        self.exchange: Ulysses | None = exchange  # None in a copy

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        if self.exchange is None or self.exchange.bounds is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        cos, sin = (table[0, :, 0, 0::2] for table in rotary_emb)
        exchange = self.exchange.begin()
        linears = attn.to_v, attn.to_q, attn.to_k
        projected = (x.unflatten(2, (attn.heads, -1)) for x in project(linears, hidden_states))
        exchange.send(v=next(projected))
        exchange.send_normed("q", next(projected), attn.norm_q, cos, sin, sums=False)
        exchange.send_normed("k", next(projected), attn.norm_k, cos, sin, sums=False)
        del projected  # because the attention needs its memory
        out = exchange.attend(_dense).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _dense(q: Tensor, k: Tensor, v: Tensor, sums: Sums, to: Parts | None = None) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class WanTransformer3DModel(WholeTransformer):
    """diffusers' transformer, whose steps run on several ranks. It has diffusers' name, because saving writes it."""

    ulysses: Ulysses | None = None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor]:
        """Compute a step on all ranks, as diffusers' forward computes it: (B, C, T, H, W) of the same shape.

        Only rank 0 gets the result. It computes alone what the ranks cannot share: gradients, a timestep for each
        token, embeddings of a picture, and very short clips.
        """
        if not splits(self, hidden_states, timestep, encoder_hidden_states_image, attention_kwargs):
            return super().forward(
                hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, return_dict,
                attention_kwargs,
            )  # fmt: skip
        with self.ulysses.sharing(self, (hidden_states, timestep, encoder_hidden_states)):
            sample = self._split(hidden_states, timestep, encoder_hidden_states)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _split(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Compute this rank's tokens; on rank 0 return those of all ranks"""
        ulysses, group = self.ulysses, self.ulysses.group
        grid = tuple(side // patch for side, patch in zip(latents.shape[2:], self.config.patch_size, strict=True))
        bounds = shares(grid[0] * grid[1] * grid[2], group.size, SUM_TOKENS)
        own = slice(*bounds[group.rank : group.rank + 2])
        tables = tuple(table[:, own] for table in self.rope(latents))
        x = self.patch_embedding(latents).flatten(2)[..., own].transpose(1, 2).contiguous()
        temb, modulation, text, _ = self.condition_embedder(timestep, text, None, timestep_seq_len=None)
        modulation = modulation.unflatten(1, (6, -1))
        ulysses.bounds = bounds
        try:
            blocks = self.blocks
            if only_compiles():  # one block, because all have the same kernels; in a CUDA graph one kernel differs
                blocks = blocks[:1]
                with fused.recording():
                    blocks[0](x, text.clone(), modulation, tables)
            for block in blocks:
                x = block(x, text, modulation, tables)
        finally:
            ulysses.bounds = None
        shift, scale = (self.scale_shift_table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out((self.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        counts = [end - begin for begin, end in pairwise(bounds)]
        whole = group.gather(x.transpose(0, 1).contiguous(), counts)
        if whole is None:
            return x
        x = whole.transpose(0, 1).unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def splits(
    model: nn.Module, latents: Tensor, timestep: Tensor, image: Tensor | None = None, more: dict | None = None
) -> bool:
    """Return whether the ranks share a step of a transformer."""
    ulysses = getattr(model, "ulysses", None)
    if ulysses is None or ulysses.group is None or torch.is_grad_enabled():
        return False
    if getattr(model, "peft_config", None) or not all(_is_known(block.attn1.processor) for block in model.blocks):
        return False  # a LoRA or an attention that only rank 0 has
    if len({_attention(block.attn1.processor) for block in model.blocks}) > 1:
        return False  # because the other ranks take over one attention for all layers
    tokens = latents[0, 0].numel() // torch.Size(model.config.patch_size).numel()
    return timestep.ndim == 1 and image is None and not more and tokens > (ulysses.group.size - 1) * SUM_TOKENS


def attention_of(model: nn.Module) -> tuple[str, SparseSettings | None]:
    """Return the attention of a transformer and its settings, which dense attention has not."""
    return attention_type(model), _attention(model.blocks[0].attn1.processor)[1]


def _attention(processor: Any) -> tuple[type | None, SparseSettings | None]:
    """Return the sparse attention of a layer and its settings, None for both with dense attention"""
    sla = processor.sla if isinstance(processor, SLAProcessor) else None
    return (type(sla), sla.settings) if sla else (None, None)


def _is_known(processor: Any) -> bool:
    """Return whether the other ranks can have the same attention"""
    return isinstance(processor, SLAProcessor | DenseProcessor) or type(processor) is WanAttnProcessor


def split(transformer: nn.Module, ulysses: Ulysses) -> None:
    """Let the steps of a transformer run on several ranks, in place. Call it on every rank, before `runtime.place`."""
    transformer.__class__ = WanTransformer3DModel
    transformer.ulysses = ulysses
    for block in transformer.blocks:
        if isinstance(block.attn1.processor, SLAProcessor):
            block.attn1.processor.exchange = ulysses
        elif type(block.attn1.processor) is WanAttnProcessor:
            block.attn1.set_processor(DenseProcessor(ulysses))
