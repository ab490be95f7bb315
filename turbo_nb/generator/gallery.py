"""The clip that was made last, large, and the clips made so far."""

from collections.abc import Callable
from dataclasses import replace

import ipywidgets as w

from .. import catalog
from ..errors import InputError, TurboNbError, explained, first_line, listed
from ..records import VideoRecord
from ..settings import MAX_EXTENSIONS
from ..video import mp4
from ..video.gallery import Clip
from .controls import in_page_words
from .form import Form
from .guard import ShowError, on_change
from .jobs import JobRunner
from .page import WRAPPED, card, visible
from .parts.clips import GalleryView, ResultPlayer
from .parts.controls import ClipDrop
from .restore import left_out, restore
from .run import RunPanel

ACTIONS = (  # name and label
    ("use", "Use these settings"), ("vary", "Vary seed"), ("extend", "Extend"),
    ("continue", "Continue from last frame"),
)  # fmt: skip


class ResultPanel:
    """The large picture: the preview of the clip that is being made, else the clip that was made or opened last.

    Args:
        show_error: called with an unexpected error.
    """

    def __init__(self, show_error: ShowError):
        self.preview, self.player = w.HTML(), ResultPlayer()
        self.box = w.VBox([self.preview, self.player], layout=w.Layout(min_width="0"))
        self.box.add_class("tnb-large")
        self.player.on_error = show_error
        on_change(self.preview, self._arrange, show_error)
        self._arrange()

    def show(self, clip: Clip) -> None:
        """Play a clip."""
        self.player.show(clip)

    def _arrange(self) -> None:
        visible(self.preview, bool(self.preview.value))
        visible(self.player, not self.preview.value)


class GalleryPanel:
    """The clips of the folder, and what a person can do with them.

    Args:
        runner: has the clips.
        form: takes a clip's settings.
        run: starts a clip.
        result: plays a clip large.
    """

    def __init__(self, runner: JobRunner, form: Form, run: RunPanel, result: ResultPanel):
        self._runner, self._gallery, self._form, self._run, self._result = runner, runner.gallery, form, run, result
        self.view = GalleryView(
            runner.gallery, on_act=self._act, on_delete=self._delete, on_zip=self._zip, on_error=self._show_error
        )
        self.view.actions = [list(action) for action in ACTIONS]
        self.drop = ClipDrop(self._on_drop)
        on_change(self.drop, self._show_drop, self._show_error, "message")
        self.times = w.BoundedIntText(
            description="Times to extend", value=1, min=1, max=MAX_EXTENSIONS, layout=w.Layout(width="200px"),
            style={"description_width": "120px"}, tooltip="How many parts the Extend button of a clip adds to it",
        )  # fmt: skip
        self.card = card("Clips", w.HBox([self.drop, self.times], layout=w.Layout(**WRAPPED)), self.view)
        self._does: dict[str, Callable[[Clip], object]] = {
            "open": result.show, "use": self._use, "vary": self._vary, "continue": self._continue,
            "extend": self._extend,
        }  # fmt: skip
        self.show_model()
        self.show()

    def show(self) -> None:
        """Show the clips as the folder has them now."""
        self.view.show()

    def show_model(self) -> None:
        """Show what suits the form's model, and drop the note on an earlier one."""
        visible(self.times, self._continues)
        self._say("")

    @property
    def _continues(self) -> bool:
        return bool(self._form.spec and self._form.spec.task == "i2v")

    def _require_i2v(self) -> None:
        """Raise InputError where the form's model cannot continue a clip"""
        if not self._continues:
            names = listed(name for name, spec in catalog.MODELS.items() if spec.task == "i2v")
            raise InputError(
                f"model is {self._form.model.label}, which begins with text alone. Expected one that begins with a "
                f"picture. Choose {names} under Model."
            )

    def _act(self, name: str, clip: Clip) -> None:
        if does := self._does.get(name):
            try:
                does(clip)
            except Exception as error:  # shown above Generate, too
                self._say(in_page_words(explained(error)), alert=True)

    def _say(self, text: str, alert: bool = False) -> None:
        """Show what has happened to the form, here and above Generate"""
        self.view.say(text, alert)
        self._run.say(text, alert)

    def _restore(self, record: VideoRecord, name: str) -> tuple[dict[str, str], str]:
        """Put settings into the form; return what was lost, and what the page says"""
        lost = restore(self._form, record)
        return lost, f"Not restored:\n{left_out(lost)}" if lost else f"The form has the settings of {name}."

    def _use(self, clip: Clip) -> None:
        lost, words = self._restore(clip.record, clip.path.name)
        self._say(words, alert=bool(lost))

    def _on_drop(self, name: str, record: VideoRecord) -> tuple[str, bool]:
        lost, words = self._restore(record, name)
        return words, bool(lost)

    def _show_drop(self) -> None:
        if self.drop.message:
            self._run.say(**self.drop.message)

    def _vary(self, clip: Clip) -> None:
        lost, _ = self._restore(clip.record, clip.path.name)
        lost.pop("seed", None)
        self._form.random_seed.value = True
        if lost:  # it would be another clip
            self._say(
                "Not started, because the clip would differ in more than its seed. Press Generate to make it all the "
                f"same.\n{left_out(lost)}",
                alert=True,
            )
        else:
            self._say("")
            self._run.start()

    def _extend(self, clip: Clip) -> None:
        """Put a job into the queue that continues a clip, with its prompt and size and what else the form says"""
        self._require_i2v()
        request = self._form.outline
        own = {"prompt": clip.record.prompt or request.clip.prompt, "extend_clip": clip.path, "resolution": None}
        own |= {"aspect_ratio": None, "image": None, "extend": self.times.value}
        self._runner.submit(replace(request, clip=replace(request.clip, **own)))
        parts = f"by {self.times.value} parts" if self.times.value > 1 else "by one part"
        self._say(f"The queue has a job that extends {clip.path.name} {parts}, with its own prompt.")

    def _continue(self, clip: Clip) -> None:
        self._require_i2v()
        frame = mp4.last_frame(clip.path)
        self._form.image.take(frame, f"the last frame of {clip.path.name}", "; say in the prompt what happens next")
        self._say(f"The next clip begins with the last frame of {clip.path.name}.")

    def _delete(self, clips: list[Clip]) -> None:
        gone = []
        try:
            for clip in clips:
                self._gallery.delete(clip)
                gone.append(clip.path.name)
        except Exception as error:  # because the others are gone
            self._show_error(error)
        else:
            self.view.say("")
        self.view.gone = gone
        self.view.show()

    def _zip(self, clips: list[Clip]) -> None:
        self.view.say(f"Packing {len(clips)} clips…" if len(clips) > 1 else "Packing…")
        self.view.in_background(self._pack, clips)

    def _pack(self, clips: list[Clip]) -> None:
        """Write the zip in the view's thread, because gigabytes take a while"""
        try:
            self.view.offer(self._gallery.archive(clips))
            self.view.say("")
        except TurboNbError as error:
            self._show_error(error)
        except OSError as error:  # the zip is gone already
            self.view.say(first_line(error), alert=True)

    def _show_error(self, error: Exception) -> None:
        self.view.say(in_page_words(explained(error)), alert=True)
