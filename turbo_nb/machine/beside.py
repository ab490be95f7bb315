"""Work in threads beside the calling thread."""

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Beside:
    """Runs functions in threads, which have ended when this context ends.

    What they warn of goes where the caller's warnings go. The end of the context raises the first of their errors,
    unless the caller itself failed.
    """

    def __enter__(self) -> "Beside":
        self._executor, self._started = ThreadPoolExecutor(), []
        return self

    def start(self, work: Callable, *arguments) -> Future:
        """Begin work(*arguments)."""
        context = contextvars.copy_context()
        self._started.append(self._executor.submit(context.run, work, *arguments))
        return self._started[-1]

    def wait(self) -> None:
        """Wait until all of them have ended, and raise the first of their errors."""
        for future in self._started:
            future.result()

    def __exit__(self, kind: type | None, *error) -> None:
        self._executor.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.wait()
