"""The queue on the page: the jobs that wait, the one at work, and those that failed."""

import html
import threading

import ipywidgets as w

from .controls import in_page_words
from .guard import ShowError, on_click
from .jobs import JobRunner
from .page import button, card, close, family, paragraph, visible
from .request import Job

SHOWN = 8  # rows; a longer queue is counted


class QueuePanel:
    """The list of jobs, in order.

    Args:
        runner: has the jobs.
        show_error: called with an unexpected error, because the panel is drawn anew at every step of a job.
    """

    def __init__(self, runner: JobRunner, show_error: ShowError):
        self._runner, self._show_error, self._shown = runner, show_error, []
        self._drawing = threading.RLock()  # because the worker and the page both draw
        self.rows, self.note = w.VBox(), w.HTML()
        self.clear = button("Clear the queue", tooltip="Cancel all clips that wait")
        self.resume = button("", button_style="info", tooltip="Go on with what the last session left in the queue")
        self.card = card("Queue", self.resume, self.rows, self.note, self.clear)
        on_click(self.clear, runner.clear, show_error)
        on_click(self.resume, self._on_resume, show_error)
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
            on_click(action, lambda: self._runner.forget(job), self._show_error)
        else:
            action = button("Cancel", tooltip=f"Cancel: {clip.prompt}", disabled=job.cancelling.is_set())
            on_click(action, lambda: self._runner.cancel(job), self._show_error)
        row = w.HBox([text, action])
        row.add_class("tnb-job")
        return row

    def _on_resume(self) -> None:
        try:
            self._runner.take_over()
        finally:
            self.show_left_over()
        self.show()
