"""Typed errors and warnings.

The message of an error has three parts: NAME is GOT. Expected ALLOWED. FIX. `warn` issues every warning of this
package, so that a job in a thread can collect its own warnings without touching Python's process-wide filters.
"""

import errno
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

FULL = re.compile("No space left|quota exceeded|the disk is full")
LONGEST = 1000  # characters of a line of a message
# What a terminal obeys, what turns text around, and what UTF-8 cannot encode
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# In an address, which has one slash where it was taken for a path. In a file:// address @ and ? are parts of names
SECRETS = re.compile(r"(?i)(?<!file)(://|\bhttps?:/(?!/))(?:[^\s'\"]*@)?([^\s'\"?#]*)(?:[?#][^\s'\"]*)?")


def presentable(message: str, longest: int = LONGEST) -> str:
    """Return a message as any terminal can show it, because it may quote a file or an argument.

    Args:
        message: any text.
        longest: characters of a line. A longer line loses its middle, because the fix stands at the end.
    """
    lines = UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], message).split("\n")
    head, tail = longest * 2 // 3, longest // 3 - 3
    return "\n".join(line if len(line) <= longest else f"{line[:head]} … {line[-tail:]}" for line in lines)


def without_secrets(text: str) -> str:
    """Remove user names, passwords, queries and fragments from the addresses in a text."""
    return SECRETS.sub(r"\1\2", text)


class TurboNbError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one line and exits with 2."""

    def __str__(self) -> str:
        return presentable(without_secrets(super().__str__()))


class InputError(TurboNbError, ValueError):
    """An argument (prompt, size, frames, steps, …) that cannot be used as given."""


class UnknownModelError(InputError):
    """A model name that is neither in the catalogue nor a path."""


class OutputError(TurboNbError, OSError):
    """A result that cannot be written where it was asked for."""


class BackendError(TurboNbError, RuntimeError):
    """An implementation that was asked for by name and cannot run here."""


class CheckpointError(TurboNbError, ValueError):
    """A model file or folder that is not what it was taken for."""


class DownloadError(TurboNbError, OSError):
    """A file that cannot be fetched from the Hub, or that came with wrong bytes; files that are whole stay."""


class EndpointError(TurboNbError, OSError):
    """A prompt that a language model's endpoint did not rewrite."""


def not_installed(package: str, extra: str) -> InputError:
    """Return the error of a missing package that an extra of this package brings."""
    return InputError(f"{package} is not installed. Run: pip install 'turbo-nb[{extra}]'")


class TurboNbWarning(UserWarning):
    """Category of every warning of this package."""


_collector: ContextVar[list[str] | None] = ContextVar("turbo_nb_warnings", default=None)


def warn(message: str, *, stacklevel: int = 1) -> None:
    """Warn with `TurboNbWarning`; within `collect_warnings` the message goes to its list instead.

    Args:
        message: what happened, and what to do about it.
        stacklevel: 1 names the caller of the function that calls `warn`.
    """
    message, collected = presentable(without_secrets(message)), _collector.get()
    if collected is None:
        warnings.warn(message, TurboNbWarning, stacklevel=stacklevel + 2)
    else:
        collected.append(message)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collect the messages of `warn` from this thread (or asyncio task) in a list, in order."""
    messages: list[str] = []
    token = _collector.set(messages)
    try:
        yield messages
    finally:
        _collector.reset(token)


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is a disk without space. A limit of one file's size is not."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(error)):
            return True
        error = error.__cause__
    return False


def space_or(fix: str, error: BaseException) -> str:
    """Return a fix, with the advice to free some space in front of it where the disk is full."""
    return f"Free some space, or {fix}." if is_full(error) else f"{fix[0].upper()}{fix[1:]}."


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line of at most 160 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:160]


def explained(error: BaseException) -> str:
    """Return the text for a person of an error, be it one of this package or another one."""
    if isinstance(error, TurboNbError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Out of memory. Take fewer frames, a smaller resolution, or the int8 checkpoint, and restart the kernel."
    return (
        f"unexpected {type(error).__name__}: {error}. Try again. If it happens again, restart the kernel and report "
        "the details."
    )


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return `a, b, c and 4 more`, sorted."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
