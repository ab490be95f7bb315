"""Download a released model, or what a reference to the Hub names."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal
from tqdm import tqdm
from tqdm.auto import tqdm as bar

from ..catalog import HubFile
from ..errors import DownloadError, InputError
from ..machine import environment
from ..settings import LoadOptions
from . import hub, locate, recognise, reference, remote
from .decide import asked, decide
from .resolve import DEFAULTS, spec_of


@dataclass(frozen=True, kw_only=True)
class Files:
    """The paths of a model's files. transformers: one, or (high-noise, low-noise). tokenizer: a folder."""

    transformers: tuple[Path, ...]
    vae: Path
    text_encoder: Path
    tokenizer: Path

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Files":
        """Arrange paths in the order of `ModelSpec.needs`."""
        *transformers, vae, text_encoder, tokenizer = paths
        return cls(transformers=tuple(transformers), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)

    def __str__(self) -> str:
        parts = [*(("transformer", path) for path in self.transformers), ("vae", self.vae)]
        parts += [("text encoder", self.text_encoder), ("tokenizer", self.tokenizer)]
        return "\n".join(f"{name:12} {path}" for name, path in parts)


def download_model(
    model: str = "auto",
    *,
    quantized: bool | None = None,
    on_plan: Callable[[hub.DownloadPlan], None] | None = None,
    on_progress: Callable[[hub.Progress], None] | None = None,
) -> Files | Path | None:
    """Download a released model, or what a reference to the Hub names.

    Args:
        model: its name; "auto" is the best text-to-video model that fits this machine. Or a reference, such as
            "owner/repo" or "owner/repo/file.safetensors"; of a transformer the other parts come, too.
        quantized: take the files with 8-bit linears, or the plain ones. None: those that suit this GPU.
        on_plan: called with the plan before the first byte.
        on_progress: called as bytes arrive. None: a progress bar is drawn.

    Returns:
        Where the files lie. Of a file that is not a model its path. None for a model that ships with the package.

    Raises:
        UnknownModelError: the name is not known.
        InputError: model is a path, or quantized is given with a reference.
        CheckpointError: a file cannot be loaded.
        DownloadError: a file cannot be fetched, or the disk is too small.
    """
    name, given = asked(LoadOptions(model=model))
    if any(isinstance(one, Path) for one in given):
        raise InputError(
            f"model is {str(model)!r}, a path. Expected the name of a released model or {reference.FORMS}."
        )
    if given and quantized is not None:
        raise InputError(f"quantized is {quantized}. Expected None with a reference, which names its files.")
    if given:
        name, parts = _parts_of_reference(given[0])
    else:
        wanted = "auto" if quantized is None else quantized
        found = decide(LoadOptions(model=model, quant_linear=wanted), to_download=True)
        name, parts = found.spec.name, found.spec.needs(found.quantized is True)
    planned = hub.plan(name, [part for part in parts if isinstance(part, HubFile)])
    if on_plan:
        on_plan(planned)
    if not planned.files:
        return None

    def judge(file: HubFile, path: Path) -> None:
        if file.commit and file.kind == "weights":  # the files of the catalogue are known
            recognise.read(path)

    with progress_bars() if on_progress is None else nullcontext(on_progress) as show:
        paths = hub.fetch(planned, on_progress=show, on_part=judge)
    found = [paths.get(part, part) for part in parts]
    return Files.of(found) if len(found) > len(DEFAULTS) else found[0]


def _parts_of_reference(given: HubFile) -> tuple[str, tuple[HubFile | Path, ...]]:
    """Return the name of what a reference names, and all parts of a model; of a file that is something else the file"""
    files, near, name = locate.located((given,), fresh=True)
    try:
        contents = remote.read(files[0])
    except DownloadError:  # of a Hub that sends no parts of files: `fetch` reads the file when it is here
        return name, files
    if contents.kind != "transformer":
        return name, files
    recognise.require(contents, "transformer")
    spec = spec_of(contents, files[0], name)
    parts = (
        locate.near(part, near, spec) or (spec.folder / part if spec.folder else default)
        for part, default in DEFAULTS.items()
    )
    return name, (*files, *parts)


@contextmanager
def progress_bars() -> Iterator[hub.OnProgress]:
    """Give an on_progress for `fetch` that draws the bytes of this file and of all files.

    Outside a notebook it also writes a line to stderr for every file that is done.
    """
    notebook = environment.in_notebook()
    style = {"unit": "B", "unit_scale": True, "leave": False, "disable": not (notebook or sys.stderr.isatty())}
    with bar(desc="all files", **style) as every, bar(**style) as one:

        def show(progress: hub.Progress) -> None:
            path, size = progress.file.file.path, progress.file.size
            one.set_description(f"{progress.stage} {path}", refresh=False)
            one.n, one.total, every.n, every.total = progress.file_done, size, progress.done, progress.total
            one.refresh()
            every.refresh()
            if not notebook and progress.stage == "check" and progress.file_done == size:
                tqdm.write(f"{path}: {decimal(size)}, checked", file=sys.stderr)

        yield show
