"""The keyboard of the page, the title of the browser's tab, and clips that are dropped on the page."""

from collections.abc import Callable

import ipywidgets as w
import traitlets as t

from ... import records
from ...errors import explained
from ...records import VideoRecord
from ...video import mp4
from . import Part, source


class Keys(Part):
    """Ctrl+Enter and Esc within the page, and the title of the browser's tab. It has no place on the page.

    Args:
        on_generate: called by Ctrl+Enter (on a Mac Cmd+Enter).
        on_cancel: called by Esc while `running` is true.
        prompt: a Textarea. Ctrl+Enter sets its value before the call, because the last letters may not have arrived.
    """

    _esm = source("keys.js")
    title = t.Unicode().tag(sync=True)  # before the tab's own title, such as "42 %"; empty: only the own title
    running = t.Bool(False).tag(sync=True)

    def __init__(
        self, on_generate: Callable[[], object], on_cancel: Callable[[], object], prompt: w.Textarea | None = None
    ):
        super().__init__(layout=w.Layout(display="none"))
        self._on_generate, self._prompt = on_generate, prompt
        if prompt is not None:
            prompt.add_class("tnb-keys-prompt")
        self._on_cancel = on_cancel
        self.answers |= {"generate": self._generate, "cancel": self._cancel}

    def _cancel(self, *_) -> None:
        self._on_cancel()

    def _generate(self, content: dict, _) -> None:
        if self._prompt is not None and isinstance(content.get("prompt"), str):
            self._prompt.value = content["prompt"]
        self._on_generate()


class ClipDrop(Part):
    """A button that picks an mp4. An mp4 that is dropped anywhere on the page counts as picked.

    Args:
        on_record: called with the file's name and how the clip was made. It returns the text to show, and whether it is
            a warning.
    """

    _esm = source("transfer.js", "drop.js")
    message = t.Dict().tag(sync=True)

    def __init__(self, on_record: Callable[[str, VideoRecord], tuple[str, bool]]):
        super().__init__()
        self._on_record, self.on_error = on_record, self._show_unexpected
        self.answers["dropped"] = self._dropped

    def _dropped(self, content: dict, buffers: list) -> None:
        name = str(content.get("name", ""))[:200]
        found = mp4.metadata_of(bytes(buffers[0])) if buffers else None
        if found is None:
            text, alert = f"{name} says nothing of how it was made. Drop an mp4 that turbo-nb wrote.", True
        else:
            text, alert = self._on_record(name, records.read(VideoRecord, found))
        self._say(text, alert)

    def _show_unexpected(self, error: Exception) -> None:
        self._say(explained(error), alert=True)

    def _say(self, text: str, alert: bool) -> None:
        self.message = {}  # because a screen reader reads out only what is new
        self.message = {"text": text, "alert": alert}
