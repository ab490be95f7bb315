"""A model's files from the Hub: planned, fetched, checked, and found again.

huggingface_hub owns the transfer and the cache ($HF_HOME), and waits where the Hub asks a transfer to. Three things
are done here. A plan takes one request per repository and returns hashes; the client's dry run takes one request per
file and returns none. Every file is hashed once, because the client accepts wrong bytes of the right size. The client's
own verification needs the network and hashes whole repositories. A branch in the cache moves after its files are
there, and not before. A broken transfer starts again at the file that it broke in.
"""

import errno
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers
from rich.filesize import decimal
from tqdm import tqdm
from tqdm.auto import tqdm as bar

from ..catalog import TEXT_ENCODER, TOKENIZER, VAE, HubFile, ModelSpec
from ..errors import DownloadError, InputError, first_line, warn
from ..machine import atomic, environment
from .endpoint import HUB, address, without_secrets

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
TRUSTED = (HUB, "https://hf.co")  # endpoints that a token may go to without a warning
TRIES = 3  # of a request that the Hub answers with 429
LONGEST_WAIT = 300  # seconds between them: the window of the Hub's rate limit
STALE = 24 * 3600  # seconds after which a partial file belongs to a dead process
CHUNK = 16 << 20  # bytes hashed between two calls of on_progress
AGAIN = "Files that are whole stay, so run it again to go on."


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
        return f"{self.file.repo}/{self.file.path}"

    def __str__(self) -> str:
        revision = self.commit[:7] if self.file.revision == self.commit else f"{_branch(self.file)} ({self.commit[:7]})"
        return f"{self.name}, {revision}"


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """The files that a model needs, and the `free` bytes at `cache`. Its text is a table."""

    model: str
    files: tuple[PlannedFile, ...]
    cache: Path
    free: int

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


def plan(spec: ModelSpec, *, quantised: bool = False) -> DownloadPlan:
    """Plan a download with one request per repository, and fetch and write nothing.

    Offline (HF_HUB_OFFLINE), or with a warning when the Hub does not answer, the plan is what the cache holds. Warns
    when a token would go to an HF_ENDPOINT that is not the Hub.

    Raises:
        DownloadError: neither the Hub nor the cache knows a file.
        InputError: HF_ENDPOINT is not an address.
    """
    return _plan(spec.name, _needed(spec, quantised))


def fetch(
    spec: ModelSpec,
    *,
    quantised: bool = False,
    planned: DownloadPlan | None = None,
    on_progress: OnProgress | None = None,
) -> Files:
    """Fetch the missing files of a model and check them.

    Args:
        spec: the model.
        quantised: whether to fetch the files with int8 linears.
        planned: what `plan` returned; None: plan first.
        on_progress: called as bytes arrive or are checked. An exception of its own ends the run.

    Returns:
        The paths of the files.

    Raises:
        InputError: the model comes with the package.
        DownloadError: the disk is too small (before the first byte), or a transfer or a check failed.
    """
    if not _needed(spec, quantised):
        raise InputError(f"{spec.name} comes with the package and needs no download. Load it by its name.")
    return _arranged(_fetch(planned or plan(spec, quantised=quantised), on_progress))


def part(file: HubFile, *, on_progress: OnProgress | None = None) -> Path:
    """Return the path of one file, or of a tokenizer's folder. Fetches it, as `fetch` does, unless it was checked."""
    if path := find(file):
        return path
    first = _fetch(_plan(file.repo, _expanded(file)), on_progress)[0]
    return first.parent if file.path == "/" else first


def find(file: HubFile) -> Path | None:
    """Return the path of a file, or of a tokenizer's folder, if it is in the cache and was checked; else None."""
    found = [_in_cache(one) for one in _expanded(file)]
    if not all(one and _is_checked(one) for one in found):
        return None
    return _pointer(found[0]).parent if file.path == "/" else _pointer(found[0])


def cached(spec: ModelSpec, *, quantised: bool = False) -> Files | None:
    """Return the paths of a model's files without the network, or None unless all are in the cache and checked.

    `fetch` only has to check files that another program fetched.
    """
    found = [find(file) for file in _needed(spec, quantised)]
    return _arranged(found) if found and None not in found else None


def missing(spec: ModelSpec, *, quantised: bool = False) -> tuple[HubFile, ...]:
    """Return the files of a model that are not in the cache, or were not checked."""
    return tuple(file for file in _needed(spec, quantised) if not find(file))


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


def _needed(spec: ModelSpec, quantised: bool) -> list[HubFile]:
    weights = spec.quant_files if quantised else spec.files
    return [*weights, VAE, TEXT_ENCODER, *_expanded(TOKENIZER)] if weights else []


def _expanded(file: HubFile) -> list[HubFile]:
    """The file, or those of the tokenizer whose folder it is"""
    return [replace(file, path=name) for name in TOKENIZER_FILES] if file.path == "/" else [file]


def _arranged(paths: list[Path]) -> Files:
    """Files from paths in the order of `_needed`"""
    *transformers, vae, text_encoder = paths[: -len(TOKENIZER_FILES)]
    return Files(transformers=tuple(transformers), vae=vae, text_encoder=text_encoder, tokenizer=paths[-1].parent)


def _plan(model: str, needed: list[HubFile]) -> DownloadPlan:
    if needed and not constants.HF_HUB_OFFLINE:
        endpoint = address(constants.ENDPOINT)
        for handler in logging.getLogger("huggingface_hub").handlers:
            handler.addFilter(_hide_secrets)
        if endpoint not in TRUSTED and "authorization" in build_hf_headers():
            warn(
                f"your Hub token goes to {endpoint}, which is not the Hub; unset HF_ENDPOINT, or set "
                "HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to send no token",
                stacklevel=2,
            )
    found = {}
    for repo, revision in dict.fromkeys((file.repo, file.revision) for file in needed):
        found |= _look_up(repo, revision, [file for file in needed if (file.repo, file.revision) == (repo, revision)])
    return DownloadPlan(
        model=model, files=tuple(found[file] for file in needed), cache=Path(constants.HF_HUB_CACHE), free=_free()
    )


def _hide_secrets(record: logging.LogRecord) -> bool:
    """A filter of the client's log, because the client logs the address of a request that it repeats"""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def _look_up(repo: str, revision: str | None, files: list[HubFile]) -> dict[HubFile, PlannedFile]:
    """The files as the Hub has them, or as the cache has all of them where the Hub does not answer"""
    local = {file: _in_cache(file) for file in files}
    complete = None not in local.values()
    if complete and all(file.commit == revision for file in local.values()):
        return local  # because a commit does not change
    try:
        return _on_hub(repo, revision, files)
    except DownloadError as error:
        if not complete:
            raise
        if not constants.HF_HUB_OFFLINE:
            warn(f"going on with the files in the cache, because {error}", stacklevel=3)
        return local


def _on_hub(repo: str, revision: str | None, files: list[HubFile]) -> dict[HubFile, PlannedFile]:
    with _translated(repo):
        info = _ask(repo, revision)
    listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    found = {}
    for file in files:
        if (entry := listed.get(file.path)) is None:
            raise DownloadError(
                f"{repo} has no {file.path!r} at {_branch(file)} ({info.sha[:7]}). It has "
                f"{', '.join(sorted(listed)) or 'no files'}. A newer turbo_nb may know the new name."
            )
        blob = entry.lfs.sha256 if entry.lfs else entry.blob_id
        there = PlannedFile(file=file, commit=info.sha, size=entry.size, blob=blob, cached=False)
        found[file] = replace(there, cached=_pointer(there).is_file() or _blob(there).is_file())
    return found


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


def _fetch(planned: DownloadPlan, on_progress: OnProgress | None) -> list[Path]:
    """Fetch and check the files of a plan, then move the branches, and return the paths"""
    for repo in {file.file.repo for file in planned.files}:
        _remove_stale(repo)
    if planned.to_fetch > (free := _free()):
        raise DownloadError(
            f"{planned.model} needs {decimal(planned.to_fetch)} more in {planned.cache}, which has {decimal(free)} "
            "free. Free some space, or set HF_HOME to a folder on a larger disk."
        )
    done, paths = 0, []
    for file in planned.files:
        with _translated(file.name):
            paths.append(_fetch_file(file, done, planned.to_fetch, on_progress or (lambda progress: None)))
        done += 0 if file.cached else file.size
    for file in planned.files:
        with _translated(file.name):
            _move_branch(file)
    return paths


def _fetch_file(file: PlannedFile, done: int, total: int, on_progress: OnProgress) -> Path:
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

    path = Path(hf_hub_download(file.file.repo, file.file.path, revision=file.commit, tqdm_class=Meter))
    if not _is_checked(file):
        for checked in _check(file):
            on_progress(Progress(file=file, stage="check", file_done=checked, done=done + fetched, total=total))
    return path


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
    return any(marker.read_text() == stamp for marker in _markers(file).glob(file.blob or "*"))


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


def _in_cache(file: HubFile) -> PlannedFile | None:
    """A file as the cache has it, by the branch as it was when last fetched"""
    found = try_to_load_from_cache(file.repo, file.path, revision=file.revision)
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


def _repo_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _blob(file: PlannedFile) -> Path:
    return _repo_folder(file.file.repo) / "blobs" / file.blob


def _pointer(file: PlannedFile) -> Path:
    """Where the cache shows the file under its own name"""
    return _repo_folder(file.file.repo) / "snapshots" / file.commit / file.file.path


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
def _translated(what: str) -> Iterator[None]:
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
