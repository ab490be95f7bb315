"""The models: what each one makes by default, and the sizes it can be asked for."""

import json
import re
from dataclasses import dataclass, replace
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


# Prompts for a model that reads anything, which was trained on long ones, and for one with a vocabulary
EXAMPLES = (
    "A small wooden boat drifts across a calm mountain lake at sunrise, mist rising slowly from the water, pine woods "
    "and snowy peaks mirrored on its surface; soft golden light, gentle ripples, the camera glides forward, cinematic.",
    "a large red circle moving from left to right on a black background",
)


@dataclass(frozen=True)
class HubFile:
    """A file of a Hub repository. revision: a branch, tag or commit; None is main. A `path` ending in / is a folder."""

    repo: str
    path: str
    revision: str | None = None


VAE = HubFile("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth")
TEXT_ENCODER = HubFile("Wan-AI/Wan2.1-T2V-1.3B", "models_t5_umt5-xxl-enc-bf16.pth")
TOKENIZER = HubFile("google/umt5-xxl", "/")


@dataclass(frozen=True, kw_only=True)
class Arch:
    """The shape of a Wan transformer. in_channels: 16 for text-to-video, 36 for image-to-video."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 16

    @property
    def task(self) -> str | None:
        """ "t2v" or "i2v"; None for a number of channels that none of ours has."""
        return {16: "t2v", 36: "i2v"}.get(self.in_channels)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model and its defaults.

    task: "t2v", or "i2v" with two experts. size is (width, height) in pixels, frames are 4n + 1 at `fps` a second,
    sla_topk is a share of the key blocks; below noise level `boundary` an i2v model's low-noise expert takes over.
    The weights are in `folder` (diffusers layout), or on the Hub: `files` and, with int8 linears, `quant_files`; two
    files are (high-noise, low-noise).
    """

    name: str
    arch: Arch | None = None
    task: str = "t2v"
    size: tuple[int, int]
    num_frames: int
    fps: int
    sla_topk: float
    sigma_max: float
    boundary: float | None = None
    folder: Path | None = None
    files: tuple[HubFile, ...] = ()
    quant_files: tuple[HubFile, ...] = ()

    @property
    def example(self) -> str:
        """A prompt that suits the model."""
        return EXAMPLES[self.vocabulary is not None]

    @cached_property
    def vocabulary(self) -> dict[str, dict[str, list[str]]] | None:
        """Attribute → value → words, for a model that knows only these; None for one that reads any prompt."""
        path = self.folder and self.folder / "vocabulary.json"
        return json.loads(path.read_text(encoding="utf-8"))["attributes"] if path and path.exists() else None

    @cached_property
    def preview(self) -> list[list[float]] | None:
        """The `factors` of `media.preview` that ship with the model; None for one whose first clip has to tell."""
        path = self.folder and self.folder / "preview.json"
        return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else None

    def understands(self, prompt: str) -> bool:
        """Whether the prompt names a shape and a colour of the vocabulary (always, for a model without one)."""
        if self.vocabulary is None:
            return True
        words = [{word for words in self.vocabulary[name].values() for word in words} for name in ("shape", "colour")]
        return all(any(re.search(rf"\b{re.escape(w)}\b", prompt, re.IGNORECASE) for w in known) for known in words)


NANO = ModelSpec(
    name="nano",
    arch=Arch(dim=256, num_heads=4, num_layers=7, ffn_dim=960),
    folder=ASSETS / "nano",
    size=(128, 128),
    num_frames=25,
    fps=16,
    sla_topk=0.15,
    sigma_max=80.0,
)
ARCH_1_3B = Arch(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
ARCH_14B = Arch(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
ARCH_A14B = replace(ARCH_14B, in_channels=36)


def _released(
    name: str, stems: tuple[str, ...], arch: Arch, resolution: str, sigma_max: float = 80.0, **more
) -> ModelSpec:
    """A model of the Hub organisation TurboDiffusion: `<stem>.pth` and `<stem>-quant.pth`"""
    return ModelSpec(
        name=name,
        arch=arch,
        size=RESOLUTIONS[resolution]["16:9"],
        num_frames=81,
        fps=16,
        sla_topk=0.1,
        files=tuple(HubFile(f"TurboDiffusion/{name}", f"{stem}.pth") for stem in stems),
        quant_files=tuple(HubFile(f"TurboDiffusion/{name}", f"{stem}-quant.pth") for stem in stems),
        sigma_max=sigma_max,
        **more,
    )


def _released_t2v(name: str, arch: Arch, resolution: str) -> ModelSpec:
    return _released(name, (name,), arch, resolution)


MODELS = {
    spec.name: spec
    for spec in (
        NANO,
        _released_t2v("TurboWan2.1-T2V-1.3B-480P", ARCH_1_3B, "480p"),
        _released_t2v("TurboWan2.1-T2V-14B-480P", ARCH_14B, "480p"),
        _released_t2v("TurboWan2.1-T2V-14B-720P", ARCH_14B, "720p"),
        _released(
            "TurboWan2.2-I2V-A14B-720P",
            ("TurboWan2.2-I2V-A14B-high-720P", "TurboWan2.2-I2V-A14B-low-720P"),
            ARCH_A14B, "720p", task="i2v", sigma_max=200.0, boundary=0.9,
        ),
    )
}  # fmt: skip
# What upstream's --model takes → the catalogue's name
UPSTREAM_NAMES = {
    "Wan2.1-1.3B": "TurboWan2.1-T2V-1.3B-480P",
    "Wan2.1-14B": "TurboWan2.1-T2V-14B-480P",
    "Wan2.2-A14B": "TurboWan2.2-I2V-A14B-720P",
}


def find(model: str) -> ModelSpec:
    """The spec of a model by its name or upstream's; what "auto" stands for depends on the machine: `auto.choose`.

    Raises UnknownModelError, which lists the known names.
    """
    name = UPSTREAM_NAMES.get(model, model)
    if name in MODELS:
        return MODELS[name]
    known = ", ".join(["auto", *MODELS, *UPSTREAM_NAMES])
    close = get_close_matches(model, [*MODELS, *UPSTREAM_NAMES], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "or the path of a checkpoint or of a folder in diffusers layout"
    raise UnknownModelError(f"unknown model {model!r}; known: {known}; {hint}")


def is_name(model) -> bool:
    """Whether `model` is a name, known or not, and no path; a known name is one whatever lies in this folder."""
    if isinstance(model, str | Path) and str(model) in ("auto", *MODELS, *UPSTREAM_NAMES):
        return True
    return isinstance(model, str) and not Path(model).exists()


def of_arch(arch: Arch) -> ModelSpec | None:
    """The first model of this shape; None if it is none of ours."""
    return next((spec for spec in MODELS.values() if spec.arch == arch), None)


def unnamed(name: str, arch: Arch, task: str) -> ModelSpec:
    """A spec with Wan's defaults for a model of another shape."""
    like = find("Wan2.2-A14B" if task == "i2v" else "Wan2.1-1.3B")
    return replace(like, name=name, arch=arch, size=RESOLUTIONS["480p"]["16:9"], files=(), quant_files=())


def adaptive_size(area: int, width: int, height: int) -> tuple[int, int]:
    """Width and height, multiples of 16, of about `area` pixels, with the aspect of an image of width × height."""
    sides = ((area * width / height) ** 0.5, (area * height / width) ** 0.5)
    return tuple(max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in sides)


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
