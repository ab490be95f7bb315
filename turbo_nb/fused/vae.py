"""Fused kernels in Wan's VAE, which then works on chunks of frames: `fuse(vae)`.

The modules keep their parameters and names. Where the kernels do not take the tensors (float32 on a GPU, a decoder of
another class), diffusers' own forward runs. Each causal convolution keeps the two frames before a chunk, so chunks of
any length give the same frames, or the same latents. diffusers' own chunks are one latent frame each.
"""

from collections.abc import Iterator
from contextlib import nullcontext, suppress
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
from ..errors import TurboNbError
from ..ops.registry import CHANNELS
from .cache import CausalCache, Strip

CHUNK = 4  # latent frames decoded or encoded at a time, where memory allows
# Memory that decoding needs, and more for each latent frame, in sizes of the widest layer's activations of one latent
# frame.
BASE_LAYERS, FRAME_LAYERS = 7, 4.1
FREE, LEAST_FREE = 0.8, 0.92  # shares of a GPU's free memory that a chunk may take; a chunk of one latent frame
CPU_BYTES = 1 << 30  # bytes that a chunk may take on a CPU


def fuse(vae: AutoencoderKLWan) -> str | None:
    """Fuse a VAE, in place. Return why its decoder or encoder stays as it is, None where both were fused."""
    channels_last(vae)
    vae._decode, vae._encode = partial(_decode, vae), partial(_encode, vae)
    reasons = []
    for name, (own, fused) in _parts().items():
        part = getattr(vae, name)
        if type(part) in (own, fused):
            part.__class__ = fused
        else:
            reasons.append(f"a {type(part).__name__} is not diffusers' {name}")
    return ", ".join(reasons) or None


def channels_last(vae: AutoencoderKLWan) -> None:
    """Store the weights of convolutions channels last, one by one because a single call refuses 2D and 3D together."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def _parts() -> dict[str, tuple[type, type]]:
    """Return part of a VAE → diffusers' class and the fused class."""
    return {"decoder": (WanDecoder3d, FusedDecoder), "encoder": (WanEncoder3d, FusedEncoder)}


def _decode(vae: AutoencoderKLWan, z: Tensor, return_dict: bool = True):
    """Compute `AutoencoderKLWan._decode` in chunks."""
    sample = torch.cat(list(chunks(vae, z)), dim=2)
    return DecoderOutput(sample=sample) if return_dict else (sample,)


def _encode(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Compute `AutoencoderKLWan._encode` in chunks: (B, 3, 4T − 3, H, W) → (B, 2 z_dim, T, H/8, W/8).

    A VAE with tiling enabled encodes in tiles where not even one latent frame fits, or memory runs out.
    """
    large = x.shape[4] > vae.tile_sample_min_width or x.shape[3] > vae.tile_sample_min_height
    length = chunk_length(vae, x, _share(vae, "encoder", x) * x[:, 0, 0].numel())
    tiles = vae.use_tiling and large
    if length or not tiles:
        with suppress(torch.OutOfMemoryError) if tiles else nullcontext():
            return _encode_in_chunks(vae, x, length or 1)
    return type(vae)._encode(vae, x)


def _encode_in_chunks(vae: AutoencoderKLWan, x: Tensor, length: int) -> Tensor:
    x = x[:, :, : 1 + (x.shape[2] - 1) // 4 * 4]  # because diffusers leaves out the other frames, too
    return vae.quant_conv(torch.cat(list(_coded(vae, "encoder", x, length)), 2))


def chunks(vae: AutoencoderKLWan, z: Tensor, length: int | None = None) -> Iterator[Tensor]:
    """Decode latents in chunks.

    Args:
        vae: a fused or plain VAE.
        z: latents (B, C, T, h, w).
        length: latent frames of a chunk. None: as many as fit in memory. 0, or not even one fits: a VAE with tiling
            enabled decodes in tiles. The first latent frame is a chunk of its own, because it becomes one frame and
            the others become four.

    Yields:
        Frames (B, 3, t, 8h, 8w) in [-1, 1], 4T − 3 in all.
    """
    if length is None:
        pixels = z[:, 0, 0].numel() * vae.spatial_compression_ratio**2
        length = chunk_length(vae, z, _share(vae, "decoder", z) * pixels)
    edge = max(s // vae.spatial_compression_ratio for s in (vae.tile_sample_min_height, vae.tile_sample_min_width))
    if not length and vae.use_tiling and max(z.shape[3:]) > edge:
        yield vae.tiled_decode(z, return_dict=False)[0]
        return
    yield from _coded(vae, "decoder", vae.post_quant_conv(z), length or 1)


def _share(vae: AutoencoderKLWan, name: str, x: Tensor) -> float:
    """Return the largest share of x's rows that a rank decodes or encodes. 1: this rank works alone."""
    strips = getattr(vae, "strips", None)  # a `parallel.strips.Strips`, where there are several ranks
    return strips.share(vae, name, x) if strips else 1


def _coded(vae: AutoencoderKLWan, name: str, x: Tensor, length: int) -> Iterator[Tensor]:
    """Run a part of a VAE as `coded` on this rank, or on all ranks."""
    return (coded if _share(vae, name, x) == 1 else vae.strips.coded)(vae, name, x, length)


def coded(vae: AutoencoderKLWan, name: str, x: Tensor, length: int, strip: Strip | None = None) -> Iterator[Tensor]:
    """Run the decoder or the encoder in chunks, on this rank.

    Args:
        vae: a fused or plain VAE.
        name: "decoder" or "encoder".
        x: what `post_quant_conv` returned, (B, C, T, h, w); or pictures (B, 3, 4T − 3, 8h, 8w).
        length: latent frames of a chunk. The first latent frame is a chunk of its own.
        strip: the rows of a clip that x has. None: all rows.

    Yields:
        Frames (B, 3, t, 8h, 8w) in [-1, 1]; or what `quant_conv` takes, (B, C, t, h, w).
    """
    part, past, patch = getattr(vae, name), [None] * vae._cached_conv_counts[name], vae.config.patch_size
    decodes, own = name == "decoder", {} if strip is None else {"strip": strip}
    for begin, end in pairwise([0, *range(1, x.shape[2], length if decodes else 4 * length), x.shape[2]]):
        chunk = x[:, :, begin:end]
        if decodes:
            frames = part(chunk, feat_cache=past, feat_idx=[0], first_chunk=begin == 0, **own)
            yield (unpatchify(frames, patch_size=patch) if patch else frames).clamp(-1, 1)
        else:
            chunk = patchify(chunk, patch_size=patch) if patch else chunk
            yield part(chunk, feat_cache=past, feat_idx=[0], **own)


def chunk_length(vae: AutoencoderKLWan, x: Tensor, pixels: int) -> int:
    """Return how many latent frames of so many pixels each fit on x's device at a time. 0: not even one."""
    free = CPU_BYTES / FREE
    if x.is_cuda and backends.kernel("rms_norm_silu", x) is None:
        return 1  # because the reference takes several times the memory
    if x.is_cuda:
        unused = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        free = torch.cuda.mem_get_info(x.device)[0] + unused
    inner = pixels / (vae.config.patch_size or 1) ** 2
    widest = 4 * inner * vae.decoder.norm_out.gamma.numel() * x.element_size()
    fit = min(CHUNK, int((FREE * free / widest - BASE_LAYERS) / FRAME_LAYERS))
    return fit if fit > 0 else int(LEAST_FREE * free >= (BASE_LAYERS + FRAME_LAYERS) * widest)


class FusedDecoder(WanDecoder3d):
    """diffusers' decoder, on clips that are channels last with a rim of zeros around each picture."""

    def forward(
        self,
        x: Tensor,
        feat_cache: list | None = None,
        feat_idx=None,
        first_chunk: bool = False,
        strip: Strip | None = None,
    ) -> Tensor:
        """Decode a chunk: x (B, C, T, h, w) → (B, 3, T or 4T, 8h, 8w). strip: x has these rows of a clip."""
        if feat_cache is None or not takes(self, x):
            return super().forward(x, feat_cache, feat_idx or [0], first_chunk)
        past = CausalCache(feat_cache, strip)
        x = past.filled(F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 1, 1, 1, 1)))
        x = _conv(self.conv_in, past.keep(torch.cat([past.before(x), x], 1)))
        x = _middle(self.mid_block, x, past)
        for block in self.up_blocks:
            shortcut = getattr(block, "avg_shortcut", None)
            skipped = shortcut and shortcut(_inner(x), first_chunk=first_chunk)
            for resnet in block.resnets:
                x = _residual(resnet, x, past)
            for upsampler in getattr(block, "upsamplers", None) or filter(None, [getattr(block, "upsampler", None)]):
                x = _upsample(upsampler, x, past)
            if shortcut:
                _inner(x).add_(skipped)
        return _finite(_inner(_conv(self.conv_out, _norm(self.norm_out, x, past))))


class FusedEncoder(WanEncoder3d):
    """diffusers' encoder, on clips that are channels last with a rim of zeros around each picture."""

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx=None, strip: Strip | None = None) -> Tensor:
        """Encode a chunk: x (B, 3, 1 or 4T, 8h, 8w) → (B, C, 1 or T, h, w). strip: x has these rows of a clip."""
        if feat_cache is None or not takes(self, x):
            return super().forward(x, feat_cache, feat_idx or [0])
        past, first, fill = CausalCache(feat_cache, strip), self.conv_in, -x.shape[1] % CHANNELS
        x = past.filled(F.pad(x.permute(0, 2, 3, 4, 1), (0, fill, 1, 1, 1, 1)))
        x = past.keep(torch.cat([past.before(x), x], 1))
        weight = F.pad(first.weight, (0, 0, 0, 0, 0, 0, 0, fill))
        x = backends.function("rimmed_conv", x)(x, weight, first.bias)
        for block in self.down_blocks:
            if isinstance(block, WanResidualDownBlock):
                skipped = block.avg_shortcut(_inner(x))
                for resnet in block.resnets:
                    x = _residual(resnet, x, past)
                if block.downsampler is not None:
                    x = _downsample(block.downsampler, x, past)
                _inner(x).add_(skipped)
            elif isinstance(block, WanResample):
                x = _downsample(block, x, past)
            elif isinstance(block, WanAttentionBlock):
                x = _attention(block, x, strip)
            else:
                x = _residual(block, x, past)
        x = _middle(self.mid_block, x, past)
        return _inner(_conv(self.conv_out, _norm(self.norm_out, x, past)))


def _finite(frames: Tensor) -> Tensor:
    """Return frames; raise TurboNbError where float16 overflowed, because clamping would hide it"""
    if frames.dtype is torch.float16 and not frames.isfinite().all():
        raise TurboNbError(
            "a frame is not finite. Expected numbers up to 65504, which float16 holds, and the VAE exceeded that. "
            "Decode with --decoder tiny, or on a GPU of sm_80 or newer, which has bfloat16."
        )
    return frames


def takes(coder: nn.Module, x: Tensor) -> bool:
    """Return whether the functions of ops/conv compute a fused decoder or encoder for x (B, C, T, h, w)."""
    if not x.is_cuda:
        return True  # the reference; on one core 128x128x25 takes 1.3 s, and diffusers' own decoding 3.3 s
    if x.dtype is torch.float16 and backends.kernel("rms_norm_silu", x) is None:
        return True  # the reference, because its norms are in float32, where the sums of squares do not overflow
    convs = (module for module in coder.modules() if isinstance(module, nn.Conv3d))
    padded = coder.conv_in if isinstance(coder, WanEncoder3d) else None  # its channels are padded
    return backends.kernel("rms_norm_silu", x) is not None and not any(
        conv.in_channels % CHANNELS for conv in convs if conv is not padded
    )


def _inner(x: Tensor) -> Tensor:
    """Return a view of a clip (B, T, H + 2, W + 2, C) without its rim, in diffusers' order (B, C, T, H, W)."""
    return x[:, :, 1:-1, 1:-1].permute(0, 4, 1, 2, 3)


def _conv(conv: nn.Module, x: Tensor, residual: Tensor | None = None, split: int = 1) -> Tensor:
    return backends.function("rimmed_conv", x)(x, conv.weight, conv.bias, residual, split)


def _norm(norm: nn.Module, x: Tensor, past: CausalCache) -> Tensor:
    """Compute norm and SiLU, and prepend the frames before for a causal convolution."""
    return past.keep(backends.function("rms_norm_silu", x)(past.filled(x), norm.gamma, past.before(x)))


def _residual(block: nn.Module, x: Tensor, past: CausalCache) -> Tensor:
    """Compute `WanResidualBlock`."""
    y, conv = _norm(block.norm1, x, past), block.conv1
    convolve = backends.function("normed_conv", y)
    y = convolve(y, conv.weight, conv.bias, block.norm2.gamma, past.before(y, conv.out_channels))
    past.filled(y[:, 2:])  # the two frames before were filled when they were kept
    past.keep(y)
    if isinstance(block.conv_shortcut, nn.Conv3d):
        x = _conv(block.conv_shortcut, x)
    return _conv(block.conv2, y, x)


def _middle(block: nn.Module, x: Tensor, past: CausalCache) -> Tensor:
    """Compute `WanMidBlock`."""
    x = _residual(block.resnets[0], x, past)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, _attention(attention, x, past.strip), past)
    return x


def _attention(block: nn.Module, x: Tensor, strip: Strip | None = None) -> Tensor:
    """Compute `WanAttentionBlock` within each picture; changes x. strip: x has these rows of the pictures."""
    inner = x[:, :, 1:-1, 1:-1]
    y = backends.function("rms_norm_silu", x)(x, block.norm.gamma, silu=False)
    y = y[:, :, 1:-1, 1:-1].flatten(2, 3).flatten(0, 1)  # (B·T, h·W, C)
    y = strip.gather(y, 1, everywhere=True).contiguous() if strip else y
    qkv = _project(block.to_qkv, y)
    y = _project(block.proj, backends.function("picture_attention", qkv)(qkv))
    inner += (strip.own(y, 1) if strip else y).reshape(inner.shape)
    return x


def _project(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Compute a 1×1 convolution of x (N, H·W, C), one picture at a time.

    cuBLAS chooses a kernel by the number of rows, so the bits would otherwise depend on the pictures in a chunk.
    """
    return torch.stack([F.linear(picture, conv.weight.flatten(1), conv.bias) for picture in x])


def _upsample(block: nn.Module, x: Tensor, past: CausalCache) -> Tensor:
    """Compute `WanResample`, upwards."""
    if block.mode == "upsample3d" and not past.starts():
        x = _conv(block.time_conv, past.keep(torch.cat([past.before(x), x], 1)), split=2)
    return backends.function("upsample_conv", x)(past.filled(x), block.resample[1].weight, block.resample[1].bias)


def _downsample(block: nn.Module, x: Tensor, past: CausalCache) -> Tensor:
    """Compute `WanResample`, downwards."""
    padded = past.filled(x)[:, :, 1:, 1:].flatten(0, 1).permute(0, 3, 1, 2)  # with the rim, at the right and below
    conv = block.resample[1]
    y = F.conv2d(padded, conv.weight, conv.bias, stride=2)
    x = F.pad(y.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unflatten(0, x.shape[:2])
    if block.mode == "downsample3d":
        before = past.slots[past.at]
        past.keep(x)
        if before is not None:  # the first frame is not downsampled in time
            x = _conv(block.time_conv, torch.cat([before[:, -1:], x], 1))[:, ::2]
    return x
