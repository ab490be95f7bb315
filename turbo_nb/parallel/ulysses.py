"""A step on several GPUs: each rank has some tokens, and during attention some heads (Ulysses, arXiv:2309.14509).

    rank 0                     tells the others the step, and sends them latents, timestep and prompt
    every rank                 embeds its tokens, and runs all blocks on them
      in each block            v, q, k of its tokens, all heads
        an exchange       ──►  v, q, k of all tokens, its heads; attention as on one GPU
        an exchange       ──►  the result for its tokens, all heads
    rank 0                     gathers the velocity of all tokens

`Direct` is the exchange through memory that the ranks share (`peers`): v travels while q is computed, and q while k is.
`Packed` is that of NCCL and gloo: one message to each rank, beside which nothing runs.

A head's attention sees the whole sequence, so block maps, scales of 8-bit keys and the linear branch are those of one
GPU. Ranks split the tokens at multiples of 16, so the sums that block maps are pooled from are the same, too.

diffusers' own context parallelism (`enable_parallelism`) does not carry fused blocks. Its Ulysses is in
`dispatch_attention_fn`, which SLA does not call. For uneven lengths it exchanges the lengths through the host, which a
CUDA graph cannot.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel as WholeTransformer
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from .. import rope
from ..linear import project
from ..ops.attention.reference import Sums
from ..ops.norms.reference import SUM_TOKENS
from ..sla import Alone, SLAProcessor, attention_type, set_attention_type, topk_of
from .group import Group, shares

if TYPE_CHECKING:
    from .ranks import Member, Team

Attention = Callable[[Tensor, Tensor, Tensor, Sums], Tensor]  # of q, k, v (B, L, h, D)


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
        self.link.tell("step", self.number, described, known, attention_of(model), recorded)
        for x in (latents, timestep) if known else (latents, timestep, text):
            self.group.broadcast(x)
        self._text, self._text_version = weakref.ref(inputs[2]), version

    def follow(self, model: nn.Module, described: list, known: bool, attention: tuple, recorded: bool) -> None:
        """Run a step that rank 0 told. The arguments are those of `tell`."""
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
            run(*inputs, self._received, return_dict=False)
        finally:
            self.shared = False

    def take(self, model: nn.Module, attention: tuple[str, float | None, str | None]) -> None:
        """Give this rank's transformer the attention of rank 0, as `attention_of` returns it."""
        if attention != attention_of(model):
            kind, topk, backend = attention
            set_attention_type(model, kind, topk or 1, backend=backend, device=self.group.device)
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

    def begin(self) -> "Packed | Direct":
        """Begin the exchange of one attention."""
        return (Direct if self.group.peers else Packed)(self)


class Direct:
    """The exchange of one attention, through memory that the other GPUs write (`peers`).

    Args:
        ulysses: of the transformer.
    """

    HEADS, TOKENS = 0, 1  # channels of the two exchanges

    def __init__(self, ulysses: Ulysses):
        self._group, self._peers, self._counts = ulysses.group, ulysses.group.peers, ulysses.counts
        self._arriving: dict[str, Tensor] = {}
        self._sent: list[Tensor] = []  # must live until they have arrived

    def send(self, **tensors: Tensor | None) -> None:
        """Begin to exchange q, k, v (B, l, H, D) or the sums of q and k, of this rank's tokens."""
        self._peers.memory.fork()
        for name, x in tensors.items():
            if x is not None:
                self._to_heads(name, x.contiguous())

    def _to_heads(self, name: str, x: Tensor) -> None:
        (batch, _, heads, dim), size, rank = x.shape, self._peers.size, self._peers.rank
        counts = [-(-count // SUM_TOKENS) for count in self._counts] if name.endswith("_sums") else self._counts
        own, total, begin = heads // size, sum(counts), sum(counts[:rank])
        row = own * dim * x.element_size()
        window = self._peers.window(name, batch * total * row)
        for other in (*range(rank + 1, size), *range(rank + 1)):
            rows = x[:, :, other * own : (other + 1) * own].flatten(2)
            for clip in range(batch):
                self._peers.send(window, other, (clip * total + begin) * row, row, rows[clip])
        self._sent.append(x)
        self._arriving[name] = window.view(x.dtype, batch, total, own, dim)

    def attend(self, attention: Attention) -> Tensor:
        """As `Packed.attend`. The result is overwritten by the next attention."""
        self._group.exchanges += 2
        self._peers.deliver(self.HEADS)
        self._sent.clear()
        q, k, v, *sums = (self._arriving.get(name) for name in ("q", "k", "v", "q_sums", "k_sums"))
        return self._to_tokens(attention(q, k, v, tuple(sums)).contiguous())

    def _to_tokens(self, x: Tensor) -> Tensor:
        """Exchange a result (B, L, h, D) for this rank's tokens of all heads, (B, l, H, D)"""
        (batch, _, own, dim), size, rank = x.shape, self._peers.size, self._peers.rank
        row = own * dim * x.element_size()
        window = self._peers.window("out", batch * max(self._counts) * size * row)
        self._peers.memory.fork()
        parts = x.flatten(2).split(self._counts, 1)
        for other in (*range(rank + 1, size), *range(rank + 1)):
            for clip in range(batch):
                at = clip * self._counts[other] * size * row + rank * row
                self._peers.send(window, other, at, size * row, parts[other][clip])
        self._peers.deliver(self.TOKENS)
        return window.view(x.dtype, batch, self._counts[rank], size * own, dim)


class Packed(Alone):
    """The exchange of one attention, in one message to each rank.

    Args:
        ulysses: of the transformer.
    """

    def __init__(self, ulysses: Ulysses):
        super().__init__()
        self._group, self._counts = ulysses.group, ulysses.counts

    def attend(self, attention: Attention) -> Tensor:
        """Compute an attention over all tokens with this rank's heads: this rank's tokens of all heads."""
        pooled, sums = None, [self._sent.pop(name, None) for name in ("q_sums", "k_sums")]
        if sums[0] is not None:
            pooled = self._to_heads(sums, [-(-count // SUM_TOKENS) for count in self._counts])
        arrived = self._to_heads([self._sent.pop(name) for name in "qkv"], self._counts)()
        out = self._to_tokens(attention(*arrived, pooled() if pooled else (None, None)))
        return torch.stack(out, dim=2).flatten(2, 3)

    def _to_heads(self, tensors: Sequence[Tensor], counts: list[int]) -> Callable[[], list[Tensor]]:
        """Begin to exchange tensors of equal shape: (B, counts[rank], H, D) → (B, sum of counts, H / ranks, D).

        Returns a function that waits for the results, views with all tokens of this rank's heads.
        """
        (batch, length, heads, dim), ranks = tensors[0].shape, self._group.size
        own = heads // ranks
        sent = tensors[0].new_empty(ranks - 1, length, batch, len(tensors), own, dim)
        received = sent.new_empty(sum(counts), batch, len(tensors), own, dim)
        from_ranks, to_ranks = [*received.split(counts)], [*sent.unbind(0)]
        to_ranks.insert(self._group.rank, from_ranks[self._group.rank])  # a rank's own part is there at once
        for number, x in enumerate(tensors):
            for to, part in zip(to_ranks, x.unflatten(2, (ranks, own)).unbind(2), strict=True):
                to[:, :, number] = part.transpose(0, 1)
        from_ranks[self._group.rank] = to_ranks[self._group.rank] = received[:0]
        arrival = self._group.exchange(from_ranks, to_ranks)

        def arrived(sent: Tensor = sent) -> list[Tensor]:  # which must live as long as the exchange
            arrival.wait()
            return [received[:, :, number].transpose(0, 1) for number in range(len(tensors))]

        return arrived

    def _to_tokens(self, x: Tensor) -> list[Tensor]:
        """Exchange a result (B, L, h, D) for this rank's tokens of each rank's heads, (B, l, h, D)"""
        (batch, _, own, dim), rank = x.shape, self._group.rank
        sent = x.transpose(0, 1).contiguous()  # a view for one clip
        to_ranks = [*sent.split(self._counts)]
        received = sent.new_empty(self._group.size - 1, self._counts[rank], batch, own, dim)
        from_ranks = [*received.unbind(0)]
        results = [*from_ranks[:rank], to_ranks[rank], *from_ranks[rank:]]
        from_ranks.insert(rank, sent[:0])
        to_ranks[rank] = sent[:0]
        self._group.exchange(from_ranks, to_ranks).wait()
        return [one.transpose(0, 1) for one in results]


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
        v, q, k = (x.unflatten(2, (attn.heads, -1)) for x in project(linears, hidden_states))
        q, k = rope.norm_rope(q, attn.norm_q, cos, sin), rope.norm_rope(k, attn.norm_k, cos, sin)
        exchange.send(q=q.to(v.dtype), k=k.to(v.dtype), v=v)
        del q, k, v  # because the attention needs their memory
        out = exchange.attend(_dense).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _dense(q: Tensor, k: Tensor, v: Tensor, sums: Sums) -> Tensor:
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
            for block in self.blocks:
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
    tokens = latents[0, 0].numel() // torch.Size(model.config.patch_size).numel()
    return timestep.ndim == 1 and image is None and not more and tokens > (ulysses.group.size - 1) * SUM_TOKENS


def attention_of(model: nn.Module) -> tuple[str, float | None, str | None]:
    """Return the attention of a transformer, its topk, and the backend that overrides the usual one."""
    processor = model.blocks[0].attn1.processor
    return attention_type(model), topk_of(model), processor.sla.backend if isinstance(processor, SLAProcessor) else None


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
