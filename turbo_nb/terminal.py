"""A command in a terminal: its arguments, standard streams, signals and exit code."""

import atexit
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from .errors import TurboNbError, TurboNbWarning

PYTHONS_WARNING = warnings.showwarning
CANCELLED = 130  # exit code after Ctrl-C, as in shells; typer uses it, too

# exit code → signal; Windows has only SIGTERM
STOPPED = {128 + one: one for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if (one := getattr(signal, name, None))}
_received: list[int] = []  # exit codes of signals that came, because Ray replaces a SystemExit by its own


class Cancelled(Exception):
    """Ends a command that has already printed what became of it."""


class _Stream:
    """A standard stream that drops text after a first failure, which `error` keeps.

    A full disk or a closed pipe behind it must not end a run whose videos are made.
    """

    def __init__(self, stream: Any):
        self._stream, self.error = stream, None

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable, *arguments: Any) -> None:
        if self.error is None:
            try:
                function(*arguments)
            except (OSError, ValueError) as error:
                self.error = error
                with suppress(OSError, ValueError):  # what the stream still holds goes nowhere, too
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(app: Callable[[], Any]) -> None:
    """Run the commands of an application: a TurboNbError is one line on stderr and exit code 2, Ctrl-C exit code 130.

    SIGTERM, SIGHUP and SIGQUIT end a command as Ctrl-C does, with 128 plus their number, and leave no temporary file.
    """
    warnings.showwarning = show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # because a prompt may have characters that a terminal cannot show
    out, err = (stream and _Stream(stream) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err), ended_by_signals():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("note: %(message)s"))
        logging.getLogger("turbo_nb").handlers[:] = [handler]
        logging.getLogger("turbo_nb").setLevel(logging.INFO)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # because our own bar is on the screen
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # because its advice is for programmers
        sys.argv[1:] = map(decoded, sys.argv[1:])
        try:
            _run(app)
        finally:
            for stream in filter(None, (out, err)):
                stream.flush()
            if out and out.error and not isinstance(out.error, BrokenPipeError):
                print(f"note: standard output cannot be written ({out.error}). Files are not affected.", file=err)


def decoded(argument: str) -> str:
    """Return an argument in UTF-8, where Python decoded it by the encoding of a locale such as C."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except ValueError:  # not UTF-8, so it can only be a path
        return argument


def _run(app: Callable[[], Any]) -> None:
    """Run a command, and turn what it raises into a line and an exit code"""
    try:
        app()
    except TurboNbError as error:
        print(f"error: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        sys.exit(2)
    except Cancelled:
        sys.exit(CANCELLED)
    except (KeyboardInterrupt, SystemExit) as end:
        code = CANCELLED if isinstance(end, KeyboardInterrupt) else [end.code, *_received][-1]
        if code not in (CANCELLED, *STOPPED):
            raise
        print("cancelled; finished files are kept", file=sys.stderr)
        sys.exit(code)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let the signals of `STOPPED` raise SystemExit, so that each `with` removes its temporary files."""

    def stop(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # because a second signal would interrupt the removal
        _received.append(128 + number)
        raise SystemExit(128 + number)

    _received.clear()
    # a signal that is ignored stays ignored, because nohup ignores SIGHUP
    before = [each for each in STOPPED.values() if signal.getsignal(each) == signal.SIG_DFL]
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in before:
            signal.signal(each, signal.SIG_DFL)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print our own warnings as one line. Those of other libraries are for programmers."""
    if issubclass(category, TurboNbWarning):
        print(f"note: {message}", file=sys.stderr)


def show_script_warning(message, category, *more: Any) -> None:
    """Print our own warnings as one line, and others as Python does, because a script of the user may warn."""
    (show_warning if issubclass(category, TurboNbWarning) else PYTHONS_WARNING)(message, category, *more)


def run_and_end(app: Callable[[], Any]) -> None:
    """Run a command, then end the process without the 1.5 s that torch's objects take to die."""
    code: Any = 0
    try:
        run(app)
    except SystemExit as end:
        code = end.code
    if "torch" not in sys.modules or not (code is None or isinstance(code, int)):
        sys.exit(code)
    atexit._run_exitfuncs()  # temporary files go
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)
