"""The clip that was made last, large, and the clips made so far."""

import threading
from functools import partial

import ipywidgets as w

from ..errors import TurboNbError
from ..machine import environment
from ..runtime.estimate import in_words
from ..video import mp4
from ..video.gallery import Clip
from .controls import in_page_words
from .form import Form
from .jobs import JobRunner
from .page import button, card, close, error_box, family, link, paragraph, player, put, visible
from .restore import in_words as lost_in_words
from .restore import restore
from .run import RunPanel

PAGE = 6  # clips of the gallery, and how many more a click shows
EMPTY = '<div class="tnb-stage"><p class="tnb-dim">The clip plays here.</p></div>'


class ResultPanel:
    """The large picture: the preview of the clip that is being made, else the clip that was made last."""

    def __init__(self):
        self.preview, self.result, self.empty = w.HTML(), w.Output(), w.HTML(EMPTY)
        self.box = w.VBox([self.preview, self.result, self.empty], layout=w.Layout(min_width="0"))
        self.box.add_class("tnb-large")
        self.preview.observe(lambda _: self._arrange(), "value")
        self._arrange()

    def show(self, clip: Clip) -> None:
        """Play a clip."""
        put(self.result, player(clip, plays=True))
        self._arrange()

    def _arrange(self) -> None:
        """Show one of the three"""
        visible(self.preview, bool(self.preview.value))
        visible(self.result, bool(self.result.outputs) and not self.preview.value)
        visible(self.empty, not self.result.outputs and not self.preview.value)


class GalleryPanel:
    """The clips of the folder, the latest first."""

    def __init__(self, runner: JobRunner, form: Form, run: RunPanel):
        self.archive, self.archive_link = button("Zip all clips"), w.Output()
        self.more = button("Show more")
        self.gallery = w.Box(layout=w.Layout(flex_flow="row wrap", width="100%", grid_gap="12px"))
        self.message = w.HTML()
        archive = w.HBox([self.archive, self.archive_link])
        self.card = card("Clips", archive, self.message, self.gallery, self.more)
        self._runner, self._form, self._run, self._count = runner, form, run, PAGE
        self._drawing = threading.RLock()  # because the worker draws the clips, too
        self.archive.on_click(lambda _: self._on_archive())
        self.more.on_click(lambda _: self._on_more())
        self.show()

    def add(self, clip: Clip) -> None:
        """Show a clip that was just made."""
        self.show()

    def show(self) -> None:
        """Draw the clips anew."""
        with self._drawing:
            clips = self._runner.gallery.clips(self._count + 1)
            gone = family(self.gallery)[1:]
            self.gallery.children = [self._item(clip) for clip in clips[: self._count]]
            close(gone)
        visible(self.more, len(clips) > self._count)
        self.archive.disabled = not clips
        self.message.value = "" if clips else paragraph("Nothing yet; what you generate is kept here.", "tnb-dim")

    def _item(self, clip: Clip) -> w.VBox:
        video = w.Output()
        put(video, player(clip, 240), link(clip.path, "Download"))
        words = w.HTML(paragraph(clip.record.prompt, "tnb-prompt") + paragraph(_facts(clip), "tnb-dim"))

        def action(text: str, does) -> w.Button:
            made = button(text, tooltip=f"{text}: {clip.path.name}")
            made.on_click(lambda _: does())
            return made

        buttons = [
            action("Use these settings", partial(self._use, clip)),
            action("Vary seed", partial(self._vary, clip)),
        ]
        if self._form.spec and self._form.spec.task == "i2v":
            buttons.append(action("Continue from last frame", partial(self._continue, clip)))
        delete = action("Delete", lambda: self._delete(clip, delete))
        row = w.Box([*buttons, delete], layout=w.Layout(flex_flow="row wrap"))
        item = w.VBox([video, words, row], layout=w.Layout(width="272px"))
        item.add_class("tnb-card")
        return item

    def _use(self, clip: Clip) -> dict[str, str]:
        """Put a clip's settings into the form; return what could not be restored, which the page lists"""
        lost = restore(self._form, clip.record)
        self.message.value = error_box(f"Not restored: {lost_in_words(lost)}.") if lost else ""
        return lost

    def _vary(self, clip: Clip) -> None:
        lost = self._use(clip)
        lost.pop("seed", None)
        self._form.random_seed.value = True
        if lost:  # it would be another clip
            self.message.value = error_box(
                f"Not started, because the clip would differ in more than its seed: {lost_in_words(lost)}. Press "
                "Generate to make it all the same."
            )
        else:
            self._run.start()

    def _continue(self, clip: Clip) -> None:
        try:
            frame = mp4.last_frame(clip.path)
        except TurboNbError as error:
            self._show_error(error)
            return
        self._form.image.take(frame, f"the last frame of {clip.path.name}", "; say in the prompt what happens next")

    def _delete(self, clip: Clip, delete: w.Button) -> None:
        if delete.description == "Delete":  # the first click asks
            delete.description, delete.button_style = "Delete for good?", "danger"
            return
        try:
            self._runner.gallery.delete(clip)
        except TurboNbError as error:
            self._show_error(error)
            return
        self.show()

    def _on_archive(self) -> None:
        try:
            path = self._runner.gallery.archive(self._runner.gallery.clips())
        except TurboNbError as error:
            self._show_error(error)
            return
        put(self.archive_link, link(path, f"Download {path.name} ({path.stat().st_size / 1e6:.1f} MB)"))

    def _on_more(self) -> None:
        self._count += PAGE
        self.show()

    def _show_error(self, error: TurboNbError) -> None:
        self.message.value = error_box(in_page_words(str(error)))


def _facts(clip: Clip) -> str:
    """Return the settings of a clip in one line, without those that its file does not give"""
    record = clip.record
    seeds = [record.seed] if isinstance(record.seed, int) else record.seed
    attention = record.attention_type and record.attention_type + (f" {record.sla_topk:g}" if record.sla_topk else "")
    facts = [
        record.width and record.height and f"{record.width}x{record.height}",
        record.num_frames and f"{record.num_frames} frames",
        f"{record.num_steps} steps",
        f"seed {' '.join(map(str, seeds))}",
        attention,
        record.model,
        ", ".join(f"{one.name} {one.strength:g}" for one in record.loras),
        in_words(clip.seconds) + environment.dollars(record.cost),
    ]
    return ", ".join(filter(None, facts))
