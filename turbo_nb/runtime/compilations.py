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
    compilation = None if device == "cpu" else _triton_options()
    if compilation is None:
        yield names
        return
    before = compilation.listener

    def listen(**event) -> None:
        if not event["cache_hit"]:
            names.append(str(getattr(event["src"], "name", event["src"])))
        if before:
            before(**event)

    compilation.listener = listen
    try:
        yield names
    finally:
        compilation.listener = before


def _triton_options():
    """Return Triton's options of compilation; None without Triton, or with one older than our kernels need"""
    try:
        from triton import knobs

        return knobs.compilation if hasattr(knobs.compilation, "listener") else None
    except ImportError:
        return None
