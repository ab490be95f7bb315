"""The download of a model in the background, with its speed. No widgets here."""

import threading
import traceback
from collections.abc import Callable

from ..errors import TurboNbError
from ..files import hub
from ..files.resolve import ResolvedModel
from ..runtime.progress import Rate


class _Cancelled(Exception):
    pass


class Download:
    """A download, begun by `start`.

    Args:
        model: whose missing files are fetched.
        changed: called with the download when it begins and when it has ended, from its own thread.

    `state` is "running", "finished", "cancelled" or "failed". `done` of `total` bytes are here, `rate` is their speed,
    and `stage` is "fetch" or "check". `error` has the reason of a failure.
    """

    def __init__(self, model: ResolvedModel, changed: Callable[["Download"], None]):
        self.model, self._changed = model, changed
        self.state, self.stage, self.error = "running", "fetch", ""
        self.done, self.total, self.rate = 0, model.to_fetch, Rate()
        self._cancelling = threading.Event()
        self._thread = threading.Thread(target=self._run, name="turbo_nb download", daemon=True)

    @property
    def running(self) -> bool:
        """Whether the download is at work."""
        return self.state == "running"

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def cancel(self) -> None:
        """End the download. Files that are whole stay, and the next download goes on where a file was left."""
        self._cancelling.set()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the download has ended, or for `timeout` seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        self._changed(self)
        try:
            self.model.fetch(self._on_progress)
            self.state = "finished"
        except _Cancelled:
            self.state = "cancelled"
        except TurboNbError as error:
            self.state, self.error = "failed", str(error)
        except BaseException as error:  # because nobody else sees an exception of a thread
            self.state, self.error = "failed", "".join(traceback.format_exception_only(error)).strip()
        self._changed(self)

    def _on_progress(self, progress: hub.Progress) -> None:
        if self._cancelling.is_set():
            raise _Cancelled
        self.stage, self.done, self.total = progress.stage, progress.done, progress.total
        if progress.stage == "fetch":
            self.rate.at(progress.done)
