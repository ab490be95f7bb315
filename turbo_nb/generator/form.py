"""The form of the generator: the prompt, the image, the model and the settings.

An option of `ClipSettings` that has no place of its own here stands under "More settings".
"""

import html
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w

from .. import catalog, settings
from ..catalog import ModelSpec
from ..errors import InputError, TurboNbError
from ..settings import ClipSettings, LoadOptions, Weights
from ..video import images
from .controls import COLUMNS, OWN, control, styled
from .jobs import JobRunner, Request
from .loras import LoRAList
from .page import card, error_box, paragraph, thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

CUSTOM = "custom"  # among the resolutions
LOAD = ("attention_type", "sla_topk", "quant_linear")  # options of loading that have a control
FRONT = ("num_frames", "num_steps", "seed")  # options of a clip with one control that is always visible
PLACED = ("prompt", "image", "adaptive_resolution", "resolution", "aspect_ratio")  # options with a place of their own
CLIP = settings.options(ClipSettings)
MORE = tuple(name for name in CLIP if name not in FRONT + PLACED)
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


class ImageInput:
    """The tabs, and the image that a clip begins with.

    Args:
        changed: called when the image or the tab has changed.
    """

    def __init__(self, changed: Callable[[], None]):
        self.picture: Image | None = None
        self._source: str | Image | None = None  # the path of the picture, or the picture itself
        self._changed = changed
        self.upload = w.FileUpload(
            description="Choose image", accept=images.ACCEPT, layout=w.Layout(width="auto"),
            tooltip=CLIP["image"].help,
        )  # fmt: skip
        self.path = styled(
            w.Text, "or its path", placeholder="a png, jpg or webp file on this machine", continuous_update=False
        )
        self.adaptive = styled(w.Checkbox, "Keep the image's aspect", value=True, indent=False)
        self.note, self._text_note = w.HTML(), w.HTML()
        with_image = w.VBox([self.note, self.upload, self.path, self.adaptive])
        self.tabs = w.Tab([w.VBox([self._text_note]), with_image], titles=("Text to video", "Image to video"))
        self.upload.observe(lambda _: self._on_upload(), "value")
        self.path.observe(lambda _: self._on_path(), "value")
        self.adaptive.observe(lambda _: changed(), "value")
        self.tabs.observe(lambda _: changed(), "selected_index")

    @property
    def settings(self) -> dict:
        """The options of a clip that stand here."""
        used = self.tabs.selected_index == 1
        return {"image": self._source if used else None, "adaptive_resolution": used and self.adaptive.value}

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the image; None: the clip does not begin with one."""
        return self.picture.size if self.picture and self.tabs.selected_index == 1 else None

    def show(self, spec: ModelSpec) -> None:
        """Show whether a model takes an image."""
        takes_image = spec.task == "i2v"
        for one in (self.upload, self.path, self.adaptive):
            one.disabled = not takes_image
        self.tabs.selected_index = int(takes_image)
        self.note.value = paragraph(
            "The clip begins with this image; the prompt says what happens. A file over 10 MB: give its path."
            if takes_image
            else f"Not with {spec.name}: it makes videos from text alone. To begin with an image, choose a model whose "
            "name says I2V."
        )
        self._text_note.value = paragraph(
            f"Not with {spec.name}: it needs an image. Choose a model whose name says T2V."
            if takes_image
            else "A clip from the prompt alone."
        )

    def take(self, source: "str | io.BytesIO | Image", name: str, more: str = "") -> bool:
        """Begin the clip with an image.

        Args:
            source: a path, the bytes of a file, or a picture.
            name: of the image, for the page.
            more: words to show after the name.

        Returns:
            Whether the image can be read. The page shows why not.
        """
        try:
            self.picture = images.load_image(source)
        except InputError as error:
            self.picture = self._source = None
            self.note.value = error_box(str(error))
        else:
            self._source = source if isinstance(source, str) else self.picture
            self.note.value = f"{thumbnail(self.picture, name)}<p>{html.escape(name + more)}</p>"
            self.tabs.selected_index = 1
        self._changed()
        return self.picture is not None

    def _on_upload(self) -> None:
        if self.upload.value:
            file = self.upload.value[-1]
            self.take(io.BytesIO(bytes(file["content"])), file["name"])

    def _on_path(self) -> None:
        if path := self.path.value.strip():
            self.take(path, path)


class Form:
    """What the person chooses.

    Args:
        runner: resolves the models.
        model: the model chosen at first.

    `controls` are those that stand for one option each, by its name. `defaults` are the values by which they stand for
    None: the model's own, or the option's default. The form calls `on_change` when anything but the prompt has changed,
    `on_prompt` with the prompt, and `on_model` with the model.
    """

    def __init__(self, runner: JobRunner, model: Weights = "auto"):
        self.on_change: Callable[[], None] = lambda: None
        self.on_prompt: Callable[[], None] = lambda: None
        self.on_model: Callable[[], None] = lambda: None
        self.spec: ModelSpec | None = None  # None: the model cannot be read
        self._runner, self._holds = runner, 0
        self._build(model)
        self._connect()
        self._show_model()

    def _build(self, model: Weights) -> None:
        self.prompt = styled(w.Textarea, "Prompt", rows=4, placeholder="What to show", tooltip=CLIP["prompt"].help)
        self.examples = styled(w.Dropdown, "Examples", options=[("choose one…", "")])
        self.hint = w.HTML()
        self.image = ImageInput(self._changed)
        entries, chosen = self._models(model)
        self.model = styled(w.Dropdown, "Model", options=entries, value=chosen)
        self.resolution = styled(w.Dropdown, "Resolution")
        self.custom = styled(w.Text, "Other size", placeholder="width x height: 128x128")
        ratios = CLIP["aspect_ratio"].check.words
        self.aspect = styled(w.Dropdown, "Aspect", options=ratios, value="16:9")
        self.random_seed = styled(w.Checkbox, "New seed each time", value=True, indent=False)
        self.loras = LoRAList(self._changed, self.holding)
        self.controls = {name: control(LoadOptions, name) for name in LOAD}
        self.controls |= {name: control(ClipSettings, name) for name in FRONT + MORE}
        self.defaults = {name: control.value for name, control in self.controls.items()}
        frames, steps, seed = (self.controls[name] for name in FRONT)
        how = [self.model, self.resolution, self.aspect, self.custom, frames, steps, seed, self.random_seed]
        how += [self.controls[name] for name in LOAD]
        # a button folds these, because the keyboard does not reach the title of an ipywidgets Accordion
        self.more = w.ToggleButton(
            description="More settings", tooltip="Settings that a clip seldom needs", layout=w.Layout(width="180px")
        )
        self.folded = w.GridBox([self.controls[name] for name in MORE], layout=w.Layout(**COLUMNS, display="none"))
        prompt = w.VBox([self.prompt, self.examples, self.hint], layout=w.Layout(width="100%"))
        self.cards = (
            card("What to show", self.image.tabs, prompt),
            card("How", w.GridBox(how, layout=w.Layout(**COLUMNS)), self.loras.box, self.more, self.folded),
        )

    def _models(self, model: Weights) -> tuple[list[tuple[str, Weights]], Weights]:
        """Return the entries of the list of models, and the entry that `model` is"""
        known = [(f"{name} (ships with turbo_nb)" if one.folder else name, name)
                 for name, one in catalog.MODELS.items()]  # fmt: skip
        if isinstance(model, tuple | list):
            paths = tuple(map(str, model))
            return [*known, (" + ".join(Path(path).name for path in paths), paths)], paths
        chosen = str(model)
        if chosen in ("auto", *catalog.UPSTREAM_NAMES):
            chosen = self._runner.resolve(LoadOptions(model=chosen)).spec.name
        if chosen in catalog.MODELS:
            return known, chosen
        return [*known, (Path(chosen).name or chosen, chosen)], chosen

    def _connect(self) -> None:
        self.model.observe(lambda _: self._show_model(), "value")
        self.prompt.observe(lambda _: self._show_prompt(), "value")
        self.examples.observe(self._on_example, "value")
        self.more.observe(lambda change: self._fold(not change["new"]), "value")
        for one in (self.resolution, self.custom, self.aspect, self.random_seed):
            one.observe(lambda _: self._changed(), "value")
        for name, one in self.controls.items():
            if name != "seed":  # because a job sets it, and no outlook depends on it
                one.observe(lambda _: self._changed(), "value")

    # what the controls say

    @property
    def request(self) -> Request:
        """What the controls ask for. Raises InputError."""
        return self._request(self.prompt.value)

    @property
    def outline(self) -> Request:
        """What the controls ask for, whatever the prompt is, because size and time do not depend on it."""
        return self._request(self.prompt.value if self.prompt.value.strip() else "?")

    def _request(self, prompt: str) -> Request:
        size = self.resolution.value
        values = {
            name: None if one.disabled or one.value in ("", self.defaults[name]) else one.value
            for name, one in self.controls.items()
        }
        clip = settings.build(
            ClipSettings,
            {name: values[name] for name in FRONT + MORE} | self.image.settings,
            prompt=prompt,
            resolution={OWN: None, CUSTOM: self.custom.value.strip()}.get(size, size),
            aspect_ratio=self.aspect.value if size in catalog.RESOLUTIONS else None,
        )
        load = {name: values[name] for name in LOAD} | {"model": self.model.value, "loras": self.loras.value}
        return Request(load=settings.build(LoadOptions, load), clip=clip, random_seed=self.random_seed.value)

    # what the controls show

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Report several changes as one."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._changed()

    def _changed(self) -> None:
        if self._holds:
            return
        size = self.resolution.value
        self.aspect.disabled = size not in catalog.RESOLUTIONS
        self.custom.disabled = size != CUSTOM
        self.controls["seed"].disabled = self.random_seed.value
        self.controls["sla_topk"].disabled = self.controls["attention_type"].value == "original"
        self.controls["boundary"].disabled = self.spec is not None and self.spec.boundary is None
        self.on_change()

    def _show_model(self) -> None:
        """Show what the chosen model can do, and the values that are its own"""
        try:
            self.spec = self._runner.resolve(LoadOptions(model=self.model.value)).spec
        except TurboNbError:
            self.spec = None
            self._changed()  # the outlook shows the error
        else:
            with self.holding():
                self._show_spec(self.spec)
            self._show_prompt()
        self.on_model()

    def _show_spec(self, spec: ModelSpec) -> None:
        size = "{}x{}".format(*spec.size)
        names = [(name, name) for name in catalog.RESOLUTIONS]
        self.resolution.options = [(f"the model's: {size}", OWN), *names, ("other…", CUSTOM)]
        self.resolution.value = OWN
        for name, one in self.controls.items():
            if (own := getattr(spec, name, None)) is not None:
                one.value = own
                self.defaults[name] = one.value
        examples = EXAMPLES["wan" if spec.vocabulary is None else "nano"]
        shown = [(text if len(text) < 80 else text[:78] + "…", text) for text in examples]
        self.examples.options = [("choose one…", ""), *shown]
        if not self.prompt.value:
            self.prompt.value = examples[0]
        self.image.show(spec)
        self.loras.show(spec.boundary is not None)

    def _show_prompt(self) -> None:
        if self.spec is None:
            return
        if self.spec.vocabulary is None:
            hint = "Long English prompts work best: say what is seen, how it moves, the light and the camera."
        elif self.spec.understands(self.prompt.value):
            hint = f"{self.spec.name} knows moving shapes: size, colour, shape, motion and background."
        else:
            hint = f"{self.spec.name} only knows moving shapes. Name a shape and its colour, as the examples do."
        self.hint.value = paragraph(hint, "tnb-dim")
        self.on_prompt()

    def _fold(self, folded: bool) -> None:
        self.folded.layout.display = "none" if folded else None
        self.more.description = "More settings" if folded else "Fewer settings"

    def _on_example(self, change) -> None:
        if change["new"]:
            self.prompt.value = change["new"]
