"""Where a kernel writes a result whose parts are for several GPUs."""

from typing import NamedTuple

from torch import Tensor

ALIGNMENT = 16  # bytes, of each part and of each token in it


class Parts(NamedTuple):
    """The parts of a result (B, L, H, D), one for each rank, in memory of any GPU that this one can write.

    Attributes:
        addresses: (B, ranks) int64, of the first number of each clip and rank.
        pitch: numbers from token to token in every part.
        bounds: (ranks + 1,) int64. Part r has the tokens from bounds[r] to bounds[r + 1], and their H heads. None: it
            has all tokens, and the r-th of equal shares of the heads.
    """

    addresses: Tensor
    pitch: int
    bounds: Tensor | None = None

    @property
    def ranks(self) -> int:
        """The number of parts."""
        return self.addresses.shape[1]
