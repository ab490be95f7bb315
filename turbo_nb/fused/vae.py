"""Wan's VAE in fused kernels and in chunks of frames: `fuse(vae)`, and `unfuse` to take them out.

As in `fuse`, the modules keep their parameters and names, and what the kernels do not take (float32 on a GPU, a
decoder of another make) runs as diffusers has it. Two frames are kept before each causal convolution, so a chunk of any
length gives the same frames, or the same latents; diffusers' chunks are one latent frame each.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualDownBlock,
    patchify,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from .. import backends
from ..ops.conv import reference as conv_reference
from .cache import Past

CHUNK = 4  # latent frames decoded or encoded at a time, where memory allows
HELD, HELD_EACH = 7, 4.1  # of the widest layers' size for a latent frame: what decoding holds, and more for each frame
LANES = 16  # channels that the kernels' convolutions read at a time
FREE = 0.8  # share of a GPU's free memory that a chunk may take
CPU_BYTES = 1 << 30  # that it may take elsewhere


def fuse(vae: AutoencoderKLWan) -> str | None:
    """Fuse a VAE, in place. Returns the reason why diffusers' decoder or encoder stays, None where both were fused."""
    channels_last(vae)
    vae._decode, vae._encode = partial(_decode, vae), partial(_encode, vae)
    reasons = []
    for name, (own, fused) in _parts().items():
        part = getattr(vae, name)
        if type(part) in (own, fused):
            part.__class__ = fused
        else:
            reasons.append(f"a {type(part).__name__} is no {name} of diffusers'")
    return ", ".join(reasons) or None


def channels_last(vae: AutoencoderKLWan) -> None:
    """Weights of convolutions with the channels innermost; all at once diffusers' VAE refuses, having 2D and 3D ones"""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def unfuse(vae: AutoencoderKLWan) -> None:
    """Give a fused VAE diffusers' own methods back; it computes the same, up to rounding."""
    for method in ("_decode", "_encode"):
        vae.__dict__.pop(method, None)
    for name, (own, fused) in _parts().items():
        if isinstance(getattr(vae, name), fused):
            getattr(vae, name).__class__ = own


def _parts() -> dict[str, tuple[type, type]]:
    """Part of a VAE → diffusers' class of it, and the fused one"""
    return {"decoder": (WanDecoder3d, FusedDecoder), "encoder": (WanEncoder3d, FusedEncoder)}


def _decode(vae: AutoencoderKLWan, z: Tensor, return_dict: bool = True):
    """`AutoencoderKLWan._decode` in chunks"""
    sample = torch.cat(list(chunks(vae, z)), dim=2)
    return DecoderOutput(sample=sample) if return_dict else (sample,)


def _encode(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """`AutoencoderKLWan._encode` in chunks: (B, 3, 4T − 3, H, W) → (B, 2 z_dim, T, H/8, W/8)"""
    if vae.use_tiling and (x.shape[4] > vae.tile_sample_min_width or x.shape[3] > vae.tile_sample_min_height):
        return type(vae)._encode(vae, x)
    frames = 1 + (x.shape[2] - 1) // 4 * 4  # diffusers leaves out the others, too
    length = 4 * chunk_length(vae, x, x[:, 0, 0].numel())
    if vae.config.patch_size is not None:
        x = patchify(x, patch_size=vae.config.patch_size)
    past = [None] * vae._cached_conv_counts["encoder"]
    bounds = pairwise([0, *range(1, frames, length), frames])
    parts = [vae.encoder(x[:, :, begin:end], feat_cache=past, feat_idx=[0]) for begin, end in bounds]
    return vae.quant_conv(torch.cat(parts, 2))


def chunks(vae: AutoencoderKLWan, z: Tensor, length: int | None = None) -> Iterator[Tensor]:
    """Decode latents (B, C, T, h, w) into frames (B, 3, t, 8h, 8w) in [-1, 1], some at a time, 4T − 3 in all.

    length: latent frames at a time, None for what fits. The first one, which makes one frame and not four, is alone.
    """
    edge = max(s // vae.spatial_compression_ratio for s in (vae.tile_sample_min_height, vae.tile_sample_min_width))
    if vae.use_tiling and max(z.shape[3:]) > edge:
        yield vae.tiled_decode(z, return_dict=False)[0]
        return
    length = length or chunk_length(vae, z, z[:, 0, 0].numel() * vae.spatial_compression_ratio**2)
    past = [None] * vae._cached_conv_counts["decoder"]
    z = vae.post_quant_conv(z)
    for begin, end in pairwise([0, *range(1, z.shape[2], length), z.shape[2]]):
        frames = vae.decoder(z[:, :, begin:end], feat_cache=past, feat_idx=[0], first_chunk=begin == 0)
        if vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=vae.config.patch_size)
        yield frames.clamp(-1, 1)


def chunk_length(vae: AutoencoderKLWan, x: Tensor, pixels: int) -> int:
    """How many latent frames to decode or encode at a time, of so many pixels each: what x's device has room for"""
    free = CPU_BYTES
    if x.is_cuda:
        unused = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        free = FREE * (torch.cuda.mem_get_info(x.device)[0] + unused)
    inner = pixels / (vae.config.patch_size or 1) ** 2
    widest = 4 * inner * vae.decoder.norm_out.gamma.numel() * x.element_size()
    return max(1, min(CHUNK, int((free / widest - HELD) / HELD_EACH)))


class FusedDecoder(WanDecoder3d):
    """diffusers' decoder over clips with a rim of zeros around each picture, channels last."""

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx=None, first_chunk: bool = False) -> Tensor:
        """x (B, C, T, h, w) → (B, 3, T or 4T, 8h, 8w)"""
        kernels = _kernels(self, x)
        if feat_cache is None or kernels is None:
            return super().forward(x, feat_cache, feat_idx or [0], first_chunk)
        past = Past(feat_cache)
        x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 1, 1, 1, 1))
        x = _conv(kernels, self.conv_in, past.keep(torch.cat([past.before(x), x], 1)))
        x = _middle(kernels, self.mid_block, x, past)
        for block in self.up_blocks:
            shortcut = getattr(block, "avg_shortcut", None)
            skipped = shortcut and shortcut(_inner(x), first_chunk=first_chunk)
            for resnet in block.resnets:
                x = _residual(kernels, resnet, x, past)
            for upsampler in getattr(block, "upsamplers", None) or filter(None, [getattr(block, "upsampler", None)]):
                x = _upsample(kernels, upsampler, x, past)
            if shortcut:
                _inner(x).add_(skipped)
        return _inner(_conv(kernels, self.conv_out, _norm(kernels, self.norm_out, x, past)))


class FusedEncoder(WanEncoder3d):
    """diffusers' encoder over clips with a rim of zeros around each picture, channels last."""

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx=None) -> Tensor:
        """x (B, 3, 1 or 4T, 8h, 8w) → (B, C, 1 or T, h, w)"""
        kernels = _kernels(self, x)
        if feat_cache is None or kernels is None:
            return super().forward(x, feat_cache, feat_idx or [0])
        past, first, fill = Past(feat_cache), self.conv_in, -x.shape[1] % LANES
        x = F.pad(x.permute(0, 2, 3, 4, 1), (0, fill, 1, 1, 1, 1))
        x = past.keep(torch.cat([past.before(x), x], 1))
        x = kernels.rimmed_conv(x, F.pad(first.weight, (0, 0, 0, 0, 0, 0, 0, fill)), first.bias)
        for block in self.down_blocks:
            if isinstance(block, WanResidualDownBlock):
                skipped = block.avg_shortcut(_inner(x))
                for resnet in block.resnets:
                    x = _residual(kernels, resnet, x, past)
                if block.downsampler is not None:
                    x = _downsample(kernels, block.downsampler, x, past)
                _inner(x).add_(skipped)
            elif isinstance(block, WanResample):
                x = _downsample(kernels, block, x, past)
            elif isinstance(block, WanAttentionBlock):
                x = _attention(kernels, block, x)
            else:
                x = _residual(kernels, block, x, past)
        x = _middle(kernels, self.mid_block, x, past)
        return _inner(_conv(kernels, self.conv_out, _norm(kernels, self.norm_out, x, past)))


def _kernels(coder: nn.Module, x: Tensor):
    """The module whose functions work on x (B, C, T, h, w), None where diffusers' own do"""
    if not x.is_cuda:
        return conv_reference  # of which 128x128x25 takes 1.3 s on one core, and diffusers' own decoding 3.3 s
    if not backends.on_triton("vae", x):
        return None
    convs = (module for module in coder.modules() if isinstance(module, nn.Conv3d))
    filled_up = coder.conv_in if isinstance(coder, WanEncoder3d) else None
    if any(conv.in_channels % LANES for conv in convs if conv is not filled_up):
        return None
    from ..ops.conv import triton_conv

    return triton_conv


def _inner(x: Tensor) -> Tensor:
    """A clip in a rim of zeros (B, T, H + 2, W + 2, C) as diffusers has it, (B, C, T, H, W); a view"""
    return x[:, :, 1:-1, 1:-1].permute(0, 4, 1, 2, 3)


def _conv(kernels, conv: nn.Module, x: Tensor, residual: Tensor | None = None, split: int = 1) -> Tensor:
    return kernels.rimmed_conv(x, conv.weight, conv.bias, residual, split)


def _norm(kernels, norm: nn.Module, x: Tensor, past: Past) -> Tensor:
    """Norm and SiLU, with the frames before for a causal convolution"""
    return past.keep(kernels.rms_norm_silu(x, norm.gamma, past.before(x)))


def _residual(kernels, block: nn.Module, x: Tensor, past: Past) -> Tensor:
    """`WanResidualBlock`"""
    y = _conv(kernels, block.conv1, _norm(kernels, block.norm1, x, past))
    if isinstance(block.conv_shortcut, nn.Conv3d):
        x = _conv(kernels, block.conv_shortcut, x)
    return _conv(kernels, block.conv2, _norm(kernels, block.norm2, y, past), x)


def _middle(kernels, block: nn.Module, x: Tensor, past: Past) -> Tensor:
    """`WanMidBlock`"""
    x = _residual(kernels, block.resnets[0], x, past)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(kernels, resnet, _attention(kernels, attention, x), past)
    return x


def _attention(kernels, block: nn.Module, x: Tensor) -> Tensor:
    """`WanAttentionBlock`, within each picture; changes x"""
    inner = x[:, :, 1:-1, 1:-1]
    y = kernels.rms_norm_silu(x, block.norm.gamma, silu=False)[:, :, 1:-1, 1:-1].flatten(2, 3).flatten(0, 1)
    q, k, v = F.linear(y, block.to_qkv.weight.flatten(1), block.to_qkv.bias)[:, None].chunk(3, -1)  # (B·T, 1, H·W, C)
    y = F.scaled_dot_product_attention(q, k, v)
    inner += F.linear(y, block.proj.weight.flatten(1), block.proj.bias).view(inner.shape)
    return x


def _upsample(kernels, block: nn.Module, x: Tensor, past: Past) -> Tensor:
    """`WanResample`, upwards"""
    if block.mode == "upsample3d" and not past.starts():
        x = _conv(kernels, block.time_conv, past.keep(torch.cat([past.before(x), x], 1)), split=2)
    return kernels.upsample_conv(x, block.resample[1].weight, block.resample[1].bias)


def _downsample(kernels, block: nn.Module, x: Tensor, past: Past) -> Tensor:
    """`WanResample`, downwards"""
    padded = x[:, :, 1:, 1:].flatten(0, 1).permute(0, 3, 1, 2)  # by the rim, at the right and below
    conv = block.resample[1]
    y = F.conv2d(padded, conv.weight, conv.bias, stride=2)
    x = F.pad(y.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unflatten(0, x.shape[:2])
    if block.mode == "downsample3d":
        before = past.slots[past.at]
        past.keep(x)
        if before is not None:  # after the first frame, which stays alone
            x = _conv(kernels, block.time_conv, torch.cat([before[:, -1:], x], 1))[:, ::2]
    return x
