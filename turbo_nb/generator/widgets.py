"""The generator: ipywidgets over a `Studio`.

Everything that matters is in the studio and on disk, so the widgets can go and come back: showing the generator again
finds the running job and the clips. Every control has a description, which is its accessible name, and text that
people typed is escaped.
"""

import base64
import html
import io
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..errors import InputError, TurboNbError

try:  # before all that takes long to load
    import ipywidgets as w
except ImportError as error:
    raise InputError("the generator needs ipywidgets; pip install 'turbo-nb[notebook]'") from error
from .. import backends, catalog
from ..files import resolve
from ..machine import environment
from ..runtime.estimate import in_words
from ..sla import ATTENTION_TYPES
from ..video import images, mp4
from ..video.gallery import Clip
from .jobs import STAGES, Job, Request, Studio

if TYPE_CHECKING:
    from IPython.display import HTML

PAGE = 6  # clips of the gallery, and how many more a click shows
OWN, CUSTOM = "own", "custom"  # of the resolutions
MAX_SEED = 2**53 - 1  # what a browser can count to
EXAMPLES = {
    "nano": (
        "a large red circle moving from left to right on a black background",
        "a small yellow triangle growing on a navy background",
        "a big blue square falling from top to bottom on a white background",
    ),
    "wan": (
        "A ginger cat in a tiny raincoat walks along a wet cobblestone street at dusk, neon signs mirrored in the "
        "puddles. The camera follows low behind it, shallow depth of field, soft rain, cinematic light.",
        "Aerial shot of a steam train that crosses a stone viaduct in an autumn valley, mist drifting between red and "
        "golden trees, early sunlight from the left, the smoke trailing slowly behind it.",
        "Close-up of a potter's hands shaping a clay bowl on a spinning wheel, wet clay glistening, warm window light, "
        "dust in the air, a calm and steady camera.",
    ),
}
NAMES = {
    "load": "Load", "text": "Read prompt", "denoise": "Denoise", "switch": "Switch experts", "decode": "Decode",
    "write": "Write",
}  # fmt: skip
STYLE = """<style>
.tnb { max-width: 1080px; --tnb-soft: color-mix(in srgb, currentColor 12%, transparent); }
.tnb .widget-label { min-width: 0; }
.tnb-card { border: 1px solid color-mix(in srgb, currentColor 18%, transparent); border-radius: 8px; padding: 10px 12px;
  box-sizing: border-box; }
.tnb h3 { margin: 0 0 4px; font-size: 1.05em; }
.tnb p { margin: 2px 0; line-height: 1.4; }
.tnb .tnb-dim { opacity: .75; }
.tnb-stages { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; padding: 0; margin: 6px 0; }
.tnb-stages li { padding: 1px 10px; border-radius: 99px; background: var(--tnb-soft); opacity: .7; }
.tnb-stages li[aria-current] { opacity: 1; font-weight: 600; outline: 1px solid currentColor; }
.tnb-stages li.tnb-done { opacity: 1; }
.tnb progress { width: 100%; height: 10px; }
.tnb img, .tnb video { display: block; max-width: 100%; border-radius: 6px; background: #0002; }
.tnb .tnb-error { border-left: 4px solid #c62828; padding: 6px 10px; background: #c6282818; }
.tnb .tnb-prompt { overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
  overflow: hidden; }
</style>"""


def has_front_end() -> bool:
    """Whether the running cell was sent by a page with a person before it, and not by papermill or nbmake."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    kernel = getattr(shell, "kernel", None)
    # a page says which of its cells it runs; nbclient, which the others use, says nothing
    return bool(kernel and (kernel.get_parent("shell") or {}).get("metadata"))


def show(folder: str | os.PathLike = "outputs", *, model: str | Path = "auto") -> "Generator":
    """The generator for the clips of `folder`, which lies in or under the notebook's: only there can a page play them.

    model: the one chosen at first, a name or a path. Shown again, it finds the running job and the clips; the widgets
    shown before go.
    """
    studio = Studio.of(folder)
    if earlier := _shown.pop(studio, None):
        earlier.close()
    _shown[studio] = generator = Generator(studio, model)
    return generator


_shown: "dict[Studio, Generator]" = {}


def player(run: Clip, width: int = 0) -> "HTML":
    """A finished clip, for IPython's `display`: by its relative path, so that the notebook stays small."""
    from IPython.display import HTML

    source = html.escape(_address(run.path))
    limit = f' style="width:{width}px"' if width else ""
    label = html.escape(f"Video: {run.settings.get('prompt', '')}")
    return HTML(
        f'<video src="{source}"{limit} aria-label="{label}" controls loop muted playsinline preload="metadata"></video>'
    )


def _address(path: Path) -> str:
    """The path from the notebook's folder, as in a URL"""
    return quote(Path(os.path.relpath(path)).as_posix())


def _link(path: Path, text: str) -> "HTML":
    from IPython.display import HTML

    return HTML(f'<a href="{html.escape(_address(path))}" download="{html.escape(path.name)}">{html.escape(text)}</a>')


def _put(output: w.Output, *things) -> None:
    """Show these in an output area; works from any thread, unlike `with output`"""
    output.outputs = ()
    for thing in things:
        output.append_display_data(thing)


def _options(model: str | Path) -> list[tuple[str, str]]:
    known = [(f"{name} (ships with turbo_nb)" if spec.folder else name, name) for name, spec in catalog.MODELS.items()]
    chosen = str(model)
    return known if chosen in ("auto", *catalog.MODELS) else [*known, (Path(chosen).name or chosen, chosen)]


class Generator:
    """The widgets. `root` is what is displayed; the public attributes are its controls, by name."""

    def __init__(self, studio: Studio, model: str | Path = "auto"):
        self.studio = studio
        self._image = None  # the picture to begin with: PIL, from an upload or a clip's last frame
        self._count = PAGE
        self._drawing = threading.RLock()  # the worker draws the clips, too
        self._build(model)
        self._connect()
        self._stop = studio.listen(self._on_job)
        self._on_model()
        if studio.job:
            self._on_job(studio.job)
        else:
            self._show_idle()

    # what is on the page

    def _build(self, model: str | Path) -> None:
        def short(kind, description: str, **more):
            wide = w.Layout(width="auto", min_width="0")
            return kind(description=description, style={"description_width": "92px"}, layout=wide, **more)

        chosen = resolve.choose()[0] if model == "auto" else catalog.UPSTREAM_NAMES.get(str(model), str(model))
        self.prompt = w.Textarea(
            description="Prompt", rows=4, style={"description_width": "92px"}, layout=w.Layout(width="auto"),
            placeholder="What to show", continuous_update=True,
        )  # fmt: skip
        self.examples = short(w.Dropdown, "Examples", options=[("choose one…", "")])
        self.hint = w.HTML()
        self.upload = w.FileUpload(
            description="Choose image", accept="image/png,image/jpeg,image/webp", layout=w.Layout(width="auto")
        )
        self.image_path = short(w.Text, "or its path", placeholder="a png, jpg or webp file on this machine")
        self.adaptive = short(w.Checkbox, "Keep the image's aspect", value=True, indent=False)
        self.image_note = w.HTML()
        self.tabs = w.Tab()
        self.tabs.children = (
            w.VBox([w.HTML("<p>A clip from the prompt alone.</p>")]),
            w.VBox([self.image_note, self.upload, self.image_path, self.adaptive]),
        )
        self.tabs.titles = ("Text to video", "Image to video")
        self.model = short(w.Dropdown, "Model", options=_options(model), value=chosen)
        self.resolution = short(w.Dropdown, "Resolution")
        self.custom = short(w.Text, "Other size", placeholder="width x height: 128x128")
        self.aspect = short(w.Dropdown, "Aspect", options=list(catalog.RESOLUTIONS["480p"]), value="16:9")
        self.frames = short(w.BoundedIntText, "Frames", min=1, max=961, step=4)
        self.steps = short(w.Dropdown, "Steps", options=[1, 2, 3, 4], value=4)
        self.seed = short(w.BoundedIntText, "Seed", min=0, max=MAX_SEED)
        self.random_seed = short(w.Checkbox, "New seed each time", value=True, indent=False)
        self.attention = short(w.Dropdown, "Attention", options=_attentions(), value="sla")
        self.topk = short(w.BoundedFloatText, "SLA top-k", min=0.01, max=1.0, step=0.05)
        self.linears = short(
            w.Dropdown,
            "Linears",
            options=[("as the file has them", "auto"), ("8-bit", True), ("16-bit or more", False)],
        )
        self.estimate = w.HTML()
        self.generate = w.Button(description="Generate", button_style="primary")
        self.cancel = w.Button(description="Cancel", disabled=True)
        self.status = w.HTML(layout=w.Layout(width="100%"))
        self.preview = w.HTML()
        self.result = w.Output()
        self.archive = w.Button(description="Zip all clips", layout=w.Layout(width="auto"))
        self.archive_link = w.Output()
        self.more = w.Button(description="Show more", layout=w.Layout(width="auto"))
        self.gallery = w.Box(layout=w.Layout(flex_flow="row wrap", width="100%", grid_gap="12px"))
        self.message = w.HTML()

        def card(title: str, *children, **layout) -> w.VBox:
            box = w.VBox([w.HTML(f"<h3>{title}</h3>"), *children], layout=w.Layout(min_width="0", **layout))
            box.add_class("tnb-card")
            return box

        two = {"width": "100%", "grid_template_columns": "repeat(auto-fit, minmax(280px, 1fr))", "grid_gap": "0 16px"}
        settings = w.GridBox(
            [
                self.model, self.resolution, self.aspect, self.custom, self.frames, self.steps,
                self.seed, self.random_seed, self.attention, self.topk, self.linears,
            ],
            layout=w.Layout(**two),
        )  # fmt: skip
        prompt = w.VBox([self.prompt, self.examples, self.hint], layout=w.Layout(width="100%"))
        run = card("Run", self.estimate, w.HBox([self.generate, self.cancel]), self.status, self.preview, self.result)
        self.root = w.VBox(
            [
                w.HTML(STYLE),
                card("What to show", self.tabs, prompt),
                card("How", settings),
                run,
                card("Clips", w.HBox([self.archive, self.archive_link]), self.message, self.gallery, self.more),
            ],
            layout=w.Layout(width="100%", grid_gap="10px"),
        )
        self.root.add_class("tnb")

    def _connect(self) -> None:
        self.model.observe(lambda _: self._on_model(), "value")
        self.examples.observe(self._on_example, "value")
        self.upload.observe(lambda _: self._on_upload(), "value")
        self.image_path.observe(lambda _: self._on_path(), "value")
        for control in (
            self.prompt, self.resolution, self.custom, self.aspect, self.frames, self.steps, self.attention, self.topk,
            self.linears,
        ):  # fmt: skip
            control.observe(lambda _: self._show_outlook(), "value")
        self.tabs.observe(lambda _: self._show_outlook(), "selected_index")
        self.random_seed.observe(lambda _: self._show_outlook(), "value")
        self.generate.on_click(lambda _: self._on_generate())
        self.cancel.on_click(lambda _: self.studio.cancel())
        self.archive.on_click(lambda _: self._on_archive())
        self.more.on_click(lambda _: self._on_more())

    def close(self) -> None:
        """Take the widgets off the page; the studio, its job and its clips stay."""
        self._stop()
        _close(_family(self.root))

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.root)

    # what the controls say

    @property
    def request(self) -> Request:
        """What the controls ask for."""
        size = self.resolution.value
        return Request(
            prompt=self.prompt.value,
            model=self.model.value,
            image=self._image if self.tabs.selected_index == 1 else None,
            adaptive_resolution=self.tabs.selected_index == 1 and self.adaptive.value,
            resolution={OWN: None, CUSTOM: self.custom.value.strip()}.get(size, size),
            aspect_ratio=self.aspect.value if size in catalog.RESOLUTIONS else None,
            num_frames=self.frames.value,
            num_steps=self.steps.value,
            seed=None if self.random_seed.value else self.seed.value,
            attention_type=self.attention.value,
            sla_topk=self.topk.value,
            quant_linear=self.linears.value,
        )

    def _spec(self) -> catalog.ModelSpec | None:
        """Of the chosen model; None, and the reason on the page, if it cannot be read"""
        try:
            return Request(prompt="", model=self.model.value).spec
        except TurboNbError as error:
            self.estimate.value = _error(str(error))
            return None

    def _on_model(self) -> None:
        spec = self._spec()
        if spec is None:
            self._show_gallery()
            return
        width, height = spec.size
        names = [(name, name) for name in catalog.RESOLUTIONS]
        self.resolution.options = [(f"the model's: {width}x{height}", OWN), *names, ("other…", CUSTOM)]
        self.resolution.value = OWN
        self.frames.value, self.topk.value = spec.num_frames, spec.sla_topk
        examples = EXAMPLES["wan" if spec.vocabulary is None else "nano"]
        shown = [(text if len(text) < 80 else text[:78] + "…", text) for text in examples]
        self.examples.options = [("choose one…", ""), *shown]
        if not self.prompt.value:
            self.prompt.value = examples[0]
        can = spec.task == "i2v"
        for control in (self.upload, self.image_path, self.adaptive):
            control.disabled = not can
        self.tabs.selected_index = int(can)
        self.image_note.value = (
            "<p>The clip begins with this image; the prompt says what happens. A file over 10 MB: give its path.</p>"
            if can
            else f"<p>Not with {html.escape(spec.name)}: it makes videos from text alone. To begin with an image, "
            "choose a model whose name says I2V.</p>"
        )
        self.tabs.children[0].children[0].value = (
            f"<p>Not with {html.escape(spec.name)}: it needs an image. Choose a model whose name says T2V.</p>"
            if can
            else "<p>A clip from the prompt alone.</p>"
        )
        self._show_outlook()
        self._show_gallery()

    def _on_example(self, change) -> None:
        if change["new"]:
            self.prompt.value = change["new"]

    def _on_upload(self) -> None:
        if self.upload.value:
            file = self.upload.value[-1]
            self._take_image(io.BytesIO(bytes(file["content"])), file["name"])

    def _on_path(self) -> None:
        if path := self.image_path.value.strip():
            self._take_image(path, path)

    def _take_image(self, source, name: str) -> None:
        try:
            self._image = images.load_image(source)
        except InputError as error:
            self._image = None
            self.image_note.value = _error(str(error))
            return
        self.image_note.value = f"{_picture(self._image, name)}<p>{html.escape(name)}</p>"

    def _show_outlook(self) -> None:
        """What a run will take, and what speaks against it"""
        spec, size = self._spec(), self.resolution.value
        self.aspect.disabled = size not in catalog.RESOLUTIONS
        self.custom.disabled = size != CUSTOM
        self.seed.disabled = self.random_seed.value
        self.topk.disabled = self.attention.value == "original"
        if spec is None:
            return
        if spec.vocabulary is None:
            hint = "Long English prompts work best: say what is seen, how it moves, the light and the camera."
        elif spec.understands(self.prompt.value):
            hint = f"{spec.name} knows moving shapes: size, colour, shape, motion and background."
        else:
            hint = (
                f"{spec.name} only knows moving shapes, and this prompt names none with its colour; see the examples."
            )
        self.hint.value = f'<p class="tnb-dim">{html.escape(hint)}</p>'
        try:
            outlook = self.studio.outlook(self.request)
        except TurboNbError as error:
            self.estimate.value = _error(str(error))
            return
        clip = f"{outlook.num_frames} frames of {outlook.width}x{outlook.height}, {outlook.num_frames / spec.fps:.1f} s"
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
        if not self.studio.has_preview(spec):
            lines.append("no live preview for the first clip of this model: its colours are learned from that one")
        self.estimate.value = "".join(f"<p>{html.escape(line)}</p>" for line in lines)

    # what happens

    def _on_generate(self) -> None:
        try:
            job = self.studio.submit(self.request)
        except TurboNbError as error:
            self.status.value = self.estimate.value = ""  # a page reads out what is new
            self.estimate.value = _error(str(error))
            return
        self.seed.value = job.request.seed

    def _on_job(self, job: Job) -> None:
        """Called from the worker's thread at every change"""
        self.generate.disabled = job.running
        self.cancel.disabled = not job.running or job.cancelling.is_set()
        self.status.value = _status(job)
        self.preview.value = (
            _image_tag(job.preview, "webp", "Preview of the clip being made", 256) if job.preview else ""
        )
        if job.running:
            self.result.outputs = ()
            return
        self.seed.value = job.request.seed
        if job.run:
            _put(self.result, player(job.run, min(640, max(256, job.run.settings["width"]))))
        self._show_outlook()
        self._show_gallery()

    def _show_idle(self) -> None:
        self.status.value = '<p role="status" class="tnb-dim">Ready.</p>'

    # the clips

    def _show_gallery(self) -> None:
        with self._drawing:
            runs = self.studio.history.clips(self._count + 1)
            gone = _family(self.gallery)[1:]
            self.gallery.children = [self._item(run) for run in runs[: self._count]]
            _close(gone)
        self.more.layout.display = None if len(runs) > self._count else "none"
        self.archive.disabled = not runs
        self.message.value = "" if runs else '<p class="tnb-dim">Nothing yet; what you generate is kept here.</p>'

    def _item(self, run: Clip) -> w.VBox:
        settings, video = run.settings, w.Output()
        _put(video, player(run, 240), _link(run.path, "Download"))
        facts = (
            f"{settings['width']}x{settings['height']}, {settings['num_frames']} frames, "
            f"{settings['num_steps']} steps, seed {settings['seed']}, {settings.get('attention_type')}"
            + (f" {settings['sla_topk']:g}" if settings.get("sla_topk") else "")
            + f", {settings['model']}, {in_words(run.seconds)}{environment.dollars(run.record.cost)}"
        )
        prompt = html.escape(str(settings["prompt"]))
        words = w.HTML(f'<p class="tnb-prompt">{prompt}</p><p class="tnb-dim">{html.escape(facts)}</p>')

        def button(text: str, does) -> w.Button:
            made = w.Button(description=text, layout=w.Layout(width="auto"), tooltip=f"{text}: {run.path.name}")
            made.on_click(lambda _: does())
            return made

        buttons = [
            button("Use these settings", partial(self._use, run)),
            button("Vary seed", partial(self._vary, run)),
        ]
        spec = self._spec()
        if spec and spec.task == "i2v":
            buttons.append(button("Continue from last frame", partial(self._continue, run)))
        delete = button("Delete", lambda: self._delete(run, delete))
        row = w.Box([*buttons, delete], layout=w.Layout(flex_flow="row wrap"))
        item = w.VBox([video, words, row], layout=w.Layout(width="272px"))
        item.add_class("tnb-card")
        return item

    def _use(self, run: Clip) -> None:
        """Put a clip's settings into the controls; its image, if it began with one, has to be chosen again"""
        settings = run.settings
        if settings["model"] not in dict(self.model.options).values():
            self._say(f"the model {settings['model']!r} is not in this list; show the generator with model= its path")
        else:
            self.model.value = settings["model"]
        size = (settings["width"], settings["height"])
        named = [
            (name, ratio) for name, table in catalog.RESOLUTIONS.items() for ratio in table if table[ratio] == size
        ]
        spec = self._spec()
        if spec and size == spec.size:
            self.resolution.value = OWN
        elif named:
            self.resolution.value, self.aspect.value = named[0]
        else:
            self.resolution.value, self.custom.value = CUSTOM, "{}x{}".format(*size)
        self.prompt.value = settings["prompt"]
        self.frames.value, self.steps.value = settings["num_frames"], settings["num_steps"]
        self.seed.value, self.random_seed.value = settings["seed"], False
        self.attention.value = settings.get("attention_type", "sla")
        if settings.get("sla_topk"):
            self.topk.value = settings["sla_topk"]

    def _vary(self, run: Clip) -> None:
        self._use(run)
        self.random_seed.value = True
        self._on_generate()

    def _continue(self, run: Clip) -> None:
        try:
            self._image = mp4.last_frame(run.path)
        except InputError as error:
            self._say(str(error))
            return
        self.tabs.selected_index = 1
        name = f"the last frame of {run.path.name}"
        self.image_note.value = (
            f"{_picture(self._image, name)}<p>{html.escape(name)}; say in the prompt what happens next</p>"
        )

    def _delete(self, run: Clip, button: w.Button) -> None:
        if button.description == "Delete":  # the first click asks
            button.description, button.button_style = "Delete for good?", "danger"
            return
        try:
            self.studio.history.delete(run)
        except TurboNbError as error:
            self._say(str(error))
            return
        self._show_gallery()

    def _on_archive(self) -> None:
        try:
            path = self.studio.history.archive(self.studio.history.clips())
        except TurboNbError as error:
            self._say(str(error))
            return
        _put(self.archive_link, _link(path, f"Download {path.name} ({path.stat().st_size / 1e6:.1f} MB)"))

    def _on_more(self) -> None:
        self._count += PAGE
        self._show_gallery()

    def _say(self, text: str) -> None:
        self.message.value = _error(text)


def _attentions() -> list[tuple[str, str]]:
    """The kinds of attention, and the reason where one cannot run"""
    cannot = backends.choose("sagesla").chosen is None
    names = {"sla": "SLA", "sagesla": "SageSLA" + (" (cannot run here)" if cannot else ""), "original": "dense"}
    return [(names[kind], kind) for kind in ATTENTION_TYPES]


def _family(widget: w.Widget) -> list[w.Widget]:
    """A widget and all inside it"""
    return [widget, *(one for child in getattr(widget, "children", ()) for one in _family(child))]


def _close(widgets: list[w.Widget]) -> None:
    for widget in widgets:
        for part in (getattr(widget, "style", None), widget.layout, widget):
            if part is not None:
                part.close()


def _error(text: str, trace: str = "") -> str:
    details = f"<details><summary>Details</summary><pre>{html.escape(trace)}</pre></details>" if trace else ""
    return f'<div class="tnb-error" role="alert">{html.escape(text)}{details}</div>'


def _image_tag(data: bytes, kind: str, label: str, width: int) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{html.escape(label)}" style="width:{width}px">'


def _picture(image, name: str) -> str:
    """A small copy of an image"""
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((240, 240))
    small.save(out, "JPEG")
    return _image_tag(out.getvalue(), "jpeg", f"The clip begins with {name}", small.width)


def _status(job: Job) -> str:
    """Where a job is, in words, stages and a bar"""
    notes = "".join(f'<p class="tnb-dim">{html.escape(note)}</p>' for note in job.notes)
    if job.state == "failed":
        return _error(job.error, job.trace) + notes
    if job.state == "cancelled":
        return f'<p role="status">Cancelled; nothing was written.</p>{notes}'
    if job.state == "finished":
        each = (
            f" (steps {', '.join(f'{seconds:.2f}' for seconds in job.run.record.steps)})"
            if job.run.record.steps
            else ""
        )
        times = ", ".join(
            f"{NAMES[stage].lower()} {in_words(seconds)}" + (each if stage == "denoise" else "")
            for stage, seconds in job.run.record.timings.items()
        )
        times += environment.dollars(job.run.record.cost)
        return f'<p role="status">Done with seed {job.request.seed}: {html.escape(times)}.</p>{notes}'
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
