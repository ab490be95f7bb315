"""Sparse-linear attention (SLA, arXiv:2509.24006; TurboDiffusion) and SageSLA, as modules and in diffusers' processor.

`set_attention_type(transformer, "sla", topk)` puts SLA into the self-attention of a `WanTransformer3DModel`. The
learned projection of the linear branch is then a parameter of the transformer, `blocks.N.attn1.processor.sla.proj_l`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backends, rope
from .linear import project
from .machine import probe
from .ops.attention.reference import Sums, block_map
from .ops.linear8.reference import QuantizedRows
from .ops.parts import Parts
from .settings import ATTENTION_TYPES, LoadOptions, options

__all__ = [
    "ATTENTION_TYPES",
    "SLAProcessor",
    "SageSparseLinearAttention",
    "SparseLinearAttention",
    "attention_type",
    "block_map",
    "set_attention_type",
    "topk_of",
]

BLOCK_Q, BLOCK_K = 128, 64  # tokens


def _checked(name: str, value: float | str) -> float | str:
    """Return the value of an option of `LoadOptions`. Raises InputError for one that cannot be used"""
    return options(LoadOptions)[name].check(name, value)


class SparseSettings(NamedTuple):
    """What decides a sparse attention beside its inputs and `proj_l`, as in `SageSparseLinearAttention`."""

    topk: float
    block_q: int
    block_k: int
    backend: str | None


class SparseLinearAttention(nn.Module):
    """Attention over the best `topk` share of key blocks, plus linear attention over all keys through `proj_l`.

    `proj_l` starts at zero, where only the sparse part counts.

    Args:
        head_dim: channels of a head.
        topk: share of the key blocks that each query block attends to.
        block_q, block_k: tokens of a query block and of a key block.

    Raises:
        InputError: topk is not above 0 and at most 1.
    """

    operation, backend = "sla", None

    def __init__(self, head_dim: int, topk: float = 0.1, block_q: int = BLOCK_Q, block_k: int = BLOCK_K):
        super().__init__()
        self.topk, self.block_q, self.block_k = _checked("sla_topk", topk), block_q, block_k
        self.proj_l = nn.Linear(head_dim, head_dim)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sums: Sums = (None, None), to: Parts | None = None
    ) -> Tensor | None:
        """Compute the attention.

        Args:
            q, k, v: (B, L, H, head_dim) after norm and rotary embedding.
            sums: of q and k over runs of tokens, from `rope.norm_rope`; kernels pool these instead of q and k.
            to: where a kernel that can writes the result.

        Returns:
            (B, L, H, head_dim) in q's dtype; None where it was written to `to`.
        """
        sizes = self.proj_l.weight, self.proj_l.bias, self.topk, self.block_q, self.block_k
        if to is not None:
            attend = backends.kernel(self.operation, q, k, v, override=self.backend, writes_parts=True)
            if attend:
                return attend(q, k, v, *sizes, sums, to)
        attend = backends.function(self.operation, q, k, v, override=self.backend)
        return attend(q, k, v, *sizes, sums)

    @property
    def settings(self) -> SparseSettings:
        """What the layer computes with; may be set."""
        return SparseSettings(self.topk, self.block_q, self.block_k, self.backend)

    @settings.setter
    def settings(self, settings: SparseSettings) -> None:
        self.topk, self.block_q, self.block_k, self.backend = settings

    def extra_repr(self) -> str:
        return f"topk={self.topk}, block_q={self.block_q}, block_k={self.block_k}"


class SageSparseLinearAttention(SparseLinearAttention):
    """SLA with its sparse part in 8 bits (SageAttention2, arXiv:2411.10958).

    Args:
        head_dim, topk: as for `SparseLinearAttention`.
        block_q, block_k: None: those of the implementation.
        backend: None: what TURBO_NB_ATTENTION names, else the fast one. "gluon" and "triton" multiply v in its own 16
            bits and so are more exact than "spargeattn". "reference" runs anywhere and is slower than SLA. It shows
            what 8 bits throughout do to a picture.
        device: where it will run, for an implementation whose blocks depend on the GPU. None: the first GPU.

    Raises:
        InputError: topk is not above 0 and at most 1.
        BackendError: the backend cannot run here, or no fast one can.
    """

    operation = "sagesla"

    def __init__(
        self,
        head_dim: int,
        topk: float = 0.1,
        block_q: int | None = None,
        block_k: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ):
        choice, blocks = backends.choose(self.operation, device, backend), (BLOCK_Q, BLOCK_K)
        choice.require()
        if fixed := choice.implementation.blocks:
            blocks = fixed.get(probe.probe(device).arch, blocks)
        super().__init__(head_dim, topk, block_q or blocks[0], block_k or blocks[1])
        self.backend = backend


class Alone:
    """The exchange of one attention that has all tokens; `parallel.ulysses` has those of several ranks."""

    def __init__(self):
        self._sent: dict[str, Tensor | None] = {}

    def send(self, **tensors: Tensor | None) -> None:
        """Take q, k, v (B, L, H, D), or the sums of q and k as `rope.norm_rope` returns them."""
        self._sent |= tensors

    def send_normed(self, name: str, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor, sums: bool = True) -> None:
        """Take q or k before `rope.norm_rope`, whose arguments these are."""
        y, summed = rope.norm_rope(x, norm, cos, sin, sums=True) if sums else (rope.norm_rope(x, norm, cos, sin), None)
        self.send(**{name: y.to(x.dtype), f"{name}_sums": summed})

    def attend(self, attention: Callable[[Tensor, Tensor, Tensor, Sums], Tensor]) -> Tensor:
        """Compute an attention over all tokens: (B, L, H, D)."""
        q, k, v, *sums = (self._sent.pop(name, None) for name in ("q", "k", "v", "q_sums", "k_sums"))
        return attention(q, k, v, tuple(sums))


class SLAProcessor(nn.Module):
    """Self-attention of a diffusers Wan block with SLA in place of dense attention."""

    _attention_backend = None  # diffusers sets these two on every processor
    _parallel_config = None
    exchange = None  # a `parallel.ulysses.Ulysses`, where several ranks share the tokens

    def __init__(self, sla: SparseLinearAttention):
        super().__init__()
        self.sla = sla

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor | QuantizedRows,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend within hidden_states (B, L, heads · head_dim). rotary_emb: cos and sin, each (1, L, 1, head_dim)."""
        cos, sin = (table[0, :, 0, 0::2] for table in rotary_emb)  # because diffusers repeats each angle for its pair
        exchange = self.exchange.begin() if self.exchange and self.exchange.bounds else Alone()
        projected = (
            x.unflatten(2, (attn.heads, -1)) for x in project((attn.to_v, attn.to_q, attn.to_k), hidden_states)
        )
        exchange.send(v=next(projected))  # which travels while the next ones are computed
        exchange.send_normed("q", next(projected), attn.norm_q, cos, sin)
        exchange.send_normed("k", next(projected), attn.norm_k, cos, sin)
        del projected  # because the attention needs its memory
        out = exchange.attend(self.sla).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def attention_type(transformer: nn.Module) -> str:
    """Return the attention that `set_attention_type` put in: "sla", "sagesla" or "original"."""
    processor = transformer.blocks[0].attn1.processor
    if not isinstance(processor, SLAProcessor):
        return "original"
    return "sagesla" if isinstance(processor.sla, SageSparseLinearAttention) else "sla"


def topk_of(transformer: nn.Module) -> float | None:
    """Return the share of key blocks that the transformer attends to, None with dense attention."""
    processor = transformer.blocks[0].attn1.processor
    return processor.sla.topk if isinstance(processor, SLAProcessor) else None


def set_topk(transformer: nn.Module, topk: float) -> None:
    """Change the share of key blocks of a transformer with sparse attention; do nothing with dense attention.

    Raises:
        InputError: topk is not above 0 and at most 1.
    """
    for block in transformer.blocks:
        if isinstance(block.attn1.processor, SLAProcessor):
            block.attn1.processor.sla.topk = _checked("sla_topk", topk)


def set_attention_type(
    transformer: nn.Module, attention_type: str, topk: float = 0.1, *, backend: str | None = None,
    device: torch.device | str | None = None,
) -> None:  # fmt: skip
    """Give every block's self-attention SLA ("sla"), SageSLA ("sagesla") or diffusers' dense attention ("original").

    `proj_l` starts at zero and keeps its values from one sparse attention to another; "original" drops it.

    Args:
        transformer: changed in place.
        attention_type: one of `ATTENTION_TYPES`.
        topk: share of the key blocks.
        backend, device: of SageSLA, as in `SageSparseLinearAttention`.

    Raises:
        InputError: the attention type is unknown, or topk is not above 0 and at most 1.
        BackendError: SageSLA's backend cannot run here, or no fast one can.
    """
    _checked("attention_type", attention_type)
    for block in transformer.blocks:
        attn = block.attn1
        if attention_type == "original":
            attn.set_processor(type(attn)._default_processor_cls())
            continue
        head_dim = attn.to_q.out_features // attn.heads
        if attention_type == "sagesla":
            sla = SageSparseLinearAttention(head_dim, topk, backend=backend, device=device)
        else:
            sla = SparseLinearAttention(head_dim, topk)
        if isinstance(attn.processor, SLAProcessor):
            sla.proj_l = attn.processor.sla.proj_l
        attn.set_processor(SLAProcessor(sla).to(next(attn.parameters()).device))
