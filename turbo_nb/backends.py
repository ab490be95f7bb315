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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from .errors import BackendError, InputError, first_line

PROBE_SECONDS = 60.0  # for the trial kernel: torch's import, Triton's compilation, one launch
KERNELS_FROM = (8, 0)  # before it Triton has no 8-bit product, and 64 KiB of shared memory are too little
KERNELS_TRITON = (3, 4)  # the first with tensor descriptors made outside a kernel; it comes with torch 2.8
GLUON_ARCH = (9, 0)
GLUON_TRITON, GLUON_TRITON_LAST = (3, 6), (3, 9)  # that our Gluon kernels were compiled with; its names still change
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


@dataclass(frozen=True)
class Choice:
    """What runs an operation (None: nothing can), and (name, reason) of each implementation passed over for it."""

    operation: str
    chosen: str | None
    passed_over: tuple[tuple[str, str], ...] = ()

    def require(self) -> str:
        """The chosen implementation's name. Raises BackendError, with the reasons, where nothing can run it."""
        if self.chosen is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over)
            raise BackendError(
                f"attention_type {self.operation!r} cannot run here ({reasons}). Use --attention_type sla, which runs "
                "the same checkpoints; or an NVIDIA GPU of sm_80 or newer with a working Triton; or, where such a GPU "
                "has the CUDA toolkit of your torch, build SpargeAttn: pip install "
                "git+https://github.com/thu-ml/SpargeAttn.git --no-build-isolation"
            )
        return self.chosen


@dataclass(frozen=True, kw_only=True)
class Backends(Machine):
    """The machine, and what runs each operation on it."""

    rope: Choice
    sla: Choice
    sagesla: Choice
    original: Choice
    linear: Choice
    block: Choice
    vae: Choice

    @property
    def attention(self) -> Choice:
        """What runs sparse attention as the models are made to be run, that is SLA."""
        return self.sla


@dataclass(frozen=True)
class Candidate:
    """An implementation. can_run: the reason why not, in words, or None. by_name_only: never chosen unasked."""

    name: str
    can_run: Callable[[Machine], str | None]
    by_name_only: bool = False


def _anywhere(machine: Machine) -> None:
    return None


def _no_cuda(machine: Machine) -> str | None:
    if machine.arch is not None:
        return None
    return "no CUDA GPU" if machine.gpu is None else f"torch cannot use the {machine.gpu}: {machine.cuda_error}"


def _no_library(machine: Machine, name: str) -> str | None:
    title, _ = LIBRARIES[name]
    library = machine.libraries.get(name)
    if library is None:
        return f"{title} not installed"
    return library.error and f"{title} {library.version or ''} found but {library.error}".replace("  ", " ")


def no_triton(machine: Machine) -> str | None:
    """Why no Triton kernel runs on this machine, None where they do."""
    return _no_cuda(machine) or _no_library(machine, "triton")


def no_kernels(machine: Machine) -> str | None:
    """Why none of our Triton kernels runs on this machine, None where they do."""
    if reason := no_triton(machine):
        return reason
    if machine.arch < KERNELS_FROM:
        return f"the kernels need {sm(KERNELS_FROM)} or newer, and this GPU is {sm(machine.arch)}"
    return _old_triton(machine, KERNELS_TRITON)


def _no_gluon(machine: Machine) -> str | None:
    if reason := no_kernels(machine):
        return reason
    if machine.arch != GLUON_ARCH:
        return f"made for {sm(GLUON_ARCH)}, and this GPU is {sm(machine.arch)}"
    version = machine.libraries["triton"].version
    if version and tuple(map(int, version.split(".")[:2])) > GLUON_TRITON_LAST:
        return f"tried with Triton up to {'.'.join(map(str, GLUON_TRITON_LAST))}, and this is {version}"
    return _old_triton(machine, GLUON_TRITON)


def _old_triton(machine: Machine, needed: tuple[int, int]) -> str | None:
    version = machine.libraries["triton"].version
    if version and tuple(map(int, version.split(".")[:2])) < needed:
        return f"the kernels need Triton {'.'.join(map(str, needed))} or newer, and this is {version}"
    return None


def _no_flash_attn(machine: Machine) -> str | None:
    # its rotary embedding is a Triton kernel
    return _no_cuda(machine) or _no_library(machine, "flash_attn") or no_triton(machine)


def _no_spargeattn(machine: Machine) -> str | None:
    if reason := _no_cuda(machine):
        return reason
    if not (8, 0) <= machine.arch <= (10, 0):
        return f"SpargeAttn is made for sm_80 to sm_100, and this GPU is {sm(machine.arch)}"
    return _no_library(machine, "spas_sage_attn")


# Operation → implementations, the preferred first. A new kernel is one row here.
GLUON = Candidate("gluon", _no_gluon)  # Triton's own lower level
TRITON = Candidate("triton", no_kernels)
REFERENCE = Candidate("reference", _anywhere)
CANDIDATES = {
    "rope": (Candidate("flash_attn", _no_flash_attn), REFERENCE),
    "sla": (GLUON, TRITON, REFERENCE),
    "sagesla": (
        GLUON,
        TRITON,  # on an H100 a whole step with SpargeAttn takes longer than one with SLA in Triton
        Candidate("spargeattn", _no_spargeattn),
        Candidate("reference", _anywhere, by_name_only=True),
    ),
    "original": (Candidate("sdpa", _anywhere),),
    "linear": (GLUON, TRITON, REFERENCE),
    "block": (TRITON, REFERENCE),
    "vae": (TRITON, REFERENCE),
}
VARIABLES = {
    "rope": "TURBO_NB_ROPE",
    "sla": "TURBO_NB_ATTENTION",
    "sagesla": "TURBO_NB_ATTENTION",
    "original": "TURBO_NB_ATTENTION",
    "linear": "TURBO_NB_LINEAR",
    "block": "TURBO_NB_BLOCK",
    "vae": "TURBO_NB_VAE",
}


def sm(arch: tuple[int, int]) -> str:
    """(9, 0) → "sm_90" """
    return "sm_{}{}".format(*arch)


def choose(operation: str, machine: Machine | None = None, override: str | None = None) -> Choice:
    """What runs `operation`, one of `CANDIDATES` ("rope", "sla", "sagesla", …), on `machine` (None: this one).

    override, else the operation's variable (TURBO_NB_ROPE, TURBO_NB_ATTENTION, TURBO_NB_LINEAR, TURBO_NB_BLOCK,
    TURBO_NB_VAE), asks for one by name; "auto" or nothing takes the first that can run. A name that only another kind
    of attention has leaves this kind as it is. `.chosen` is None where nothing can run it. Raises InputError for an
    unknown operation, and BackendError for an unknown name or one that cannot run here.
    """
    if operation not in CANDIDATES:
        raise InputError(f"operation is {operation!r}; it is one of {', '.join(CANDIDATES)}")
    if machine is not None:
        return _choose(operation, machine, override, asked_for(operation))
    # every call of every layer asks: what was chosen for this machine is remembered
    machine, key = _probe_once(), (operation, override, asked_for(operation))
    if key not in _chosen or _chosen[key][0] is not machine:
        _chosen[key] = machine, _choose(operation, machine, *key[1:])
    return _chosen[key][1]


_chosen: dict[tuple, tuple[Machine, Choice]] = {}


def _choose(operation: str, machine: Machine, override: str | None, wish: str | None) -> Choice:
    variable, candidates = VARIABLES[operation], CANDIDATES[operation]
    asked = override or wish or "auto"
    source = f"{operation} backend {asked!r}" if override else f"{variable}={asked}"
    known = [c.name for other in CANDIDATES if VARIABLES[other] == variable for c in CANDIDATES[other]]
    if asked not in ("auto", *known):
        raise BackendError(f"{source} is unknown; give one of {', '.join(dict.fromkeys(['auto', *known]))}")
    by_name = asked in [c.name for c in candidates]
    passed_over = []
    for candidate in candidates:
        if by_name and candidate.name != asked:
            reason = f"{source} was asked for"
        elif candidate.by_name_only and not by_name:
            reason = f"slow; runs only where {variable}={candidate.name} asks for it"
        else:
            reason = candidate.can_run(machine)
        if reason is None:
            return Choice(operation, candidate.name, tuple(passed_over))
        if candidate.name == asked:
            raise BackendError(f"{source} cannot run here: {reason}; leave it out to use what can")
        passed_over.append((candidate.name, reason))
    return Choice(operation, None, tuple(passed_over))


def on_triton(operation: str, *tensors, override: str | None = None) -> bool:
    """Whether Triton kernels of `operation`, Gluon's too, take these tensors: chosen, on a GPU and in bf16 or fp16."""
    half = ("torch.bfloat16", "torch.float16")
    fit = all(tensor.is_cuda and str(tensor.dtype) in half for tensor in tensors)
    return fit and choose(operation, override=override).chosen in ("gluon", "triton")


def asked_for(operation: str) -> str | None:
    """The implementation that the operation's variable in the environment asks for, if any."""
    return os.environ.get(VARIABLES[operation]) or None


def detect(*, rope: str | None = None, attention: str | None = None, linear: str | None = None) -> Backends:
    """This machine and what runs each operation on it; the arguments are overrides, as in `choose`.

    Raises BackendError for an override that is unknown or cannot run here.
    """
    machine = probe()
    overrides = {"rope": rope, "sla": attention, "sagesla": attention, "original": attention, "linear": linear}
    choices = {operation: choose(operation, machine, overrides.get(operation)) for operation in CANDIDATES}
    return Backends(**vars(machine), **choices)


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


def _probe_triton(script: Path = Path(__file__).parent / "kernels" / "probe.py", seconds: float = PROBE_SECONDS):
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
