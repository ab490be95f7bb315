""" "Use these settings": put how a clip was made back into the form."""

from contextlib import suppress
from dataclasses import asdict
from typing import Any

from traitlets import TraitError

from .. import catalog
from ..errors import presentable
from ..records import VideoRecord
from .controls import OWN
from .form import CUSTOM, Form

MISSING = "the file does not give it"


def restore(form: Form, record: VideoRecord) -> dict[str, str]:
    """Put the settings of a clip into the form.

    Args:
        form: whose controls are set.
        record: how the clip was made. Of a grid the first seed is taken.

    Returns:
        The reasons why an option could not be restored, by its name. The form has the model's own value for it.
    """
    seeds = [record.seed] if isinstance(record.seed, int) else record.seed
    values = asdict(record) | record.more | {"seed": seeds[0] if seeds else None}
    with form.holding():
        lost = _model(form, record.model)
        lost |= _size(form, record.width, record.height)
        lost |= form.loras.restore(record.loras)
        form.prompt.value = record.prompt
        unset = [name for name in form.controls if not _set(form, name, values.get(name))]
        form.random_seed.value = False
    for name in unset:
        has_place = name in VideoRecord.__dataclass_fields__ or name in record.more  # else None is what it had
        if has_place and not form.controls[name].disabled:
            lost[name] = MISSING if values.get(name) is None else f"{values[name]} is not on the page"
    if len(seeds) > 1:
        lost["seed"] = f"{seeds[0]} is the first of a grid of {', '.join(map(str, seeds))}"
    if not record.prompt:
        lost["prompt"] = MISSING
    if form.spec and form.spec.task == "i2v" and not (record.image and form.image.take(record.image, record.image)):
        lost["image"] = "choose it again"
    return {name: presentable(reason, 300) for name, reason in lost.items()}  # foreign metadata may be endless


def _model(form: Form, name: str) -> dict[str, str]:
    if form.spec and form.spec.name == name:  # a model given by its path may have the name of a released one
        return {}
    if name in [value for _, value in form.model.options]:
        form.model.value = name
        return {}
    return {"model": f"{name!r} is not in this list: show the generator with model= its path" if name else MISSING}


def _size(form: Form, width: int | None, height: int | None) -> dict[str, str]:
    form.resolution.value = OWN
    if width is None or height is None:
        return {"resolution": MISSING}
    form.image.adaptive.value = False  # because the clip's size is known exactly
    if form.spec and (width, height) == form.spec.size:
        return {}
    for name, table in catalog.RESOLUTIONS.items():
        for ratio, size in table.items():
            if size == (width, height):
                form.resolution.value, form.aspect.value = name, ratio
                return {}
    form.resolution.value, form.custom.value = CUSTOM, f"{width}x{height}"
    return {}


def _set(form: Form, name: str, value: Any) -> bool:
    """Set a control; return False where it cannot show the value, and show the default"""
    control = form.controls[name]
    if value is not None:
        with suppress(TraitError):
            control.value = value
            if control.value == value:  # a control with limits takes the nearest value
                return True
    control.value = form.defaults[name]
    return False
