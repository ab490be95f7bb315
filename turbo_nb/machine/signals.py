"""Signals that must not reach other processes, or interrupt what has to be finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What a terminal sends to all its processes
TERMINAL = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


@contextmanager
def terminal_blocked() -> Iterator[None]:
    """Keep the signals of the terminal from processes that start in this block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handlers_kept(**during: signal.Handlers) -> Iterator[None]:
    """Restore the handlers of some signals after a block, in which they may be others, as SIGINT=signal.SIG_IGN."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before = {name: signal.signal(getattr(signal, name), handler) for name, handler in during.items()}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Raise KeyboardInterrupt only at the end of a block for a Ctrl-C inside it. A second Ctrl-C interrupts at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        if came:
            signal.default_int_handler(number, frame)
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
