"""Python's garbage collection, put off where it costs much or does harm."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0  # contexts of all threads
_enabled = False  # whether collection was on before the first of them


@contextmanager
def uncollected() -> Iterator[None]:
    """Put garbage collection off inside this context, in all threads. It is on again after the last context, if it was.

    Importing torch and diffusers takes a fifth less time then, because a collection walks through all their objects.
    """
    global _inside, _enabled
    with _lock:
        if not _inside:
            _enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _enabled:
                gc.enable()
