"""SageSLA whose sparse part is SpargeAttn's compiled kernel (arXiv:2502.18137).

Only the call is ours. The kernel fixes the sizes of the blocks for each GPU architecture: `blocks` of its row in
`ops/registry.py`, those of SLA on any other.
"""

from functools import partial

import torch
from torch import Tensor

from . import reference

NEVER = 1e6  # SpargeAttn's threshold for leaving out products that count for little


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_q: int, block_k: int) -> Tensor:
    """`reference.sage_sparse_attention`; block_q and block_k are those of the GPU's architecture."""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    out = block_sparse_sage2_attn_cuda(q, k, v, mask_id=block_map.to(torch.int8), pvthreshd=NEVER)
    return out.transpose(1, 2).to(q.dtype)


sage_linear_attention = partial(reference.sparse_linear_attention, attend=sparse_attention)
