"""Files of the Hub: planned, fetched, checked, and found again.

Models of the catalogue, and repositories, folders and files that a reference names, are all lists of `HubFile`s here.
huggingface_hub owns the transfer and the cache, and waits where the Hub asks a transfer to. Three things are done
here. A plan takes one request per repository and returns hashes; the client's dry run takes one request per file and
returns none. Every file is hashed once, because the client accepts wrong bytes of the right size. The client's own
verification needs the network and hashes whole repositories. A branch in the cache moves after its files are there,
and not before. A broken transfer starts again at the file that it broke in.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from rich.filesize import decimal
from tqdm import tqdm

from ..catalog import HubFile
from ..errors import CheckpointError, DownloadError, listed
from . import hub_cache, hub_requests, reference
from .filenames import CONFIG, SHARD, TOKENIZER_CONFIG, VOCABULARIES, WEIGHTS
from .hub_cache import PlannedFile, branch, path_of
from .hub_requests import Listing, translated
from .weight_set import names_in_index

INDEX = 32 << 20  # bytes that an index of shards may have


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """The files of each part that a model needs, and the `free` bytes at `cache`. Its text is a table."""

    model: str
    parts: tuple[tuple[HubFile, tuple[PlannedFile, ...]], ...]
    cache: Path
    free: int
    listings: tuple[Listing, ...] = field(default=(), repr=False)

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The files of all parts, each once."""
        return tuple(dict.fromkeys(file for _, files in self.parts for file in files))

    @property
    def to_fetch(self) -> int:
        """Bytes that are not in the cache."""
        return sum(file.size for file in self.files if not file.cached)

    @property
    def line(self) -> str:
        """The plan in one line."""
        if not self.files:
            return f"{self.model} comes with the package: nothing to download"
        size = f"{self.model}: {len(self.files)} files, {decimal(sum(file.size for file in self.files))}"
        what = f"{decimal(self.to_fetch)} to fetch, {decimal(self.free)} free" if self.to_fetch else "nothing to fetch"
        return f"{size}; {what} in {self.cache}"

    def __str__(self) -> str:
        lines = [f"{'cached' if f.cached else 'fetch':6} {decimal(f.size):>10}  {f}" for f in self.files]
        return "\n".join([self.line, *lines])


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a `fetch`: stage ("fetch" or "check") is done with `file_done` bytes of the file.

    `done` of the plan's `total` bytes to fetch were fetched.
    """

    file: PlannedFile
    stage: str
    file_done: int
    done: int
    total: int


OnProgress = Callable[[Progress], None]


def plan(model: str, needed: Sequence[HubFile]) -> DownloadPlan:
    """Plan a download with one request per repository, and fetch and write nothing.

    Offline (HF_HUB_OFFLINE), or with a warning when the Hub does not answer, the plan is what the cache holds. Warns
    when a token would go to an HF_ENDPOINT that is not the Hub.

    Args:
        model: the name that the plan and its errors have.
        needed: files and folders. A folder stands for its weights and config.json, or for its tokenizer.

    Raises:
        DownloadError: neither the Hub nor the cache knows a file.
        CheckpointError: a folder does not have what it stands for.
        InputError: HF_ENDPOINT is not an address.
    """
    if needed:
        hub_requests.check_endpoint()
    found, listings = {}, []
    for place in dict.fromkeys((file.repo, file.revision, file.commit) for file in needed):
        files = [file for file in needed if (file.repo, file.revision, file.commit) == place]
        there = {file: _in_cache(file) for file in files}
        complete = None not in there.values()
        if not complete or any(one.commit != (place[2] or place[1]) for every in there.values() for one in every):
            missing = next((_missing(file) for file in files if not there[file]), "")
            if names := hub_requests.ask_listing(files[0], optional=complete, missing=missing):
                listings.append(names)
                there = {file: _planned(file, names) for file in files}
        found |= there
    return DownloadPlan(
        model=model,
        parts=tuple((file, tuple(found[file])) for file in needed),
        cache=Path(constants.HF_HUB_CACHE),
        free=hub_cache.free_bytes(),
        listings=tuple(listings),
    )


def fetch(
    planned: DownloadPlan,
    *,
    on_progress: OnProgress | None = None,
    on_part: Callable[[HubFile, Path], None] | None = None,
) -> dict[HubFile, Path]:
    """Fetch the missing files of a plan and check all of them.

    Args:
        planned: what `plan` returned.
        on_progress: called as bytes arrive or are checked. An exception of its own ends the run.
        on_part: called with each part of the plan, in its order, as soon as all its files are checked. An exception
            of its own ends the run before the next part is fetched.

    Returns:
        The path of each part; that of a folder is a folder in the cache.

    Raises:
        DownloadError: the disk is too small, or the user has no home for the cache (before the first byte). Or a
            transfer or a check failed.
    """
    if planned.to_fetch and planned.cache.parts[0].startswith("~"):  # else a folder of this name would be made here
        raise DownloadError(
            f"the Hub's cache is {str(planned.cache)!r}, and this user has no home folder. Set HF_HOME to a folder of "
            "yours."
        )
    for repo in {file.file.repo for file in planned.files}:
        hub_cache.remove_stale(repo)
    if planned.to_fetch > (free := hub_cache.free_bytes()):
        raise DownloadError(
            f"{planned.model} needs {decimal(planned.to_fetch)} more in {planned.cache}, which has {decimal(free)} "
            "free. Free some space, or set HF_HOME to a folder on a larger disk."
        )
    done, paths, fetched = 0, {}, set()
    for part, files in planned.parts:
        for file in files:
            if file in fetched:
                continue
            with translated(file.name):
                _fetch_file(file, done, planned.to_fetch, on_progress or (lambda progress: None))
            done += 0 if file.cached else file.size
            fetched.add(file)
        paths[part] = path_of(part, files)
        if on_part:
            on_part(part, paths[part])
    for listing in planned.listings:
        hub_cache.remember_names(listing)
    for file in planned.files:
        with translated(file.name):
            hub_cache.move_branch(file)
    return paths


def find(file: HubFile) -> Path | None:
    """Return the path of a file or a folder if all of it is in the cache and was checked; else None. Asks no network.

    `fetch` only has to check files that another program fetched.
    """
    found = _in_cache(file)
    return path_of(file, found) if found and all(map(hub_cache.is_checked, found)) else None


def path_in_cache(part: HubFile, files: Sequence[PlannedFile]) -> Path | None:
    """Return the path of a planned part if all its files are in the cache, checked or not; else None."""
    return path_of(part, files) if all(file.path.is_file() for file in files) else None


def cached(files: Iterable[HubFile]) -> list[Path] | None:
    """Return the paths of files and folders. None unless `find` finds all of them; None for an empty list, too."""
    paths = [find(file) for file in files]
    return paths if paths and None not in paths else None


def missing(files: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """Return the files and folders that are not in the cache, or were not checked."""
    return tuple(file for file in files if not find(file))


def listing(file: HubFile) -> Listing:
    """Return the names in a file's repository as the Hub has them, or as the cache has where the Hub does not answer.

    Raises:
        DownloadError: neither the Hub nor the cache knows the repository.
    """
    hub_requests.check_endpoint()
    here = hub_cache.known_names(file, complete=False)
    return hub_requests.ask_listing(file, optional=bool(here and here.files), missing=file.name) or here


def _planned(file: HubFile, there: Listing) -> list[PlannedFile]:
    """The files that `file` stands for, as the Hub has them"""
    found = []
    for path in _expanded(file, there):
        if path not in there.files:
            raise DownloadError(
                f"{file.repo} has no {path!r} at {branch(file)} ({there.commit[:7]}). It has "
                f"{listed(there.files, 12) or 'no files'}. Check the name; a newer turbo_nb may know a new name."
            )
        found.append(hub_cache.planned_file(replace(file, path=path, kind="weights"), there))
    return found


def _expanded(file: HubFile, there: Listing) -> list[str]:
    """The names of the files that a file or folder stands for. Raises CheckpointError where nothing is there."""
    if not file.path.endswith("/"):
        return [file.path]
    folder = file.path.lstrip("/")
    if file.kind == "tokenizer":
        found, what = reference.tokenizer(there.files, folder), " or ".join(VOCABULARIES)
    else:
        index, found = reference.weights(there.files, folder)
        found, what = [*_shards(file, there, index, found), *([index] if index else [])], "weight files"
        found += [name for name in (f"{folder}{CONFIG}",) if found and name in there.files]
    if not found:
        raise CheckpointError(
            f"{file} has no {what}. Its repository has {listed(there.files, 12) or 'no files'}. Give {reference.FORMS}."
        )
    return found


def _shards(file: HubFile, there: Listing, index: str | None, otherwise: list[str]) -> list[str]:
    """The shards that a folder's index names; without an index those that are there, if none is left out"""
    if index is None:
        counts = {int(match["count"]) for name in otherwise if (match := SHARD.fullmatch(name))}
        if counts and counts != {len(otherwise)}:
            raise CheckpointError(f"{file} has {len(otherwise)} of {max(counts)} shards. Expected all of them.")
        return otherwise
    one = replace(file, path=index)
    local = hub_cache.planned_file(one, there).path
    data = local.read_bytes() if local.is_file() else hub_requests.read_bytes(one, there.commit, 0, INDEX)
    names = [f"{file.path.lstrip('/')}{name}" for name in names_in_index(data, str(one))]
    known = names if there.partial else there.files
    if wrong := [name for name in names if name not in known or not name.lower().endswith(WEIGHTS)]:
        raise CheckpointError(f"{one} names {listed(wrong)}. Expected weight files of {file.repo}.")
    return names


def _fetch_file(file: PlannedFile, done: int, total: int, on_progress: OnProgress) -> None:
    fetched = 0

    class Meter(tqdm):
        """What huggingface_hub takes for a progress bar. It draws nothing."""

        def __init__(self, *args, **kwargs):
            super().__init__(disable=True)

        def update(self, n: int = 1) -> None:
            nonlocal fetched
            fetched += n
            on_progress(Progress(file=file, stage="fetch", file_done=fetched, done=done + fetched, total=total))

        def update_transfer(self, n: int) -> None:
            """Ignore the bytes on the wire, which Xet counts beside those on the disk."""

        def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
            """Ignore their speed."""

    hf_hub_download(file.file.repo, file.file.path, revision=file.commit, tqdm_class=Meter)
    if not hub_cache.is_checked(file):
        for checked in hub_cache.check(file):
            on_progress(Progress(file=file, stage="check", file_done=checked, done=done + fetched, total=total))


def _in_cache(file: HubFile) -> list[PlannedFile] | None:
    """What `plan` gives for a file or folder, from the cache alone; None where it is not whole.

    A tokenizer is whole with one vocabulary, because other programs fetch one of two.
    """
    names = _names_in_cache(file)
    found = [one for name in names if (one := hub_cache.find_file(replace(file, path=name, kind="weights")))]
    if file.kind == "tokenizer" and reference.makes_tokenizer(Path(one.file.path).name for one in found):
        return found
    return found if found and len(found) == len(names) else None


def _missing(file: HubFile) -> str:
    """The name of the first file that is not in the cache and has to be"""
    names = (replace(file, path=name) for name in _names_in_cache(file))
    return next((one.name for one in names if not hub_cache.find_file(one)), file.name)


def _names_in_cache(file: HubFile) -> list[str]:
    """The names of the files that a file or folder stands for, as far as the cache tells them"""
    if not file.path.endswith("/"):
        return [file.path]
    known, folder = hub_cache.known_names(file, complete=False), file.path.lstrip("/")
    if file.kind == "tokenizer" and (known is None or known.partial):
        here = reference.tokenizer(known.files, folder) if known else []
        needed = (TOKENIZER_CONFIG, VOCABULARIES[0])
        return list(dict.fromkeys([*here, *(f"{folder}{name}" for name in needed)]))
    index = reference.weights(known.files, folder)[0] if known else None
    if known is None or (index and file.kind != "tokenizer" and not hub_cache.find_file(replace(file, path=index))):
        return []
    with suppress(CheckpointError):
        return _expanded(file, known)
    return []
