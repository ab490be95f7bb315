"""Presets: fast, normal, best, and those that the user saved."""

from contextlib import suppress
from typing import Any

import ipywidgets as w

from .. import presets
from ..errors import InputError
from .controls import styled
from .form import LOAD, MORE, Form
from .guard import on_change, on_click
from .page import WRAPPED, button, error_box, error_of, paragraph, visible
from .restore import left_out

# options that a preset of the user keeps: how a clip is made, and not what it shows
KEPT = ("resolution", "aspect_ratio", "num_frames", "num_steps", *LOAD, *MORE)


class PresetBar:
    """The list of presets, and a field to save the present settings under a name."""

    def __init__(self, form: Form):
        self._form = form
        self.choice = styled(w.Dropdown, "Preset")
        self.name = styled(w.Text, "Save as", placeholder="a name for the present settings", continuous_update=False)
        self.save, self.delete = button("Save preset"), button("Delete preset")
        self.note = w.HTML()
        more = w.HBox([self.name, self.save], layout=w.Layout(**WRAPPED))
        self.name.layout.flex = self.choice.layout.flex = "1 1 180px"
        self.box = w.VBox([w.HBox([self.choice, self.delete], layout=w.Layout(**WRAPPED)), self.note])
        self.own = more
        self.list()
        on_change(self.choice, self._use, self._show_error)
        on_click(self.save, self._on_save, self._show_error)
        on_click(self.delete, self._on_delete, self._show_error)
        self._used: dict[str, Any] | None = None  # the settings that the chosen preset has made
        self.show()

    def list(self, chosen: str | None = None) -> None:
        """List the presets again, and choose one without using it."""
        entries = [("choose one…", ""), *((name, name) for name in (*presets.BUILT_IN, *presets.own()))]
        self._listing = True
        self.choice.options = entries
        self.choice.value = chosen if chosen in [value for _, value in entries] else ""
        self._listing = False

    def show(self) -> None:
        """Show what the chosen preset does."""
        name = self.choice.value
        words = presets.BUILT_IN.get(name, "your own settings" if name else "")
        self.note.value = paragraph(words, "tnb-help") if words else ""
        visible(self.delete, bool(name) and name not in presets.BUILT_IN)

    def settings_changed(self) -> None:
        """Show no preset where the settings are not those of the preset any more, so that it can be chosen again."""
        with suppress(InputError):
            if self.choice.value and self._used is not None and self._settings() != self._used:
                self.list()
                self.show()

    def _settings(self) -> dict[str, Any]:
        """Return the present settings that a preset keeps. Raises InputError"""
        state = self._form.state
        return {option: state[option] for option in KEPT if option in state}

    def _use(self) -> None:
        self.show()
        name = self.choice.value
        if not name or self._listing:
            return
        if name in presets.BUILT_IN:
            values = presets.built_in(name, self._form.spec) if self._form.spec else {}
        else:
            kept: dict[str, Any] = dict.fromkeys(KEPT)
            values = kept | presets.own().get(name, {})
        self._used = None
        lost = self._form.put(values)
        with suppress(InputError):
            self._used = self._settings()
        if lost:
            self.note.value = error_box(f"Not set:\n{left_out(lost)}")

    def _on_save(self) -> None:
        name = self.name.value.strip()
        presets.save(name, used := self._settings())
        self.name.value = ""
        self.list(name)
        self._used = used
        self.show()

    def _on_delete(self) -> None:
        presets.delete(self.choice.value)
        self.list()
        self.show()

    def _show_error(self, error: Exception) -> None:
        self.note.value = error_of(error)
