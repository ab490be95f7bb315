"""Controls for the options of settings.py, which gives their defaults, choices, limits and explanations."""

import html
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import ipywidgets as w
from traitlets import TraitError

from .. import backends, settings
from ..errors import InputError
from ..settings import ClipSettings, LoadOptions
from ..values import Choice, Flag, Number, Whole, shown
from .guard import ShowError, on_change

OWN = "own"  # stands for None in a Dropdown, because a Dropdown takes None for "nothing chosen"
QUOTES = "'\""
BROWSER_INT = 2**53 - 1  # the largest whole number that JavaScript counts to
COLUMNS = {"width": "100%", "grid_template_columns": "repeat(auto-fit, minmax(270px, 1fr))", "grid_gap": "4px 16px"}
LABELS = {
    "num_frames": "Frames", "num_steps": "Steps", "attention_type": "Attention", "sla_topk": "SLA top-k",
    "quant_linear": "Weights", "resolution": "Size", "aspect_ratio": "Aspect", "loras": "LoRAs", "ode": "ODE",
    "sigma_max": "First noise level", "boundary": "Expert boundary", "adaptive_resolution": "Keep the image's aspect",
    "checkpoint": "Model", "last_image": "Last frame", "extend_clip": "Clip to extend",
    "random_seed": "New seed each time", "gpus": "GPUs", "vae": "VAE",
}  # fmt: skip
NONE = {"extend": 0}  # numbers that stand for None where no model gives one
STEPS = {"num_frames": 4, "sla_topk": 0.05, "boundary": 0.05}  # of the arrows beside a number
ENTRIES = {
    "attention_type": {OWN: "the model's own", "sla": "SLA", "sagesla": "SageSLA", "original": "dense"},
    "quant_linear": {"auto": "as in the file", True: "8-bit", False: "16-bit or more"},
}
HELP = {  # in place of what `--help` says
    "attention_type": "SLA skips most of the picture's parts and is quick. Dense attention skips nothing.",
    "quant_linear": "8-bit weights take half the memory.",
    "extend": "Continue the clip so many times from its last frame. 0: do not.",
}
UNUSED = {  # why a control is disabled
    "sla_topk": "Dense attention has none.", "boundary": "This model has only one expert.",
    "extend": "This model cannot: it does not begin with a picture.", "decoder": "This model has only its own.",
}  # fmt: skip
MISSING = {"sagesla": "SageSLA cannot run here: it needs an NVIDIA GPU of sm_80 or newer with a working Triton."}


def label_of(name: str) -> str:
    """Return what the page calls an option."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def not_on_page(value: Any) -> str:
    """Return that no control can show a value."""
    return f"{shown(value).strip(QUOTES)} is not on the page"


def in_page_words(text: str) -> str:
    """Return a message with the page's labels in place of the names of options and flags."""
    for name, option in {**settings.options(LoadOptions), **settings.options(ClipSettings)}.items():
        label = label_of(name)
        for flag in filter(None, (option.flag, f"--{name}")):
            spelled = re.sub("(?<!^)(?<!-)[-_]", "[-_]", flag)
            text = re.sub(rf" ?\({spelled}\)", "", text)
            text = re.sub(rf"{spelled}\b", label, text)
        text = re.sub(rf"^{name}(?= is )", label, text)  # only there, because many names are English words as well
        if "_" in name:
            text = re.sub(rf"\b{name}\b", label, text)
    return text


def styled(kind: type, description: str, **more) -> w.Widget:
    """Make a control that is as wide as its cell."""
    layout = w.Layout(width="auto", min_width="0")
    return kind(description=description, style={"description_width": "92px"}, layout=layout, **more)


class Field:
    """The control of one option: its kind by the option's check, its value by the default.

    Args:
        cls: a class of options.
        name: of one of its options.
        changed: called when the person has changed it.
        show_error: called with what `changed` raises.

    `own` is the control's value that stands for None: the model's own, or the option's default.
    """

    def __init__(self, cls: type, name: str, changed: Callable[[], None], show_error: ShowError):
        self.name, self._cls, self._option = name, cls, settings.options(cls)[name]
        self._default = cls.__dataclass_fields__[name].default
        self.widget = self._control()
        self.own = self.widget.value
        on_change(self.widget, changed, show_error)

    @cached_property
    def box(self) -> w.VBox:
        """The control above its explanation, made on first use, because nobody closes a widget outside the page."""
        return w.VBox([self.widget, w.HTML(self._explanation())], layout=w.Layout(min_width="0"))

    def _explanation(self) -> str:
        explained = [
            HELP.get(self.name, self._option.help),
            *(MISSING[value] for value in self._choices if not _can_run(value)),
            *([UNUSED[self.name]] if self.widget.disabled and self.name in UNUSED else []),
        ]
        return f'<p class="tnb-help">{html.escape(" ".join(explained))}</p>'

    @property
    def value(self) -> Any:
        """The option's value, None for the model's own or the default. Raises InputError for unreadable text."""
        value = self.widget.value
        if self.widget.disabled or value in ("", self.own):
            return None
        return self._option.parse(self.name, value) if isinstance(value, str) and self._is_typed else value

    def put(self, value: Any) -> str:
        """Show a value of the option.

        Returns:
            Why the control cannot show it, and has the model's own; empty where it shows it.
        """
        if value is not None:
            with suppress(TraitError, InputError):
                checked = self._check(value)
                self.widget.value = str(checked) if self._is_typed else checked
                if self.widget.value == (str(checked) if self._is_typed else checked):
                    return ""  # a control with limits would take the nearest value
        self.widget.value = self.own
        return "" if value is None else not_on_page(value)

    @property
    def checked(self) -> Any:
        """`value`, if it can be used. Raises InputError."""
        value = self.value
        return None if value is None else self._check(value)

    def _check(self, value: Any) -> Any:
        """Return a value in its own type. The whole class checks it, which checks more than the option"""
        more = {"prompt": "?"} if "prompt" in settings.options(self._cls) else {}
        return getattr(settings.build(self._cls, {self.name: value}, **more), self.name)

    def show_own(self, own: Any) -> None:
        """Show the model's own value in the place of None."""
        self.widget.value = own
        self.own = self.widget.value

    def enable(self, enabled: bool) -> None:
        """Let the person change the control, or not."""
        self.widget.disabled = not enabled
        if "box" in vars(self):
            self.box.children[1].value = self._explanation()

    @property
    def _is_typed(self) -> bool:
        """Whether the control is a text that is parsed, because a browser would round the number"""
        return isinstance(self._option.check, Whole) and self._option.check.most > BROWSER_INT

    @property
    def _choices(self) -> tuple:
        check = self._option.check
        return (*check.words, *check.more) if isinstance(check, Choice) else ()

    def _control(self) -> w.Widget:
        check, label, default = self._option.check, label_of(self.name), self._default
        more = {"tooltip": self._option.help} | ({} if default is None else {"value": default})
        if isinstance(check, Flag):
            return styled(w.Checkbox, label, indent=False, **more)
        if isinstance(check, Choice):
            values = [*([OWN] if default is None else []), *filter(_can_run, self._choices)]
            entries = [(ENTRIES.get(self.name, {}).get(value, str(value)), value) for value in values]
            return styled(w.Dropdown, label, options=entries, **more)
        if isinstance(check, Whole) and check.most - check.least < 10:
            return styled(w.Dropdown, label, options=list(range(check.least, check.most + 1)), **more)
        if self._is_typed:
            return styled(w.Text, label, **more | {"value": str(default)})
        if isinstance(check, Whole):
            least = NONE.get(self.name, check.least)
            return styled(w.BoundedIntText, label, step=STEPS.get(self.name, 1), min=least, max=check.most, **more)
        if isinstance(check, Number):
            return styled(w.FloatText, label, step=STEPS.get(self.name, 1), **more)
        return styled(w.Text, label, **more)


def _can_run(value: Any) -> bool:
    """Return whether a choice can be made here"""
    return value != "sagesla" or backends.choose(value).chosen is not None
