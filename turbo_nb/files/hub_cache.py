"""The Hub's cache on this disk: where a file of the Hub lies in it, which files are whole, and which were checked.

The folders are those of huggingface_hub ($HF_HOME). Beside them `turbo_nb` keeps two things for each repository: a
marker for each file that was hashed, and the names of all files of a commit. All names of a folder decide which of its
files are taken, and the cache alone shows only those that were fetched.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from ..catalog import HubFile
from ..errors import DownloadError
from ..machine import atomic, environment
from .hub_requests import Listing

STALE = 24 * 3600  # seconds after which a partial file belongs to a dead process
CHUNK = 16 << 20  # bytes hashed between two calls of on_progress


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file as the Hub has it now.

    Args:
        file: its repository, path and revision.
        commit: what the revision is today.
        size: in bytes.
        blob: its name in the cache: the SHA-256 of an LFS file, or git's SHA-1 of another one. None: unknown.
        cached: whether the bytes are in the cache, checked or not.
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

    @property
    def path(self) -> Path:
        """Where the cache shows the file under its own name."""
        return repo_folder(self.file.repo) / "snapshots" / self.commit / self.file.path

    @property
    def blob_path(self) -> Path:
        """Where the cache keeps its bytes, under the name of the blob."""
        return repo_folder(self.file.repo) / "blobs" / self.blob

    def __str__(self) -> str:
        revision = self.commit[:7] if self.file.revision == self.commit else f"{branch(self.file)} ({self.commit[:7]})"
        return f"{self.name}, {revision}"


def repo_folder(repo: str) -> Path:
    """Return the folder of a repository."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def path_of(part: HubFile, files: Sequence[PlannedFile]) -> Path:
    """Return where the cache shows a file or folder whose files are `files`."""
    return repo_folder(part.repo) / "snapshots" / files[0].commit / part.path.strip("/")


def origin(path: Path) -> HubFile | None:
    """Return the file or folder of the Hub that a path in the cache shows, with its commit; None for another path."""
    with suppress(ValueError):
        inside = Path(path).absolute().relative_to(Path(constants.HF_HUB_CACHE).absolute())
        repo, snapshots, commit, *names = inside.parts
        kind, *name = repo.split("--")
        if kind == "models" and snapshots == "snapshots":
            return HubFile("/".join(name), "/".join(names) or "/", commit=commit)
    return None


def branch(file: HubFile) -> str:
    """Return the branch, tag or commit of a file."""
    return file.revision or constants.DEFAULT_REVISION


def commit_of(file: HubFile) -> str | None:
    """Return the commit that a file's revision was when it was last fetched; None where the cache does not know it."""
    if file.commit or re.fullmatch(r"[0-9a-f]{40}", file.revision or ""):
        return file.commit or file.revision
    with suppress(OSError):
        return (repo_folder(file.repo) / "refs" / branch(file)).read_text().strip()
    return None


def free_bytes() -> int:
    """Return the free bytes where the cache is, or will be."""
    return environment.free_bytes(Path(constants.HF_HUB_CACHE))


def planned_file(file: HubFile, listing: Listing) -> PlannedFile:
    """Return a file as a listing has it, and whether the cache has its bytes."""
    size, blob = listing.files[file.path]
    one = PlannedFile(file=file, commit=listing.commit, size=size, blob=blob, cached=False)
    return replace(one, cached=one.path.is_file() or bool(blob and one.blob_path.is_file()))


def find_file(file: HubFile) -> PlannedFile | None:
    """Return a file as the cache has it, by the branch as it was when it was last fetched; None without the file."""
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


def known_names(file: HubFile, *, complete: bool = True) -> Listing | None:
    """Return the names in a file's repository without the network: as they were when one of its files was fetched.

    Args:
        file: of the repository and the revision.
        complete: None instead of the names of the files in the cache, where nothing else is known.
    """
    folder, commit = repo_folder(file.repo), commit_of(file)
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


def remember_names(listing: Listing) -> None:
    """Keep the names of a repository's files in the cache."""
    with suppress(OSError):  # a cache that cannot be written is asked for every time
        path = repo_folder(listing.repo) / "turbo_nb" / "listings" / f"{listing.commit}.json"
        atomic.write(path, json.dumps(listing.files))


def check(file: PlannedFile) -> Iterator[int]:
    """Hash a file, yield the bytes done, and mark it as checked. Removes a wrong file and raises DownloadError."""
    path = file.path
    status = path.stat()
    if file.blob is None:  # offline in a cache without links, where nothing records the hash
        return
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % status.st_size)  # as git hashes a file
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            yield stream.tell()
    if digest.hexdigest() != file.blob:
        for name in (path.resolve(), file.blob_path, path):
            name.unlink(missing_ok=True)
        raise DownloadError(
            f"{file.name} came with wrong bytes: its hash is {digest.hexdigest()[:12]}…. Expected {file.blob[:12]}…. "
            "The file is removed, so run it again to fetch it anew."
        )
    with suppress(OSError):  # a cache that cannot be written is hashed every time
        atomic.write(_markers(file) / file.blob, _stamp(status))


def is_checked(file: PlannedFile) -> bool:
    """Return whether the file was hashed and has not changed since."""
    if not (path := file.path).is_file():
        return False
    stamp = _stamp(path.stat())
    return any(marker.read_text() == stamp for marker in _markers(file).glob(file.blob or "[0-9a-f]*"))


def _markers(file: PlannedFile) -> Path:
    """The folder of the markers of checked files, each named as the blob"""
    return repo_folder(file.file.repo) / "turbo_nb"


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def move_branch(file: PlannedFile) -> None:
    """Point the branch in the cache to the commit whose files are all there."""
    ref = repo_folder(file.file.repo) / "refs" / branch(file.file)
    if file.file.revision != file.commit and not (ref.is_file() and ref.read_text() == file.commit):
        atomic.write(ref, file.commit)


def remove_stale(repo: str) -> None:
    """Remove the partial files of downloads that died more than a day ago."""
    for path in (repo_folder(repo) / "blobs").glob("*.incomplete"):
        with suppress(OSError):  # because its process may have ended it just now
            if path.stat().st_mtime < time.time() - STALE:
                path.unlink()
