"""The place (RunPod, Colab, Jupyter, a plain shell) and what it has: disks, caches, memory, packages.

Importing this module needs no other package, so that `needed_packages` can name one that is missing.
"""

import errno
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import InputError, warn
from ..values import local

DISTRIBUTION = "turbo-nb"
VOLUMES = {"RunPod pod": Path("/workspace"), "RunPod serverless": Path("/runpod-volume")}
CONTAINER = Path("/")
PRICE = "TURBO_NB_PRICE_PER_HOUR"
FOLDERS = (
    "TURBO_NB_HOME", "TURBO_NB_CACHE", "TURBO_NB_CONFIG", "TURBO_NB_LORAS", "TRITON_CACHE_DIR", "HF_HOME",
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME",
)  # fmt: skip
SWITCHES = TEXT_CACHE, GRAPHS, TUNING = "TURBO_NB_TEXT_CACHE", "TURBO_NB_GRAPHS", "TURBO_NB_TUNING"
# pathlib's predicates raise for a name that is too long or a folder without permission, before Python 3.14
exists, is_dir, is_file = os.path.exists, os.path.isdir, os.path.isfile


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A disk. `name` says what it is for; `free` and `total` are in bytes."""

    name: str
    path: str
    free: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder of files that can be fetched or made again. `size`, and `free` on its disk, are in bytes."""

    name: str
    path: str
    size: int
    free: int
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory in bytes, at most the container's limit. None where the system does not report it."""

    available: int | None
    total: int | None


@dataclass(frozen=True, kw_only=True)
class Package:
    """A required package. `needed` is a specifier such as ">=2.7", `installed` a version or None."""

    name: str
    needed: str
    installed: str | None
    ok: bool


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The result of `survey`. `version` is turbo_nb's own, None where it is imported from a folder, not installed."""

    place: str
    notebook: bool
    system: str
    python: str
    version: str | None
    memory: Memory
    disks: tuple[Disk, ...]
    caches: tuple[Cache, ...]
    packages: tuple[Package, ...]


def survey() -> Environment:
    """Describe this machine. Writes nothing and sends nothing."""
    return Environment(
        place=place(),
        notebook=in_notebook(),
        system=platform.platform(),
        python=platform.python_version(),
        version=version(DISTRIBUTION),
        memory=memory(),
        disks=disks(),
        caches=caches(),
        packages=needed_packages(),
    )


def place(variables: Mapping[str, str] = os.environ) -> str:
    """Return "RunPod pod", "RunPod serverless", "Colab", "Jupyter" or "plain"."""
    # Serverless first, because its workers have RUNPOD_POD_ID, too
    if "RUNPOD_ENDPOINT_ID" in variables or "RUNPOD_WEBHOOK_GET_JOB" in variables:
        return "RunPod serverless"
    if "RUNPOD_POD_ID" in variables:
        return "RunPod pod"
    if "COLAB_RELEASE_TAG" in variables:
        return "Colab"
    return "Jupyter" if in_notebook() else "plain"


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def price_per_hour() -> float | None:
    """Return the price of an hour of this machine in dollars, from TURBO_NB_PRICE_PER_HOUR.

    Raises:
        InputError: the variable does not hold a price.
    """
    text = os.environ.get(PRICE)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", text.strip()):
        raise InputError(f"{PRICE} is {text!r}. Expected a number of dollars, such as 2.99. Set it again, or unset it.")
    return float(text)


def cost(seconds: float) -> float | None:
    """Return the dollars for so many seconds of this machine. None without a price; a wrong price warns."""
    try:
        price = price_per_hour()
    except InputError as error:  # the video of these seconds is worth more than its price
        warn(str(error))
        return None
    return None if price is None else price * seconds / 3600


def dollars(cost: float | None, before: str = ", ") -> str:
    """Return a cost as it follows a time, such as ", $0.0042", or nothing without a cost."""
    return "" if cost is None else f"{before}${cost:.4f}"


def switch(variable: str) -> bool | None:
    """Return whether a variable of `SWITCHES` is 1, None where it is not set or empty. Raises InputError for a word."""
    text = os.environ.get(variable) or None
    if text not in (None, "0", "1"):
        raise InputError(f"{variable} is {text!r}. Expected 0 or 1. Unset it for the default.")
    return text and text == "1"


def check_python() -> None:
    """Raise InputError where Python runs without docstrings, which transformers reads."""
    if sys.flags.optimize > 1:
        raise InputError(
            "PYTHONOPTIMIZE is 2 (python -OO), which removes docstrings. Expected at most 1, because transformers "
            "reads them. Unset PYTHONOPTIMIZE."
        )


def check_folders() -> None:
    """Raise InputError for a variable of `FOLDERS` with an address, such as s3://bucket/x."""
    for variable in FOLDERS:
        folder_of(variable)


@contextmanager
def usable_folders() -> Iterator[dict[str, str]]:
    """Unset the variables of `FOLDERS` with an address, inside this context. Gives variable → what is wrong."""
    wrong, kept = {}, {}
    for variable in FOLDERS:
        try:
            folder_of(variable)
        except InputError as error:
            wrong[variable], kept[variable] = str(error), os.environ.pop(variable)
    try:
        yield wrong
    finally:
        os.environ.update(kept)


def folder_of(variable: str) -> Path | None:
    """Return the folder that a variable names, None where it is not set or empty. Raises InputError for an address."""
    path = os.environ.get(variable)
    return Path(local(path, variable)) if path else None


def hub_cache() -> Path:
    """Return huggingface_hub's folder of files, as its `constants` compute it.

    It is $HF_HUB_CACHE, else $HUGGINGFACE_HUB_CACHE, else `hub` in $HF_HOME or in its default. Variables such as $HOME
    within them are expanded.
    """
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    path = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(os.path.expandvars(_expanded(home)), "hub"))
    return Path(os.path.expandvars(_expanded(os.environ.get("HF_HUB_CACHE", path))))


def volume() -> Path | None:
    """Return the disk that outlasts the container on RunPod, or None."""
    path = VOLUMES.get(place())
    return path if path and is_dir(path) and not same_disk(path, CONTAINER) else None


def cache() -> Path:
    """Return the folder for what makes later runs faster.

    It is $TURBO_NB_CACHE, else `cache` in $TURBO_NB_HOME or on a pod's volume, else in the user's own cache. A user
    without a home gets a temporary folder.
    """
    return _own_folder("cache")


def config() -> Path:
    """Return the folder for what the user keeps, such as presets.

    It is $TURBO_NB_CONFIG, else `config` in $TURBO_NB_HOME or on a pod's volume, else in the user's own configuration.
    A user without a home gets a temporary folder.
    """
    return _own_folder("config")


def _own_folder(kind: str) -> Path:
    """Return the folder of this package for "cache" or "config" """
    if path := folder_of(f"TURBO_NB_{kind.upper()}"):
        return path
    lasting = volume()
    if home := folder_of("TURBO_NB_HOME") or (lasting and lasting / "turbo_nb_home"):
        return home / kind
    import platformdirs

    find = {"cache": platformdirs.user_cache_path, "config": platformdirs.user_config_path}[kind]
    with suppress(RuntimeError):  # without a home platformdirs raises, and its older versions return "~/.cache"
        if (path := find("turbo_nb", appauthor=False)).is_absolute():
            return path
    return Path(tempfile.gettempdir(), "turbo_nb")


def text_cache() -> Path:
    """Return the folder of the prompts' embeddings."""
    return cache() / "text"


def kernel_cache() -> Path:
    """Return the folder of the kernels that Triton compiled."""
    return folder_of("TRITON_CACHE_DIR") or _expanded("~/.triton/cache")


def same_disk(one: Path, other: Path) -> bool:
    """Return whether two folders are on one disk. A folder that does not exist counts as where it would be made."""
    return existing(one).stat().st_dev == existing(other).stat().st_dev


def disks() -> tuple[Disk, ...]:
    """Return the volume, if this place has one, and the container's (or the machine's) own disk."""
    own = "container" if place().startswith("RunPod") else "machine"
    return tuple(
        Disk(name=name, path=str(path), free=usage[0], total=usage[1])
        for name, path in (("volume", volume()), (own, CONTAINER))
        if path and (usage := _free_and_total(path))[1]
    )


def caches() -> tuple[Cache, ...]:
    """Return the caches of the Hub's files, of Triton's kernels and of the prompts' embeddings."""
    return tuple(
        Cache(
            name=name,
            path=str(path),
            size=folder_size(path),
            free=_free_and_total(path)[0],
            writable=path.parts[0] != "~" and os.access(existing(path), os.W_OK),
        )
        for name, path in (("Hub", hub_cache()), ("Triton", kernel_cache()), ("prompt", text_cache()))
    )


def folder_size(path: Path) -> int:
    """Return the bytes of all files under a folder, without following links. A missing folder has 0."""
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # deleted since it was listed
                continue
    return size


def memory(root: Path = Path("/")) -> Memory:
    """Return main memory: the kernel's count or the container's limit (cgroup 2 or 1), whichever is less."""
    counts = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE))
    total, available = (int(counts[key]) * 1024 if key in counts else None for key in ("MemTotal", "MemAvailable"))
    for folder, limit_file, used_file, cached_key in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = (_read(root / folder / name).strip() for name in (limit_file, used_file))
        if not (limit.isdigit() and used.isdigit()) or (total is not None and int(limit) >= total):
            continue
        # the page cache counts as used, but the kernel frees it for programs
        cached = re.search(rf"^{cached_key} (\d+)", _read(root / folder / "memory.stat"), re.MULTILINE)
        left = max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))
        total, available = int(limit), left if available is None else min(available, left)
    return Memory(available=available, total=total)


def needed_packages() -> tuple[Package, ...]:
    """Return Python and every package that turbo_nb requires, in a notebook those of its extra `notebook` too.

    In Colab they are those of the extra `colab`, because Colab pins a server and a kernel of its own.

    Returns:
        One entry for each package. Empty where turbo_nb is imported from a folder and not installed.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        ours = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ()
    extra = {"extra": ("colab" if place() == "Colab" else "notebook") if in_notebook() else ""}
    needed = [Requirement(line) for line in ours.requires or ()]
    found = {r.name: (r.specifier, version(r.name)) for r in needed if r.marker is None or r.marker.evaluate(extra)}
    found = {"Python": (SpecifierSet(ours.metadata["Requires-Python"]), platform.python_version()), **found}
    return tuple(
        Package(
            name=name,
            needed=str(specifier),
            installed=installed,
            ok=installed is not None and specifier.contains(installed, prereleases=True),
        )
        for name, (specifier, installed) in found.items()
    )


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _expanded(path: str | os.PathLike) -> Path:
    """Expand "~", which stays as it is for a user without a home"""
    return Path(os.path.expanduser(path))


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not exists(path) and path != path.parent:
        path = path.parent
    return path


def require_writable(folder: Path) -> None:
    """Raise OSError for a folder that could not be made, or into which no file could be written. Makes nothing."""
    with suppress(FileNotFoundError, NotADirectoryError):
        folder.stat()  # raises for a name that is too long, and for a link to itself
    place = existing(folder)
    if not is_dir(place):
        raise NotADirectoryError(errno.ENOTDIR, f"{str(place)!r} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"no permission in {str(place)!r}")


def free_bytes(path: Path) -> int:
    """Return the free bytes of a path's disk; the largest number where the system does not report them."""
    free, total = _free_and_total(path)
    return free if total else sys.maxsize


def _free_and_total(path: Path) -> tuple[int, int]:
    """Return the free and total bytes of a path's disk, zeros where the system refuses to tell them"""
    try:
        usage = shutil.disk_usage(existing(path))
    except OSError:
        return 0, 0
    return usage.free, usage.total


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
