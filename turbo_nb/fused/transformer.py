"""Fused kernels in the blocks of a diffusers Wan transformer: `fuse(transformer)`, and `unfuse` to take them out.

A fused block is the same module with the same parameters under the same names. Its class, and so its forward, changes,
and 8-bit linears get per-row scales (`linear.to_per_row_scales`). LoRA, offload, saving and a plain diffusers pipeline
keep working. Where the kernels do not take the tensors (a CPU, float32, a timestep per token), diffusers' own forward
runs. q, k and v are fused in `sla.SLAProcessor`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn

from .. import backends, rope
from ..linear import has_per_row_scales, project, to_per_row_scales, to_tile_scales
from ..ops.linear8.reference import QuantizedRows
from ..sla import SLAProcessor
from .cache import TensorCache

TEXT_TOKENS, PROMPT_TOKENS = 512, 100  # of a prompt with its padding; of one without, for a warm-up
_recorded: ContextVar[bool] = ContextVar("recorded", default=False)  # whether to run the kernels of a CUDA graph


@dataclass(frozen=True)
class Report:
    """How many of a transformer's blocks were fused, and why not the others."""

    fused: int
    blocks: int
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([f"{self.fused} of {self.blocks} blocks fused", *self.reasons])


def fuse(transformer: nn.Module, device: torch.device | str | None = None) -> Report:
    """Fuse the blocks of a `WanTransformer3DModel`, in place. Call it before offload puts hooks on the transformer.

    Args:
        transformer: changed in place.
        device: the GPU that the transformer will run on. None: the one it is on, else the first GPU.
    """
    if device is None and (own := next(transformer.parameters()).device).type == "cuda":
        device = own
    if backends.choose("row_quantize", device).uses_triton:
        to_per_row_scales(transformer.blocks, (device or "cuda:0") if torch.cuda.is_available() else None)
    choice = backends.choose("block", device)
    if not choice.uses_triton:
        reasons = tuple(f"{name}: {reason}" for name, reason in choice.rejected)
        return Report(0, len(transformer.blocks), reasons)
    backends.load_kernels(device)
    repeats = TensorCache()  # shared by all blocks
    reasons = [reason for block in transformer.blocks if (reason := _fuse(block, repeats))]
    text = transformer.condition_embedder.text_embedder
    if type(text) is PixArtAlphaTextProjection and len(reasons) < len(transformer.blocks):
        text.__class__, text.cache = FusedTextProjection, TensorCache()
    if type(transformer.rope) is WanRotaryPosEmbed and len(reasons) < len(transformer.blocks):
        transformer.rope.__class__, transformer.rope.tables = FusedRotaryPosEmbed, (None, None)
    return Report(len(transformer.blocks) - len(reasons), len(transformer.blocks), tuple(dict.fromkeys(reasons)))


def unfuse(transformer: nn.Module) -> None:
    """Give a fused transformer diffusers' own blocks back. It computes the same, up to rounding."""
    to_tile_scales(transformer.blocks)
    for block in transformer.blocks:
        if isinstance(block, FusedBlock):
            block.__class__ = WanTransformerBlock
            block.attn2.set_processor(WanAttnProcessor())
    text = transformer.condition_embedder.text_embedder
    if isinstance(text, FusedTextProjection):
        text.__class__ = PixArtAlphaTextProjection
        del text.cache
    if isinstance(transformer.rope, FusedRotaryPosEmbed):
        transformer.rope.__class__ = WanRotaryPosEmbed
        del transformer.rope.tables


@torch.inference_mode()
def warm_up(transformer: nn.Module, size: tuple[int, int, int], recorded: bool = False) -> None:
    """Run a fused transformer's first block once on noise, so that no step has to wait while its kernels compile.

    Args:
        transformer: a fused one; nothing happens for another.
        size: of the latents, (T, H, W).
        recorded: run the kernels of a CUDA graph, of which one differs.
    """
    block, dtype = transformer.blocks[0], transformer.patch_embedding.weight.dtype
    if not isinstance(block, FusedBlock):
        return
    device, width = block.scale_shift_table.device, block.scale_shift_table.shape[-1]
    tables = transformer.rope(torch.empty(1, 1, *size, device=device, dtype=dtype))
    generator = torch.Generator(device).manual_seed(0)
    x, temb = (
        torch.empty(1, rows, width, device=device, dtype=dtype).normal_(generator=generator)
        for rows in (tables[0].shape[1], 6)
    )
    with recording() if recorded else nullcontext():
        block(x, sample_text(width, device, dtype), temb, tables)


def sample_text(width: int, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """Return noise of the rows that a prompt has, and equal rows after them: (1, TEXT_TOKENS, width)."""
    generator = torch.Generator(device).manual_seed(0)
    text = torch.empty(1, TEXT_TOKENS, width, device=device, dtype=dtype).normal_(generator=generator)
    text[:, PROMPT_TOKENS:] = text[:, -1:].clone()
    return text


@contextmanager
def recording() -> Iterator[None]:
    """Run the kernels of a CUDA graph inside, of which one differs."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def is_recorded(x: Tensor) -> bool:
    """Return whether work on a tensor goes into a CUDA graph now."""
    return _recorded.get() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def prepare_prompt(transformer: nn.Module, text: Tensor) -> list[Tensor]:
    """Compute what all steps of a clip share, so that the next forward with the same `text` finds it.

    Args:
        transformer: a fused one.
        text: the prompt's embedding (B, S, text_dim).

    Returns:
        Every tensor that these steps read. A CUDA graph of a step is valid as long as they live.
    """
    projected = transformer.condition_embedder.text_embedder(text)
    found = [projected]
    for block in transformer.blocks:
        found += block.attn2.processor.of_prompt(block.attn2, projected)
    return found


def forget_prompt(transformer: nn.Module) -> None:
    """Let a fused transformer drop what it keeps of the last prompt."""
    transformer.condition_embedder.text_embedder.cache = TensorCache()
    for block in transformer.blocks:
        block.attn2.processor.keys.clear()
        block.attn2.processor.repeats.clear()


def all_fused(transformer: nn.Module) -> bool:
    """Return whether every block and the projection of the prompt run in kernels of ours."""
    text = getattr(getattr(transformer, "condition_embedder", None), "text_embedder", None)
    return isinstance(text, FusedTextProjection) and all(
        isinstance(block, FusedBlock) and isinstance(block.attn2.processor, FusedCrossAttention)
        for block in transformer.blocks
    )


def _fuse(block: nn.Module, repeats: TensorCache) -> str | None:
    """Fuse one block. Return the reason where it stays as it is."""
    if isinstance(block, FusedBlock):
        return None
    if type(block) is not WanTransformerBlock:
        return f"a {type(block).__name__} is not diffusers' block"
    if not isinstance(block.norm2, nn.LayerNorm):
        return "cross-attention without a norm"
    if type(block.attn2.processor) is not WanAttnProcessor or block.attn2.add_k_proj is not None:
        return "a cross-attention of its own"
    block.__class__ = FusedBlock
    block.attn2.set_processor(FusedCrossAttention(repeats))
    return None


class FusedTextProjection(PixArtAlphaTextProjection):
    """diffusers' projection of the prompt's embedding, computed once for all steps of a video."""

    def forward(self, caption: Tensor) -> Tensor:
        linears = self.linear_1, self.linear_2
        return self.cache.get(caption, lambda: super(FusedTextProjection, self).forward(caption), linears)


class FusedRotaryPosEmbed(WanRotaryPosEmbed):
    """diffusers' tables of angles, computed once for a clip's shape, in float32."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or not backends.kernel("norm_rope", hidden_states):
            return super().forward(hidden_states)
        shape = (hidden_states.shape[2:], self.freqs_cos.device)
        if self.tables[0] != shape:
            self.tables = shape, tuple(table.float() for table in super().forward(hidden_states))
        return self.tables[1]


class FusedCrossAttention(WanAttnProcessor):
    """diffusers' cross-attention with one key for all padding, and keys and values computed once for all steps."""

    def __init__(self, repeats: TensorCache):
        super().__init__()
        self.repeats, self.keys = repeats, TensorCache()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        if isinstance(hidden_states, QuantizedRows):  # which only a kernel makes
            attend = backends.choose("cross_attention", hidden_states.q.get_device()).function
        else:
            attend = backends.kernel("cross_attention", hidden_states)
        if attn.fused_projections or attention_mask is not None or attend is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        k, v, repeats = self.of_prompt(attn, encoder_hidden_states)
        (q,) = project((attn.to_q,), hidden_states)
        q = rope.norm_rope(q.unflatten(2, (attn.heads, -1)), attn.norm_q)
        return attn.to_out[1](attn.to_out[0](attend(q, k, v, repeats).flatten(2)))

    def of_prompt(self, attn: nn.Module, text: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """Return keys, values and repeats of a prompt (B, S, C), as `triton_cross.cross_attention` takes them.

        In a CUDA graph the keys keep all their rows, because a graph cannot wait for the number of them.
        """
        from ..ops.attention import triton_cross

        whole = is_recorded(text)
        count = triton_cross.counts if whole else triton_cross.repeats
        repeats = self.repeats.get(text, lambda: count(text))

        def keys_and_values() -> list[Tensor]:
            k, v = (x.unflatten(2, (attn.heads, -1)) for x in project((attn.to_k, attn.to_v), text))
            both = rope.norm_rope(k, attn.norm_k), v
            return [x if whole else triton_cross.without_repeats(x, repeats) for x in both]

        k, v = self.keys.get(text, keys_and_values, (attn.to_k, attn.to_v, attn.norm_k))
        return k, v, repeats


class FusedBlock(WanTransformerBlock):
    """diffusers' block with each norm, the residual before it and the modulation after it in one kernel."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Compute the block: hidden_states (B, L, C), encoder_hidden_states (B, S, C), temb (B, 6, C) → (B, L, C)."""
        gated_norm = backends.kernel("gated_norm", hidden_states)
        if temb.ndim != 3 or gated_norm is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)

        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + temb.float()).unbind(1)
        attention, text, first = self.attn1, self.attn2, self.ffn.net[0]
        in_8_bits = backends.kernel("row_quantize", hidden_states) is not None
        qkv_in_8_bits = isinstance(attention.processor, SLAProcessor) and has_per_row_scales(
            (attention.to_q, attention.to_k, attention.to_v)
        )
        x, normed = gated_norm(hidden_states, None, None, 1 + scale, shift, self.norm1.eps, in_8_bits and qkv_in_8_bits)
        branch = attention(normed, None, None, rotary_emb)
        text_in_8_bits = in_8_bits and has_per_row_scales((text.to_q,))
        x, normed = gated_norm(x, branch, gate, self.norm2.weight, self.norm2.bias, self.norm2.eps, text_in_8_bits)
        branch = text(normed, encoder_hidden_states, None, None)
        ffn_in_8_bits = in_8_bits and has_per_row_scales((first.proj,))
        x, normed = gated_norm(x, branch, None, 1 + ffn_scale, ffn_shift, self.norm3.eps, ffn_in_8_bits)
        return gated_norm(x, self._feed_forward(normed), ffn_gate, None, None)[0]

    def _feed_forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Compute self.ffn(x) with GELU in the epilogue of the first linear, or in the quantisation for the second."""
        linear, second = self.ffn.net[0].proj, self.ffn.net[2]
        if type(linear) is nn.Linear and linear.bias is not None:
            hidden = torch._addmm_activation(linear.bias, x.flatten(0, 1), linear.weight.T, use_gelu=True)  # cuBLASLt
            return second(hidden.unflatten(0, x.shape[:2]))
        (hidden,) = project((linear,), x)
        if has_per_row_scales((linear, second)) and (quantize_rows := backends.kernel("row_quantize", hidden)):
            (result,) = project((second,), quantize_rows(hidden, gelu=True))
            return result
        return second(F.gelu(hidden, approximate="tanh"))  # with a LoRA, or one of the two linears in 8 bits
