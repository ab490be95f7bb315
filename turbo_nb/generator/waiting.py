"""The queue on the page: the jobs that wait, the one at work, and those that failed."""

import html
import threading

import ipywidgets as w

from .controls import in_page_words
from .jobs import JobRunner
from .page import button, card, close, error_of, family, paragraph, visible
from .request import Job

SHOWN = 8  # rows; a longer queue is counted


class QueuePanel:
    """The list of jobs, in order."""

    def __init__(self, runner: JobRunner):
        self._runner, self._shown = runner, []
        self._drawing = threading.RLock()  # because the worker and the page both draw
        self.rows, self.note = w.VBox(), w.HTML()
        self.clear = button("Clear the queue", tooltip="Cancel all clips that wait")
        self.resume = button("", button_style="info", tooltip="Go on with what the last session left in the queue")
        self.card = card("Queue", self.resume, self.rows, self.note, self.clear)
        self.clear.on_click(lambda _: runner.clear())
        self.resume.on_click(lambda _: self._on_resume())
        self.show_left_over()
        self.show()

    def show(self) -> None:
        """Show the jobs anew, if the list has changed."""
        with self._drawing:
            jobs = tuple(self._runner.jobs)
            states = [(job, job.state, job.cancelling.is_set()) for job in jobs]
            if states != self._shown:
                self._shown = states
                gone = family(self.rows)[1:]
                self.rows.children = [self._row(number, job) for number, job in enumerate(jobs[:SHOWN], 1)]
                close(gone)
            waiting = sum(job.state == "waiting" for job in jobs)
            more = len(jobs) - SHOWN
            self.note.value = paragraph(f"and {more} more", "tnb-dim") if more > 0 else ""
            visible(self.clear, waiting > 0 or any(job.state == "failed" for job in jobs))
            visible(self.card, bool(jobs) or self.resume.layout.display is None)

    def show_left_over(self) -> None:
        """Offer the jobs that an earlier kernel left."""
        count = self._runner.left_over()
        self.resume.description = f"Continue {count} job{'s' * (count > 1)} of the last session"
        visible(self.resume, count > 0)

    def _row(self, number: int, job: Job) -> w.HBox:
        clip = job.request.clip
        state = {"waiting": f"{number}.", "running": "▶"}.get(job.state, "✗")
        words = f'<div class="tnb-line" title="{html.escape(clip.prompt)}"><span>{state}</span>'
        words += f'<span>{html.escape(clip.prompt)}</span><span class="tnb-dim">seed {clip.seed}</span></div>'
        if job.state == "failed":
            # without role=alert, because the run panel reads it out
            words += f'<div class="tnb-error">{html.escape(in_page_words(job.error))}</div>'
        text = w.HTML(words, layout=w.Layout(flex="1 1 0", min_width="0"))
        if job.state == "failed":
            action = button("Dismiss", tooltip=f"Dismiss: {clip.prompt}")
            action.on_click(lambda _: self._runner.forget(job))
        else:
            action = button("Cancel", tooltip=f"Cancel: {clip.prompt}", disabled=job.cancelling.is_set())
            action.on_click(lambda _: self._runner.cancel(job))
        row = w.HBox([text, action])
        row.add_class("tnb-job")
        return row

    def _on_resume(self) -> None:
        try:
            self._runner.take_over()
        except Exception as error:  # because ipywidgets would only log it
            self.show_left_over()
            self.note.value = error_of(error)
            return
        self.show_left_over()
        self.show()
