"""Which implementation of each operation runs on this machine, which were passed over, and why.

`probe()` gathers the facts into a `Machine`; `choose()` reads the table `CANDIDATES` against them. An implementation is
chosen because something real ran (an import, a trial kernel), and one that fails is a reason and not an exception.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from .errors import BackendError, InputError
from .machine.probe import LIBRARIES, Machine, _probe_once, probe

KERNELS_FROM = (8, 0)  # before it Triton has no 8-bit product, and 64 KiB of shared memory are too little
KERNELS_TRITON = (3, 4)  # the first with tensor descriptors made outside a kernel; it comes with torch 2.8
GLUON_ARCH = (9, 0)
GLUON_TRITON, GLUON_TRITON_LAST = (3, 6), (3, 9)  # that our Gluon kernels were compiled with; its names still change


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
