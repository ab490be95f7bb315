"""TAEHV's tiny decoder for Wan2.1's latents: a small network that decodes a clip in a fraction of the VAE's time.

Its pictures are softer than those of the VAE. It has no attention and no norms, and works causally in time: each memory
block sees the present frame and the one before.

Source of the architecture and of the weights `taew2_1`: madebyollin/taehv on GitHub (MIT).
"""

from collections.abc import Iterator
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16
CHUNK = 4  # latent frames that are decoded at a time
TRIMMED = 3  # frames before the first, because the first latent frame stands for one frame and not for four


class SoftClamp(nn.Module):
    """Limit latents to -3 … 3 smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 3 tanh(x / 3)."""
        return (x / 3).tanh().mul_(3)


class MemoryBlock(nn.Module):
    """A residual block of three convolutions over each frame and the frame before it.

    Args:
        channels: of the frames.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * channels, channels), nn.ReLU(inplace=True), _conv(channels, channels), nn.ReLU(inplace=True),
            _conv(channels, channels),
        )  # fmt: skip

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        """Compute frames x (t, C, h, w), which follow the frame `before` (1, C, h, w); None stands for black."""
        before = torch.zeros_like(x[:1]) if before is None else before
        first, _, second, _, third = self.conv
        inner = _relu(second, _relu(first, torch.cat([x, torch.cat([before, x[:-1]])], 1)))
        return _relu(third, inner, x)


class Grow(nn.Module):
    """Turn each frame into several of twice the width and height.

    Args:
        channels: of the frames.
        frames: that each frame becomes.
    """

    def __init__(self, channels: int, frames: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Grow x (t, C, h, w) → (t · frames, C, 2h, 2w)."""
        # The 1x1 convolution comes before the pixels are repeated, because the result is the same at a quarter of the
        # work.
        grown = self.conv(x).unflatten(1, (-1, x.shape[1])).flatten(0, 1)
        return F.interpolate(grown.contiguous(memory_format=torch.channels_last), scale_factor=2.0)


def _relu(conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute a convolution and ReLU, with the residual added in between. On a GPU that is one kernel of cuDNN."""
    if x.is_cuda and torch.backends.cudnn.is_available() and torch.version.hip is None:
        more = (conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, conv.weight, *more)
        return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, *more)
    out = conv(x)
    return (out if residual is None else out.add_(residual)).relu_()


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class TinyDecoder(nn.Module):
    """Decode normalised latents. The names of the parameters are those of the file."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [SoftClamp(), _conv(LATENT_CHANNELS, 256), nn.ReLU(inplace=True)]
        for channels, following, frames in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
            layers += [MemoryBlock(channels) for _ in range(3)]
            # The file counts the repeating of the pixels as a layer of its own
            layers += [nn.Identity(), Grow(channels, frames), _conv(channels, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(inplace=True), _conv(64, 3))

    @torch.no_grad()
    def chunks(self, latents: Tensor, length: int = CHUNK) -> Iterator[Tensor]:
        """Decode latents in chunks. The length of the chunks does not change the frames.

        Args:
            latents: (1, 16, T, h, w), as the transformer makes them.
            length: latent frames of a chunk.

        Yields:
            Frames (1, 3, t, 8h, 8w) in [-1, 1], 4T − 3 in all.
        """
        weight = self.decoder[1].weight
        frames = latents[0].transpose(0, 1).to(weight.device, weight.dtype)
        before: dict[nn.Module, Tensor] = {}
        for number, x in enumerate(frames.split(length)):
            x = x.contiguous(memory_format=torch.channels_last)
            for layer, following in zip_longest(self.decoder, self.decoder[1:]):
                if isinstance(layer, MemoryBlock):
                    x, before[layer] = layer(x, before.get(layer)), x[-1:].clone()  # a view would keep all of x
                elif isinstance(following, nn.ReLU):
                    x = _relu(layer, x)
                elif not isinstance(layer, nn.ReLU):
                    x = layer(x)
            x = x[TRIMMED:] if number == 0 else x
            yield x.mul(2).sub_(1).clamp_(-1, 1).transpose(0, 1)[None]
