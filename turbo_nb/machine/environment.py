"""Where we are (RunPod, Colab, Jupyter, a plain shell), and what is there: disks, caches, memory, packages.

Nothing here needs a package of ours to be installed, so that it can tell which one is missing.
"""

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import InputError

DISTRIBUTION = "turbo-nb"
VOLUMES = {"RunPod pod": Path("/workspace"), "RunPod serverless": Path("/runpod-volume")}
CONTAINER = Path("/")
PRICE = "TURBO_NB_PRICE_PER_HOUR"


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A disk by what it is for; free and total in bytes."""

    name: str
    path: str
    free: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder of files that can be fetched or made again; size, and free on its disk, in bytes."""

    name: str
    path: str
    size: int
    free: int
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory in bytes, the container's limit counted in; None where the system does not tell."""

    available: int | None
    total: int | None


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that we need: `needed` is a specifier such as ">=2.7", `installed` a version or None."""

    name: str
    needed: str
    installed: str | None
    ok: bool


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Everything `survey()` saw. version is ours, None where turbo_nb is not installed but lies on the path."""

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
    """Look around. Makes nothing, sends nothing."""
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
    """ "RunPod pod", "RunPod serverless", "Colab", "Jupyter" or "plain"."""
    if "RUNPOD_ENDPOINT_ID" in variables or "RUNPOD_WEBHOOK_GET_JOB" in variables:  # a worker has a pod's id, too
        return "RunPod serverless"
    if "RUNPOD_POD_ID" in variables:
        return "RunPod pod"
    if "COLAB_RELEASE_TAG" in variables:
        return "Colab"
    return "Jupyter" if in_notebook() else "plain"


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def price_per_hour() -> float | None:
    """What this machine costs an hour, from TURBO_NB_PRICE_PER_HOUR. Raises InputError if that is no price."""
    text = os.environ.get(PRICE)
    if not text:
        return None
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text.strip()):
        raise InputError(f"{PRICE} is {text!r}; it is a number of dollars, such as 2.99")
    return float(text)


def cost(seconds: float) -> float | None:
    """Dollars for so many seconds of this machine; None without a price, and with a warning if it cannot be read."""
    try:
        price = price_per_hour()
    except InputError as error:  # what was made in that time is not lost over it
        warnings.warn(str(error), stacklevel=1)
        return None
    return None if price is None else price * seconds / 3600


def dollars(cost: float | None, before: str = ", ") -> str:
    """A cost as it follows a time, such as ", $0.0042"; nothing without one."""
    return "" if cost is None else f"{before}${cost:.4f}"


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloaded files: $HF_HUB_CACHE, else `hub` in $HF_HOME or its default."""
    if path := os.environ.get("HF_HUB_CACHE"):
        return Path(path).expanduser()
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return (Path(os.environ.get("HF_HOME") or default) / "hub").expanduser()


def volume() -> Path | None:
    """The disk that outlasts the container, on RunPod; None where there is none."""
    path = VOLUMES.get(place())
    return path if path and path.is_dir() and not same_disk(path, CONTAINER) else None


def cache() -> Path:
    """Where we keep what makes later runs quicker: $TURBO_NB_CACHE, else `cache` in $TURBO_NB_HOME or on a pod's
    volume, else the user's own cache."""
    if path := os.environ.get("TURBO_NB_CACHE"):
        return Path(path).expanduser()
    lasting = volume()
    if home := os.environ.get("TURBO_NB_HOME") or (lasting and lasting / "turbo_nb_home"):
        return Path(home).expanduser() / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "turbo_nb"


def text_cache() -> Path:
    """The folder of prompts' embeddings."""
    return cache() / "text"


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders, or where they will be made, are on one disk."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def disks() -> tuple[Disk, ...]:
    """The volume, if there is one, and the container's (or the machine's) own disk."""
    own = "container" if place().startswith("RunPod") else "machine"
    return tuple(
        Disk(name=name, path=str(path), free=usage.free, total=usage.total)
        for name, path in (("volume", volume()), (own, CONTAINER))
        if path and (usage := shutil.disk_usage(path))
    )


def caches() -> tuple[Cache, ...]:
    """The Hub's files first, then Triton's kernels and the embeddings of prompts."""
    return tuple(
        Cache(
            name=name,
            path=str(path),
            size=folder_size(path),
            free=shutil.disk_usage(_existing(path)).free,
            writable=os.access(_existing(path), os.W_OK),
        )
        for name, path in (("Hub", hub_cache()), ("Triton", kernel_cache()), ("prompt", text_cache()))
    )


def kernel_cache() -> Path:
    """Where Triton keeps what it compiled."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser()


def folder_size(path: Path) -> int:
    """Bytes of all files under a folder, links not followed; 0 for one that isn't there."""
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # gone since it was listed
                continue
    return size


def memory(root: Path = Path("/")) -> Memory:
    """Main memory, by the kernel's count or the container's limit (cgroup 2 or 1), whichever is less."""
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE))
    total, available = (int(told[key]) * 1024 if key in told else None for key in ("MemTotal", "MemAvailable"))
    for folder, limit_file, used_file, cached_key in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = (_read(root / folder / name).strip() for name in (limit_file, used_file))
        if not (limit.isdigit() and used.isdigit()) or (total is not None and int(limit) >= total):
            continue
        # the page cache counts as used, and gives way
        cached = re.search(rf"^{cached_key} (\d+)", _read(root / folder / "memory.stat"), re.MULTILINE)
        left = max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))
        total, available = int(limit), left if available is None else min(available, left)
    return Memory(available=available, total=total)


def needed_packages() -> tuple[Package, ...]:
    """Python, then every package that ours asks for (in a notebook, the extra `notebook` counted in).

    Empty where turbo_nb is not installed but lies on the path.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        ours = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ()
    extra = {"extra": "notebook" if in_notebook() else ""}
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


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
