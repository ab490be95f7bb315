"""Fused kernels in the blocks of a diffusers Wan transformer: `fuse(transformer)`, and `unfuse` to take them out.

A fused block is the same module, with the same parameters under the same names; its class, and so its forward, is
another, and 8-bit linears get a scale for each row (`linear.to_rows`). LoRA, offload, saving and a plain diffusers
pipeline keep working, and whatever the kernels do not take (a CPU, float32, a timestep per token) runs as diffusers has
it. q, k and v are fused in `sla.SLAProcessor` itself.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import Int8Linear


class Kept:
    """What was last computed from a tensor, for as long as that tensor lives and nobody writes to it."""

    def __init__(self):
        self._source, self._version, self._result = None, None, None

    def get(self, source: Tensor, compute: Callable[[], Any], linears: Sequence[nn.Module] = ()) -> Any:
        """compute(), or its result of last time if that was for this very tensor; with gradients always compute()

        linears: those that it is computed with. Written to, they count as others; with a LoRA nothing is kept.
        """
        if torch.is_grad_enabled() or not all(type(linear) in (nn.Linear, Int8Linear) for linear in linears):
            return compute()
        parameters = (x for linear in linears for x in linear._parameters.values() if x is not None)
        version = [(id(x), None if x.is_inference() else x._version) for x in (source, *parameters)]
        if self._source is None or self._source() is not source or self._version != version:
            self._result = compute()
            self._source, self._version = weakref.ref(source, self._forget), version
        return self._result

    def _forget(self, source: weakref.ref) -> None:
        if source is self._source:
            self.__init__()

    def __reduce__(self):  # a copy or a pickle starts empty
        return Kept, ()


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
