"""Wan's VAE in fused kernels and in chunks of frames: `fuse(vae)`, and `unfuse` to take them out.

As in `fuse`, the modules keep their parameters and names, and what the kernels do not take (float32 on a GPU, a
decoder of another make) runs as diffusers has it. Decoding keeps two frames before each causal convolution, so a chunk
of any length gives the same frames; diffusers' chunks are one latent frame each.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d, unpatchify
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from . import backends
from .kernels import reference

CHUNK = 4  # latent frames decoded at a time, where memory allows
HELD, HELD_EACH = 7, 4.1  # of the last layers' size for a latent frame: what decoding holds, and more for each frame
FREE = 0.8  # share of a GPU's free memory that a chunk may take
CPU_BYTES = 1 << 30  # that it may take elsewhere


def fuse(vae: AutoencoderKLWan) -> str | None:
    """Fuse a VAE, in place. Returns the reason why diffusers' decoder stays, None where it was fused."""
    channels_last(vae)
    vae._decode = partial(_decode, vae)
    if type(vae.decoder) not in (WanDecoder3d, FusedDecoder):
        return f"a {type(vae.decoder).__name__} is no decoder of diffusers'"
    vae.decoder.__class__ = FusedDecoder
    return None


def channels_last(vae: AutoencoderKLWan) -> None:
    """Weights of convolutions with the channels innermost; all at once diffusers' VAE refuses, having 2D and 3D ones"""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def unfuse(vae: AutoencoderKLWan) -> None:
    """Give a fused VAE diffusers' own methods back; it computes the same, up to rounding."""
    vae.__dict__.pop("_decode", None)
    if isinstance(vae.decoder, FusedDecoder):
        vae.decoder.__class__ = WanDecoder3d


def _decode(vae: AutoencoderKLWan, z: Tensor, return_dict: bool = True):
    """`AutoencoderKLWan._decode` in chunks"""
    sample = torch.cat(list(chunks(vae, z)), dim=2)
    return DecoderOutput(sample=sample) if return_dict else (sample,)


def chunks(vae: AutoencoderKLWan, z: Tensor, length: int | None = None) -> Iterator[Tensor]:
    """Decode latents (B, C, T, h, w) into frames (B, 3, t, 8h, 8w) in [-1, 1], some at a time, 4T − 3 in all.

    length: latent frames at a time, None for what fits. The first one, which makes one frame and not four, is alone.
    """
    edge = max(s // vae.spatial_compression_ratio for s in (vae.tile_sample_min_height, vae.tile_sample_min_width))
    if vae.use_tiling and max(z.shape[3:]) > edge:
        yield vae.tiled_decode(z, return_dict=False)[0]
        return
    length = length or chunk_length(vae, z)
    past = [None] * vae._cached_conv_counts["decoder"]
    z = vae.post_quant_conv(z)
    for begin, end in pairwise([0, *range(1, z.shape[2], length), z.shape[2]]):
        frames = vae.decoder(z[:, :, begin:end], feat_cache=past, feat_idx=[0], first_chunk=begin == 0)
        if vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=vae.config.patch_size)
        yield frames.clamp(-1, 1)


def chunk_length(vae: AutoencoderKLWan, z: Tensor) -> int:
    """How many latent frames (B, C, T, h, w) to decode at a time, from the memory that is free"""
    free = CPU_BYTES
    if z.is_cuda:
        unused = torch.cuda.memory_reserved(z.device) - torch.cuda.memory_allocated(z.device)
        free = FREE * (torch.cuda.mem_get_info(z.device)[0] + unused)
    edge = vae.spatial_compression_ratio // (vae.config.patch_size or 1)
    last = 4 * edge**2 * z[:, 0, 0].numel() * vae.decoder.norm_out.gamma.numel() * z.element_size()
    return max(1, min(CHUNK, int((free / last - HELD) / HELD_EACH)))


class Past:
    """The two frames before a chunk, for each causal convolution in turn; slots: diffusers' feat_cache."""

    def __init__(self, slots: list):
        self.slots, self.at = slots, 0

    def starts(self) -> bool:
        """Whether nothing came before this chunk; then the next convolution is left out, in this chunk alone"""
        if self.slots[self.at] is not None:
            return False
        self.slots[self.at] = "Rep"
        self.at += 1
        return True

    def before(self, x: Tensor) -> Tensor:
        """The frames before x (B, T, H, W, C) at the next convolution: (B, 2, H, W, C)"""
        known = self.slots[self.at]
        return known if isinstance(known, Tensor) else x.new_zeros(x.shape[0], 2, *x.shape[2:])

    def keep(self, x: Tensor) -> Tensor:
        """x, the input of that convolution with the frames before it, whose last two are kept"""
        self.slots[self.at] = x[:, -2:].clone()
        self.at += 1
        return x


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
        x = _residual(kernels, self.mid_block.resnets[0], x, past)
        for attention, block in zip(self.mid_block.attentions, self.mid_block.resnets[1:], strict=True):
            x = _residual(kernels, block, _attention(kernels, attention, x), past)
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


def _kernels(decoder: nn.Module, x: Tensor):
    """The module whose functions work on x (B, C, T, h, w), None where diffusers' own do"""
    if not x.is_cuda:
        return reference  # of which 128x128x25 takes 1.3 s on one core, and diffusers' own decoding 3.3 s
    if not backends.on_triton("vae", x):
        return None
    if any(module.in_channels % 16 for module in decoder.modules() if isinstance(module, nn.Conv3d)):
        return None
    from .kernels import vae as kernels

    return kernels


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
