"""What can stop a clip: its settings against the model, its pictures, the clip that it extends, memory and disk.

Everything here happens before a model is downloaded or loaded.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .catalog import ModelSpec
from .errors import InputError
from .files.resolve import ResolvedModel, resolve
from .records import VideoRecord
from .settings import PICTURES, ClipSettings, LoadOptions, ResolvedClip, resolve_clip
from .values import shown
from .video import images, mp4

if TYPE_CHECKING:
    from PIL.Image import Image

RATE_SLACK = 0.02  # of frames a second, because some programs round the length of a frame to milliseconds


@dataclass(frozen=True, kw_only=True)
class PreparedClip:
    """A clip that can be made: its settings with the model's defaults, and its pictures.

    Args:
        pictures: the first frame as `image`, and the last one as `last_image`, as they were given.
        earlier: how the clip that is extended was made. None: a new clip.
    """

    clip: ResolvedClip
    pictures: "dict[str, Image]"
    earlier: VideoRecord | None = None

    @property
    def image(self) -> "Image | None":
        """The picture that the clip begins with."""
        return self.pictures.get("image")


def preflight(
    settings: ClipSettings,
    load: LoadOptions | Callable[[], ResolvedModel],
    paths: Iterable["str | Path"],
    *,
    columns: int = 1,
) -> tuple[ResolvedModel, PreparedClip]:
    """Check everything that can stop a run, before anything is downloaded or loaded.

    The options were checked when they were made. First come the encoder, the files to write and the pictures. Then come
    the model and whether its parts fit together, of which a reference asks the Hub for heads. Last come the clip's
    settings against the model, the memory plan, and the space for a clip. `ResolvedModel.fetch` checks the space for
    the download before its first byte.

    Args:
        settings: the clip.
        load: the model, or a function that resolves it.
        paths: of the mp4 files to write.
        columns: clips that each file has side by side.

    Returns:
        The model, and the clip with its pictures.

    Raises:
        InputError, OutputError, UnknownModelError, CheckpointError, BackendError: the run cannot end well.
        DownloadError: a reference names something that neither the Hub nor the cache has.
    """
    paths = [mp4.check_output(path) for path in paths]
    opened = _opened(settings)
    for path in paths:
        if settings.extend_clip is not None and path.exists() and path.samefile(settings.extend_clip):
            raise InputError(
                f"save_path is {shown(path)}, the clip to extend. Expected another file, so that the clip stays. "
                "Choose another name."
            )
    resolved = resolve(load) if isinstance(load, LoadOptions) else load()
    prepared = prepare(settings, resolved.spec, opened)
    resolved = resolved.decoding(settings.decoder)
    resolved.plan(prepared.clip.size)
    resolved.require_memory(prepared.clip, columns)
    width, height = prepared.clip.width * columns, prepared.clip.height
    mp4.check_size(paths[0], width, height)
    mp4.check_space(paths[0], width, height, count_frames(settings, resolved.spec))
    return resolved, prepared


def count_frames(settings: ClipSettings, spec: ModelSpec) -> int:
    """Return how many frames a clip will have, with those of the clip that it extends."""
    clip = resolve_clip(settings, spec)
    if settings.extend_clip is None:
        return clip.all_frames
    return mp4.count_frames(settings.extend_clip) + clip.all_frames - 1  # the parts begin with its last frame


def prepare(
    settings: ClipSettings, spec: ModelSpec, opened: "tuple[dict[str, Image], VideoRecord | None] | None" = None
) -> PreparedClip:
    """Check a clip against a model; no model is loaded.

    Args:
        settings: the clip.
        spec: the model.
        opened: the settings' pictures and the record of the clip to extend, where they were opened before. None: they
            are opened now.

    Raises:
        InputError: a setting does not suit the model, or a picture is missing, unwanted or cannot be read.
    """
    check(settings, spec)
    pictures, earlier = opened or _opened(settings)
    image = pictures.get("image")
    clip = resolve_clip(settings, spec, image and image.size)
    if earlier:
        _check_earlier(settings.extend_clip, earlier, spec)
    return PreparedClip(clip=clip, pictures=pictures, earlier=earlier)


def _check_earlier(path: Path, earlier: VideoRecord, spec: ModelSpec) -> None:
    """Raise InputError for a clip of another rate, whatever its metadata say, or of several clips side by side"""
    name = shown(path)
    if isinstance(earlier.seed, list) and len(earlier.seed) > 1:
        raise InputError(
            f"extend_clip is {name}, a grid of {len(earlier.seed)} clips. Expected one clip. Make it without grid."
        )
    rates = mp4.read_timing(path)[1] or [earlier.fps or 0]
    if any(abs(rate / spec.fps - 1) > RATE_SLACK for rate in rates):
        rate = " to ".join(f"{rate:.4g}" for rate in dict.fromkeys((rates[0], rates[-1])))
        raise InputError(
            f"extend_clip is {name} of {rate} frames a second. Expected {spec.fps}, as {spec.name} makes them. Choose "
            "another clip or model."
        )


def check(settings: ClipSettings, spec: ModelSpec) -> None:
    """Check what neither the pictures' pixels nor the clip's size decide. Raises InputError."""
    for name in (*PICTURES, "extend_clip"):
        if spec.task == "t2v" and getattr(settings, name) is not None:
            raise InputError(f"{name} is given. Expected none, because {spec.name} makes videos from text alone.")
    if spec.task == "i2v" and settings.image is None and settings.extend_clip is None:
        raise InputError(f"image is None. Expected a picture (--image_path), because {spec.name} begins with one.")
    check_without_pictures(settings, spec)


def check_without_pictures(settings: ClipSettings, spec: ModelSpec) -> None:
    """Check what `check` does, for a clip whose picture may be chosen later. Raises InputError."""
    if settings.extend and spec.task != "i2v":
        raise InputError(
            f"extend is {settings.extend}. Expected None for {spec.name}, because only an image-to-video model can go "
            "on from a frame. Make the clip first, and give its last frame as image to an image-to-video model."
        )
    if settings.extend and settings.num_frames == 1:
        raise InputError("num_frames is 1. Expected 5 or more to extend, because parts share a frame.")
    if settings.last_image is not None and settings.num_frames == 1:
        raise InputError("num_frames is 1. Expected 5 or more with last_image, because a clip begins with another one.")
    _check_noise(settings)


def _check_noise(settings: ClipSettings) -> None:
    if settings.noise_device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("noise_device is 'cuda', and torch sees no GPU here. Expected cpu.")


def _opened(settings: ClipSettings) -> "tuple[dict[str, Image], VideoRecord | None]":
    """Open the pictures and the clip to extend, after the one check that needs this machine and no model"""
    _check_noise(settings)
    given = {name: value for name in PICTURES if (value := getattr(settings, name)) is not None}
    pictures, earlier = {name: images.load_image(value, name) for name, value in given.items()}, None
    if settings.extend_clip is not None:
        with named_extend_clip():
            earlier = mp4.read_record(settings.extend_clip)
            pictures["image"] = mp4.last_frame(settings.extend_clip)
    return pictures, earlier


@contextmanager
def named_extend_clip() -> Iterator[None]:
    """Let errors about a clip's path name the option"""
    try:
        yield
    except InputError as error:
        raise InputError(f"extend_clip {str(error).removeprefix('path ')}") from error
