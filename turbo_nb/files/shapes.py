"""Names and shapes of the tensors that a model has, by diffusers' and transformers' names.

They tell whether a file is whole when it is read, before anything else is downloaded.
"""

from collections.abc import Mapping

from .. import catalog
from .names import PROJ_L

PATCH = 1 * 2 * 2  # frames, rows and columns of latents that make a token
OUT_CHANNELS = 16  # of all of Wan's models that turbo_nb runs
TEXT_DIM = 4096  # of umT5-xxl, which all released models read
TIME_DIM = 256  # channels of the sinusoidal time embedding
EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"  # umT5's table of embeddings, under two names

Shapes = dict[str, tuple[int, ...]]


def of_transformer(arch: catalog.Arch, *, head_dim: int, text_dim: int, sla: bool) -> Shapes:
    """Return the shapes of a Wan transformer, as diffusers' WanTransformer3DModel has them.

    Args:
        arch: its shape.
        head_dim: channels of one attention head.
        text_dim: channels of the text embeddings.
        sla: whether it has SLA's projections.
    """
    dim, embedder = arch.dim, "condition_embedder"
    shapes = {
        "patch_embedding.weight": (dim, arch.in_channels, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "scale_shift_table": (1, 2, dim),
        **_linear(f"{embedder}.time_embedder.linear_1", dim, TIME_DIM),
        **_linear(f"{embedder}.time_embedder.linear_2", dim, dim),
        **_linear(f"{embedder}.time_proj", 6 * dim, dim),
        **_linear(f"{embedder}.text_embedder.linear_1", dim, text_dim),
        **_linear(f"{embedder}.text_embedder.linear_2", dim, dim),
        **_linear("proj_out", OUT_CHANNELS * PATCH, dim),
    }
    block = {
        "scale_shift_table": (1, 6, dim),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        **_linear("ffn.net.0.proj", arch.ffn_dim, dim),
        **_linear("ffn.net.2", dim, arch.ffn_dim),
    }
    for attention in ("attn1", "attn2"):
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            block |= _linear(f"{attention}.{linear}", dim, dim)
        block |= {f"{attention}.{norm}.weight": (dim,) for norm in ("norm_q", "norm_k")}
    if sla:
        block |= _linear(PROJ_L.strip("."), head_dim, head_dim)
    return shapes | _repeated("blocks", arch.num_layers, block)


def of_text_encoder(tensors: Mapping, num_layers: int) -> Shapes:
    """Return the shapes of umT5's encoder with the widths of some tensors of it.

    Args:
        tensors: of the encoder, by transformers' names.
        num_layers: how many blocks it has.

    Raises:
        LookupError, ValueError: a tensor that tells a width is missing, or has another number of dimensions.
    """
    attention, feed_forward = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    words, width = tensors[EMBEDDING if EMBEDDING in tensors else TIED].shape
    buckets, heads = tensors[f"encoder.block.0.{attention}.relative_attention_bias.weight"].shape
    inner, _ = tensors[f"encoder.block.0.{attention}.q.weight"].shape
    _, hidden = tensors[f"encoder.block.0.{feed_forward}.wo.weight"].shape
    block = {
        "layer.0.layer_norm.weight": (width,),
        "layer.1.layer_norm.weight": (width,),
        f"{attention}.relative_attention_bias.weight": (buckets, heads),
        f"{attention}.o.weight": (width, inner),
        f"{feed_forward}.wi_0.weight": (hidden, width),
        f"{feed_forward}.wi_1.weight": (hidden, width),
        f"{feed_forward}.wo.weight": (width, hidden),
        **{f"{attention}.{one}.weight": (inner, width) for one in "qkv"},
    }
    shapes = {EMBEDDING: (words, width), "encoder.final_layer_norm.weight": (width,)}
    if min(words, width, buckets, heads, inner, hidden) < 1 or inner % heads:
        raise ValueError(f"{heads} heads of {inner} channels, {words} words of {width}")
    return shapes | _repeated("encoder.block", num_layers, block)


def _linear(name: str, out: int, columns: int) -> Shapes:
    return {f"{name}.weight": (out, columns), f"{name}.bias": (out,)}


def _repeated(name: str, count: int, block: Shapes) -> Shapes:
    return {f"{name}.{number}.{end}": shape for number in range(count) for end, shape in block.items()}
