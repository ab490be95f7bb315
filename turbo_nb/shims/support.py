"""What every stand-in for a compiled function shares: its signature, its limits, and their error."""

import functools
import inspect
from collections.abc import Callable

import torch

from ..errors import TurboNbError, first_line


class UnsupportedCall(TurboNbError, NotImplementedError):
    """A call of a compiled library that its stand-in does not compute."""


class UnsupportedName(UnsupportedCall, AttributeError):
    """A name of a compiled library that its stand-in does not have."""


def supplies(call: str, **fixed: object) -> Callable[[Callable], Callable]:
    """Check the arguments of a stand-in before it runs.

    Args:
        call: the full name of the function that it stands for.
        fixed: the only value that it computes of some parameters.

    Raises:
        UnsupportedCall: the arguments do not fit the signature, or a fixed parameter has another value.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*arguments, **named):
            try:
                bound = signature.bind(*arguments, **named).arguments
            except TypeError as error:
                raise UnsupportedCall(f"{call}: {first_line(error)}. Expected {signature}.") from None
            for name, value in fixed.items():
                if name in bound and bound[name] is not value and bound[name] != value:
                    raise unsupported(call, name, bound[name], repr(value))
            return function(*arguments, **named)

        return checked

    return decorate


def unsupported(call: str, name: str, got: object, expected: str) -> UnsupportedCall:
    """Return the error for a value that a stand-in does not compute."""
    library = call.partition(".")[0]
    return UnsupportedCall(
        f"{call}: {name} is {got!r}. Expected {expected}, because turbo_nb stands in for {library} in the calls of "
        f"upstream's Wan code only. Install {library} for others."
    )


def require_no_gradient(call: str, *tensors: torch.Tensor) -> None:
    """Raise UnsupportedCall where autograd would lose these tensors, because training would go on without them."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UnsupportedCall(
            f"{call}: an input requires a gradient. Expected none, because 8-bit kernels have no backward. Train with "
            "SparseLinearAttention and without quantised linears; run inference within torch.no_grad()."
        )
