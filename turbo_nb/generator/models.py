"""The card of the chosen model: what it makes, whether it fits, and its download."""

import html

import ipywidgets as w
from rich.filesize import decimal

from .. import backends, catalog
from ..catalog import ModelSpec
from ..checkup import fits
from ..files import hub_cache
from ..files.resolve import ResolvedModel
from ..machine import environment, probe
from ..runtime.estimate import in_words
from ..settings import LoadOptions
from .downloads import Download
from .form import Form
from .guard import on_change, on_click
from .jobs import JobRunner
from .page import WRAPPED, bar, button, error_box, error_of, fold, paragraph, visible


class ModelCard:
    """The chosen model, the button that downloads it, and a table of all models."""

    def __init__(self, runner: JobRunner, form: Form):
        self._runner, self._form = runner, form
        self.facts = w.HTML()
        self.download, self.cancel = button("Download", button_style="primary"), button("Cancel download")
        self.progress, self.table = w.HTML(), w.HTML()
        tip = "What each model makes, and whether it fits this machine"
        self.compare = fold("Compare models", self.table, tip, self._show_error)
        self.box = w.VBox(
            [self.facts, w.HBox([self.download, self.cancel], layout=w.Layout(**WRAPPED)), self.progress, self.compare]
        )
        self.facts.add_class("tnb-model")
        on_click(self.download, self._on_download, self._show_error)
        on_click(self.cancel, self._on_cancel, self._show_error)
        on_change(self.compare.toggle, self._show_table, self._show_error)
        self.show()

    def show(self) -> None:
        """Show the chosen model anew."""
        try:
            model = self._runner.choices.resolve(self._options).decoding(self._decoder)
        except Exception as error:
            self.facts.value = error_of(error)
            visible(self.download, False)
        else:
            free = hub_cache.free_bytes()
            self.facts.value = _facts(model, free)
            visible(self.download, bool(model.downloads))
            self.download.description = f"Download {decimal(model.to_fetch)}"
            self.download.disabled = model.to_fetch > free
            self.download.tooltip = f"Download {model.spec.name}"
        self.show_download()

    @property
    def _options(self) -> LoadOptions:
        return LoadOptions(model=self._form.model.value)

    @property
    def _decoder(self) -> str:
        return self._form.fields["decoder"].value or "full"

    def show_download(self) -> None:
        """Show the running or latest download; called every second while it runs."""
        download = self._runner.downloading
        running = bool(download and download.running)
        if running:
            self.download.disabled = True
        visible(self.cancel, running)
        if download:  # else it may have an error
            self.progress.value = _progress(download)

    def _on_download(self) -> None:
        self._runner.download(self._options, self._decoder)

    def _on_cancel(self) -> None:
        if self._runner.downloading:
            self._runner.downloading.cancel()

    def _show_error(self, error: Exception) -> None:
        self.progress.value = error_of(error)

    def _show_table(self) -> None:
        if not self.compare.toggle.value:
            return
        host = environment.memory().available
        rows = [_row(one) for one in fits.every_fit(probe.probe(), hub_cache.free_bytes(), host)]
        head = "".join(f'<th scope="col">{name}</th>' for name in ("model", "on this machine", "disk"))
        self.table.value = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def makes(spec: ModelSpec) -> str:
    """Return what a model makes, in words."""
    width, height = spec.size
    source = "a picture and text" if spec.task == "i2v" else "text"
    return f"clips of {spec.num_frames / spec.fps:.1f} s in {width}×{height} from {source}"


def _facts(model: ResolvedModel, free: int) -> str:
    spec, tags = model.spec, []
    plan = model.plan()
    if spec.folder:
        tags.append(("good", f"runs here, on the {'CPU' if model.device == 'cpu' else 'GPU'}"))
    elif model.device == "cpu":
        tags.append(("bad", "needs a GPU: on this CPU a clip takes hours"))
    elif slow := backends.no_tensor_cores(probe.probe(model.device)):
        tags.append(("bad", f"very slow: {slow}"))
    elif plan.fits:
        tags.append(("good", f"fits this GPU: plan {plan.name}"))
    else:
        tags.append(("bad", f"does not fit this GPU: needs {plan.needs / 1e9:.1f} of {plan.budget / 1e9:.1f} GB"))
    if model.quant_linear:
        tags.append(("", "8-bit"))
    if spec.folder:
        tags.append(("good", "comes with turbo_nb"))
    elif not model.downloads:
        tags.append(("good", "on disk"))
    else:
        enough = model.to_fetch <= free
        words = f"{decimal(model.to_fetch)} to download, {decimal(free)} free"
        tags.append(("" if enough else "bad", words if enough else f"{words}: too little"))
    tags.append(("", f"licence {spec.license}" if spec.license else "licence: that of its files"))
    shown = "".join(f'<span class="tnb-tag{f" tnb-{kind}" * bool(kind)}">{html.escape(text)}</span>'
                    for kind, text in tags)  # fmt: skip
    return f"{paragraph('Makes ' + makes(spec) + '.')}{shown}"


def _row(fit: fits.Fit) -> str:
    spec = catalog.MODELS[fit.model]
    name = fit.model + (" (8-bit)" if fit.int8 else "")
    disk = "on disk" if fit.downloaded else f"{decimal(fit.to_fetch)} to download"
    here = ("✓ " if fit.fits else "✗ ") + fit.text + (f"; {fit.time}" if fit.time else "")
    title = f'<th scope="row">{html.escape(name)}{paragraph(makes(spec), "tnb-help")}</th>'
    return f"<tr>{title}" + "".join(f"<td>{html.escape(one)}</td>" for one in (here, disk)) + "</tr>"


def _progress(download: Download) -> str:
    """Return HTML of a download: how much is here, how fast it comes, and how long it will take"""
    name = download.model.spec.name
    if download.state == "failed":
        return error_box(download.error)
    if download.state == "cancelled":
        return paragraph(f"The download of {name} was cancelled. What is here stays.", "tnb-dim")
    if download.state == "finished":
        return f'<p role="status">{html.escape(name)} is downloaded.</p>'
    share = min(1.0, download.done / download.total) if download.total else 0.0
    words = [f"{decimal(download.done)} of {decimal(download.total)}"]
    if download.stage == "check":
        words.append("checking a file")
    elif (speed := download.rate.speed) is not None:
        words.append(f"{decimal(int(speed))}/s")
        if (left := download.rate.left(download.total)) is not None:
            words.append(f"about {in_words(left)} left")
    shown = bar("Download of the model", share)
    return f'<p role="status">Downloading {html.escape(name)}: {", ".join(words)}</p>{shown}'
