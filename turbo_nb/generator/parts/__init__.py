"""Components of the page with scripts of their own: players, the gallery, the keyboard and dropped files.

The scripts are plain JavaScript beside this file. anywidget gives them to the page, so nothing is compiled or fetched.
"""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from ...errors import first_line, not_installed
from ..guard import ShowError, guarded, raise_error

try:
    import anywidget
except ImportError as error:
    raise not_installed("anywidget", "notebook") from error


def source(*names: str) -> str:
    """Return the text of files of this folder, one after the other, because a script of a component has no imports."""
    return "\n".join(files(__name__).joinpath(name).read_text(encoding="utf-8") for name in names)


class Part(anywidget.AnyWidget):
    """A component whose script sends messages to the kernel.

    `answers` has a function for each kind of message. It takes the message and its buffers. What it returns, a pair of
    a mapping and buffers, goes back to the page. The component calls `on_error` with an unexpected error.
    """

    _css = source("parts.css")

    def __init__(self, **traits):
        super().__init__(**traits)
        self.answers: dict[str, Callable[[dict, list], tuple[dict, list[bytes]] | None]] = {}
        self.on_error: ShowError = raise_error
        self.on_msg(guarded(self._on_message, self._show_error))

    def _on_message(self, _, content: Any, buffers: list) -> None:
        kind = content.get("kind") if isinstance(content, dict) else None
        if isinstance(kind, str) and (answer := self.answers.get(kind)):
            try:
                reply = answer(content, buffers)
            except Exception as error:  # because the page may wait for an answer
                self.reply(content, {"error": first_line(error)})
                raise
            if reply:
                self.reply(content, *reply)

    def _show_error(self, error: Exception) -> None:
        self.on_error(error)

    def reply(self, content: dict, answer: dict, buffers: list[bytes] = ()) -> None:
        """Send the answer to a message. Works from any thread."""
        if self.comm is not None:  # None: closed since the page asked
            self.send(answer | {"id": content.get("id")}, list(buffers))
