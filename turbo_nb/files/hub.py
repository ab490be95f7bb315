"""Files of the Hub: planned, fetched, checked, and found again.

Models of the catalogue, and repositories, folders and files that a reference names, are all lists of `HubFile`s here.
huggingface_hub owns the transfer and the cache ($HF_HOME), and waits where the Hub asks a transfer to. Three things
are done here. A plan takes one request per repository and returns hashes; the client's dry run takes one request per
file and returns none. Every file is hashed once, because the client accepts wrong bytes of the right size. The client's
own verification needs the network and hashes whole repositories. A branch in the cache moves after its files are
there, and not before. A broken transfer starts again at the file that it broke in.

The cache keeps the names of a repository's files beside the files that were fetched. All names
of a folder decide which of its files are taken, and the cache alone shows only those that were fetched.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers
from rich.filesize import decimal
from tqdm import tqdm
from tqdm.auto import tqdm as bar

from ..catalog import HubFile
from ..errors import CheckpointError, DownloadError, first_line, listed, warn
from ..machine import atomic, environment
from . import reference
from .endpoint import HUB, address, without_secrets

TRUSTED = (HUB, "https://hf.co")  # endpoints that a token may go to without a warning
TRIES = 3  # of a request that the Hub answers with 429
LONGEST_WAIT = 300  # seconds between them: the window of the Hub's rate limit
STALE = 24 * 3600  # seconds after which a partial file belongs to a dead process
CHUNK = 16 << 20  # bytes hashed between two calls of on_progress
INDEX = 32 << 20  # bytes that an index of shards may have
AGAIN = "Files that are whole stay, so run it again to go on."
DOWNLOAD_FIRST = "Download it first, with turbo-nb download."


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a repository at a commit: size in bytes and blob (see `PlannedFile`) by name.

    partial: these are the files in the cache, and the repository may have more.
    """

    repo: str
    commit: str
    files: dict[str, tuple[int, str | None]]
    partial: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file as the Hub has it now: `commit` is what the file's revision is today, size is in bytes.

    blob: its name in the cache, the SHA-256 of an LFS file or git's SHA-1 of another; None if unknown. cached: whether
    the bytes are in the cache, checked or not.
    """

    file: HubFile
    commit: str
    size: int
    blob: str | None
    cached: bool

    @property
    def sha256(self) -> str | None:
        """The hash of an LFS file; None for one that the Hub keeps in git."""
        return self.blob if self.blob and len(self.blob) == 64 else None

    @property
    def name(self) -> str:
        """Repository and path."""
        return self.file.name

    def __str__(self) -> str:
        revision = self.commit[:7] if self.file.revision == self.commit else f"{_branch(self.file)} ({self.commit[:7]})"
        return f"{self.name}, {revision}"


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

    def __str__(self) -> str:
        if not self.files:
            return f"{self.model} comes with the package: nothing to download"
        size = f"{self.model}: {len(self.files)} files, {decimal(sum(file.size for file in self.files))}"
        what = f"{decimal(self.to_fetch)} to fetch, {decimal(self.free)} free" if self.to_fetch else "nothing to fetch"
        lines = [f"{'cached' if f.cached else 'fetch':6} {decimal(f.size):>10}  {f}" for f in self.files]
        return "\n".join([f"{size}; {what} in {self.cache}", *lines])


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
_asked: dict[tuple[str, str, str], Listing] = {}  # what the Hub answered for commits, which do not change


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
        _check_endpoint()
    found, listings = {}, []
    for place in dict.fromkeys((file.repo, file.revision, file.commit) for file in needed):
        files = [file for file in needed if (file.repo, file.revision, file.commit) == place]
        there = {file: _in_cache(file) for file in files}
        complete = None not in there.values()
        if not complete or any(one.commit != (place[2] or place[1]) for every in there.values() for one in every):
            missing = next((_missing(file) for file in files if not there[file]), "")
            if names := _listing_or_cache(files[0], complete, missing):
                listings.append(names)
                there = {file: _planned(file, names) for file in files}
        found |= there
    return DownloadPlan(
        model=model,
        parts=tuple((file, tuple(found[file])) for file in needed),
        cache=Path(constants.HF_HUB_CACHE),
        free=_free(),
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
        DownloadError: the disk is too small (before the first byte), or a transfer or a check failed.
    """
    for repo in {file.file.repo for file in planned.files}:
        _remove_stale(repo)
    if planned.to_fetch > (free := _free()):
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
        paths[part] = _path(part, files)
        if on_part:
            on_part(part, paths[part])
    for listing in planned.listings:
        _remember(listing)
    for file in planned.files:
        with translated(file.name):
            _move_branch(file)
    return paths


def find(file: HubFile) -> Path | None:
    """Return the path of a file or a folder if all of it is in the cache and was checked; else None. Asks no network.

    `fetch` only has to check files that another program fetched.
    """
    found = _in_cache(file)
    return _path(file, found) if found and all(map(_is_checked, found)) else None


def path_in_cache(part: HubFile, files: Sequence[PlannedFile]) -> Path | None:
    """Return the path of a planned part if all its files are in the cache, checked or not; else None."""
    return _path(part, files) if all(_pointer(file).is_file() for file in files) else None


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
    _check_endpoint()
    here = known_names(file, complete=False)
    return _listing_or_cache(file, bool(here and here.files), file.name) or here


def known_names(file: HubFile, *, complete: bool = True) -> Listing | None:
    """Return the names in a file's repository without the network: as they were when one of its files was fetched.

    Args:
        file: of the repository and the revision.
        complete: None instead of the names of the files in the cache, where nothing else is known.
    """
    folder, commit = _repo_folder(file.repo), _commit(file)
    if commit is None:
        return None
    with suppress(OSError, ValueError, TypeError):
        known = json.loads((folder / "turbo_nb" / "listings" / f"{commit}.json").read_text(encoding="utf-8"))
        return Listing(
            repo=file.repo, commit=commit, files={name: (size, blob) for name, (size, blob) in known.items()}
        )
    snapshot = folder / "snapshots" / commit
    if complete or not snapshot.is_dir():
        return None
    names = (path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file())
    return Listing(repo=file.repo, commit=commit, files=dict.fromkeys(names, (0, None)), partial=True)


def read_bytes(file: PlannedFile, begin: int, end: int) -> bytes:
    """Return some bytes of a file on the Hub without writing them anywhere. Fewer where the file is shorter.

    Raises:
        DownloadError: the Hub does not answer with these bytes.
    """
    url = hf_hub_url(file.file.repo, file.file.path, revision=file.commit)
    headers = build_hf_headers() | {"range": f"bytes={begin}-{end - 1}"}
    found = bytearray()
    with (
        translated(file.name),
        get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
    ):
        hf_raise_for_status(response)
        if begin and response.status_code != 206:
            raise DownloadError(f"{file.name}: {constants.ENDPOINT} cannot send a part of it. {DOWNLOAD_FIRST}")
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= end - begin:  # because a server may send more than it was asked for
                break
    return bytes(found[: end - begin])


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """Give an on_progress for `fetch` that draws the bytes of this file and of all files.

    Outside a notebook it also writes a line to stderr for every file that is done.
    """
    notebook = environment.in_notebook()
    style = {"unit": "B", "unit_scale": True, "leave": False, "disable": not (notebook or sys.stderr.isatty())}
    with bar(desc="all files", **style) as every, bar(**style) as one:

        def show(progress: Progress) -> None:
            path, size = progress.file.file.path, progress.file.size
            one.set_description(f"{progress.stage} {path}", refresh=False)
            one.n, one.total, every.n, every.total = progress.file_done, size, progress.done, progress.total
            one.refresh()
            every.refresh()
            if not notebook and progress.stage == "check" and progress.file_done == size:
                tqdm.write(f"{path}: {decimal(size)}, checked", file=sys.stderr)

        yield show


def _check_endpoint() -> None:
    """Check HF_ENDPOINT, keep its secrets out of the client's log, and warn where a token goes to a foreign place"""
    if constants.HF_HUB_OFFLINE:
        return
    endpoint = address(constants.ENDPOINT)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_hide_secrets)
    if endpoint not in TRUSTED and "authorization" in build_hf_headers():
        warn(
            f"your Hub token goes to {endpoint}, which is not the Hub; unset HF_ENDPOINT, or set "
            "HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to send no token",
            stacklevel=2,
        )


def _hide_secrets(record: logging.LogRecord) -> bool:
    """A filter of the client's log, because the client logs the address of a request that it repeats"""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def _listing_or_cache(file: HubFile, complete: bool, missing: str) -> Listing | None:
    """The names as the Hub has them; None, with a warning, where it does not answer and the cache is enough"""
    if file.commit and (known := _asked.get((constants.ENDPOINT, file.repo, file.commit))):
        return known
    try:
        with translated(missing if constants.HF_HUB_OFFLINE and missing else file.repo):
            info = _ask(file.repo, file.commit or file.revision)
    except DownloadError as error:
        if not complete:
            raise
        if not constants.HF_HUB_OFFLINE:
            warn(f"going on with the files in the cache, because {error}", stacklevel=3)
        return None
    files = {
        one.rfilename: (one.size, one.lfs.sha256 if one.lfs else one.blob_id)
        for one in info.siblings or ()
        if not {"..", ""} & {*one.rfilename.split("/")}  # because a name becomes a path in the cache
    }
    found = _asked[constants.ENDPOINT, file.repo, info.sha] = Listing(repo=file.repo, commit=info.sha, files=files)
    return found


def _planned(file: HubFile, there: Listing) -> list[PlannedFile]:
    """The files that `file` stands for, as the Hub has them"""
    found = []
    for path in _expanded(file, there):
        if path not in there.files:
            raise DownloadError(
                f"{file.repo} has no {path!r} at {_branch(file)} ({there.commit[:7]}). It has "
                f"{listed(there.files, 12) or 'no files'}. Check the name; a newer turbo_nb may know a new name."
            )
        size, blob = there.files[path]
        one = replace(file, path=path, kind="weights")
        plan = PlannedFile(file=one, commit=there.commit, size=size, blob=blob, cached=False)
        found.append(replace(plan, cached=_pointer(plan).is_file() or bool(blob and _blob(plan).is_file())))
    return found


def _expanded(file: HubFile, there: Listing) -> list[str]:
    """The names of the files that a file or folder stands for. Raises CheckpointError where nothing is there."""
    if not file.path.endswith("/"):
        return [file.path]
    folder = file.path.lstrip("/")
    if file.kind == "tokenizer":
        found, what = reference.tokenizer(there.files, folder), " or ".join(reference.VOCABULARIES)
    else:
        index, found = reference.weights(there.files, folder)
        found, what = [*_shards(file, there, index, found), *([index] if index else [])], "weight files"
        found += [name for name in (f"{folder}config.json",) if found and name in there.files]
    if not found:
        raise CheckpointError(
            f"{file} has no {what}. Its repository has {listed(there.files, 12) or 'no files'}. Give {reference.FORMS}."
        )
    return found


def _shards(file: HubFile, there: Listing, index: str | None, otherwise: list[str]) -> list[str]:
    """The shards that a folder's index names; without an index those that are there, if none is left out"""
    if index is None:
        counts = {int(match[1]) for name in otherwise if (match := re.search(r"-\d+-of-(\d+)\.\w+$", name))}
        if counts and counts != {len(otherwise)}:
            raise CheckpointError(f"{file} has {len(otherwise)} of {max(counts)} shards. Expected all of them.")
        return otherwise
    size, blob = there.files[index]
    one = replace(file, path=index)
    plan = PlannedFile(file=one, commit=there.commit, size=size, blob=blob, cached=False)
    local = _pointer(plan)
    try:
        text = local.read_bytes() if local.is_file() else read_bytes(plan, 0, INDEX)
        names = {f"{file.path.lstrip('/')}{name}" for name in json.loads(text)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{one} is not an index of shards ({first_line(error)}). Expected JSON with a weight_map."
        ) from error
    known = names if there.partial else there.files
    if wrong := [name for name in names if name not in known or not name.lower().endswith(reference.FORMATS)]:
        raise CheckpointError(f"{one} names {listed(wrong)}. Expected weight files of {file.repo}.")
    return sorted(names)


def _ask(repo: str, revision: str | None, tries: int = TRIES):
    """Ask for a repository's files. Waits after a 429, because the client does that for transfers only."""
    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        wait = _wait(error)
        if error.response.status_code != 429 or tries == 1 or wait > LONGEST_WAIT:
            raise
    warn(f"the Hub is asked too often; asking again in {wait} s", stacklevel=5)
    time.sleep(wait)
    return _ask(repo, revision, tries - 1)


def _wait(error: HfHubHTTPError) -> int:
    """Seconds to wait after a 429, as its headers ask; 5 without such a header"""
    headers = error.response.headers
    limit, after = parse_ratelimit_headers(headers), headers.get("retry-after", "").strip()
    return limit.reset_in_seconds if limit else int(after) if after.isdigit() else 5


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
    if not _is_checked(file):
        for checked in _check(file):
            on_progress(Progress(file=file, stage="check", file_done=checked, done=done + fetched, total=total))


def _check(file: PlannedFile) -> Iterator[int]:
    """Hash a file, yield the bytes done, and mark it as checked. Removes a wrong file and raises DownloadError."""
    path = _pointer(file)
    status = path.stat()
    if file.blob is None:  # offline in a cache without links, where nothing records the hash
        return
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % status.st_size)  # as git hashes a file
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            yield stream.tell()
    if digest.hexdigest() != file.blob:
        for name in (path.resolve(), _blob(file), path):
            name.unlink(missing_ok=True)
        raise DownloadError(
            f"{file.name} came with wrong bytes: its hash is {digest.hexdigest()[:12]}…. Expected {file.blob[:12]}…. "
            "The file is removed, so run it again to fetch it anew."
        )
    with suppress(OSError):  # a cache that cannot be written is hashed every time
        atomic.write(_markers(file) / file.blob, _stamp(status))


def _is_checked(file: PlannedFile) -> bool:
    """Whether the file was hashed and has not changed since"""
    if not (path := _pointer(file)).is_file():
        return False
    stamp = _stamp(path.stat())
    return any(marker.read_text() == stamp for marker in _markers(file).glob(file.blob or "[0-9a-f]*"))


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _move_branch(file: PlannedFile) -> None:
    """Point the branch in the cache to the commit whose files are all there"""
    ref = _repo_folder(file.file.repo) / "refs" / _branch(file.file)
    if file.file.revision != file.commit and not (ref.is_file() and ref.read_text() == file.commit):
        atomic.write(ref, file.commit)


def _remove_stale(repo: str) -> None:
    """Remove the partial files of downloads that died more than a day ago"""
    for path in (_repo_folder(repo) / "blobs").glob("*.incomplete"):
        with suppress(OSError):  # because its process may have ended it just now
            if path.stat().st_mtime < time.time() - STALE:
                path.unlink()


def _commit(file: HubFile) -> str | None:
    """The commit of a file's revision as the cache knows it"""
    if file.commit or re.fullmatch(r"[0-9a-f]{40}", file.revision or ""):
        return file.commit or file.revision
    with suppress(OSError):
        return (_repo_folder(file.repo) / "refs" / _branch(file)).read_text().strip()
    return None


def _in_cache(file: HubFile) -> list[PlannedFile] | None:
    """What `plan` gives for a file or folder, from the cache alone; None where it is not whole.

    A tokenizer is whole with one vocabulary, because other programs fetch one of two.
    """
    names = _names_in_cache(file)
    found = [one for name in names if (one := _one_in_cache(replace(file, path=name, kind="weights")))]
    if file.kind == "tokenizer" and reference.makes_tokenizer(Path(one.file.path).name for one in found):
        return found
    return found if found and len(found) == len(names) else None


def _missing(file: HubFile) -> str:
    """The name of the first file that is not in the cache and has to be"""
    names = (replace(file, path=name) for name in _names_in_cache(file))
    return next((one.name for one in names if not _one_in_cache(one)), file.name)


def _names_in_cache(file: HubFile) -> list[str]:
    """The names of the files that a file or folder stands for, as far as the cache tells them"""
    if not file.path.endswith("/"):
        return [file.path]
    known, folder = known_names(file, complete=False), file.path.lstrip("/")
    if file.kind == "tokenizer" and (known is None or known.partial):
        here = reference.tokenizer(known.files, folder) if known else []
        needed = ("tokenizer_config.json", reference.VOCABULARIES[0])
        return list(dict.fromkeys([*here, *(f"{folder}{name}" for name in needed)]))
    index = reference.weights(known.files, folder)[0] if known else None
    if known is None or (index and file.kind != "tokenizer" and not _one_in_cache(replace(file, path=index))):
        return []
    with suppress(CheckpointError):
        return _expanded(file, known)
    return []


def _one_in_cache(file: HubFile) -> PlannedFile | None:
    """A file as the cache has it, by the branch as it was when last fetched"""
    found = try_to_load_from_cache(file.repo, file.path, revision=file.commit or file.revision)
    if not isinstance(found, str):
        return None
    path = Path(found)
    return PlannedFile(
        file=file,
        commit=path.parents[file.path.count("/")].name,
        size=path.stat().st_size,
        blob=Path(os.readlink(path)).name if path.is_symlink() else None,  # because some file systems have no links
        cached=True,
    )


def _remember(names: Listing) -> None:
    """Keep the names of a repository's files in the cache"""
    with suppress(OSError):  # a cache that cannot be written is asked for every time
        path = _repo_folder(names.repo) / "turbo_nb" / "listings" / f"{names.commit}.json"
        atomic.write(path, json.dumps(names.files))


def _repo_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _blob(file: PlannedFile) -> Path:
    return _repo_folder(file.file.repo) / "blobs" / file.blob


def _pointer(file: PlannedFile) -> Path:
    """Where the cache shows the file under its own name"""
    return _repo_folder(file.file.repo) / "snapshots" / file.commit / file.file.path


def origin(path: Path) -> HubFile | None:
    """Return the file or folder of the Hub that a path in the cache shows, with its commit; None for another path."""
    with suppress(ValueError):
        inside = Path(path).absolute().relative_to(Path(constants.HF_HUB_CACHE).absolute())
        repo, snapshots, commit, *names = inside.parts
        kind, *name = repo.split("--")
        if kind == "models" and snapshots == "snapshots":
            return HubFile("/".join(name), "/".join(names) or "/", commit=commit)
    return None


def _path(part: HubFile, files: Sequence[PlannedFile]) -> Path:
    """Where the cache shows a file or folder"""
    return _repo_folder(part.repo) / "snapshots" / files[0].commit / part.path.strip("/")


def _markers(file: PlannedFile) -> Path:
    """The folder of the markers of checked files, each named as the blob"""
    return _repo_folder(file.file.repo) / "turbo_nb"


def _branch(file: HubFile) -> str:
    return file.revision or constants.DEFAULT_REVISION


def _free() -> int:
    """Free bytes where the cache is, or will be"""
    folder = Path(constants.HF_HUB_CACHE).absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what huggingface_hub, httpx, hf_xet or the system raises over `what` into one line with a fix"""
    try:
        yield
    except DownloadError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError, KeyError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        secret = without_secrets(constants.ENDPOINT) != constants.ENDPOINT  # a traceback shows the causes, too
        raise DownloadError(without_secrets(f"{what}: {_reason(cause)}")) from (None if secret else error)


def _reason(error: BaseException) -> str:
    """What went wrong, and the fix"""
    status, number = getattr(getattr(error, "response", None), "status_code", None), getattr(error, "errno", None)
    kind, text, hub, cache = type(error).__name__, first_line(error), constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and it is not in {cache}. Unset HF_HUB_OFFLINE, or copy a cache that has it."
    if status in (401, 403):
        return f"{hub} does not show it to you ({status}). Set HF_TOKEN, and accept its licence there if it has one."
    if status == 404:
        return f"{hub} does not have it (404). Check its name and revision, and HF_ENDPOINT if it is set."
    if status == 429:
        return f"{hub} is asked too often (429). Wait {_wait(error)} s, or set HF_TOKEN. {AGAIN}"
    if status:
        return f"{hub} failed ({status}). Wait some minutes. {AGAIN}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {cache}. Free some, or set HF_HOME to a folder on a larger disk. {AGAIN}"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{cache} cannot be written ({text}). Set HF_HOME to a folder of yours."
    if kind in ("ConnectError", "ConnectTimeout", "ProxyError"):
        return f"cannot reach {hub} ({text}). Check the network, proxies, and HF_ENDPOINT if it is set."
    if isinstance(error, (HTTPError, RuntimeError)) or "Consistency check" in text:
        return f"the transfer broke off ({kind}: {text}). {AGAIN}"
    return f"{hub} gave no answer that the Hub would give ({kind}: {text}). Check HF_ENDPOINT and proxies."
