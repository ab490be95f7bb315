"""What fused modules keep between calls: a result for a whole clip, and frames from one chunk of a clip to the next."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..linear import Int8Linear

PLAIN = (nn.Linear, Int8Linear, nn.RMSNorm)  # modules whose result depends only on the input and their parameters


class TensorCache:
    """The last result that was computed from a tensor, valid while that tensor lives and is not written to."""

    def __init__(self):
        self._source, self._version, self._result = None, None, None

    def get(self, source: Tensor, compute: Callable[[], Any], linears: Sequence[nn.Module] = ()) -> Any:
        """Return compute(), or its last result for the same tensor.

        Args:
            source: what the result is computed from.
            compute: called unless the cache is valid, and always with gradients.
            linears: modules that `compute` uses, linears and norms. Writing to their parameters makes the cache
                invalid. With a module of another kind, such as PEFT's, nothing is cached.
        """
        if torch.is_grad_enabled() or not all(type(linear) in PLAIN for linear in linears):
            return compute()
        parameters = (x for linear in linears for x in linear._parameters.values() if x is not None)
        version = [(id(x), None if x.is_inference() else x._version) for x in (source, *parameters)]
        if self._source is None or self._source() is not source or self._version != version:
            self._result = compute()
            self._source, self._version = weakref.ref(source, self._forget), version
        return self._result

    def clear(self) -> None:
        """Drop the result."""
        self.__init__()

    def _forget(self, source: weakref.ref) -> None:
        if source is self._source:
            self.clear()

    def __reduce__(self):  # a copy or a pickle starts empty
        return TensorCache, ()


class Strip(Protocol):
    """Some rows of a clip whose other rows other ranks have, as `parallel.strips.Strip`."""

    def fill(self, x: Tensor) -> None:
        """Put the neighbours' rows into the upper and lower rim of x (B, T, h + 2, W + 2, C)."""

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's rows of x, whose dimension `dim` has all rows."""

    def gather(self, x: Tensor, dim: int, everywhere: bool = False) -> Tensor | None:
        """Return all ranks' rows of x, whose dimension `dim` has this rank's."""


class CausalCache:
    """The two frames before a chunk, for each causal convolution in turn.

    Args:
        slots: diffusers' feat_cache, one entry for each convolution.
        strip: the rows that this rank has. None: all rows.
    """

    def __init__(self, slots: list, strip: Strip | None = None):
        self.slots, self.at, self.strip = slots, 0, strip

    def filled(self, x: Tensor) -> Tensor:
        """Return a convolution's input x (B, T, h + 2, W + 2, C) with its rim as the convolution reads it."""
        if self.strip:
            self.strip.fill(x)
        return x

    def starts(self) -> bool:
        """Return whether this is the first chunk; then skip the next convolution, in this chunk only."""
        if self.slots[self.at] is not None:
            return False
        self.slots[self.at] = "Rep"  # diffusers' mark
        self.at += 1
        return True

    def before(self, x: Tensor, channels: int | None = None) -> Tensor:
        """Return the two frames before x (B, T, H, W, C) at the next convolution, where x may get other channels."""
        known = self.slots[self.at]
        shape = x.shape[0], 2, *x.shape[2:4], channels or x.shape[4]
        return known if isinstance(known, Tensor) else x.new_zeros(shape)

    def keep(self, x: Tensor) -> Tensor:
        """Keep the last two frames of a convolution's input x, and return x."""
        self.slots[self.at] = x[:, -2:].clone()
        self.at += 1
        return x
