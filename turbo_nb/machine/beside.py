"""Work in threads beside the calling thread."""

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Thread
from typing import Any


def within(seconds: float, work: Callable, *arguments) -> Any:
    """Return work(*arguments), run in a thread. A thread that is late goes on alone and ends with the process.

    Raises:
        TimeoutError: the work did not end within some seconds.
    """
    future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return future.result()


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
