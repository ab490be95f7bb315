"""The generator: ipywidgets over a `JobRunner`.

Everything that matters is in the runner and on disk, so the widgets can go and come back. Showing the generator again
finds the running job and the clips. Every control has a description, which is its accessible name.
"""

import os
import sys

from ..errors import InputError

try:  # before all that takes long to load
    import ipywidgets as w
except ImportError as error:
    raise InputError(
        "ipywidgets is not installed, and the generator needs it. pip install 'turbo-nb[notebook]'"
    ) from error
from ..settings import Weights
from .form import Form
from .jobs import Job, JobRunner
from .page import STYLE, close, family, player
from .panels import GalleryPanel, OutlookPanel, RunPanel

__all__ = ["Generator", "has_front_end", "player", "show"]


def has_front_end() -> bool:
    """Return whether a page with a person before it sent the running cell, and not papermill or nbmake."""
    if os.environ.get("SERVER_SOFTWARE", "").startswith("voila/"):  # it runs the cells itself, for a page
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    kernel = getattr(shell, "kernel", None)
    # a page sends metadata with the cells that it runs; nbclient, which the others use, sends nothing
    return bool(kernel and (kernel.get_parent("shell") or {}).get("metadata"))


def show(folder: str | os.PathLike = "outputs", *, model: Weights = "auto") -> "Generator":
    """Show the generator. A second call closes the first one's widgets and finds its job and clips.

    Args:
        folder: of the clips. It lies in or under the notebook's folder, because a page can play only those files.
        model: the model chosen at first; a name or a path.
    """
    runner = JobRunner.of(folder)
    if earlier := _shown.pop(runner, None):
        earlier.close()
    runner.refresh()
    _shown[runner] = generator = Generator(runner, model)
    return generator


_shown: "dict[JobRunner, Generator]" = {}


class Generator:
    """The page: a form and three panels. `root` is the widget that is displayed."""

    def __init__(self, runner: JobRunner, model: Weights = "auto"):
        self.runner = runner
        self.form = Form(runner, model)
        self.outlook = OutlookPanel(runner, self.form)
        self.run = RunPanel(runner, self.form, self.outlook)
        self.clips = GalleryPanel(runner, self.form, self.run)
        self.root = w.VBox(
            [w.HTML(STYLE), *self.form.cards, self.run.card, self.clips.card],
            layout=w.Layout(width="100%", grid_gap="10px"),
        )
        self.root.add_class("tnb")
        self.form.on_change, self.form.on_prompt = self.outlook.update, self.outlook.restore
        self.form.on_model = self.clips.show
        self._stop = runner.listen(self._on_job)
        self.outlook.update()

    def close(self) -> None:
        """Take the widgets off the page. The runner, its job and its clips stay."""
        self._stop()
        close(family(self.root))

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.root)

    def _on_job(self, job: Job) -> None:
        """Show a change of the job; the worker's thread calls this"""
        self.run.show(job)
        if not job.running:
            self.outlook.update()
            self.clips.show()
