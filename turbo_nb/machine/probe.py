"""Which implementation of each operation runs on this machine, which were passed over, and why.

`probe()` gathers the facts into a `Machine`; `choose()` reads the table `CANDIDATES` against them. An implementation is
chosen because something real ran (an import, a trial kernel), and one that fails is a reason and not an exception.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, first_line
from . import environment

PROBE_SECONDS = 60.0  # for the trial kernel: torch's import, Triton's compilation, one launch
SMI_SECONDS = 10.0
# Import name → what users call it, and the module whose import shows that it works
LIBRARIES = {
    "triton": ("Triton", "triton"),
    "flash_attn": ("flash_attn", "flash_attn.layers.rotary"),
    "spas_sage_attn": ("SpargeAttn", "spas_sage_attn"),
}


@dataclass(frozen=True, kw_only=True)
class Library:
    """An installed library. error: why it cannot be used ("import failed: …"), None where it can."""

    version: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What probing found; `Machine()` is one without a GPU.

    gpu: the first GPU's name, of gpu_count. arch: its compute capability (major, minor), None where torch cannot use
    it; cuda_error then says why. Memory in bytes. driver, torch and cuda (the one torch is built for) are versions.
    compiler: path of the C compiler. libraries: import name → Library, those installed.
    """

    gpu: str | None = None
    gpu_count: int = 0
    arch: tuple[int, int] | None = None
    cuda_error: str | None = None
    free_memory: int | None = None
    total_memory: int | None = None
    driver: str | None = None
    torch: str | None = None
    cuda: str | None = None
    compiler: str | None = None
    libraries: Mapping[str, Library] = field(default_factory=dict)


def probe() -> Machine:
    """The facts about this machine, gathered once a process (seconds on a GPU); free memory is that of now."""
    machine = _probe_once()
    if machine.arch is None:
        return machine
    import torch

    free, total = torch.cuda.mem_get_info()
    return replace(machine, free_memory=free, total_memory=total)


def device_name(device: str) -> str:
    """What a timing was measured on: the GPU's name, or the CPU's threads, with torch's version."""
    import torch

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU with {threads} thread{'s' * (threads != 1)}"
    return f"{name}, torch {torch.__version__}"


@cache
def _probe_once() -> Machine:
    name, driver = _nvidia_smi()
    facts = {"gpu": name, "driver": driver, "compiler": _compiler()}
    try:
        import torch

        facts |= {"torch": str(torch.__version__), "cuda": torch.version.cuda}
        if torch.version.cuda and torch.cuda.is_available():
            (torch.zeros(1, device="cuda") + 1).item()  # fails where torch has no code for this GPU
            facts |= {
                "gpu": torch.cuda.get_device_name(),
                "gpu_count": torch.cuda.device_count(),
                "arch": torch.cuda.get_device_capability(),
            }
        elif name and torch.version.cuda is None:
            facts["cuda_error"] = f"torch {torch.__version__} is built without CUDA"
        elif name:
            torch.cuda.init()  # fails, and says why
            facts["cuda_error"] = "torch sees no GPU; is it hidden by CUDA_VISIBLE_DEVICES?"
    except Exception as error:  # whatever a broken driver, torch or GPU raises is a fact about it
        facts["cuda_error"] = first_line(error)
    usable = "arch" in facts
    libraries = {name: library for name in LIBRARIES if (library := _probe_library(name, usable))}
    if usable and "triton" in libraries and not libraries["triton"].error:
        libraries["triton"] = replace(libraries["triton"], error=_probe_triton())
    return Machine(**facts, libraries=libraries)


def installed(name: str) -> bool:
    """Whether a library of `LIBRARIES` is there, working or not; nothing is imported."""
    return _probe_library(name, usable=False) is not None


def _nvidia_smi() -> tuple[str | None, str | None]:
    """Name of the first GPU and the driver's version, as the driver itself tells them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
        name, driver = told.splitlines()[0].rsplit(", ", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None, None
    return name, driver


def _compiler() -> str | None:
    """The C compiler that Triton would take."""
    names = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    return next(filter(None, map(shutil.which, names)), None)


def _probe_library(name: str, usable: bool) -> Library | None:
    """Whether a library is installed and, with a GPU to use it on, can be imported."""
    try:
        if find_spec(name) is None:
            return None
    except (ImportError, ValueError):  # half removed
        return None
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    if not usable:
        return Library(version=version, error="not imported: no CUDA GPU")
    try:
        import_module(LIBRARIES[name][1])
    except Exception as error:  # an undefined symbol, a wrong torch, a missing dependency of theirs
        return Library(version=version, error=f"import failed: {first_line(error)}")
    return Library(version=version)


def _probe_triton(script: Path = Path(__file__).parent / "triton_trial.py", seconds: float = PROBE_SECONDS):
    """Compile and run a Triton kernel in another process: None if it ran, else why not."""
    try:
        with tempfile.TemporaryDirectory() as folder, open(f"{folder}/stderr", "w+", errors="replace") as stderr:
            # a fresh cache, since one kept from an earlier run hides that the compiler is gone
            environment = os.environ | {"TRITON_CACHE_DIR": folder}
            process = subprocess.Popen(
                [sys.executable, "-P", str(script)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=stderr, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"its trial kernel gave no answer in {seconds:g} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # the compiler it started, too
                    process.wait()
            if code == 0:
                return None
            if code < 0:
                return f"its trial kernel crashed ({signal.Signals(-code).name})"
            stderr.seek(0)
            lines = [line.strip() for line in stderr if line.strip()] or [f"exit code {code}"]
    except OSError as error:
        return f"its trial kernel could not be started: {error}"
    # a compiler's own complaint comes before Python's traceback about it
    line = next((line for line in lines if "fatal error:" in line or "cannot find" in line), lines[-1])
    return f"its trial kernel failed: {line}"


if TYPE_CHECKING:
    pass


def device_of(device: str) -> str:
    """The device to load on; "auto" is "cuda" where torch sees a GPU. Raises InputError for one that is not here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise InputError(f"device is {str(device)!r}; it is auto, cpu, cuda, or one GPU of several, such as cuda:1")
    if asked.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device is {str(device)!r}, and torch sees no GPU here; use --device cpu, or a CUDA build of torch"
        )
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {str(device)!r}; torch sees {torch.cuda.device_count()} GPU, from cuda:0 on")
    return str(asked)


def free_memory(device: str) -> float:
    """Bytes that are free on a GPU, or of main memory for "cpu", a container's limit counted in."""
    if device == "cpu":
        import psutil

        available = environment.memory().available
        return psutil.virtual_memory().available if available is None else available
    import torch

    return torch.cuda.mem_get_info(device)[0]
