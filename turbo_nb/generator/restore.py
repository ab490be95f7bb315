""" "Use these settings": put how a clip was made back into the form."""

from dataclasses import asdict
from pathlib import PurePath

from ..errors import presentable
from ..records import VideoRecord
from .controls import in_page_words, label_of
from .form import Form

MOST_LINES = 20
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
    known = asdict(record) | record.more | {"seed": seeds[0] if seeds else None, "prompt": record.prompt or None}
    known["model"] = record.model or None
    sized = record.width is not None and record.height is not None
    values = {name: known.get(name) for name in form.fields}
    values |= {"prompt": known["prompt"], "resolution": f"{record.width}x{record.height}" if sized else None}
    values |= {"random_seed": False, "adaptive_resolution": False}  # False, because the size is known exactly
    extended = record.more.get("extend_clip")
    if extended:  # the form has no place for it, and its extensions are not those of an image
        values["extend"] = None
    with form.holding():
        lost = form.put({"model": known["model"]}) if known["model"] else {}
        lost |= form.loras.restore(record.loras) | form.put(values)
    # an option that clips of other versions do not have was not set, so that None is what it had
    has_place = {*VideoRecord.__dataclass_fields__, *record.more}
    for name in ("model", "prompt", *form.fields):
        if (
            known.get(name) is None
            and name in has_place
            and not (name in form.fields and form.fields[name].widget.disabled)
        ):
            lost[name] = MISSING
    if not sized:
        lost["resolution"] = MISSING
    if len(seeds) > 1:
        lost["seed"] = f"{seeds[0]} is the first of a grid of {', '.join(map(str, seeds))}"
    form.last_image.clear()
    if form.spec and form.spec.task == "i2v":
        if extended:
            lost["image"] = f"press Extend at the clip {PurePath(str(extended)).name}"
        elif not (record.image and form.image.take(record.image, record.image)):
            lost["image"] = "choose it again"
        if record.last_image and not form.last_image.take(record.last_image, record.last_image):
            lost["last_image"] = "choose it again"
    return lost


def left_out(lost: dict[str, str]) -> str:
    """Return what the form could not take, by the page's labels, a line for each."""
    lines = []
    for name, reason in lost.items():
        label, words = label_of(short(name, 60)), in_page_words(short(reason))
        lines.append(words if words.startswith(f"{label} is ") else f"{label}: {words}")
    return "\n".join([*lines[:MOST_LINES], *([f"and {len(lines) - MOST_LINES} more"] * (len(lines) > MOST_LINES))])


def short(text: str, longest: int = 300) -> str:
    """Return text of a foreign file in one line, because it may be endless."""
    return presentable(" ".join(text.split()), longest)
