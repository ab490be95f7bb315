"""The generator: ipywidgets over a `JobRunner`.

Everything that matters is in the runner and on disk, so the widgets can go and come back. Showing the generator again
finds the jobs, the settings and the clips. Every control has a description, which is its accessible name.
"""

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, not_installed

try:  # before all that takes long to load
    import ipywidgets as w
except ImportError as error:
    raise not_installed("ipywidgets", "notebook") from error
from .. import presets
from ..machine import environment
from ..settings import Weights
from .comms import answer_on_any_page
from .downloads import Download
from .form import Form
from .gallery import GalleryPanel, ResultPanel
from .guard import guarded, on_change
from .jobs import JobRunner
from .models import ModelCard
from .page import ADVICE, STYLE, card, close, family
from .parts.controls import Keys
from .preset_bar import PresetBar
from .request import Job
from .restore import left_out
from .run import RunPanel
from .waiting import QueuePanel

__all__ = ["Generator", "has_front_end", "show"]

TICK = 1.0  # seconds between two looks at the progress


def has_front_end() -> bool:
    """Return whether a page with a person before it sent the running cell, and not papermill or nbmake."""
    if os.environ.get("SERVER_SOFTWARE", "").startswith("voila/"):  # it runs the cells itself, for a page
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    kernel = getattr(shell, "kernel", None)
    # a page sends metadata with the cells that it runs; nbclient, which the others use, sends nothing
    return bool(kernel and (kernel.get_parent("shell") or {}).get("metadata"))


def _allow_widgets_in_colab() -> None:
    """Let Colab show widgets of other packages, whose scripts it then loads from its own server"""
    if environment.place() == "Colab" and (output := sys.modules.get("google.colab.output")):
        output.enable_custom_widget_manager()


def show(folder: str | os.PathLike = "outputs", *, model: Weights = "auto") -> "Generator":
    """Show the generator. A second call closes the first one's widgets and finds its jobs, settings and clips.

    Args:
        folder: of the clips.
        model: the model chosen at first; a name or a path. "auto": the one that was chosen last on a page, else the
            best here.

    Raises:
        InputError: `folder`, or a variable that names a folder, has an address of another place.
    """
    environment.check_folders()
    runner = JobRunner.of(folder)
    earlier, unread = _shown.pop(runner, None), ""
    state = earlier.state if earlier else {}
    if not state:
        try:
            state = presets.latest()
        except InputError as error:
            unread = str(error)
    if earlier:
        earlier.close()
    runner.refresh()
    _shown[runner] = generator = Generator(runner, model, state)
    if unread:
        generator.run.say(f"The settings of the latest session are left out: {unread}", alert=True)
    return generator


_shown: "dict[JobRunner, Generator]" = {}


class Generator:
    """The page. `root` is the widget that is displayed.

    Args:
        runner: makes the clips.
        model: the model chosen at first.
        state: the settings to begin with, as `Form.state` has them.
    """

    def __init__(self, runner: JobRunner, model: Weights = "auto", state: Mapping[str, Any] | None = None):
        self.runner = runner
        self.form = form = Form(runner, model)
        state = state or {}
        lost = form.put(state if model == "auto" else {name: state[name] for name in state if name != "model"})
        self.result, self.presets = ResultPanel(self._show_error), PresetBar(form)
        self.models, self.queue = ModelCard(runner, form), QueuePanel(runner, self._show_error)
        self.run = RunPanel(runner, form, self.result.preview)
        self.clips = GalleryPanel(runner, form, self.run, self.result)
        if lost:  # after the gallery, because a new one clears the note
            self.run.say(f"Of the latest session these settings are left out:\n{left_out(lost)}", alert=True)
        self.keys = Keys(self._on_ctrl_enter, runner.cancel, form.prompt.text)
        self.keys.on_error = self._show_error
        ask = card("", form.prompt.box, form.image.box, form.last_image.box, self.run.box)
        shown = w.VBox([self.result.box, self.queue.card], layout=w.Layout(min_width="0", grid_gap="10px"))
        options = card(
            "", form.model, self.models.box, self.presets.box, form.front, form.lora_fold, form.advanced,
            self.presets.own,
        )  # fmt: skip
        columns = w.Box([ask, shown, options])
        columns.add_class("tnb-columns")
        parts = [self.keys, columns, self.clips.card]
        self.root = w.VBox(parts, layout=w.Layout(width="100%", grid_gap="14px"))
        self.root.add_class("tnb")
        if runner.job and runner.job.clip:
            self.result.show(runner.job.clip)
        form.on_change, form.on_model, form.on_error = self._on_form, self._on_model, self._show_error
        on_change(form.fields["decoder"].widget, self.models.show, self._show_error)  # it may need a download
        form.on_prompt = lambda: self.run.update(prompt_only=True)
        self._closed = threading.Event()
        self._stop = runner.listen(guarded(self._on_change, self._show_error))
        answer_on_any_page(self.root, self._show_error)
        if runner.busy:
            self._tick()

    @property
    def state(self) -> dict[str, Any]:
        """The settings in the form, without those that cannot be used."""
        return self.form.usable_state

    def close(self) -> None:
        """Take the widgets off the page. The runner, its jobs and its clips stay."""
        self._stop()
        self._closed.set()
        self.run.close()
        close(family(self.root))

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        _allow_widgets_in_colab()
        display(HTML(STYLE + ADVICE))
        display(self.root)

    def _show_error(self, error: Exception) -> None:
        """Show an unexpected error that no panel has a place for"""
        self.run.show_error(error)

    def _on_ctrl_enter(self) -> None:
        if not self.run.generate.disabled:
            self.run.start()

    def _show_in_tab(self) -> None:
        """Show the progress in the title of the browser's tab"""
        job = self.runner.job
        self.keys.running = bool(job and job.running)
        self.keys.title = f"{job.progress.fraction:.0%}" if self.keys.running else ""

    def _on_form(self) -> None:
        self.run.update()
        self.presets.settings_changed()

    def _on_model(self) -> None:
        self.models.show()
        self.clips.show_model()

    def _on_change(self, change: Job | Download) -> None:
        """Show a change of a job or a download; their threads call this"""
        if isinstance(change, Download):
            self.models.show()
            self.form.prompt.read_tokenizer()
            self.run.update(keep_error=True)
        else:
            self.queue.show()
            if change is self.runner.job:
                self.run.show(change)
                self._show_in_tab()
            if change.clip and not change.running:
                self.result.show(change.clip)
                self.clips.show()
                self.run.say_done()
            if change.state in ("finished", "failed"):
                self.run.update(keep_error=True)
        if self.runner.busy:
            self._tick()

    def _tick(self) -> None:
        """Show the progress every second, until nothing is at work"""
        if not (self._ticker and self._ticker.is_alive()):
            show = guarded(self._show_progress, self._show_error)
            self._ticker = threading.Thread(target=show, name="turbo_nb page", daemon=True)
            self._ticker.start()

    _ticker: threading.Thread | None = None

    def _show_progress(self) -> None:
        while not self._closed.wait(TICK) and self.runner.busy:
            self.models.show_download()
            if (job := self.runner.job) and job.running:
                self.run.show(job)
                self._show_in_tab()
