"""Sparse-linear attention (SLA, arXiv:2509.24006; TurboDiffusion) and SageSLA, as modules and in diffusers' processor.

`set_attention_type(transformer, "sla", topk)` puts it into the self-attention of a `WanTransformer3DModel`; the
learned projection of the linear branch is then an ordinary parameter of the transformer, under
`blocks.N.attn1.processor.sla.proj_l`.
"""

import torch
from torch import Tensor, nn

from . import backends, rope
from .errors import InputError
from .linear import project
from .machine import probe
from .ops.attention import reference as attention_reference
from .ops.attention.reference import block_map
from .ops.linear8 import reference as linear8_reference

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

ATTENTION_TYPES = ("sla", "sagesla", "original")
BLOCK_Q, BLOCK_K = 128, 64  # tokens
KERNEL_HEAD_DIMS = (64, 128)  # that the Triton kernel takes
SPARGEATTN_TOKENS = 128  # fewest that SpargeAttn takes
NEVER = 1e6  # SpargeAttn's threshold for leaving out products that count for little
SPARGEATTN_BLOCKS = {(9, 0): (64, 128)}  # by arch of the GPU; those of SLA on any other


def check_topk(topk: float) -> float:
    """The same number. Raises InputError for one that is no share."""
    if not 0 < topk <= 1:
        raise InputError(f"sla_topk is {topk}; it is a share of the key blocks, above 0 and at most 1, such as 0.1")
    return topk


class SparseLinearAttention(nn.Module):
    """Attention over the best `topk` share of key blocks, plus linear attention over all keys through `proj_l`.

    (q, k, v), each (B, L, H, head_dim) after norm and rotary embedding → (B, L, H, head_dim) in q's dtype. Blocks are
    of block_q and block_k tokens. `proj_l` starts at zero, where only the sparse part counts. sums: of q and k, as
    `rope.norm_rope` gives them. Raises InputError for a topk outside (0, 1].
    """

    def __init__(self, head_dim: int, topk: float = 0.1, block_q: int = BLOCK_Q, block_k: int = BLOCK_K):
        super().__init__()
        check_topk(topk)
        self.topk, self.block_q, self.block_k = topk, block_q, block_k
        self.proj_l = nn.Linear(head_dim, head_dim)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sums=(None, None)) -> Tensor:
        if q.shape[-1] in KERNEL_HEAD_DIMS and backends.on_triton("sla", q, k, v):
            from .ops.attention.triton_sla import sparse_linear_attention

            weight, bias = self.proj_l.weight, self.proj_l.bias
            gluon = backends.choose("sla").chosen == "gluon"
            return sparse_linear_attention(q, k, v, weight, bias, self.topk, self.block_q, self.block_k, gluon, sums)
        return self._attend(q, k, v, attention_reference.sparse_attention)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sparse_attention) -> Tensor:
        weight, bias = self.proj_l.weight, self.proj_l.bias
        return attention_reference.sparse_linear_attention(
            q, k, v, weight, bias, self.topk, self.block_q, self.block_k, sparse_attention
        )

    def extra_repr(self) -> str:
        return f"topk={self.topk}, block_q={self.block_q}, block_k={self.block_k}"


class SageSparseLinearAttention(SparseLinearAttention):
    """SLA with its sparse part in 8 bits (SageAttention2, arXiv:2411.10958), in the blocks of what runs it.

    backend: "gluon" or "triton", whose product with v is in v's 16 bits and so more exact; "spargeattn"; or
    "reference", which is plain PyTorch, runs anywhere and shows what 8 bits throughout do to a picture, slower than
    SLA. None is what TURBO_NB_ATTENTION says, else the fast one. Raises BackendError where it cannot run, or there is
    no fast one.
    """

    def __init__(
        self,
        head_dim: int,
        topk: float = 0.1,
        block_q: int | None = None,
        block_k: int | None = None,
        backend: str | None = None,
    ):
        blocks = BLOCK_Q, BLOCK_K
        if backends.choose("sagesla", override=backend).require() == "spargeattn":
            blocks = SPARGEATTN_BLOCKS.get(probe.probe().arch, blocks)
        super().__init__(head_dim, topk, block_q or blocks[0], block_k or blocks[1])
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sums=(None, None)) -> Tensor:
        chosen = backends.choose("sagesla", override=self.backend).chosen
        if q.shape[-1] in KERNEL_HEAD_DIMS and backends.on_triton("sagesla", q, k, v, override=self.backend):
            from .ops.attention.triton_sage import sage_linear_attention

            weight, bias = self.proj_l.weight, self.proj_l.bias
            return sage_linear_attention(
                q, k, v, weight, bias, self.topk, self.block_q, self.block_k, chosen == "gluon", sums
            )
        fast = chosen == "spargeattn" and q.is_cuda and q.shape[1] >= SPARGEATTN_TOKENS
        return self._attend(q, k, v, _spargeattn if fast else attention_reference.sage_sparse_attention)


def _spargeattn(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_q: int, block_k: int) -> Tensor:
    """`reference.sage_sparse_attention` by SpargeAttn's compiled kernel, whose blocks are those of its arch"""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    out = block_sparse_sage2_attn_cuda(q, k, v, mask_id=block_map.to(torch.int8), pvthreshd=NEVER)
    return out.transpose(1, 2).to(q.dtype)


class SLAProcessor(nn.Module):
    """Self-attention of a diffusers Wan block with SLA in place of dense attention."""

    _attention_backend = None  # diffusers sets these two on every processor
    _parallel_config = None

    def __init__(self, sla: SparseLinearAttention):
        super().__init__()
        self.sla = sla

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor | linear8_reference.Rows,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states (B, L, heads · head_dim) → the same shape; rotary_emb: cos and sin, each (1, L, 1, head_dim)"""
        cos, sin = (table[0, :, 0, 0::2] for table in rotary_emb)  # diffusers repeats each angle for its pair
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in project((attn.to_q, attn.to_k, attn.to_v), hidden_states))
        q, q_sums = rope.norm_rope(q, attn.norm_q, cos, sin, sums=True)
        k, k_sums = rope.norm_rope(k, attn.norm_k, cos, sin, sums=True)
        out = self.sla(q.to(v.dtype), k.to(v.dtype), v, (q_sums, k_sums)).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def attention_type(transformer: nn.Module) -> str:
    """The attention that `set_attention_type` put in: "sla", "sagesla" or "original"."""
    processor = transformer.blocks[0].attn1.processor
    if not isinstance(processor, SLAProcessor):
        return "original"
    return "sagesla" if isinstance(processor.sla, SageSparseLinearAttention) else "sla"


def topk_of(transformer: nn.Module) -> float | None:
    """The share of key blocks that the transformer attends to; None with dense attention."""
    processor = transformer.blocks[0].attn1.processor
    return processor.sla.topk if isinstance(processor, SLAProcessor) else None


def set_topk(transformer: nn.Module, topk: float) -> None:
    """Change the share of key blocks of a transformer with sparse attention, as it stands; dense attention has none.

    Raises InputError for a topk outside (0, 1].
    """
    for block in transformer.blocks:
        if isinstance(block.attn1.processor, SLAProcessor):
            block.attn1.processor.sla.topk = check_topk(topk)


def set_attention_type(
    transformer: nn.Module, attention_type: str, topk: float = 0.1, *, backend: str | None = None
) -> None:
    """Give every block's self-attention SLA ("sla"), SageSLA ("sagesla") or diffusers' dense attention ("original").

    `proj_l` starts at zero and keeps its values from one sparse attention to another; "original" drops it. backend: of
    SageSLA, as in `SageSparseLinearAttention`. Raises InputError for an unknown type and BackendError for
    "sagesla" where it has no fast kernel.
    """
    if attention_type not in ATTENTION_TYPES:
        raise InputError(f"attention_type is {attention_type!r}; it is one of {', '.join(ATTENTION_TYPES)}")
    for block in transformer.blocks:
        attn = block.attn1
        if attention_type == "original":
            attn.set_processor(type(attn)._default_processor_cls())
            continue
        head_dim = attn.to_q.out_features // attn.heads
        if attention_type == "sagesla":
            sla = SageSparseLinearAttention(head_dim, topk, backend=backend)
        else:
            sla = SparseLinearAttention(head_dim, topk)
        if isinstance(attn.processor, SLAProcessor):
            sla.proj_l = attn.processor.sla.proj_l
        attn.set_processor(SLAProcessor(sla).to(next(attn.parameters()).device))
