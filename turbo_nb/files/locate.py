"""Where the parts of a model lie: in folders here, and in repositories of the Hub that references name.

`layouts` knows the folders that people have, and `reference` the same for the names in a repository.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from ..catalog import HubFile, ModelSpec
from ..errors import CheckpointError, DownloadError
from ..machine import environment
from ..values import LoRAFile
from . import hub, hub_cache, layouts, reference
from .hub_requests import Listing


@dataclass(frozen=True)
class Beside:
    """The folder of a repository that a model lies in, and the names of the repository's files."""

    folder: HubFile
    names: Collection[str]


def located(
    given: tuple[Path | HubFile, ...], part: str = "transformer", fresh: bool = False
) -> tuple[tuple[Path | HubFile, ...], tuple[Path | Beside, ...], str | None]:
    """Return the files or folders of a part, where its other parts may lie, and the name that references give it.

    A reference gets the commit that the cache has of its revision, if all of the part is there, or with `fresh` what
    the Hub has.
    """
    files, near, names = [], (), []
    for one in given:
        if isinstance(one, Path):
            files += layouts.transformers(one) if len(given) == 1 and environment.is_dir(one) else [one]
            near = near or (files[0],)
            continue
        found, listed = of_reference(one, part, fresh)
        files += found
        folder = found[0].path.rstrip("/").rpartition("/")[0]
        near = near or (Beside(replace(found[0], path=f"{folder}/"), listed.files),)
        names.append(str(replace(one, commit=listed.commit)))
    return tuple(files), near, " + ".join(names) or None


def of_reference(given: HubFile, part: str, fresh: bool) -> tuple[tuple[HubFile, ...], Listing]:
    """Return the files of a part that a reference names, and the names in its repository."""
    if not fresh and (known := hub_cache.known_names(given)):
        try:
            found = reference.find(replace(given, commit=known.commit), known.files, part)
        except CheckpointError:
            found = ()  # the Hub may have it by now
        if hub.cached(found):
            return found, known
    try:
        listed = hub.listing(given)
    except DownloadError as error:
        raise DownloadError(f"{error} No file or folder here is called {given.name!r}.") from error
    return reference.find(replace(given, commit=listed.commit), listed.files, part), listed


def near(part: str, places: tuple[Path | Beside, ...], spec: ModelSpec) -> Path | HubFile | None:
    """Return a part that lies near one of some files, or in their repository; else None."""
    found = (
        layouts.near(one, part, own_layout=bool(spec.folder))
        if isinstance(one, Path)
        else reference.beside(one.folder, one.names, part)
        for one in places
    )
    return next((place for place in found if place), None)


def local(
    given: str | Path, *, option: str = "lora", on_progress: Callable[[hub.Progress], None] | None = None
) -> Path:
    """Return the path of a file that was given as a path or as a reference, which is downloaded and checked.

    Args:
        given: a path, which may not exist; or a reference to a file, or to a repository with one weight file.
        option: its name, for errors.
        on_progress: called as bytes arrive.

    Raises:
        InputError, CheckpointError: the reference does not name one file.
        DownloadError: the file cannot be fetched.
    """
    place = reference.read(given, option, constants.ENDPOINT)
    if not isinstance(place, HubFile):
        return place
    (file, *_), _, _ = located((place,), "LoRA")
    return hub.find(file) or hub.fetch(hub.plan(str(file), [file]), on_progress=on_progress)[file]


def local_loras(asked: Iterable[LoRAFile]) -> list[LoRAFile]:
    """Return LoRAs with paths in place of references; raises as `local`. Names and paths stay as they are."""
    paths = [(one, local(one.file)) for one in asked]
    return [one if path == Path(one.file) else replace(one, file=str(path)) for one, path in paths]
