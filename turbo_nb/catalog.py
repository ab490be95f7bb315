"""The models: what each one makes by default, and the sizes it can be asked for."""

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from .errors import InputError, UnknownModelError

ASSETS = Path(__file__).parent / "assets"

# width × height, by resolution and aspect ratio
RESOLUTIONS = {
    "480p": {"1:1": (640, 640), "4:3": (640, 480), "3:4": (480, 640), "16:9": (832, 480), "9:16": (480, 832)},
    "720p": {"1:1": (960, 960), "4:3": (960, 720), "3:4": (720, 960), "16:9": (1280, 720), "9:16": (720, 1280)},
}
SIZE_MULTIPLE = 16  # pixels: 8 of the VAE times a patch of 2


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model in a folder of diffusers layout, and its defaults.

    size is (width, height) in pixels, frames are 4n + 1 at `fps` a second, sla_topk is a share of the key blocks.
    """

    name: str
    folder: Path
    size: tuple[int, int]
    num_frames: int
    fps: int
    sla_topk: float
    sigma_max: float

    @cached_property
    def vocabulary(self) -> dict[str, dict[str, list[str]]] | None:
        """Attribute → value → words, for a model that knows only these; None for one that reads any prompt."""
        path = self.folder / "vocabulary.json"
        return json.loads(path.read_text(encoding="utf-8"))["attributes"] if path.exists() else None

    def understands(self, prompt: str) -> bool:
        """Whether the prompt names a shape and a colour of the vocabulary (always, for a model without one)."""
        if self.vocabulary is None:
            return True
        words = [{word for words in self.vocabulary[name].values() for word in words} for name in ("shape", "colour")]
        return all(any(re.search(rf"\b{re.escape(w)}\b", prompt, re.IGNORECASE) for w in known) for known in words)


NANO = ModelSpec(
    name="nano", folder=ASSETS / "nano", size=(128, 128), num_frames=25, fps=16, sla_topk=0.15, sigma_max=80.0
)
MODELS = {spec.name: spec for spec in (NANO,)}


def find(model: str) -> ModelSpec:
    """The spec of a model by name; "auto" is the best that can run here, today always `nano`.

    A path to a folder of diffusers layout works too, with Wan's defaults (832×480, 81 frames, topk 0.1).
    Raises UnknownModelError, which lists the known names.
    """
    if model == "auto":
        return NANO
    if model in MODELS:
        return MODELS[model]
    if (Path(model) / "transformer" / "config.json").is_file():
        size = RESOLUTIONS["480p"]["16:9"]
        return ModelSpec(
            name=Path(model).name, folder=Path(model), size=size, num_frames=81, fps=16, sla_topk=0.1, sigma_max=80.0
        )
    known = ", ".join(["auto", *MODELS])
    close = get_close_matches(model, MODELS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "or a folder in diffusers layout (with transformer/config.json)"
    raise UnknownModelError(f"unknown model {model!r}; known: {known}; {hint}")


def size_of(spec: ModelSpec, resolution: str | None, aspect_ratio: str | None) -> tuple[int, int]:
    """Width and height in pixels from "480p", "720p" or "WxH" (None: the model's own) and an aspect ratio.

    Raises InputError for another form, an unknown ratio, or a side that is no positive multiple of 16.
    """
    if resolution is None:
        if aspect_ratio is not None:
            raise InputError(
                f"aspect_ratio {aspect_ratio!r} needs a resolution; give {' or '.join(RESOLUTIONS)} with it"
            )
        return spec.size
    if resolution in RESOLUTIONS:
        table = RESOLUTIONS[resolution]
        ratio = aspect_ratio or "16:9"
        if ratio not in table:
            raise InputError(f"aspect_ratio is {ratio!r}; it is one of {', '.join(table)}")
        return table[ratio]
    match = re.fullmatch(r"(\d+)x(\d+)", resolution)
    if not match:
        raise InputError(
            f"resolution is {resolution!r}; it is {', '.join(RESOLUTIONS)} or WIDTHxHEIGHT, such as 128x128"
        )
    if aspect_ratio is not None:
        raise InputError(f"resolution {resolution} already says the aspect ratio; leave aspect_ratio out")
    width, height = int(match[1]), int(match[2])
    if width < 1 or height < 1 or width % SIZE_MULTIPLE or height % SIZE_MULTIPLE:
        near = "x".join(str(max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE) for side in (width, height))
        raise InputError(
            f"resolution is {resolution}; width and height are multiples of {SIZE_MULTIPLE}, such as {near}"
        )
    return width, height
