"""What every stand-in for a compiled function shares: its signature, its limits, their error, and new processes."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from pathlib import Path
from typing import Any

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


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Give a module other attributes within the block."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


# What a new process of multiprocessing calls before its main module, and the function that `in_new_processes` replaces
_starts: list[Callable[[], object]] = []
_given: list[Callable[[str], dict]] = []


class _Start:
    """Calls a function of a module when it is unpickled."""

    def __init__(self, function: Callable[[], object]):
        self.function = function

    def __reduce__(self) -> tuple:
        module, name = self.function.__module__, self.function.__name__
        # sys.path comes first, because only the parent may have the folder of this package in it
        path = [*sys.path, str(Path(__file__).parents[2])]
        return exec, (f"import sys; sys.path[:] = {path!r}; from {module} import {name}; {name}()",)


def _preparation_data(name: str) -> dict:
    return _given[0](name) | {f"turbo_nb {one.__name__}": _Start(one) for one in _starts}


@contextmanager
def in_new_processes(function: Callable[[], object]) -> Iterator[None]:
    """Let processes that multiprocessing spawns within the block call a module's function first.

    Forked processes do not need it. A DataLoader whose workers use CUDA spawns them.
    """
    if not _starts:
        _given.append(spawn.get_preparation_data)
        spawn.get_preparation_data = _preparation_data
    _starts.append(function)
    try:
        yield
    finally:
        _starts.remove(function)
        if not _starts:
            spawn.get_preparation_data = _given.pop()
