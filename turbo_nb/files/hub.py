"""A model's files from the Hub: what is needed, whether it fits the disk, then fetched, checked, and found again.

huggingface_hub owns the transfer and the cache ($HF_HOME). It takes bytes of the right size for right and moves a
branch in the cache before its files are there; so every file is hashed once against the Hub's record, a marker in the
repository's cache remembers it, and the branch moves last. A broken transfer starts again at the file it broke in.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers
from rich.filesize import decimal
from tqdm import tqdm

from ..catalog import TEXT_ENCODER, TOKENIZER, VAE, HubFile, ModelSpec
from ..errors import DownloadError, InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
HUB = ("https://huggingface.co", "https://hf.co")
TRIES = 3  # of a request that the Hub answers with 429
LONGEST_WAIT = 300  # seconds between them: the window of the Hub's rate limit
STALE = 24 * 3600  # seconds after which a half-written file belongs to a dead process
CHUNK = 16 << 20  # bytes hashed between two words of progress
AGAIN = "files that are whole stay, so run it again to go on"


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file as the Hub has it now. blob: its name in the cache, the sha256 of an LFS file or git's SHA-1 of another.

    file.revision is what the catalogue asks for (None: main), `commit` what that is today; size is in bytes. cached:
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

    def __str__(self) -> str:
        revision = self.commit[:7] if self.file.revision == self.commit else f"{_branch(self.file)} ({self.commit[:7]})"
        return f"{self.file.repo}/{self.file.path}, {revision}"


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """What a model needs. `free` bytes are at `cache`; print it to read it."""

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
    """Where a model's files lie. transformers: one, or (high-noise, low-noise); tokenizer is a folder."""

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
    """What `fetch` is at. stage: "fetch" or "check" of `file`, with file_done of its bytes behind it.

    done of the plan's `total` bytes to fetch have come.
    """

    file: PlannedFile
    stage: str
    file_done: int
    done: int
    total: int


def plan(spec: ModelSpec, *, quantised: bool = False) -> DownloadPlan:
    """What a model needs, from one request a repository; fetches and writes nothing.

    Offline (HF_HUB_OFFLINE), or with a warning when the Hub cannot be asked, what the cache holds stands. Warns when
    a token would go to an HF_ENDPOINT that is not the Hub. Raises DownloadError if neither the Hub nor the cache
    knows a file.
    """
    return _plan(spec.name, _needed(spec, quantised))


def _plan(name: str, needed: list[HubFile]) -> DownloadPlan:
    if needed:
        _warn_of_token()
    groups: dict[tuple[str, str | None], list[HubFile]] = {}
    for file in needed:
        groups.setdefault((file.repo, file.revision), []).append(file)
    found = {}
    for (repo, revision), files in groups.items():
        found |= _look_up(repo, revision, files)
    return DownloadPlan(
        model=name, files=tuple(found[file] for file in needed), cache=Path(constants.HF_HUB_CACHE), free=_free()
    )


def fetch(
    spec: ModelSpec,
    *,
    quantised: bool = False,
    planned: DownloadPlan | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Files:
    """Fetch what is missing of a model (of `planned`, if that was made before), check it, and say where it lies.

    on_progress(progress) is called as bytes come or are checked; what it raises ends the run, see `progress_bars`.
    Raises InputError for a model that comes with the package; DownloadError before the first byte if the disk is too
    small, and for whatever goes wrong later.
    """
    needed = _needed(spec, quantised)
    if not needed:
        raise InputError(f"{spec.name} comes with the package and needs no download; load it by its name")
    return _arranged(_fetch(planned or plan(spec, quantised=quantised), on_progress))


def part(file: HubFile, *, on_progress: Callable[[Progress], None] | None = None) -> Path:
    """Where a file (or a tokenizer's folder) lies: in the cache if it was checked, else fetched as `fetch` does it."""
    files = _expanded(file)
    found = [_in_cache(one) for one in files]
    if all(one and _is_checked(one) for one in found):
        first = _pointer(found[0])
    else:
        first = _fetch(_plan(file.repo, files), on_progress)[0]
    return first.parent if file.path == "/" else first


def find(file: HubFile) -> Path | None:
    """Return where a file (or a tokenizer's folder) lies, if it is in the cache and was checked; else None."""
    found = [_in_cache(one) for one in _expanded(file)]
    if not all(one and _is_checked(one) for one in found):
        return None
    return _pointer(found[0]).parent if file.path == "/" else _pointer(found[0])


def _fetch(planned: DownloadPlan, on_progress: Callable[[Progress], None] | None) -> list[Path]:
    """Fetch and check the files of a plan, and say where they lie"""
    for repo in {file.file.repo for file in planned.files}:
        _remove_stale(repo)
    if planned.to_fetch > (free := _free()):
        raise DownloadError(
            f"{planned.model} needs {decimal(planned.to_fetch)} more in {planned.cache}, which has {decimal(free)} "
            "free; free some space, or set HF_HOME to a folder on a larger disk"
        )
    done, paths = 0, []
    for file in planned.files:
        paths.append(_fetch_file(file, done, planned.to_fetch, on_progress or (lambda progress: None)))
        done += 0 if file.cached else file.size
    for file in planned.files:
        _move_branch(file)
    return paths


def cached(spec: ModelSpec, *, quantised: bool = False) -> Files | None:
    """Where a model's files lie if all are in the cache and were checked, without the network and at once; else None.

    For files that another program fetched, `fetch` only has to check them.
    """
    needed = _needed(spec, quantised)
    if not needed or missing(spec, quantised=quantised):
        return None
    return _arranged([_pointer(_in_cache(file)) for file in needed])


def missing(spec: ModelSpec, *, quantised: bool = False) -> tuple[HubFile, ...]:
    """The files of a model that are not in the cache, or not checked: what `cached` waits for."""
    found = {file: _in_cache(file) for file in _needed(spec, quantised)}
    return tuple(file for file, here in found.items() if not (here and _is_checked(here)))


@contextmanager
def progress_bars() -> Iterator[Callable[[Progress], None]]:
    """An on_progress for `fetch` that draws this file's bytes and all bytes: with rich in a shell, tqdm in a notebook.

    A shell that is no terminal, such as a log, gets a line for every file that is done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if console.is_jupyter:
        from tqdm.auto import tqdm as bar

        with bar(desc="all files", unit="B", unit_scale=True) as every, bar(unit="B", unit_scale=True) as one:

            def show(progress: Progress) -> None:
                one.set_description(f"{progress.stage} {progress.file.file.path}", refresh=False)
                one.n, one.total = progress.file_done, progress.file.size
                every.n, every.total = progress.done, progress.total
                one.refresh()
                every.refresh()

            yield show
        return

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    columns = (*columns, TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        one, every = bars.add_task("", total=None), bars.add_task("all files", total=None)

        def show(progress: Progress) -> None:
            bars.update(
                one, description=f"{progress.stage} {progress.file.file.path}",
                completed=progress.file_done, total=progress.file.size,
            )  # fmt: skip
            bars.update(every, completed=progress.done, total=progress.total)
            if progress.stage == "check" and progress.file_done == progress.file.size:
                console.print(f"{progress.file.file.path}: {decimal(progress.file.size)}, checked", highlight=False)

        yield show


class _Meter(tqdm):
    """What huggingface_hub takes for a progress bar; draws nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(disable=True)

    def update_transfer(self, n: int) -> None:
        """Bytes on the wire, which Xet counts beside those on the disk."""

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Their speed."""


def _needed(spec: ModelSpec, quantised: bool) -> list[HubFile]:
    weights = spec.quant_files if quantised else spec.files
    if not weights:
        return []
    return [*weights, VAE, TEXT_ENCODER, *_expanded(TOKENIZER)]


def _expanded(file: HubFile) -> list[HubFile]:
    """The file, or those of the tokenizer whose folder it is"""
    return [replace(file, path=name) for name in TOKENIZER_FILES] if file.path == "/" else [file]


def _arranged(paths: list[Path]) -> Files:
    """Files from paths in the order of `_needed`."""
    weights, tokens = paths[: -len(TOKENIZER_FILES)], paths[-len(TOKENIZER_FILES) :]
    *transformers, vae, text_encoder = weights
    return Files(transformers=tuple(transformers), vae=vae, text_encoder=text_encoder, tokenizer=tokens[0].parent)


def _look_up(repo: str, revision: str | None, files: list[HubFile]) -> dict[HubFile, PlannedFile]:
    local = {file: _in_cache(file) for file in files}
    complete = None not in local.values()
    if complete and all(file.commit == revision for file in local.values()):
        return local  # a commit does not change
    try:
        return _on_hub(repo, revision, files)
    except DownloadError as error:
        if not complete:
            raise
        if not constants.HF_HUB_OFFLINE:
            warnings.warn(f"going on with the files in the cache, because {error}", stacklevel=2)
        return local


def _on_hub(repo: str, revision: str | None, files: list[HubFile]) -> dict[HubFile, PlannedFile]:
    with _plainly(repo):
        info = _model_info(repo, revision)
    listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    found = {}
    for file in files:
        if (entry := listed.get(file.path)) is None:
            raise DownloadError(
                f"{repo} has no {file.path!r} at {_branch(file)} ({info.sha[:7]}); it has "
                f"{', '.join(sorted(listed)) or 'no files'}; a newer turbo_nb may know its new name"
            )
        blob = entry.lfs.sha256 if entry.lfs else entry.blob_id
        there = PlannedFile(file=file, commit=info.sha, size=entry.size, blob=blob, cached=False)
        in_cache = _pointer(there).is_file() or (_repo_folder(repo) / "blobs" / blob).is_file()
        found[file] = replace(there, cached=in_cache)
    return found


def _model_info(repo: str, revision: str | None, tries: int = TRIES):
    """The Hub's record of a repository and its files, asked again when the Hub says that it is asked too often."""
    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        wait = _wait(error)
        if error.response.status_code != 429 or tries == 1 or wait > LONGEST_WAIT:
            raise
    warnings.warn(f"the Hub is asked too often; asking again in {wait} s", stacklevel=2)
    time.sleep(wait)
    return _model_info(repo, revision, tries - 1)


def _wait(error: HfHubHTTPError) -> int:
    """Seconds that a 429 asks to wait, from Retry-After or RateLimit ('"api";r=0;t=55'); 5 if it does not say."""
    headers = error.response.headers
    said = re.search(r"^\s*(\d+)\s*$", headers.get("retry-after", "")) or re.search(
        r"\bt=(\d+)", headers.get("ratelimit", "")
    )
    return int(said[1]) if said else 5


def _in_cache(file: HubFile) -> PlannedFile | None:
    """A file as the cache has it, by the branch as it was when last fetched."""
    found = try_to_load_from_cache(file.repo, file.path, revision=file.revision)
    if not isinstance(found, str):
        return None
    path = Path(found)
    return PlannedFile(
        file=file,
        commit=path.parents[file.path.count("/")].name,
        size=path.stat().st_size,
        blob=Path(os.readlink(path)).name if path.is_symlink() else None,  # some file systems have no links
        cached=True,
    )


def _fetch_file(file: PlannedFile, done: int, total: int, tell: Callable[[Progress], None]) -> Path:
    come = 0

    class Meter(_Meter):
        def update(self, n: int = 1) -> None:
            nonlocal come
            come += n
            tell(Progress(file=file, stage="fetch", file_done=come, done=done + come, total=total))

    with _plainly(f"{file.file.repo}/{file.file.path}"):
        path = Path(hf_hub_download(file.file.repo, file.file.path, revision=file.commit, tqdm_class=Meter))
    if not _is_checked(file):
        with _plainly(f"{file.file.repo}/{file.file.path}"):
            for checked in _check(file):
                tell(Progress(file=file, stage="check", file_done=checked, done=done + come, total=total))
    return path


def _check(file: PlannedFile) -> Iterator[int]:
    """Hash a file, yielding the bytes done, and mark it as right; remove it and raise DownloadError if it is wrong."""
    path = _pointer(file)
    status = path.stat()
    if file.blob is None:
        return  # without links or the Hub nothing says what its bytes should be
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % status.st_size)  # as git hashes a file
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            yield stream.tell()
    if digest.hexdigest() != file.blob:
        for name in (path.resolve(), _repo_folder(file.file.repo) / "blobs" / file.blob, path):
            name.unlink(missing_ok=True)
        raise DownloadError(
            f"{file.file.repo}/{file.file.path} came with wrong bytes: the hash is {digest.hexdigest()[:12]}…, the Hub "
            f"says {file.blob[:12]}…; it is removed, run it again to fetch it anew"
        )
    with suppress(OSError):  # a cache that cannot be written is hashed every time
        _write(_markers(file) / file.blob, _stamp(status))


def _is_checked(file: PlannedFile) -> bool:
    """Whether the file was hashed and has not been touched since."""
    if not (path := _pointer(file)).is_file():
        return False
    stamp = _stamp(path.stat())
    return any(marker.read_text() == stamp for marker in _markers(file).glob(file.blob or "*"))


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _move_branch(file: PlannedFile) -> None:
    """Let the branch in the cache stand at the commit whose files are all there."""
    ref = _repo_folder(file.file.repo) / "refs" / _branch(file.file)
    if file.file.revision == file.commit or (ref.is_file() and ref.read_text() == file.commit):
        return
    with _plainly(str(ref)):
        _write(ref, file.commit)


def _write(path: Path, text: str) -> None:
    """Write a small file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _remove_stale(repo: str) -> None:
    """Remove the half-written files of downloads that died more than a day ago."""
    for path in (_repo_folder(repo) / "blobs").glob("*.incomplete"):
        with suppress(OSError):  # its process lives after all, or the cache cannot be written
            if path.stat().st_mtime < time.time() - STALE:
                path.unlink()


def _repo_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _pointer(file: PlannedFile) -> Path:
    """Where the cache shows the file under its own name."""
    return _repo_folder(file.file.repo) / "snapshots" / file.commit / file.file.path


def _markers(file: PlannedFile) -> Path:
    """The folder of the markers of checked files, each named as the blob is."""
    return _repo_folder(file.file.repo) / "turbo_nb"


def _branch(file: HubFile) -> str:
    return file.revision or constants.DEFAULT_REVISION


def _free() -> int:
    """Free bytes where the cache is, or will be."""
    folder = Path(constants.HF_HUB_CACHE).absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def _warn_of_token() -> None:
    if constants.HF_HUB_OFFLINE or constants.ENDPOINT in HUB or "authorization" not in build_hf_headers():
        return
    warnings.warn(
        f"your Hub token goes to {constants.ENDPOINT}, which is not the Hub; unset HF_ENDPOINT, or set "
        "HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to send none",
        stacklevel=2,
    )


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Turn what huggingface_hub, httpx, hf_xet or the system raises over `what` into one line that says what to do."""
    try:
        yield
    except DownloadError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError, KeyError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise DownloadError(f"{what}: {_reason(cause)}") from error


def _reason(error: BaseException) -> str:
    """What went wrong, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind, text = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and it is not in {cache}; unset HF_HUB_OFFLINE, or copy a cache that has it"
    if status in (401, 403):
        return (
            f"{constants.ENDPOINT} does not show it to you ({status}); accept its licence on its page there if it has "
            "one, and set HF_TOKEN to a token that may read it"
        )
    if status == 404:
        return f"{constants.ENDPOINT} does not have it (404); check its name and revision, and HF_ENDPOINT if it is set"
    if status == 429:
        return f"{constants.ENDPOINT} is asked too often (429); wait {_wait(error)} s or set HF_TOKEN; {AGAIN}"
    if status:
        return f"{constants.ENDPOINT} failed ({status}); wait some minutes; {AGAIN}"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {cache}; free some, or set HF_HOME to a folder on a larger disk; {AGAIN}"
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{cache} cannot be written ({text}); set HF_HOME to a folder of yours"
    if kind in ("ConnectError", "ConnectTimeout", "ProxyError"):
        return f"cannot reach {constants.ENDPOINT} ({text}); check the network, proxies, and HF_ENDPOINT if it is set"
    if isinstance(error, (HTTPError, RuntimeError)) or "Consistency check" in text:
        return f"the transfer broke off ({kind}: {text}); {AGAIN}"
    return (
        f"{constants.ENDPOINT} gave no answer that the Hub would give ({kind}: {text}); check HF_ENDPOINT and proxies"
    )
