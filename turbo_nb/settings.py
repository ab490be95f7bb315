"""Every option of this package, declared once: its type, default, help text and check.

`LoadOptions` chooses a model and how it is loaded. `ClipSettings` describes one clip. `RunOptions` says what a command
makes of them. The command line, `load_pipeline`, `generate`, the rows of a batch, the widgets and the metadata of an
mp4 are derived from these three classes. To add an option, add one field here.

Constructing one of the classes checks it: a value that cannot be used raises InputError before any other work.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal

from . import catalog
from .errors import InputError
from .values import (
    Anything,
    Choice,
    Count,
    Flag,
    LoRAFile,
    LoRAFiles,
    Number,
    PathLike,
    Prompt,
    Sides,
    Text,
    Whole,
    closest,
    shown,
    wrong,
)

MAX_STEPS = 4  # steps that rCM models were trained for
MAX_SEED = 2**63 - 1  # torch's generators take 63 bits
MAX_SAMPLES = 10_000  # clips of one prompt in one run
MAX_GPUS = 1024
MAX_EXTENSIONS = 20  # of a clip, whose frames stay in memory
MAX_POSITIONS = 1024  # length of diffusers' rotary tables, in latent patches along each axis
MAX_FRAMES = 4 * (MAX_POSITIONS - 1) + 1
SIGMA_MAX_ABOVE = math.tan(1.5)  # the second trig-flow time of rCM is 1.5, and noise levels must fall
ATTENTION_TYPES = ("sla", "sagesla", "original")
PICTURES = ("image", "last_image")  # options of a clip that are pictures
PLAN_NAMES = ("auto", "resident", "cpu-text", "free-text", "offload-cpu-text", "offload", "offload-tiled", "group")
Weights = str | Path | tuple[str | Path, str | Path]  # a file or a folder; or (high-noise, low-noise)


# Declarations


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is declared of an option beside its name and default.

    Args:
        check: checks a value and returns it in its own type.
        help: one sentence for `--help`, docstrings and tooltips.
        group: the panel of `--help` in which the option stands.
        flag: its spelling on the command line, where that is not its name.
        scale: what the number given on the command line is multiplied by.
        row: whether a row of a batch may set it.
    """

    check: Any
    help: str
    group: str
    flag: str | None = None
    scale: float | None = None
    row: bool = False

    def parse(self, name: str, text: str) -> Any:
        """Return the value that a cell's text stands for. Raises InputError where it stands for none."""
        text, kind = text.strip(), self.check.type
        try:
            if kind is bool:
                value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
            else:
                value = kind(text) if kind in (int, float) else text
        except (KeyError, ValueError):
            value = text
        return self.check(name, value)


def _option(default: Any, check: Any, help: str, group: str, **more) -> Any:
    return field(default=default, metadata={"option": Option(check=check, help=help, group=group, **more)})


class _Checked:
    """Checks every field of a dataclass when an instance is made. None stands for the default."""

    def __post_init__(self):
        for name, option in options(type(self)).items():
            value = getattr(self, name)
            if value is not None or self.__dataclass_fields__[name].default is MISSING:
                object.__setattr__(self, name, option.check(name, value))
            elif (default := self.__dataclass_fields__[name].default) is not None:
                object.__setattr__(self, name, default)


@cache
def options(cls: type) -> dict[str, Option]:
    """Return the options that a class declares, by name, in order."""
    return {one.name: one.metadata["option"] for one in fields(cls)}


@dataclass(frozen=True, kw_only=True)
class LoadOptions(_Checked):
    """Which model to load, and how."""

    model: Weights = _option(
        "auto",
        PathLike(pair=True, hub=True, type=str),
        "A model's name, auto, a checkpoint, a folder, or a Hub id such as owner/repo/file@rev.",
        "model",
    )
    checkpoint: Weights | None = _option(
        None,
        PathLike(pair=True, hub=True),
        "The checkpoint to take for a model given by name.",
        "model",
        flag="--dit-path",
    )
    attention_type: Literal["sla", "sagesla", "original"] | None = _option(
        None, Choice(ATTENTION_TYPES), "Attention; sla if left out, original (dense) for a file without SLA.", "model"
    )
    sla_topk: float | None = _option(
        None,
        Number(lambda x: 0 < x <= 1, "above 0 and at most 1, such as 0.1"),
        "Share of the key blocks that SLA attends to; the model's own if left out.",
        "model",
    )
    quant_linear: bool | Literal["auto"] = _option(
        "auto", Choice(("auto",), (True, False)), "8-bit linears, or not; as the file has them if left out.", "model"
    )
    attention_backend: str | None = _option(
        None,
        Choice(("auto", "gluon", "triton", "spargeattn", "reference")),
        "What runs SageSLA; the fastest that works here if left out.",
        "advanced",
    )
    vae: str | Path | None = _option(
        None, PathLike(hub=True), "Wan2.1_VAE.pth, or a folder.", "model", flag="--vae-path"
    )
    text_encoder: str | Path | None = _option(
        None,
        PathLike(hub=True),
        "umT5: a .pth, fp8, int8 or GGUF file, or a folder.",
        "model",
        flag="--text-encoder-path",
    )
    tokenizer: str | Path | None = _option(
        None,
        PathLike(hub=True),
        "umT5's tokenizer: a folder, spiece.model, or a text encoder with a tokenizer in its file.",
        "model",
        flag="--tokenizer-path",
    )
    loras: tuple[LoRAFile, ...] = _option(
        (),
        LoRAFiles(),
        "A LoRA as FILE or FILE:STRENGTH, such as style.safetensors:0.8; high=FILE or low=FILE for one of two experts.",
        "model",
        flag="--lora",
    )
    tiny_decoder: str | Path | None = _option(
        None,
        PathLike(hub=True),
        "taew2_1.safetensors, which decodes with --decoder tiny; from the Hub if left out.",
        "model",
        flag="--tiny-decoder-path",
    )
    device: str = _option(
        "auto",
        Text("auto, cpu, cuda, or one GPU of several, such as cuda:1", r"auto|cpu|cuda|cuda:[0-9]{1,3}"),
        "auto, cpu, cuda, or one GPU such as cuda:1.",
        "memory",
    )
    gpus: int | Literal["all"] = _option(
        1, Count(MAX_GPUS), "GPUs of this machine that make a clip together, or all.", "memory"
    )
    memory_plan: str = _option(
        "auto", Choice(PLAN_NAMES), "Where the parts go; auto takes the fastest that fits.", "memory", flag="--plan"
    )
    memory: float | None = _option(
        None,
        Number(lambda x: x > 0, "above 0 (bytes; on the command line GB, such as 12)"),
        "Plan for this many GB of GPU memory; what is free if left out.",
        "memory",
        scale=1e9,
    )
    text_cache: bool | None = _option(
        None, Flag(), "Keep embeddings of prompts on disk; TURBO_NB_TEXT_CACHE decides if left out.", "advanced"
    )


@dataclass(frozen=True, kw_only=True)
class ClipSettings(_Checked):
    """One clip as it was asked for. None stands for the model's own value."""

    prompt: str = _option(
        MISSING,
        Prompt("text that says what to show", fix="Write a prompt, such as 'a small green square growing'."),
        "What to show.",
        "clip",
    )
    image: Any = _option(
        None, Anything(), "The picture that the clip begins with.", "clip", flag="--image-path", row=True
    )
    last_image: Any = _option(
        None, Anything(), "The picture that the clip, or its last extension, ends with.", "clip", row=True
    )
    num_frames: int | None = _option(
        None, Whole(1, MAX_FRAMES), "4n + 1; the model's own if left out.", "clip", row=True
    )
    num_steps: int = _option(
        4,
        Whole(1, MAX_STEPS, "rCM models are trained for few steps."),
        "Steps of the sampler, 1 to 4.",
        "clip",
        row=True,
    )
    seed: int = _option(0, Whole(0, MAX_SEED), "The same seed gives the same clip.", "clip", row=True)
    resolution: str | None = _option(
        None,
        Sides(
            "480p, 720p, WIDTHxHEIGHT or (WIDTH, HEIGHT), such as 128x128", r"480p|720p|\s*\d{1,6}\s*[xX×]\s*\d{1,6}\s*"
        ),
        "480p, 720p or WIDTHxHEIGHT; the model's own if left out.",
        "clip",
        row=True,
    )
    aspect_ratio: str | None = _option(
        None,
        Choice(tuple(catalog.RESOLUTIONS["480p"])),
        "Aspect of the picture, with 480p or 720p.",
        "clip",
        row=True,
    )
    adaptive_resolution: bool = _option(
        False, Flag(), "Keep the image's aspect, at the resolution's area.", "clip", row=True
    )
    extend: int | None = _option(
        None,
        Whole(1, MAX_EXTENSIONS),
        "Continue the clip N times from its last frame, with an image-to-video model.",
        "clip",
        row=True,
    )
    extend_clip: Path | None = _option(
        None,
        PathLike(),
        "A finished mp4 to continue in place of an image: once, or as often as extend says.",
        "clip",
    )
    sigma_max: float | None = _option(
        None,
        Number(lambda x: x > SIGMA_MAX_ABOVE, f"above {SIGMA_MAX_ABOVE:.1f}, such as 80"),
        "First noise level; a larger one is sharper and less diverse.",
        "clip",
        row=True,
    )
    ode: bool = _option(False, Flag(), "Sample the ODE: sharper, less robust.", "clip", row=True)
    boundary: float | None = _option(
        None,
        Number(lambda x: 0 <= x <= 1, "from 0 to 1, such as 0.9"),
        "Noise level below which the low-noise expert works.",
        "clip",
        row=True,
    )
    decoder: Literal["full", "tiny"] = _option(
        "full",
        Choice(("full", "tiny")),
        "full: the VAE; tiny: TAEHV's decoder, which is quick and softer, for Wan2.1's VAE.",
        "advanced",
        row=True,
    )
    noise_device: Literal["cpu", "cuda"] = _option(
        "cpu", Choice(("cpu", "cuda")), "cpu: the same clip everywhere; cuda: upstream's seeds.", "advanced", row=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.extend_clip is not None:
            if self.image is not None:
                raise InputError(
                    "image is given. Expected none beside extend_clip, because the clip's last frame is the image. "
                    "Leave one out."
                )
            object.__setattr__(self, "extend", self.extend or 1)
        if self.num_frames is not None and self.num_frames % 4 != 1:
            near = 4 * max(0, round((self.num_frames - 1) / 4)) + 1
            raise wrong("num_frames", self.num_frames, "4n + 1 (1, 5, 9, …)", f"Take {near}.")
        seeds(self.seed, 1 + (self.extend or 0))
        if self.resolution is not None or self.aspect_ratio is not None:
            size_of(None, self.resolution, self.aspect_ratio)


@dataclass(frozen=True, kw_only=True)
class RunOptions(_Checked):
    """What a command makes, and where it writes it."""

    save_path: Path = _option(Path("video.mp4"), PathLike(), "The mp4 to write.", "output")
    output_dir: Path = _option(Path("outputs/batch"), PathLike(), "The folder of videos and manifest.", "output")
    num_samples: int = _option(1, Whole(1, MAX_SAMPLES), "Clips to make, with seed, seed + 1, …", "output")
    grid: bool = _option(False, Flag(), "Put the samples side by side into one file.", "output")
    workers: int | None = _option(
        None, Whole(1, 1024), "Copies of the model, each on its GPU; one a GPU if left out.", "memory"
    )
    ray_address: str | None = _option(
        None,
        Text("the address of a Ray cluster, such as 10.0.0.5:6379, or auto", r"[^\s]{1,300}"),
        "A Ray cluster that makes the clips; RAY_ADDRESS if left out.",
        "memory",
        flag="--ray",
    )


def build(cls: type, values: Mapping[str, Any], **more: Any) -> Any:
    """Make an instance of a class of options.

    Args:
        cls: LoadOptions, ClipSettings or RunOptions.
        values: options by name.
        more: options that override `values`.

    Raises:
        InputError: an option is unknown, missing, or has a value that cannot be used.
    """
    values = {**values, **more}
    check_names("an option", values, options(cls))
    for name, one in cls.__dataclass_fields__.items():
        if one.default is MISSING and name not in values:
            raise InputError(f"{name} is missing. Expected a value for it. {options(cls)[name].help}")
    return cls(**values)


def asked(values: Any) -> dict[str, Any]:
    """Return the options of an instance that differ from their defaults, as JSON takes them; see `build_known`."""
    given = {name: getattr(values, name) for name in options(type(values))}
    defaults = {name: one.default for name, one in type(values).__dataclass_fields__.items()}
    return {
        name: _as_json(value)
        for name, value in given.items()
        # an array, which a picture can be, is compared with nothing, because the result is an array
        if value is not None and (defaults[name] is None or value != defaults[name])
    }


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json(one) for one in value]
    return str(value) if isinstance(value, os.PathLike | LoRAFile) else value


def build_known(cls: type, values: Any) -> tuple[Any, list[str]]:
    """Make an instance of a class of options from parsed JSON of any origin, such as `asked` gives.

    Args:
        cls: LoadOptions or ClipSettings.
        values: options by name.

    Returns:
        The instance, and the names of what was left out: unknown options, and those with a value that cannot be used.
        The instance is None where a required option is missing.
    """
    known, left_out = {}, []
    for name, value in values.items() if isinstance(values, Mapping) else ():
        try:
            known[str(name)] = options(cls)[name].check(str(name), value)
        except (KeyError, InputError):
            left_out.append(str(name))
    try:
        return build(cls, known), left_out
    except InputError:
        return None, left_out


def check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError for the first name that is not known; `what` says what the names are of."""
    for name in names:
        if name not in known:
            close = closest(name, known)
            raise InputError(f"{what} is {shown(name)}. Expected one of {', '.join(sorted(known))}. {close}".strip())


# A clip of a model


@dataclass(frozen=True, kw_only=True)
class ResolvedClip:
    """Everything that determines a clip of a model, with the model's defaults filled in.

    Width and height are in pixels; boundary is None for a model with one expert. `more` has the values of options that
    no other field holds. A new option of ClipSettings thereby reaches job ids and metadata.
    """

    model: str
    prompt: str
    seed: int
    num_steps: int
    num_frames: int
    width: int
    height: int
    sigma_max: float
    ode: bool
    noise_device: str
    boundary: float | None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int, int]:
        """Width, height and number of frames, of one part where the clip is extended."""
        return self.width, self.height, self.num_frames

    @property
    def parts(self) -> int:
        """How many times the model makes `num_frames` frames: once for a new clip, and once for each extension."""
        return self.more.get("extend", 0) + ("extend_clip" not in self.more)

    @property
    def all_frames(self) -> int:
        """Number of frames of all parts. A part begins with the last frame of the part before it."""
        return 1 + self.parts * (self.num_frames - 1)


def resolve_clip(
    settings: ClipSettings, spec: catalog.ModelSpec, image_size: tuple[int, int] | None = None
) -> ResolvedClip:
    """Fill in a model's defaults.

    Args:
        settings: the clip as it was asked for.
        spec: the model.
        image_size: width and height of the image that the clip begins with; None without an image. A finished clip
            that is extended gives its own size.

    Returns:
        The clip.

    Raises:
        InputError: a setting does not suit this model.
    """
    if settings.boundary is not None and spec.boundary is None:
        raise wrong("boundary", settings.boundary, f"None for {spec.name}, which has one expert", "Leave it out.")
    width, height = size_of(spec, settings.resolution, settings.aspect_ratio)
    if image_size and settings.extend_clip:
        width, height = _size_of_extended(settings, width, height, *image_size)
    elif image_size and settings.adaptive_resolution:
        width, height = adaptive_size(width * height, *image_size)
        _check_sides(f"{width}x{height}", width, height, "Crop the image, or leave adaptive_resolution out.")
    held = {*ResolvedClip.__dataclass_fields__, *PICTURES, "resolution", "aspect_ratio", "adaptive_resolution"}
    return ResolvedClip(
        more={name: value for name, value in asked(settings).items() if name not in held},
        model=spec.name,
        prompt=settings.prompt,
        seed=settings.seed,
        num_steps=settings.num_steps,
        num_frames=spec.num_frames if settings.num_frames is None else settings.num_frames,
        width=width,
        height=height,
        sigma_max=spec.sigma_max if settings.sigma_max is None else settings.sigma_max,
        ode=settings.ode,
        noise_device=settings.noise_device,
        boundary=spec.boundary if settings.boundary is None else settings.boundary,
    )


def _size_of_extended(settings: ClipSettings, width: int, height: int, *own: int) -> tuple[int, int]:
    """Return the size of a finished clip. Raises InputError where another one was asked for"""
    name, size = shown(Path(settings.extend_clip)), "{}x{}".format(*own)
    if settings.resolution is None:
        _check_sides(size, *own, f"{name} cannot be extended.")
    elif (width, height) != own:
        raise InputError(
            f"resolution is {settings.resolution!r}. Expected {size}, the size of {name}, which is extended. Leave it "
            "out."
        )
    return own


def seeds(first: int, count: int) -> range:
    """Return the seeds of `count` clips. Raises InputError where the last one is too large for a generator."""
    if first + count - 1 > MAX_SEED:
        raise wrong("seed", first, f"at most {MAX_SEED - count + 1} for {count} samples or parts")
    return range(first, first + count)


def adaptive_size(area: int, width: int, height: int) -> tuple[int, int]:
    """Return the sides, multiples of 16, of about `area` pixels with the aspect of an image of width × height."""
    sides = ((area * width / height) ** 0.5, (area * height / width) ** 0.5)
    return tuple(max(1, round(side / catalog.SIZE_MULTIPLE)) * catalog.SIZE_MULTIPLE for side in sides)


def size_of(spec: catalog.ModelSpec | None, resolution: str | None, aspect_ratio: str | None) -> tuple[int, int]:
    """Return width and height in pixels.

    Args:
        spec: the model, whose own size is taken where resolution is None. Otherwise it is not used.
        resolution: "480p", "720p" or "WIDTHxHEIGHT".
        aspect_ratio: "16:9" and others, for 480p and 720p.

    Raises:
        InputError: the two do not go together, or a side is not a multiple of 16 within the model's limits.
    """
    known = " or ".join(catalog.RESOLUTIONS)
    if resolution is None:
        if aspect_ratio is not None:
            raise wrong("aspect_ratio", aspect_ratio, "None without a resolution", f"Give resolution {known} with it.")
        return spec.size
    if resolution in catalog.RESOLUTIONS:
        return catalog.RESOLUTIONS[resolution][aspect_ratio or "16:9"]
    width, height = (int(side) for side in re.split(r"[xX×]", resolution))
    if aspect_ratio is not None:
        raise wrong("aspect_ratio", aspect_ratio, f"None with resolution {resolution}", f"Or give resolution {known}.")
    near = "x".join(str(_near(side)) for side in (width, height))
    _check_sides(resolution, width, height, f"Take {near}.")
    return width, height


def _near(side: int) -> int:
    multiple = catalog.SIZE_MULTIPLE
    return min(MAX_POSITIONS, max(1, round(side / multiple))) * multiple


def _check_sides(resolution: str, width: int, height: int, fix: str) -> None:
    multiple = catalog.SIZE_MULTIPLE
    most = MAX_POSITIONS * multiple
    if any(side < 1 or side % multiple or side > most for side in (width, height)):
        raise wrong("resolution", resolution, f"sides that are multiples of {multiple}, from {multiple} to {most}", fix)


# Signatures and documentation


def accepts(*classes: type, skip: Iterable[str] = ()) -> Callable:
    """Give a function the options of some classes as keyword arguments.

    The first parameters of the decorated function receive one instance of each class, in order. Every other argument
    is passed on unchanged. The function's signature and docstring list all options.

    Args:
        classes: of options, in the order of the function's first parameters.
        skip: options that the function does not take.
    """
    declared = {name: cls for cls in classes for name in options(cls) if name not in skip}

    def decorate(function: Callable) -> Callable:
        own = list(inspect.signature(function).parameters.values())
        takes, rest = own[: len(classes)], own[len(classes) :]
        first = [p for p in rest if p.kind is p.POSITIONAL_OR_KEYWORD]
        others = [p for p in rest if p.kind is p.KEYWORD_ONLY]
        positional = [name for name in ("model", "prompt") if name in declared]

        @wraps(function)
        def call(*args, **kwargs):
            names = [p.name for p in first] + positional
            if len(args) > len(names):
                raise TypeError(f"{function.__name__}() takes {len(names)} positional arguments, got {len(args)}")
            given = dict(zip(names, args, strict=False))
            if twice := given.keys() & kwargs.keys():
                raise TypeError(f"{function.__name__}() got several values for {', '.join(sorted(twice))}")
            given |= kwargs
            check_names(f"an argument of {function.__name__}", given, {*declared, *(p.name for p in rest)})
            built = {}
            for parameter, cls in zip(takes, classes, strict=True):
                chosen = {n: given.pop(n) for n, owner in declared.items() if owner is cls and n in given}
                built[parameter.name] = build(cls, chosen)
            return function(**built, **given)

        made = [*first]
        for name in declared:
            default = declared[name].__dataclass_fields__[name].default
            made.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD if name in positional else inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if default is MISSING else default,
                    annotation=declared[name].__dataclass_fields__[name].type,
                )
            )
        made.sort(key=lambda p: p.kind)
        call.__signature__ = inspect.Signature([*made, *others])
        lines = [f"    {name}: {options(cls)[name].help}" for name, cls in declared.items()]
        call.__doc__ = (inspect.getdoc(function) or "").replace("{options}", "\n".join(lines).strip())
        return call

    return decorate
