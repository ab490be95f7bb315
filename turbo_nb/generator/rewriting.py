"""The button that lets a language model rewrite the prompt. Without TURBO_NB_REWRITE_URL it is not on the page."""

import threading
from collections.abc import Callable, Sequence

import ipywidgets as w

from ..catalog import ModelSpec
from ..errors import collect_warnings
from ..text import rewrite
from .guard import guarded, on_change, on_click
from .page import WRAPPED, button, error_box, error_of, paragraph, visible

PRIVACY = "The text of the prompt is sent to the language model at TURBO_NB_REWRITE_URL. No picture is sent."


class RewriteBar:
    """Rewrite, Cancel and Undo beside the prompt.

    A person who changes the prompt while it is rewritten keeps what they wrote, and the answer is dropped.

    Args:
        text: the prompt.
        prompts: returns the prompts that the text stands for.
    """

    def __init__(self, text: w.Textarea, prompts: Callable[[], Sequence[str]]):
        self._text, self._prompts = text, prompts
        self._model = {"task": "t2v", "vocabulary": None}
        self._other = ""  # what Undo puts in the place of the text
        self._asked: object | None = None  # stands for the latest request, until its answer is shown or dropped
        self._lock = threading.RLock()  # because the answer comes in a thread, and the text calls `_drop` there
        self.rewrite = button("Rewrite", tooltip=f"Rewrite the prompt in long English. {PRIVACY}")
        self.cancel, self.undo = button("Cancel rewriting"), button("Undo", tooltip="Bring back the earlier prompt")
        self.note = w.HTML()
        buttons = w.HBox([self.rewrite, self.cancel, self.undo], layout=w.Layout(**WRAPPED))
        self.box = w.VBox([buttons, self.note])
        self.box.add_class("tnb-under")  # the text, beside its label
        visible(self.box, rewrite.is_set())
        visible(self.undo, False)
        on_click(self.rewrite, self.start, self._show_error)
        on_click(self.cancel, lambda: self._stop(_status("Cancelled. The prompt stays as it is.")), self._show_error)
        on_click(self.undo, self._swap, self._show_error)
        on_change(text, lambda: self._drop("prompt"), self._show_error)
        self._show(False)

    def show_model(self, spec: ModelSpec) -> None:
        """Rewrite for a model from now on."""
        self._model = {"task": spec.task, "vocabulary": spec.vocabulary}
        self._drop("model")

    def start(self) -> None:
        """Begin to rewrite, in the background."""
        prompts = [prompt for prompt in self._prompts() if prompt.strip()]
        if not prompts:
            self.note.value = error_box("The prompt is empty. Say what to show.")
            return
        with self._lock:
            self._asked = asked = object()
            self._show(True)
        self.note.value = _status("Rewriting…")
        run = guarded(self._run, self._show_error)
        threading.Thread(target=run, args=(asked, prompts), name="turbo_nb rewrite", daemon=True).start()

    def _run(self, asked: object, prompts: Sequence[str]) -> None:
        try:
            with collect_warnings() as notes:
                made = [rewrite.rewrite_prompt(one, **self._model) for one in prompts]
        except Exception as error:  # because the page would wait for ever
            made, note = [], error_of(error)
        else:
            note = _status("Rewritten.") + "".join(paragraph(one, "tnb-dim") for one in notes)
        with self._lock:
            if self._asked is not asked or self._text.comm is None:  # cancelled, edited, or taken off the page
                return
            self._stop(note)
            if made:
                self._other, self._text.value = self._text.value, "\n".join(made)
                self._show_undo("Undo")

    def _swap(self) -> None:
        """Put the earlier prompt back. A second click brings the later one, so that no words are lost"""
        with self._lock:
            self._stop("")
            self._other, self._text.value = self._text.value, self._other
            self._show_undo("Redo" if self.undo.description == "Undo" else "Undo")

    def _drop(self, changed: str) -> None:
        """Drop the answer that is to come, because something that it was asked for has changed"""
        if self._asked is not None:
            self._stop(_status(f"The {changed} has changed, so the prompt is not rewritten."))

    def _stop(self, note: str) -> None:
        with self._lock:
            self._asked = None
            self._show(False)
            self.note.value = note

    def _show_error(self, error: Exception) -> None:
        self._stop(error_of(error))

    def _show(self, running: bool) -> None:
        self.rewrite.disabled = running
        visible(self.cancel, running)

    def _show_undo(self, word: str) -> None:
        self.undo.description = word
        visible(self.undo, True)


def _status(text: str) -> str:
    """Return a line that a screen reader reads out"""
    return f'<p role="status" class="tnb-dim">{text}</p>'
