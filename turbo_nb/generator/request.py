"""What a person asks for, the job that it becomes, and what is known of its clip before it is made."""

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .. import settings
from ..errors import InputError
from ..files.resolve import ResolvedModel
from ..runtime import estimate
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from ..settings import ClipSettings, LoadOptions
from ..video.gallery import Clip


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asks for.

    Args:
        load: the model, and how it is loaded.
        clip: the clip.
        random_seed: draw a new seed in place of the clip's.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    clip: ClipSettings
    random_seed: bool = False

    @classmethod
    def of(cls, prompt: str, *, seed: int | None = None, **options) -> "Request":
        """Make a request from options by name.

        Args:
            prompt: what to show.
            seed: None: a random seed.
            options: those of `LoadOptions` and `ClipSettings`.

        Raises:
            InputError: an option is unknown or has a value that cannot be used.
        """
        load = {name: options.pop(name) for name in settings.options(LoadOptions) if name in options}
        clip = settings.build(ClipSettings, options, prompt=prompt, seed=seed)
        return cls(load=settings.build(LoadOptions, load), clip=clip, random_seed=seed is None)

    def spread(self, prompts: Sequence[str], count: int) -> "list[Request]":
        """Return a request for each prompt and each of `count` seeds: random ones, or those that follow the clip's."""
        seeds = [self.clip.seed] * count if self.random_seed else settings.seeds(self.clip.seed, count)
        return [
            replace(self, clip=replace(self.clip, prompt=prompt, seed=seed)) for prompt in prompts for seed in seeds
        ]


@dataclass(kw_only=True, eq=False)
class Job:
    """A request that waits, is at work, or has ended.

    Args:
        id: the name of its rows on disk.
        download: whether files of the model that are missing are downloaded.
        state: "waiting", "running", "finished", "cancelled" or "failed".
        progress: where it is, once it runs.
        preview: an animated WebP of the clip so far.
        notes: warnings, and where the memory plan puts the model.
        error: why the job failed. trace: the traceback of an error that this package does not raise on purpose.
        clip: the finished clip.
    """

    request: Request
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    download: bool = False
    state: str = "waiting"
    progress: Progress = field(default_factory=Progress)
    preview: bytes | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""
    trace: str = ""
    clip: Clip | None = None
    cancelling: threading.Event = field(default_factory=threading.Event)

    @property
    def running(self) -> bool:
        """Whether the job is at work."""
        return self.state == "running"

    @property
    def stage(self) -> str:
        """The stage that the job is at, one of `runtime.progress.STAGES`."""
        return self.progress.stage

    @property
    def done(self) -> int:
        """Steps, frames or bytes of the stage."""
        return self.progress.done


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is known of a clip before it is made.

    Args:
        width, height: in pixels. num_frames, fps: frames, and how many of them a second.
        memory: the memory plan.
        time: None where nothing is known about this machine.
        loaded: whether the model is in memory.
        has_preview: whether the clip can be shown while it is made.
        to_fetch: bytes of the model that have to be downloaded first.
        notes: warnings about the choice of model.
    """

    width: int
    height: int
    num_frames: int
    fps: int
    memory: Plan
    time: estimate.Estimate | None
    loaded: bool
    has_preview: bool
    to_fetch: int
    notes: tuple[str, ...]


def require_downloaded(model: ResolvedModel) -> None:
    """Raise InputError for a model that is not on the disk."""
    if model.downloads:
        raise InputError(
            f"model is {model.spec.name}, which is not downloaded ({model.to_fetch / 1e9:.1f} GB). Expected one on the "
            "disk. Download it first."
        )
