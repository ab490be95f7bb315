"""The panels below the form: what a clip will take, the running job, and the clips made so far."""

import html
import threading
import time
from functools import partial

import ipywidgets as w

from ..errors import TurboNbError
from ..machine import environment
from ..runtime.estimate import in_words
from ..video import mp4
from ..video.gallery import Clip
from .form import Form
from .jobs import STAGES, Job, JobRunner
from .page import button, card, close, error_box, family, image_tag, link, paragraph, player, put
from .restore import restore

PAGE = 6  # clips of the gallery, and how many more a click shows
NAMES = {
    "load": "Load", "text": "Read prompt", "denoise": "Denoise", "switch": "Switch experts", "decode": "Decode",
    "write": "Write",
}  # fmt: skip


class OutlookPanel:
    """Size, time and memory of the clip that the form asks for, or why it cannot be made."""

    def __init__(self, runner: JobRunner, form: Form):
        self.estimate = w.HTML()
        self._runner, self._form, self._outlook = runner, form, ""

    def update(self) -> None:
        """Ask the runner again, because the form or the loaded model has changed."""
        try:
            self._outlook = "".join(map(paragraph, self._lines()))
        except TurboNbError as error:
            self._outlook = error_box(str(error))
        self.estimate.value = self._outlook

    def restore(self) -> None:
        """Show the latest outlook in place of an error."""
        self.estimate.value = self._outlook

    def show_error(self, error: TurboNbError) -> None:
        """Show why a job did not start."""
        self.estimate.value = ""  # because a screen reader reads out only what is new
        self.estimate.value = error_box(str(error))

    def _lines(self) -> list[str]:
        outlook = self._runner.outlook(self._form.outline, self._form.image.size)
        seconds = outlook.num_frames / outlook.fps
        clip = f"{outlook.num_frames} frames of {outlook.width}x{outlook.height}, {seconds:.1f} s"
        if outlook.time is None:
            duration = "time: not known before the first run of this model on this machine"
        else:
            duration = str(outlook.time)
        if not outlook.loaded:
            load = outlook.time and outlook.time.load
            duration += f", and {in_words(load) if load else 'more'} to load the model"
        memory = outlook.memory
        needs = f"memory: {memory.needs / 1e9:.1f} GB of {memory.budget / 1e9:.1f} GB free"
        lines = [clip, duration, needs if memory.name == "resident" and memory.fits else str(memory)]
        if not outlook.has_preview:
            lines.append("no live preview for the first clip of this model: its colours are learned from that one")
        return [*lines, *outlook.notes]


class RunPanel:
    """The buttons, the running job, and the clip that was made last."""

    def __init__(self, runner: JobRunner, form: Form, outlook: OutlookPanel):
        self.generate = w.Button(description="Generate", button_style="primary")
        self.cancel = w.Button(description="Cancel", disabled=True)
        self.status = w.HTML(layout=w.Layout(width="100%"))
        self.preview, self.result = w.HTML(), w.Output()
        buttons = w.HBox([self.generate, self.cancel])
        self.card = card("Run", outlook.estimate, buttons, self.status, self.preview, self.result)
        self._runner, self._form, self._outlook = runner, form, outlook
        self.generate.on_click(lambda _: self.start())
        self.cancel.on_click(lambda _: runner.cancel())
        if runner.job:
            self.show(runner.job)
        else:
            self.status.value = '<p role="status" class="tnb-dim">Ready.</p>'

    def start(self) -> None:
        """Submit what the form asks for."""
        try:
            job = self._runner.submit(self._form.request)
        except TurboNbError as error:
            self.status.value = ""
            self._outlook.show_error(error)
            return
        self._form.controls["seed"].value = job.request.clip.seed

    def show(self, job: Job) -> None:
        """Show a job. The worker's thread calls this at every change."""
        self.generate.disabled = job.running
        self.cancel.disabled = not job.running or job.cancelling.is_set()
        self.status.value = _status(job)
        self.preview.value = (
            image_tag(job.preview, "webp", "Preview of the clip being made", 256) if job.preview else ""
        )
        if job.running:
            self.result.outputs = ()
            return
        self._form.controls["seed"].value = job.request.clip.seed
        if job.clip:
            put(self.result, player(job.clip, min(640, max(256, job.clip.record.width or 0))))


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

    def show(self) -> None:
        """Draw the clips anew."""
        with self._drawing:
            clips = self._runner.gallery.clips(self._count + 1)
            gone = family(self.gallery)[1:]
            self.gallery.children = [self._item(clip) for clip in clips[: self._count]]
            close(gone)
        self.more.layout.display = None if len(clips) > self._count else "none"
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
        words = ", ".join(f"{name} ({reason})" for name, reason in lost.items())
        self.message.value = error_box(f"Not restored: {words}.") if lost else ""
        return lost

    def _vary(self, clip: Clip) -> None:
        lost = self._use(clip)
        self._form.random_seed.value = True
        if not lost.keys() - {"seed"}:  # else it would be another clip
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
        self.message.value = error_box(str(error))


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


def _status(job: Job) -> str:
    """Return HTML that shows where a job is: in words, by stages, and as a bar"""
    notes = "".join(paragraph(note, "tnb-dim") for note in job.notes)
    if job.state == "failed":
        return error_box(job.error, job.trace) + notes
    if job.state == "cancelled":
        return f'<p role="status">Cancelled; nothing was written.</p>{notes}'
    if job.state == "finished":
        return f'<p role="status">Done with seed {job.request.clip.seed}: {_times(job.clip)}.</p>{notes}'
    at = STAGES.index(job.stage)
    stages = "".join(
        f"<li{' aria-current=step' if i == at else ' class=tnb-done' if i < at else ''}>{NAMES[stage]}</li>"
        for i, stage in enumerate(STAGES)
    )
    words, bar = NAMES[job.stage], ""
    if job.total:
        bar = f' value="{job.done}" max="{job.total}"'
        words += (
            f", step {job.done} of {job.total}" if job.stage == "denoise" else f", {job.done / job.total:.0%} fetched"
        )
    if job.cancelling.is_set():
        words += "; cancelling after this step"
    passed = in_words(time.monotonic() - job.began)
    return (
        f'<div role="status"><p>{words} ({passed})</p><ol class=tnb-stages>{stages}</ol>'
        f'<progress aria-label="Progress of the clip"{bar}></progress></div>{notes}'
    )


def _times(clip: Clip) -> str:
    """Return the seconds of each stage, and the cost"""
    record = clip.record
    each = f" (steps {', '.join(f'{seconds:.2f}' for seconds in record.steps)})" if record.steps else ""
    times = (
        f"{NAMES.get(stage, stage).lower()} {in_words(seconds)}{each if stage == 'denoise' else ''}"
        for stage, seconds in record.timings.items()
    )
    return html.escape(", ".join(times) + environment.dollars(record.cost))
