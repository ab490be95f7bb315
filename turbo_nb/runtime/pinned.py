"""Pinned main memory, which the driver copies to and from a GPU at the full speed of the bus."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import first_line, warn


def pinned_empty(shape: int | Sequence[int], dtype: torch.dtype = torch.uint8, pin: bool = True) -> Tensor:
    """Return an uninitialised tensor in pinned memory, or in pageable memory where the system refuses to pin more.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        pin: False returns pageable memory, for work on a CPU.

    Returns:
        The tensor. Its `is_pinned()` says which memory it has. A refusal warns.
    """
    if pin:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            warn(
                f"Main memory cannot be pinned ({first_line(error)}). Copies to and from the GPU are slower. "
                "`ulimit -l` shows the system's limit."
            )
    return torch.empty(shape, dtype=dtype)
