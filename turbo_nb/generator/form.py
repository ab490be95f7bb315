"""The form of the generator: the prompt, the pictures, the model and the settings.

An option of `ClipSettings` that has no place of its own here stands under "Advanced settings". `put` is the one way in
for settings from elsewhere: presets, clips of the gallery, and the latest session.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ipywidgets as w

from .. import catalog, settings
from ..catalog import ModelSpec
from ..errors import InputError
from ..settings import ClipSettings, LoadOptions, Weights
from ..values import Flag, shown
from .controls import COLUMNS, OWN, UNUSED, Field, not_on_page, styled
from .guard import ShowError, on_change, raise_error
from .image import ImageInput, LastImageInput
from .jobs import JobRunner
from .loras import LoRAList
from .page import fold, visible
from .prompt import PromptInput
from .request import Request

CUSTOM = "custom"  # among the resolutions
LOAD = ("attention_type", "sla_topk", "quant_linear")  # options of loading that have a control
SIZE = {"resolution", "aspect_ratio"}  # options that the controls of the size set together
FRONT = ("num_frames", "num_steps", "seed")  # options of a clip with one control that is always visible
# options with a place of their own, or an action of the gallery
PLACED = ("prompt", *settings.PICTURES, "adaptive_resolution", "resolution", "aspect_ratio", "extend_clip")
MORE = tuple(name for name in settings.options(ClipSettings) if name not in FRONT + PLACED)


class Form:
    """What the person chooses.

    Args:
        runner: resolves the models.
        model: the model chosen at first.

    `fields` are the controls that stand for one option each, by its name. The form calls `on_prompt` when the prompt
    has changed, `on_change` when anything else has, `on_model` when another model is chosen, and
    `on_error` with an unexpected error of a control.
    """

    def __init__(self, runner: JobRunner, model: Weights = "auto"):
        self.on_change: Callable[[], None] = lambda: None
        self.on_prompt: Callable[[], None] = lambda: None
        self.on_model: Callable[[], None] = lambda: None
        self.on_error: ShowError = raise_error
        self.spec: ModelSpec | None = None  # None: the model cannot be read
        self._runner, self._holds = runner, 0
        self._build(model)
        self._connect()
        self.show_model()

    def _build(self, model: Weights) -> None:
        self.prompt = PromptInput(self._runner, self._prompt_changed)
        self.image, self.last_image = ImageInput(self._changed), LastImageInput(self._changed)
        entries, chosen = self._models(model)
        self.model = styled(w.Dropdown, "Model", options=entries, value=chosen)
        self.resolution = styled(w.Dropdown, "Size", options=[("", OWN)])
        self.custom = styled(w.Text, "Pixels", placeholder="128 x 128", tooltip="Width x height")
        ratios = settings.options(ClipSettings)["aspect_ratio"].check.words
        self.aspect = styled(w.Dropdown, "Aspect", options=ratios, value="16:9")
        self.random_seed = styled(w.Checkbox, "New seed each time", value=True, indent=False)
        self.loras = LoRAList(self._changed, self.holding)
        self.fields = {name: Field(LoadOptions, name, self._changed, self._show_error) for name in LOAD}
        self.fields |= {name: Field(ClipSettings, name, self._changed, self._show_error) for name in FRONT + MORE}
        frames, steps, seed = (self.fields[name].widget for name in FRONT)
        front = [self.resolution, self.aspect, self.custom, frames, steps, seed, self.random_seed]
        self.front = w.GridBox(front, layout=w.Layout(**COLUMNS))
        more = w.GridBox([self.fields[name].box for name in LOAD + MORE], layout=w.Layout(**COLUMNS))
        tip = "Settings that a clip seldom needs"
        self.advanced = fold("Advanced settings", more, tip, self._show_error)
        tip = "Small files that change a model's style"
        self.lora_fold = fold("LoRAs", self.loras.box, tip, self._show_error)

    def _models(self, model: Weights) -> tuple[list[tuple[str, Weights]], Weights]:
        """Return the entries of the list of models, and the entry that `model` is"""
        known = [(f"{name} (ships with turbo_nb)" if one.folder else name, name)
                 for name, one in catalog.MODELS.items()]  # fmt: skip
        if isinstance(model, tuple | list):
            paths = tuple(map(str, model))
            return [*known, (" + ".join(Path(path).name for path in paths), paths)], paths
        chosen = str(model)
        if chosen in ("auto", *catalog.UPSTREAM_NAMES):
            chosen = self._runner.choices.resolve(LoadOptions(model=chosen)).spec.name
        if chosen in catalog.MODELS:
            return known, chosen
        return [*known, (Path(chosen).name or chosen, chosen)], chosen

    def _connect(self) -> None:
        on_change(self.model, self.show_model, self._show_error)
        for one in (self.resolution, self.custom, self.aspect, self.random_seed):
            on_change(one, self._changed, self._show_error)

    def _show_error(self, error: Exception) -> None:
        self.on_error(error)

    # what the controls say

    @property
    def lacks_size(self) -> bool:
        """Whether a size of one's own is chosen and not typed yet."""
        return self.resolution.value == CUSTOM and not self.custom.value.strip()

    @property
    def request(self) -> Request:
        """What the controls ask for. Raises InputError."""
        return self._request(self.prompt.prompts[0])

    @property
    def outline(self) -> Request:
        """What the controls ask for, whatever the prompt is, because size and time do not depend on it."""
        return self._request(self.prompt.text.value if self.prompt.text.value.strip() else "?")

    @property
    def load(self) -> LoadOptions:
        """The model that the controls ask for. Raises InputError."""
        values = {name: self.fields[name].value for name in LOAD}
        return settings.build(LoadOptions, values, model=self.model.value, loras=self.loras.value)

    def _request(self, prompt: str) -> Request:
        clip = settings.build(
            ClipSettings,
            {name: self.fields[name].value for name in FRONT + MORE} | self.image.settings | self.last_image.settings,
            prompt=prompt,
            **self._size,
        )
        return Request(load=self.load, clip=clip, random_seed=self.random_seed.value)

    @property
    def _size(self) -> dict[str, str | None]:
        size = self.resolution.value
        own = {OWN: None, CUSTOM: self.custom.value.strip()}
        return {
            "resolution": own.get(size, size),
            "aspect_ratio": self.aspect.value if size in catalog.RESOLUTIONS else None,
        }

    @property
    def state(self) -> dict[str, Any]:
        """The options that differ from a new form's, as JSON takes them; `put` restores them. Raises InputError."""
        request = self.outline
        clip = settings.asked(request.clip) | self._always
        clip = {name: value for name, value in clip.items() if name not in settings.PICTURES or isinstance(value, str)}
        return settings.asked(request.load) | clip

    @property
    def _always(self) -> dict[str, Any]:
        """The part of `state` that a new form has in another way than `ClipSettings`"""
        ticked = {"random_seed": self.random_seed.value, "adaptive_resolution": self.image.adaptive.value}
        return {"prompt": self.prompt.text.value, **ticked}

    @property
    def usable_state(self) -> dict[str, Any]:
        """`state` without the values that cannot be used, because one of them would take all others along."""
        with suppress(InputError):
            return self.state
        model = self.model.value
        found = self._always | {"model": list(model) if isinstance(model, tuple) else model}
        if self.loras.value:
            found["loras"] = [str(one) for one in self.loras.value]
        for one in (self.image.settings, self.last_image.settings):
            found |= {name: value for name, value in one.items() if isinstance(value, str)}
        for name, field in self.fields.items():
            with suppress(InputError):
                found[name] = field.checked
        with suppress(InputError):
            settings.build(ClipSettings, self._size, prompt="?")
            found |= self._size
        return {name: value for name, value in found.items() if value is not None}

    # what the controls show

    def put(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Show options, by name. Those that `values` does not name stay; None stands for the model's own value.

        Returns:
            The reasons why some could not be shown, by name.
        """
        lost = {name: reason for name, value in values.items() if (reason := _without_place(name, value))}
        with self.holding():
            if values.get("model") is not None:
                lost |= self._put_model(values["model"])
            if "prompt" in values:
                lost |= self._put_prompt(values["prompt"])
            if "resolution" in values or values.get("aspect_ratio") is not None:
                lost |= self._put_size(values.get("resolution"), values.get("aspect_ratio"))
            for name, box in (("adaptive_resolution", self.image.adaptive), ("random_seed", self.random_seed)):
                if name in values:
                    lost |= _put_flag(name, values[name], box)
            for name in settings.PICTURES:
                lost |= self._put_picture(name, values.get(name))
            if "loras" in values:
                lost |= self.loras.put(values["loras"])
            for name, field in self.fields.items():
                if name in values and (reason := field.put(values[name])):
                    lost[name] = reason
        idle = (name for name in self.fields if name in values and not self._uses(name))
        return lost | {name: UNUSED[name] for name in idle if self.fields[name].widget.value != self.fields[name].own}

    def _uses(self, name: str) -> bool:
        """Return whether the chosen model has a use for an option. A clip without such an option is another clip"""
        if self.spec is None:
            return True
        uses = {
            "boundary": self.spec.boundary is not None,
            "extend": self.spec.task == "i2v",
            "decoder": self.spec.folder is None,  # nano's VAE is its own
        }
        return uses.get(name, True)

    def _put_model(self, name: Any) -> dict[str, str]:
        name = tuple(name) if isinstance(name, list) else name
        if name == "auto" or (self.spec and self.spec.name == name):  # a path may have the name of a released one
            return {}
        if name in [value for _, value in self.model.options]:
            self.model.value = name
            return {}
        return {"model": f"{shown(name)} is not in this list: show the generator with model= its path"}

    def _put_prompt(self, text: Any) -> dict[str, str]:
        try:
            blank = text is None or (isinstance(text, str) and not text.strip())
            self.prompt.text.value = "" if blank else settings.options(ClipSettings)["prompt"].check("prompt", text)
        except InputError as error:
            return {"prompt": str(error)}
        return {}

    def _put_picture(self, name: str, value: Any) -> dict[str, str]:
        fits = value is None or getattr(self, name).take(value, str(value))
        return {} if fits else {name: f"{shown(value)} cannot be opened: choose it again"}

    def _put_size(self, resolution: Any, aspect: Any) -> dict[str, str]:
        self.resolution.value, known = OWN, settings.options(ClipSettings)
        if resolution is None and aspect is None:
            return {}
        try:  # a preset may be a file that somebody wrote
            resolution = resolution if resolution is None else known["resolution"].check("resolution", resolution)
            aspect = aspect if aspect is None else known["aspect_ratio"].check("aspect_ratio", aspect)
            settings.size_of(self.spec, resolution, aspect)
        except InputError as error:
            return {"resolution": str(error)}
        if resolution in catalog.RESOLUTIONS:
            self.resolution.value, self.aspect.value = resolution, aspect or "16:9"
            return {}
        sizes = {(name, ratio): "{}x{}".format(*size) for name, table in catalog.RESOLUTIONS.items()
                 for ratio, size in table.items()}  # fmt: skip
        if self.spec and resolution == "{}x{}".format(*self.spec.size):
            return {}
        if known := next((one for one, size in sizes.items() if size == resolution), None):
            self.resolution.value, self.aspect.value = known
        else:
            self.resolution.value, self.custom.value = CUSTOM, resolution
        return {}

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Report several changes as one."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._changed()

    def _prompt_changed(self) -> None:
        if not self._holds:
            self.on_prompt()

    def _changed(self) -> None:
        if self._holds:
            return
        size = self.resolution.value
        visible(self.aspect, size in catalog.RESOLUTIONS)
        visible(self.custom, size == CUSTOM)
        self.fields["seed"].enable(not self.random_seed.value)
        self.fields["sla_topk"].enable(self.fields["attention_type"].widget.value != "original")
        for name in ("boundary", "extend", "decoder"):
            self.fields[name].enable(self._uses(name))
        self.on_change()

    def show_model(self) -> None:
        """Show what the chosen model can do, and the values that are its own."""
        options = LoadOptions(model=self.model.value)
        try:
            self.spec = self._runner.choices.resolve(options).spec
        except Exception:
            self.spec = None
            self._changed()  # the page shows the error
        else:
            with self.holding():
                self._show_spec(self.spec)
                self.prompt.show_model(self.spec, options)
        self.on_model()

    def _show_spec(self, spec: ModelSpec) -> None:
        size = "{}x{}".format(*spec.size)
        names = [(name, name) for name in catalog.RESOLUTIONS]
        self.resolution.options = [(f"{size} (default)", OWN), *names, ("other…", CUSTOM)]
        self.resolution.value = OWN
        for name, field in self.fields.items():
            if (own := getattr(spec, name, None)) is not None:
                field.show_own(own)
        self.image.show_model(spec)
        self.last_image.show_model(spec)
        self.loras.show(spec.boundary is not None)

    def seed_of(self, seed: int) -> None:
        """Show the seed that a job has, where seeds are drawn."""
        with self.holding():
            self.fields["seed"].put(seed)


def _without_place(name: str, value: Any) -> str:
    """Return why the form has no place for an option; empty where it has one, or where the value is the default"""
    cls = next((one for one in (LoadOptions, ClipSettings) if name in settings.options(one)), None)
    if cls is None:
        return "" if name == "random_seed" else "this version has no such option"
    if name in (*LOAD, *FRONT, *MORE, "model", "loras") or (name in PLACED and name != "extend_clip"):
        return ""
    return "" if value in (None, cls.__dataclass_fields__[name].default) else "it has no control on this page"


def _put_flag(name: str, value: Any, box: w.Checkbox) -> dict[str, str]:
    try:
        box.value = True if value is None else Flag()(name, value)  # both are ticked at first
    except InputError:
        return {name: not_on_page(value)}
    return {}
