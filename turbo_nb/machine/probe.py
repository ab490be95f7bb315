"""The facts about this machine that decide what runs on it: GPUs, driver, torch, compiler and accelerator libraries.

A library counts as working because something real ran: its import, or for Triton a trial kernel. A library that fails
is a fact with a reason, not an exception.
"""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, first_line, warn
from . import environment, recall

if TYPE_CHECKING:
    import torch

    Device = str | torch.device | int | None

HIDES = "CUDA_VISIBLE_DEVICES"
RANKS = "TURBO_NB_RANKS"  # cpu: several ranks share a CPU, for trials and tests
EXCHANGE = "TURBO_NB_EXCHANGE"  # how several GPUs exchange the parts of a step
EXCHANGES = ("auto", "nccl")
TRIAL = Path(__file__).parent / "triton_trial.py"
TORCH_SITE = "pytorch.org/get-started"
TRIAL_SECONDS = 60.0  # of the trial kernel: torch's import, Triton's compilation, one launch
SMI_SECONDS = 10.0
# Import name → what users call it, and the module whose import shows that it works
LIBRARIES = {
    "triton": ("Triton", "triton"),
    "flash_attn": ("flash_attn", "flash_attn.layers.rotary"),
    "spas_sage_attn": ("SpargeAttn", "spas_sage_attn"),
}


@dataclass(frozen=True, kw_only=True)
class Library:
    """An installed library. error: why it cannot be used ("import failed: …"), None where it works."""

    version: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU. arch: its compute capability (major, minor). memory: all of it, in bytes."""

    name: str
    arch: tuple[int, int]
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What probing found. `Machine()` is a machine without a GPU.

    Attributes:
        gpu: name of the GPU that the machine is seen from (`on`), the first one of `gpu_count`.
        arch: that GPU's compute capability (major, minor), None where torch cannot use it.
        cuda_error: why torch cannot use the GPU.
        free_memory: of that GPU, in bytes.
        total_memory: of that GPU, in bytes.
        driver, torch, cuda: versions; cuda is the one that torch is built for.
        compiler: path of the C compiler.
        libraries: import name → `Library`, for those that are installed.
        gpus: every GPU that torch can use, by its index.
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
    gpus: tuple[Gpu, ...] = ()

    def on(self, device: "Device") -> "Machine":
        """Return the machine as seen from one device: `gpu`, `arch` and memory are those of that card.

        Args:
            device: "cuda:1", 1 or a torch.device. None: the first GPU. "cpu" and -1 see no GPU.
        """
        index = gpu_index(device)
        if index is None:
            return replace(self, gpu=None, arch=None, cuda_error=None, free_memory=None, total_memory=None)
        if index >= len(self.gpus):
            return self
        card = self.gpus[index]
        free = self.free_memory if index == 0 else None
        return replace(self, gpu=card.name, arch=card.arch, free_memory=free, total_memory=card.memory)


def gpu_index(device: "Device") -> int | None:
    """Return the index of a CUDA device, None for a CPU. None is GPU 0, "cuda" torch's current GPU, -1 the CPU."""
    if device is None:
        return 0
    if isinstance(device, int):
        return None if device < 0 else device
    kind, _, index = str(device).partition(":")
    if kind != "cuda":
        return None
    if index:
        return int(index)
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def probe(device: "Device" = None) -> Machine:
    """Gather the facts about this machine, once a process (seconds on a GPU); free memory is the current value.

    Args:
        device: the GPU to see the machine from, as in `Machine.on`.
    """
    machine = this_machine().on(device)
    if machine.arch is None:
        return machine
    import torch

    free, total = torch.cuda.mem_get_info(gpu_index(device))
    return replace(machine, free_memory=free, total_memory=total)


def device_name(device: str) -> str:
    """Return what a timing was measured on: the GPU's name, or the CPU's threads, with torch's version."""
    import torch

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU with {threads} thread{'s' * (threads != 1)}"
    return f"{name}, torch {torch.__version__}"


def _once(function: Callable[[], Machine]) -> Callable[[], Machine]:
    """Cache a function's result; a second thread waits for it"""
    cached, lock = cache(function), threading.RLock()

    @wraps(function)
    def call() -> Machine:
        with lock:
            return cached()

    call.cache_clear = cached.cache_clear
    return call


def begin() -> None:
    """Begin to probe in a thread, so that it takes no time later. An error is raised by the first real call."""

    def work() -> None:
        with suppress(Exception):
            this_machine()

    threading.Thread(target=work, name="probe", daemon=True).start()


@_once
def this_machine() -> Machine:
    """Gather the facts about this machine, once a process, without the free memory; see `probe`."""
    with ThreadPoolExecutor(1) as thread:
        smi = thread.submit(_nvidia_smi)  # beside the import of torch
        with suppress(Exception):
            import torch
        name, driver = smi.result()
    facts = {"gpu": name, "driver": driver, "compiler": _compiler()}
    try:
        import torch

        facts |= {"torch": str(torch.__version__), "cuda": torch.version.cuda}
        if torch.version.cuda and torch.cuda.is_available():
            (torch.zeros(1, device="cuda") + 1).item()  # raises where torch has no code for this GPU
            # properties, and no tensor on each GPU, because a context takes some 0.5 GB of each card's memory
            found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            gpus = tuple(Gpu(card.name, (card.major, card.minor), card.total_memory) for card in found)
            facts |= {"gpu": gpus[0].name, "gpu_count": len(gpus), "arch": gpus[0].arch, "gpus": gpus}
        elif name and torch.version.cuda is None:
            facts["cuda_error"] = f"torch {torch.__version__} is built without CUDA"
        elif name and not re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get(HIDES, "0")):
            facts["cuda_error"] = _hidden()
        elif name:
            torch.cuda.init()  # raises, with the reason
            facts["cuda_error"] = "torch sees no GPU"
    except Exception as error:  # whatever a broken driver, torch or GPU raises is a fact about it
        hidden = HIDES in os.environ and "No CUDA GPUs" in str(error)
        facts["cuda_error"] = _hidden() if hidden else first_line(error)
    usable = "arch" in facts
    libraries = {name: library for name in LIBRARIES if (library := _probe_library(name, usable))}
    if usable and "triton" in libraries and not libraries["triton"].error:
        libraries["triton"] = replace(libraries["triton"], error=_try_triton(facts, libraries["triton"].version))
    return Machine(**facts, libraries=libraries)


def _hidden() -> str:
    return f"{HIDES} is {os.environ[HIDES]!r}, which hides it"


def installed(name: str) -> bool:
    """Return whether a library of `LIBRARIES` is installed, working or not. Imports nothing."""
    return _probe_library(name, usable=False) is not None


def _nvidia_smi() -> tuple[str | None, str | None]:
    """Return the name of the first GPU and the driver's version, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
        name, driver = answer.splitlines()[0].rsplit(", ", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None, None
    return name, driver


def _compiler() -> str | None:
    """Return the path of the C compiler that Triton would use."""
    names = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    return next(filter(None, map(shutil.which, names)), None)


def _probe_library(name: str, usable: bool) -> Library | None:
    """Find out whether a library is installed and, if a GPU is usable, whether its import works."""
    try:
        spec = find_spec(name)
        if spec is None or getattr(spec.loader, "is_stand_in", False):  # one of turbo_nb.shims
            return None
    except (ImportError, ValueError):  # half removed
        return None
    version = environment.version(name)
    if not usable:
        return Library(version=version, error="not imported: no CUDA GPU")
    try:
        import_module(LIBRARIES[name][1])
    except Exception as error:  # an undefined symbol, a wrong torch, a missing dependency of theirs
        return Library(version=version, error=f"import failed: {first_line(error)}")
    return Library(version=version)


def _try_triton(facts: dict, version: str | None) -> str | None:
    """Return why Triton does not work. The trial kernel runs unless it ran under the same circumstances.

    Only success is kept, because a failure can have a cause that no circumstance shows.
    """
    if facts["driver"] is None:  # nvidia-smi did not report it
        return _probe_triton()
    library = Library(version=version)
    found = circumstances(Machine(**facts, libraries={"triton": library})) | {"script": recall.stamp(TRIAL)}
    if recall.recall("triton", found) == "works":
        return None
    error = _probe_triton()
    if error is None:
        recall.remember("triton", found, "works")
    return error


def circumstances(machine: Machine) -> dict:
    """Return what decides whether and how fast Triton's kernels run: GPUs, driver, torch, compilers, variables."""
    triton = machine.libraries["triton"].version
    compiler = machine.compiler and shutil.which(machine.compiler)
    return {
        "gpus": [[card.name, list(card.arch)] for card in machine.gpus],
        "driver": machine.driver,
        "torch": [machine.torch, machine.cuda],
        "triton": [triton, recall.stamp(getattr(find_spec("triton"), "origin", None))],
        "compiler": [compiler, recall.stamp(compiler)],
        "python": [sys.version, recall.stamp(Path(sysconfig.get_paths()["include"]) / "Python.h")],
        "variables": {name: value for name, value in os.environ.items() if _counts(name)},
    }


def _counts(variable: str) -> bool:
    """Return whether an environment variable can decide whether Triton works"""
    named = variable in ("CC", "LD_LIBRARY_PATH", "CPATH", "C_INCLUDE_PATH", "LIBRARY_PATH", "CUDA_HOME", HIDES)
    return named or (variable.startswith("TRITON_") and variable != "TRITON_CACHE_DIR")


def _probe_triton(script: Path = TRIAL, seconds: float = TRIAL_SECONDS) -> str | None:
    """Compile and run a Triton kernel in another process. Return None if it ran, else the reason why not."""
    try:
        with tempfile.TemporaryDirectory() as folder, open(f"{folder}/stderr", "w+", errors="replace") as stderr:
            # a fresh cache, because a cached kernel would hide that the compiler is gone
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
                    os.killpg(process.pid, signal.SIGKILL)  # with the compiler that it started
                    process.wait()
            if code == 0:
                return None
            if code < 0:
                return f"its trial kernel crashed ({signal.Signals(-code).name})"
            stderr.seek(0)
            lines = [line.strip() for line in stderr if line.strip()] or [f"exit code {code}"]
    except OSError as error:
        return f"its trial kernel could not be started: {error}"
    # the compiler's own message comes before Python's traceback
    line = next((line for line in lines if "fatal error:" in line or "cannot find" in line), lines[-1])
    return f"its trial kernel failed: {line}"


def unused_gpu(machine: Machine) -> tuple[str, str] | None:
    """Return why torch cannot use the GPU of this machine, and the fix. None: torch uses it, or no GPU exists."""
    if machine.gpu is None or machine.arch or machine.torch is None:
        return None
    reason = machine.cuda_error or "for an unknown reason"
    if reason.startswith(HIDES):
        fix = f"unset {HIDES}"
    elif "too old" in reason:
        fix = f"update the driver (it is {machine.driver}), or install a torch that is built for it: {TORCH_SITE}"
    else:
        fix = f"install a torch that is built for this GPU and its driver: {TORCH_SITE}"
    return f"torch cannot use the {machine.gpu}: {reason}", fix


def device_of(device: str) -> str:
    """Return the device to load on; "auto" is "cuda" where torch sees a GPU, else "cpu".

    Warns where "auto" is "cpu" although this machine has a GPU.

    Raises:
        InputError: the device is unknown, or this machine does not have it.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if unused := unused_gpu(this_machine()):
            reason, fix = unused
            warn(f"{reason}. This runs on the CPU, which is much slower. To use the GPU, {fix}.", stacklevel=2)
        return "cpu"
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise InputError(f"device is {str(device)!r}. Expected auto, cpu, cuda, or one GPU of several, such as cuda:1.")
    if asked.type == "cuda" and not torch.cuda.is_available():
        unused = unused_gpu(this_machine())
        raise InputError(
            f"device is {str(device)!r}, and torch sees no GPU here. Expected cpu. "
            + (f"{unused[0][0].upper()}{unused[0][1:]}. To use it, {unused[1]}." if unused else "Use --device cpu.")
        )
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise InputError(f"device is {str(device)!r}. Expected cuda:0{f' to cuda:{last}' * (last > 0)}, as torch sees.")
    return str(asked)


def exchange() -> str:
    """Return how several GPUs exchange the parts of a step. Raises InputError for an unknown value of the variable."""
    name = os.environ.get(EXCHANGE) or "auto"
    if name not in EXCHANGES:
        raise InputError(f"{EXCHANGE} is {name!r}. Expected one of {', '.join(EXCHANGES)}. Unset it for auto.")
    return name


def ranks_share_cpu() -> bool:
    """Return whether several ranks run on a CPU. Raises InputError for an unknown value of the variable."""
    name = os.environ.get(RANKS) or ""
    if name not in ("", "cpu"):
        raise InputError(f"{RANKS} is {name!r}. Expected cpu. Unset it for GPUs.")
    return name == "cpu"


def gpus_of(gpus: int | str, device: str) -> int:
    """Return how many GPUs make a clip together; "all" is every GPU that torch sees.

    Raises:
        InputError: this machine has fewer GPUs, or the device is one of them. Also what `ranks_share_cpu` raises.
    """
    import torch

    if ranks_share_cpu() and device == "cpu":
        return 2 if gpus == "all" else gpus
    count = torch.cuda.device_count() if device.startswith("cuda") else 0
    if gpus == 1 or (gpus == "all" and count < 2):
        return 1
    if count == 0:
        raise InputError(f"gpus is {gpus}. Expected 1, because the device is the CPU. Leave gpus out.")
    if device not in ("cuda", "cuda:0"):
        raise InputError(f"device is {device!r}. Expected cuda beside gpus {gpus}, which takes the first {gpus} GPUs.")
    if not torch.distributed.is_nccl_available():
        raise InputError(f"gpus is {gpus}. Expected 1, because this torch has no NCCL. Use Linux, and a CUDA build.")
    if gpus != "all" and gpus > count:
        raise InputError(f"gpus is {gpus}. Expected at most {count}, the number of GPUs that torch sees here.")
    return count if gpus == "all" else gpus


def free_memory(device: str) -> float:
    """Return the free bytes of a GPU, or for "cpu" of main memory within a container's limit."""
    if device == "cpu":
        import psutil

        available = environment.memory().available
        return psutil.virtual_memory().available if available is None else available
    import torch

    return torch.cuda.mem_get_info(device)[0]


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def avoid_fragments() -> None:
    """Let torch's allocator join free GPU memory, unless a variable of the user sets the allocator.

    Pieces of fixed sizes leave gaps: 14B at 1280x720x81 held 1.8 GB more than its tensors on an H100, so a plan for 10
    GB ran out of memory.
    """
    import torch

    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        setting = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # the name in torch from 2.9 on
        (setting or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def release_memory() -> None:
    """Return unused GPU memory and pinned memory to the system, also that of modules that refer to each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()  # torch has no public name for this
