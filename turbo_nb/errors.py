"""Typed errors. Each message says what was got, what is allowed and what to do."""


class TurboNbError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one line and exits with 2."""


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


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 160 characters"""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
