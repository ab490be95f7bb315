"""Which Triton kernels were compiled in a stretch of work: the time of that work says little about later runs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def compilations(device: str) -> Iterator[list[str]]:
    """Collect the names of the kernels that Triton compiles, and does not find in its cache.

    An earlier listener of Triton's keeps being called. On a CPU nothing is collected, because nothing is compiled.

    Args:
        device: where the work runs.
    """
    names: list[str] = []
    try:
        if device == "cpu":
            raise ImportError
        from triton import knobs

        before = knobs.compilation.listener
    except (ImportError, AttributeError):  # Triton is missing, or older than 3.4, which our kernels need
        yield names
        return

    def listen(**event) -> None:
        if not event["cache_hit"]:
            names.append(str(getattr(event["src"], "name", event["src"])))
        if before:
            before(**event)

    knobs.compilation.listener = listen
    try:
        yield names
    finally:
        knobs.compilation.listener = before
