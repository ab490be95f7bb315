"""Fused kernels in the blocks of a diffusers Wan transformer: `fuse(transformer)`, and `unfuse` to take them out.

A fused block is the same module, with the same parameters under the same names; its class, and so its forward, is
another, and 8-bit linears get a scale for each row (`linear.to_rows`). LoRA, offload, saving and a plain diffusers
pipeline keep working, and whatever the kernels do not take (a CPU, float32, a timestep per token) runs as diffusers has
it. q, k and v are fused in `sla.SLAProcessor` itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn

from .. import backends, rope
from ..linear import in_rows, project, to_rows, to_tiles
from ..ops.linear8.reference import Rows
from ..sla import SLAProcessor
from .cache import Kept

TEXT_TOKENS = 512  # of a prompt with its padding


@dataclass(frozen=True)
class Report:
    """How many of a transformer's blocks were fused, and why not the others."""

    fused: int
    blocks: int
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([f"{self.fused} of {self.blocks} blocks fused", *self.reasons])


def fuse(transformer: nn.Module) -> Report:
    """Fuse the blocks of a `WanTransformer3DModel`, in place; before hooks for offload are put on it."""
    if backends.on_triton("linear"):
        to_rows(transformer.blocks, "cuda" if torch.cuda.is_available() else None)
    choice = backends.choose("block")
    if choice.chosen != "triton":
        reasons = tuple(f"{name}: {reason}" for name, reason in choice.passed_over)
        return Report(0, len(transformer.blocks), reasons)
    repeats = Kept()  # the same for every block
    reasons = [reason for block in transformer.blocks if (reason := _fuse(block, repeats))]
    text = transformer.condition_embedder.text_embedder
    if type(text) is PixArtAlphaTextProjection and len(reasons) < len(transformer.blocks):
        text.__class__, text.kept = FusedTextProjection, Kept()
    if type(transformer.rope) is WanRotaryPosEmbed and len(reasons) < len(transformer.blocks):
        transformer.rope.__class__, transformer.rope.made = FusedRotaryPosEmbed, (None, None)
    return Report(len(transformer.blocks) - len(reasons), len(transformer.blocks), tuple(dict.fromkeys(reasons)))


def unfuse(transformer: nn.Module) -> None:
    """Give a fused transformer diffusers' own blocks back; it computes the same, up to rounding."""
    to_tiles(transformer.blocks)
    for block in transformer.blocks:
        if isinstance(block, FusedBlock):
            block.__class__ = WanTransformerBlock
            block.attn2.set_processor(WanAttnProcessor())
    text = transformer.condition_embedder.text_embedder
    if isinstance(text, FusedTextProjection):
        text.__class__ = PixArtAlphaTextProjection
        del text.kept
    if isinstance(transformer.rope, FusedRotaryPosEmbed):
        transformer.rope.__class__ = WanRotaryPosEmbed
        del transformer.rope.made


@torch.inference_mode()
def warm_up(transformer: nn.Module, size: tuple[int, int, int]) -> None:
    """Run a fused transformer's first block once, on latents of size (T, H, W): no step has to wait for its kernels."""
    block, dtype = transformer.blocks[0], transformer.patch_embedding.weight.dtype
    if not isinstance(block, FusedBlock):
        return
    device, width = block.scale_shift_table.device, block.scale_shift_table.shape[-1]
    tables = transformer.rope(torch.empty(1, 1, *size, device=device, dtype=dtype))
    rows = (tables[0].shape[1], TEXT_TOKENS, 6)
    block(*(torch.zeros(1, count, width, device=device, dtype=dtype) for count in rows), tables)


def _fuse(block: nn.Module, repeats: "Kept") -> str | None:
    """The reason why a block stays as it is; None where it was fused"""
    if isinstance(block, FusedBlock):
        return None
    if type(block) is not WanTransformerBlock:
        return f"a {type(block).__name__} is no block of diffusers'"
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
        return self.kept.get(caption, lambda: super(FusedTextProjection, self).forward(caption), linears)


class FusedRotaryPosEmbed(WanRotaryPosEmbed):
    """diffusers' tables of angles, made once for a clip's shape, in float32."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or not backends.on_triton("block", hidden_states):
            return super().forward(hidden_states)
        shape = (hidden_states.shape[2:], self.freqs_cos.device)
        if self.made[0] != shape:
            self.made = shape, tuple(table.float() for table in super().forward(hidden_states))
        return self.made[1]


class FusedCrossAttention(WanAttnProcessor):
    """diffusers' cross-attention, to keys and values kept from the first step on, with all padding as one key."""

    def __init__(self, repeats: Kept):
        super().__init__()
        self.repeats, self.keys = repeats, Kept()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        if attn.fused_projections or attention_mask is not None or not _on_triton(hidden_states):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        from ..ops.attention import triton_cross

        text = encoder_hidden_states
        repeats = self.repeats.get(text, lambda: triton_cross.repeats(text))

        def keys_and_values() -> list[Tensor]:
            k, v = (x.unflatten(2, (attn.heads, -1)) for x in project((attn.to_k, attn.to_v), text))
            return [triton_cross.without_repeats(x, repeats) for x in (rope.norm_rope(k, attn.norm_k), v)]

        k, v = self.keys.get(text, keys_and_values, (attn.to_k, attn.to_v))
        (q,) = project((attn.to_q,), hidden_states)
        q = rope.norm_rope(q.unflatten(2, (attn.heads, -1)), attn.norm_q)
        return attn.to_out[1](attn.to_out[0](triton_cross.cross_attention(q, k, v, repeats).flatten(2)))


def _on_triton(x: Tensor | Rows) -> bool:
    """Whether the blocks' kernels take x; only they make `Rows`"""
    return isinstance(x, Rows) or backends.on_triton("block", x)


class FusedBlock(WanTransformerBlock):
    """diffusers' block with each norm, the residual before it and the modulation after it in one kernel."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """hidden_states (B, L, C), encoder_hidden_states (B, S, C), temb (B, 6, C) → (B, L, C)"""
        if temb.ndim != 3 or not backends.on_triton("block", hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        from ..ops.norms.triton_norms import gated_norm

        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + temb.float()).unbind(1)
        attention, text, first = self.attn1, self.attn2, self.ffn.net[0]
        in_8_bits = backends.on_triton("linear", hidden_states)
        qkv_in_8_bits = isinstance(attention.processor, SLAProcessor) and in_rows(
            (attention.to_q, attention.to_k, attention.to_v)
        )
        x, normed = gated_norm(hidden_states, None, None, 1 + scale, shift, self.norm1.eps, in_8_bits and qkv_in_8_bits)
        branch = attention(normed, None, None, rotary_emb)
        x, normed = gated_norm(
            x, branch, gate, self.norm2.weight, self.norm2.bias, self.norm2.eps, in_8_bits and in_rows((text.to_q,))
        )
        branch = text(normed, encoder_hidden_states, None, None)
        x, normed = gated_norm(
            x, branch, None, 1 + ffn_scale, ffn_shift, self.norm3.eps, in_8_bits and in_rows((first.proj,))
        )
        return gated_norm(x, self._feed_forward(normed), ffn_gate, None, None)[0]

    def _feed_forward(self, x: Tensor | Rows) -> Tensor:
        """self.ffn(x), with GELU in the epilogue of the linear before it, or in what quantises for the one after it"""
        linear, second = self.ffn.net[0].proj, self.ffn.net[2]
        if in_rows((linear, second)) and backends.on_triton("linear"):
            from ..ops.linear8.triton_rows import row_quantize

            (hidden,) = project((linear,), x)
            return project((second,), row_quantize(hidden, gelu=True))[0]
        if type(linear) is nn.Linear and linear.bias is not None:
            hidden = torch._addmm_activation(linear.bias, x.flatten(0, 1), linear.weight.T, use_gelu=True)  # cuBLASLt
            return second(hidden.unflatten(0, x.shape[:2]))
        (hidden,) = project((linear,), x)  # with a LoRA, or one of the two in 8 bits
        return second(F.gelu(hidden, approximate="tanh"))
