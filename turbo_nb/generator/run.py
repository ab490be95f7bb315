"""What a clip will take, the buttons that start and cancel it, and its progress."""

import html
import threading
from contextlib import suppress

import ipywidgets as w
from rich.filesize import decimal

from .. import presets
from ..errors import OutputError
from ..files import hub_cache
from ..generation import UNTRAINED
from ..machine import environment
from ..runtime.estimate import in_words
from ..video.gallery import Clip
from .controls import in_page_words
from .form import SIZE, Form
from .guard import guarded, on_change, on_click
from .jobs import JobRunner
from .page import WRAPPED, bar, button, error_box, error_of, image_tag, paragraph, visible
from .request import Job, Outlook

NAMES = {
    "load": "Load the model", "text": "Read the prompt", "denoise": "Denoise", "switch": "Switch experts",
    "decode": "Decode", "write": "Write",
}  # fmt: skip
SIZE_HINT = "Type the width and the height in pixels, such as 128 x 128."
MOST_SEEDS = 100
ABSURD = 7 * 86400  # seconds of a clip from which on it is a mistake
KEEP_AFTER = 1.0  # seconds after a change before the settings are kept on disk


class RunPanel:
    """The outlook, the buttons, and where the running job is.

    Args:
        preview: shows the clip while it is made.
    """

    def __init__(self, runner: JobRunner, form: Form, preview: w.HTML):
        self._runner, self._form = runner, form
        self._outlook: Outlook | None = None
        self._refused = ""  # HTML of the latest error that is not one of the form
        self._updating = threading.RLock()
        self._showing = threading.RLock()  # because the worker and the ticker both show the job
        self._keeping: threading.Timer | None = None
        self._writing = threading.Lock()  # because the timer and Generate both write the settings
        self._kept = form.usable_state  # the settings that were on the page when it opened, or was written last
        self._noted: dict[str, Job] = {}  # notes on what a model is not trained for, by the first job with them
        self.generate = button("Generate", button_style="primary", tooltip="Put the clip at the end of the queue")
        self.cancel = button("Cancel", tooltip="Cancel the running clip", disabled=True)
        self.seeds = w.BoundedIntText(
            description="Clips", value=1, min=1, max=MOST_SEEDS, tooltip="How many clips, each with a seed of its own",
            style={"description_width": "40px"}, layout=w.Layout(width="110px"),
        )  # fmt: skip
        self.outlook, self.status, self.preview = w.HTML(), w.HTML(), preview
        self.note = w.HTML()  # what an action of the gallery has done to the form
        self.generate.add_class("tnb-go")
        buttons = w.HBox([self.generate, self.seeds, self.cancel], layout=w.Layout(**WRAPPED))
        self.box = w.VBox([self.note, buttons, self.outlook, self.status])
        on_click(self.generate, self.start, self.show_error)
        on_click(self.cancel, runner.cancel, self.show_error)
        on_change(self.seeds, self.update, self.show_error)
        self.preview.add_class("tnb-preview")
        self.say("")
        self.update()
        self.show(runner.job)

    def start(self) -> bool:
        """Add the clips that the form asks for to the queue; return whether that was possible."""
        try:
            jobs = self._runner.submit_all(self._form.request.spread(self._form.prompt.prompts, self.seeds.value))
        except Exception as error:
            self.show_error(error)
            return False
        self._refused = ""
        self._form.seed_of(jobs[0].request.clip.seed)
        self.say("")
        self.keep()
        return True

    def update(self, prompt_only: bool = False, keep_error: bool = False) -> None:
        """Show what the clip will take, or why it cannot be made.

        Args:
            prompt_only: only the prompt has changed, which changes neither size nor time.
            keep_error: the form has not changed, so that the error that `show_error` shows stays.
        """
        with self._updating:  # because the threads of jobs and downloads update, too
            if not keep_error:
                self._refused = ""
            self._update(prompt_only)
        if not keep_error:
            self._keep_soon()

    def _update(self, prompt_only: bool) -> None:
        form = self._form
        if form.lacks_size:  # a step on the way, and not a fault
            self.generate.disabled, self._outlook = True, None
            self.outlook.value = paragraph(SIZE_HINT, "tnb-dim")
            return
        try:
            if not (prompt_only and self._outlook):
                self._outlook = None
                self._outlook = self._runner.choices.outlook(form.outline, form.image.size)
            outlook = self._outlook
            problem = _problem(outlook, form)
        except Exception as error:
            self.generate.disabled = True
            self.outlook.value = error_of(error)
            return
        self.generate.disabled = bool(problem)
        count = self.seeds.value * len(form.prompt.prompts)
        self.generate.description = "Generate" if count == 1 else f"Generate {count}"
        lines = [paragraph(line, "tnb-dim") for line in _lines(outlook, count)]
        lines += [paragraph(in_page_words(note), "tnb-dim") for note in outlook.notes]
        self.outlook.value = (error_box(problem) if problem else self._refused) + "".join(lines)

    def say(self, text: str, alert: bool = False) -> None:
        """Show above Generate what has happened to the form, in one box.

        The gallery has the message for a screen reader.
        """
        kind = "tnb-error" if alert else "tnb-note"
        self.note.value = f'<div class="{kind}">{html.escape(text)}</div>' if text else ""
        visible(self.note, bool(text))

    def say_done(self) -> None:
        """Drop the note on an action whose clip is finished. A warning stays."""
        if "tnb-error" not in self.note.value:
            self.say("")

    def show_error(self, error: Exception) -> None:
        """Show why no job was added, or an unexpected error, until the form changes."""
        with self._updating:
            self.outlook.value = ""  # because a screen reader reads out only what is new
            self.outlook.value = self._refused = error_of(error)

    def show(self, job: Job | None) -> None:
        """Show where a job is. The worker's thread calls this at every change, and the ticker every second."""
        if job is None:
            self.status.value = '<p role="status" class="tnb-dim">Ready.</p>'
            return
        with self._showing:
            self.cancel.disabled = not job.running or job.cancelling.is_set()
            self.status.value = _status(job, [note for note in job.notes if self._is_new(note, job)])
            picture = job.preview if job.running else None
            self.preview.value = image_tag(picture, "webp", "Preview of the clip being made") if picture else ""

    def _is_new(self, note: str, job: Job) -> bool:
        """Return False for a note on what the model was not trained for that the page has shown for another job"""
        return not note.endswith(tuple(UNTRAINED.values())) or self._noted.setdefault(note, job) is job

    def _keep_soon(self) -> None:
        """Keep the settings a moment after the last change"""
        if self._keeping:
            self._keeping.cancel()
        self._keeping = threading.Timer(KEEP_AFTER, guarded(self.keep, self.show_error))
        self._keeping.daemon = True
        self._keeping.start()

    def keep(self) -> None:
        """Keep on disk, for the next kernel, what has changed on this page. What cannot be written is tried again."""
        with self._writing, suppress(OutputError):
            now = self._form.usable_state
            changed = {name for name in {**self._kept, **now} if now.get(name) != self._kept.get(name)}
            if not changed.isdisjoint(SIZE):  # because one says what the other means
                changed |= SIZE
            if changed:
                presets.remember({name: now.get(name) for name in changed})
                self._kept = now

    def close(self) -> None:
        """Keep the last changes, and write nothing any more."""
        if self._keeping:
            self._keeping.cancel()
        self.keep()


def _problem(outlook: Outlook, form: Form) -> str:
    """Return why Generate cannot be pressed, in words; empty where it can"""
    if outlook.to_fetch:
        size = decimal(outlook.to_fetch)
        if outlook.to_fetch > hub_cache.free_bytes():
            return (
                f"This model is not on the disk, and its {size} do not fit there. Choose another model, or free space."
            )
        return f"This model is not on the disk. Press Download first ({size})."
    if form.spec and form.spec.task == "i2v" and form.image.picture is None:
        return "This model begins with an image. Choose one."
    if not form.prompt.text.value.strip():
        return "The prompt is empty. Say what to show."
    if outlook.time and outlook.time.seconds > ABSURD:
        return f"A clip of this size takes {in_words(outlook.time.seconds)}. Take a smaller size or fewer frames."
    return ""


def _lines(outlook: Outlook, count: int) -> list[str]:
    """Return size, time and memory of a clip"""
    seconds = outlook.num_frames / outlook.fps
    clip = f"{outlook.num_frames} frames of {outlook.width}x{outlook.height}, {seconds:.1f} s"
    if outlook.time is None:
        duration = "time: not known before the first run of this model on this machine"
    else:
        duration = str(outlook.time)
        if count > 1:
            duration += f"; {in_words(count * outlook.time.seconds)} for {count} clips"
    if outlook.time and not outlook.loaded:
        load = outlook.time.load
        duration += f", and {in_words(load) if load else 'more'} to load the model"
    memory = outlook.memory
    needs = f"memory: {memory.needs / 1e9:.1f} GB of {memory.budget / 1e9:.1f} GB free"
    lines = [f"{clip}; {duration}", needs if memory.name == "resident" and memory.fits else str(memory)]
    if not outlook.has_preview:
        lines.append("no live preview for the first clip of this model: its colours are learned from that one")
    return lines


def _status(job: Job, notes: list[str]) -> str:
    """Return HTML that shows where a job is: in words, and as one bar over all stages, with notes below"""
    notes = "".join(paragraph(in_page_words(note), "tnb-dim") for note in notes)
    if job.state == "failed":
        return error_box(job.error, job.trace) + notes
    if job.state == "cancelled":
        return f'<p role="status">Cancelled; nothing was written.</p>{notes}'
    if job.state == "finished":
        return f'<p role="status">Done with seed {job.request.clip.seed}: {_times(job.clip)}.</p>{notes}'
    progress, words = job.progress, [NAMES.get(job.stage, job.stage)]
    if progress.total:
        done, total = progress.done, progress.total
        words[0] += {
            "denoise": f", step {min(done + 1, total)} of {total}",
            "decode": f", {done} of {total} frames",
            "load": f", {done / total:.0%} downloaded",
        }.get(job.stage, "")
    if job.cancelling.is_set():
        words.append("cancelling after this step")
    elif (left := progress.remaining) is not None:
        words.append(f"about {in_words(max(left, 1.0))} left")
    words.append(f"{in_words(progress.seconds)} so far")
    shown = bar("Progress of the clip", progress.fraction)
    return f'<div role="status"><p>{html.escape(", ".join(words))}</p></div>{shown}{notes}'


def _times(clip: Clip) -> str:
    """Return the seconds of each stage, and the cost"""
    record = clip.record
    each = f" (steps {', '.join(f'{seconds:.2f}' for seconds in record.steps)})" if record.steps else ""
    times = (
        f"{NAMES.get(stage, stage).lower()} {in_words(seconds)}{each if stage == 'denoise' else ''}"
        for stage, seconds in record.timings.items()
    )
    return html.escape(", ".join(times) + environment.dollars(record.cost))
