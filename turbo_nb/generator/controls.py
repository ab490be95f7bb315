"""Controls for the options of settings.py, which gives their defaults, choices, limits and tooltips."""

from typing import Any

import ipywidgets as w

from .. import backends, settings
from ..settings import Choice, Flag, Number, Whole

OWN = "own"  # stands for None in a Dropdown, because a Dropdown takes None for "nothing chosen"
BROWSER_INT = 2**53 - 1  # the largest whole number that JavaScript counts to
COLUMNS = {"width": "100%", "grid_template_columns": "repeat(auto-fit, minmax(280px, 1fr))", "grid_gap": "0 16px"}
LABELS = {
    "num_frames": "Frames", "num_steps": "Steps", "attention_type": "Attention", "sla_topk": "SLA top-k",
    "quant_linear": "Linears",
}  # fmt: skip
STEPS = {"num_frames": 4, "sla_topk": 0.05, "boundary": 0.05}  # of the arrows beside a number
ENTRIES = {
    "attention_type": {OWN: "the model's own", "sla": "SLA", "sagesla": "SageSLA", "original": "dense"},
    "quant_linear": {"auto": "as the file has them", True: "8-bit", False: "16-bit or more"},
}


def styled(kind: type, description: str, **more) -> w.Widget:
    """Make a control that is as wide as its cell."""
    layout = w.Layout(width="auto", min_width="0")
    return kind(description=description, style={"description_width": "92px"}, layout=layout, **more)


def control(cls: type, name: str) -> w.Widget:
    """Make the control of an option: its kind by the option's check, its value by the default.

    Args:
        cls: a class of options.
        name: of one of its options.
    """
    option, default = settings.options(cls)[name], cls.__dataclass_fields__[name].default
    check, label = option.check, LABELS.get(name) or name.replace("_", " ").capitalize()
    more = {"tooltip": option.help} | ({} if default is None else {"value": default})
    if isinstance(check, Flag):
        return styled(w.Checkbox, option.help.rstrip("."), indent=False, **more)  # because it shows no tooltip
    if isinstance(check, Choice):
        values = [*([OWN] if default is None else []), *check.words, *check.more]
        return styled(w.Dropdown, label, options=[(_entry(name, value), value) for value in values], **more)
    if isinstance(check, Whole) and check.most - check.least < 10:
        return styled(w.Dropdown, label, options=list(range(check.least, check.most + 1)), **more)
    if isinstance(check, Whole):
        limits = {"min": check.least, "max": min(check.most, BROWSER_INT)}
        return styled(w.BoundedIntText, label, step=STEPS.get(name, 1), **limits, **more)
    if isinstance(check, Number):
        return styled(w.FloatText, label, step=STEPS.get(name, 1), **more)
    return styled(w.Text, label, **more)


def _entry(name: str, value: Any) -> str:
    """Return the words for a value of an option; of SageSLA also that it cannot run here"""
    words = ENTRIES.get(name, {}).get(value, str(value))
    return f"{words} (cannot run here)" if value == "sagesla" and backends.choose(value).chosen is None else words
