"""The controls of the generator. settings.py gives their defaults, choices, limits and tooltips.

An option of `ClipSettings` that has no place of its own on the page stands under "More settings".
"""

import html
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as w
from traitlets import TraitError

from .. import backends, catalog, settings
from ..catalog import ModelSpec
from ..errors import InputError, TurboNbError
from ..records import VideoRecord
from ..settings import Choice, ClipSettings, Flag, LoadOptions, Number, Weights, Whole
from ..video import images
from .jobs import JobRunner, Request
from .page import COLUMNS, card, error_box, paragraph, thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

OWN, CUSTOM = "own", "custom"  # entries of the resolutions
BROWSER_INT = 2**53 - 1  # the largest whole number that JavaScript counts to
LOAD = ("attention_type", "sla_topk", "quant_linear")  # options of loading that have a control
FRONT = ("num_frames", "num_steps", "seed")  # options of a clip beside those that need more than one control
PLACED = ("prompt", "image", "adaptive_resolution", "resolution", "aspect_ratio")  # these need more
MORE = tuple(name for name in settings.options(ClipSettings) if name not in FRONT + PLACED)
LABELS = {
    "num_frames": "Frames", "num_steps": "Steps", "attention_type": "Attention", "sla_topk": "SLA top-k",
    "quant_linear": "Linears", "ode": "ODE",
}  # fmt: skip
ENTRIES = {
    "attention_type": {None: "the model's own", "sla": "SLA", "sagesla": "SageSLA", "original": "dense"},
    "quant_linear": {"auto": "as the file has them", True: "8-bit", False: "16-bit or more"},
}
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


class Form:
    """What the person chooses: the prompt, the image, the model and the settings.

    Args:
        runner: resolves the models.
        model: the model chosen at first.

    `controls` holds the controls that stand for one option each, by the option's name. `on_change` is called when
    anything but the prompt has changed, `on_prompt` when the prompt has, and `on_model` when the model has.
    """

    def __init__(self, runner: JobRunner, model: Weights = "auto"):
        self.on_change: Callable[[], None] = lambda: None
        self.on_prompt: Callable[[], None] = lambda: None
        self.on_model: Callable[[], None] = lambda: None
        self.spec: ModelSpec | None = None  # None: the model cannot be read
        self.image: Image | None = None  # the picture that the clip begins with
        self._source: str | Image | None = None  # where it came from: its path, or the picture itself
        self._runner, self._holds = runner, 0
        self._build(model)
        self._connect()
        self._show_model()

    def _build(self, model: Weights) -> None:
        self.prompt = _styled(w.Textarea, "Prompt", rows=4, placeholder="What to show", tooltip=_help("prompt"))
        self.examples = _styled(w.Dropdown, "Examples", options=[("choose one…", "")])
        self.hint = w.HTML()
        self.upload = w.FileUpload(
            description="Choose image", accept="image/png,image/jpeg,image/webp", layout=w.Layout(width="auto")
        )
        self.image_path = _styled(
            w.Text, "or its path", placeholder="a png, jpg or webp file on this machine", continuous_update=False
        )
        self.adaptive = _styled(
            w.Checkbox, "Keep the image's aspect", value=True, indent=False, tooltip=_help("adaptive_resolution")
        )
        self.image_note, self.text_note = w.HTML(), w.HTML()
        with_image = w.VBox([self.image_note, self.upload, self.image_path, self.adaptive])
        self.tabs = w.Tab([w.VBox([self.text_note]), with_image], titles=("Text to video", "Image to video"))
        entries, chosen = self._models(model)
        self.model = _styled(w.Dropdown, "Model", options=entries, value=chosen)
        self.resolution = _styled(w.Dropdown, "Resolution", tooltip=_help("resolution"))
        self.custom = _styled(w.Text, "Other size", placeholder="width x height: 128x128")
        ratios = settings.options(ClipSettings)["aspect_ratio"].check.words
        self.aspect = _styled(w.Dropdown, "Aspect", options=ratios, value="16:9", tooltip=_help("aspect_ratio"))
        self.random_seed = _styled(w.Checkbox, "New seed each time", value=True, indent=False)
        self.controls = {name: _control(LoadOptions, name) for name in LOAD}
        self.controls |= {name: _control(ClipSettings, name) for name in FRONT + MORE}
        frames, steps, seed = (self.controls[name] for name in FRONT)
        how = [self.model, self.resolution, self.aspect, self.custom, frames, steps, seed, self.random_seed]
        how += [self.controls[name] for name in LOAD]
        # a button folds these, because the keyboard does not reach the title of an ipywidgets Accordion
        self.more = w.ToggleButton(description="More settings", layout=w.Layout(width="auto"))
        self.folded = w.GridBox([self.controls[name] for name in MORE], layout=w.Layout(**COLUMNS, display="none"))
        prompt = w.VBox([self.prompt, self.examples, self.hint], layout=w.Layout(width="100%"))
        self.cards = (
            card("What to show", self.tabs, prompt),
            card("How", w.GridBox(how, layout=w.Layout(**COLUMNS)), self.more, self.folded),
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
        self.upload.observe(lambda _: self._on_upload(), "value")
        self.image_path.observe(lambda _: self._on_path(), "value")
        self.tabs.observe(lambda _: self._changed(), "selected_index")
        for control in (self.resolution, self.custom, self.aspect, self.adaptive, self.random_seed):
            control.observe(lambda _: self._changed(), "value")
        for name, control in self.controls.items():
            if name != "seed":  # because a job sets it, and no outlook depends on it
                control.observe(lambda _: self._changed(), "value")

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
        size, with_image = self.resolution.value, self.tabs.selected_index == 1
        values = {name: None if one.disabled else one.value for name, one in self.controls.items()}
        clip = settings.build(
            ClipSettings,
            {name: values[name] for name in FRONT + MORE},
            prompt=prompt,
            image=self._source if with_image else None,
            adaptive_resolution=with_image and self.adaptive.value,
            resolution={OWN: None, CUSTOM: self.custom.value.strip()}.get(size, size),
            aspect_ratio=self.aspect.value if size in catalog.RESOLUTIONS else None,
        )
        load = settings.build(LoadOptions, {name: values[name] for name in LOAD}, model=self.model.value)
        return Request(load=load, clip=clip, random_seed=self.random_seed.value)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Width and height of the image; None: the clip does not begin with one."""
        return self.image.size if self.image and self.tabs.selected_index == 1 else None

    # what the controls show

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Report several changes as one"""
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
            self.spec = None  # the outlook shows the error
        else:
            with self._holding():
                self._show_spec(self.spec)
        self._show_prompt()
        self._changed()
        self.on_model()

    def _show_spec(self, spec: ModelSpec) -> None:
        size = "{}x{}".format(*spec.size)
        names = [(name, name) for name in catalog.RESOLUTIONS]
        self.resolution.options = [(f"the model's: {size}", OWN), *names, ("other…", CUSTOM)]
        self._show_defaults(spec)
        examples = EXAMPLES["wan" if spec.vocabulary is None else "nano"]
        shown = [(text if len(text) < 80 else text[:78] + "…", text) for text in examples]
        self.examples.options = [("choose one…", ""), *shown]
        if not self.prompt.value:
            self.prompt.value = examples[0]
        takes_image = spec.task == "i2v"
        for control in (self.upload, self.image_path, self.adaptive):
            control.disabled = not takes_image
        self.tabs.selected_index = int(takes_image)
        self.image_note.value = paragraph(
            "The clip begins with this image; the prompt says what happens. A file over 10 MB: give its path."
            if takes_image
            else f"Not with {spec.name}: it makes videos from text alone. To begin with an image, choose a model whose "
            "name says I2V."
        )
        self.text_note.value = paragraph(
            f"Not with {spec.name}: it needs an image. Choose a model whose name says T2V."
            if takes_image
            else "A clip from the prompt alone."
        )

    def _show_defaults(self, spec: ModelSpec) -> None:
        """Show the values that a model has of its own"""
        self.resolution.value = OWN
        for name, control in self.controls.items():
            if (own := getattr(spec, name, None)) is not None:
                control.value = own

    def _show_prompt(self) -> None:
        if self.spec is None:
            return
        if self.spec.vocabulary is None:
            hint = "Long English prompts work best: say what is seen, how it moves, the light and the camera."
        elif self.spec.understands(self.prompt.value):
            hint = f"{self.spec.name} knows moving shapes: size, colour, shape, motion and background."
        else:
            hint = f"{self.spec.name} only knows moving shapes, and this prompt names none with its colour. See the "
            hint += "examples."
        self.hint.value = paragraph(hint, "tnb-dim")
        self.on_prompt()

    def _fold(self, folded: bool) -> None:
        self.folded.layout.display = "none" if folded else None
        self.more.description = "More settings" if folded else "Fewer settings"

    def _on_example(self, change) -> None:
        if change["new"]:
            self.prompt.value = change["new"]

    # the image

    def _on_upload(self) -> None:
        if self.upload.value:
            file = self.upload.value[-1]
            self._take_image(io.BytesIO(bytes(file["content"])), file["name"])

    def _on_path(self) -> None:
        if path := self.image_path.value.strip():
            self._take_image(path, path)

    def _take_image(self, source: "str | io.BytesIO", name: str) -> bool:
        """Begin the clip with an image; return False, with the reason on the page, where it cannot be read"""
        try:
            self.image = images.load_image(source)
        except InputError as error:
            self.image = self._source = None
            self.image_note.value = error_box(str(error))
        else:
            self._source = source if isinstance(source, str) else self.image
            self.image_note.value = f"{thumbnail(self.image, name)}{paragraph(name)}"
        self._changed()
        return self.image is not None

    def begin_with(self, image: "Image", name: str) -> None:
        """Begin the clip with a picture, such as another clip's last frame."""
        self.image = self._source = image
        self.tabs.selected_index = 1
        self.image_note.value = (
            f"{thumbnail(image, name)}<p>{html.escape(name)}; say in the prompt what happens next</p>"
        )
        self._changed()

    # an earlier clip

    def restore(self, record: VideoRecord) -> list[str]:
        """Put the settings of a clip into the controls.

        Args:
            record: how the clip was made. Of a grid the first seed is taken.

        Returns:
            What could not be restored, and why. The controls have the model's own values for it.
        """
        lost = []
        with self._holding():
            if self.spec is None or record.model != self.spec.name:
                lost += self._restore_model(record.model)
            elif self.spec:
                self._show_defaults(self.spec)
            lost += self._restore_size(record)
            self.prompt.value = record.prompt
            seeds = [record.seed] if isinstance(record.seed, int) else record.seed
            values = asdict(record) | {"seed": seeds[0] if seeds else None}
            unknown = [name for name, control in self.controls.items() if not _set(control, values[name])]
            self.random_seed.value = False
        lost += [
            f"{name} ({'the file does not give it' if values[name] is None else f'{values[name]} is not on the page'})"
            for name in unknown
            if not self.controls[name].disabled
        ]
        if not record.prompt:
            lost.append("prompt (the file does not give it)")
        if (
            self.spec
            and self.spec.task == "i2v"
            and not (record.image and self._take_image(record.image, record.image))
        ):
            lost.append("image (choose it again)")
        return lost

    def _restore_model(self, name: str) -> list[str]:
        if name in [value for _, value in self.model.options]:
            self.model.value = name
            return []
        if not name:
            return ["model (the file does not give it)"]
        return [f"model ({name!r} is not in this list: show the generator with model= its path)"]

    def _restore_size(self, record: VideoRecord) -> list[str]:
        size = (record.width, record.height)
        if None in size:
            return ["resolution (the file does not give it)"]
        self.adaptive.value = False  # because the clip's size is known exactly
        named = [
            (name, ratio) for name, table in catalog.RESOLUTIONS.items() for ratio in table if table[ratio] == size
        ]
        if self.spec and size == self.spec.size:
            self.resolution.value = OWN
        elif named:
            self.resolution.value, self.aspect.value = named[0]
        else:
            self.resolution.value, self.custom.value = CUSTOM, "{}x{}".format(*size)
        return []


def _help(name: str) -> str:
    return settings.options(ClipSettings)[name].help


def _styled(kind: type, description: str, **more) -> w.Widget:
    """Make a control that is as wide as its cell"""
    layout = w.Layout(width="auto", min_width="0")
    return kind(description=description, style={"description_width": "92px"}, layout=layout, **more)


def _control(cls: type, name: str) -> w.Widget:
    """Make the control of an option: its kind by the option's check, its value by the default"""
    option, default = settings.options(cls)[name], cls.__dataclass_fields__[name].default
    check, label = option.check, LABELS.get(name, name.replace("_", " ").capitalize())
    more = {"tooltip": option.help} | ({} if default is None else {"value": default})
    if isinstance(check, Flag):
        return _styled(w.Checkbox, label, indent=False, **more)
    if isinstance(check, Choice):
        values = [*([None] if default is None else []), *check.words, *check.more]
        entries = [(_entry(name, value), value) for value in values]
        return _styled(w.Dropdown, label, options=entries, **more | {"value": default})
    if isinstance(check, Whole) and check.most - check.least < 10:
        return _styled(w.Dropdown, label, options=list(range(check.least, check.most + 1)), **more)
    if isinstance(check, Whole):
        step = 4 if name == "num_frames" else 1
        return _styled(w.BoundedIntText, label, min=check.least, max=min(check.most, BROWSER_INT), step=step, **more)
    if isinstance(check, Number):
        return _styled(w.FloatText, label, step=0.05 if name in ("sla_topk", "boundary") else 1, **more)
    return _styled(w.Text, label, **more)


def _entry(name: str, value: Any) -> str:
    """Return the words for a value of an option; of SageSLA also that it cannot run here"""
    words = ENTRIES.get(name, {}).get(value, str(value))
    return f"{words} (cannot run here)" if value == "sagesla" and backends.choose(value).chosen is None else words


def _set(control: w.Widget, value: Any) -> bool:
    """Set a control; return False where it cannot show the value"""
    try:
        control.value = value
    except TraitError:
        return False
    return control.value == value
