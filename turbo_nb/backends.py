"""Which implementation of each operation runs on a device, which were rejected, and why.

`choose` reads the rows of `ops.registry` against the facts of `machine.probe`. `kernel` and `function` return the
function that computes the given tensors, so that callers need not know which implementation runs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import BackendError, InputError
from .machine import environment, probe
from .machine.probe import Machine
from .ops import registry
from .ops.registry import Implementation, no_bfloat16, no_tensor_cores, no_triton, sm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .machine.probe import Device

__all__ = [
    "SHOWN", "VARIABLES", "Backends", "Choice",
    "choose", "detect", "function", "kernel", "load_kernels", "no_bfloat16", "no_tensor_cores", "no_triton",
    "number_format", "sm",
]  # fmt: skip

# What the doctor shows → the operation whose choice stands for the group
SHOWN = {
    "rope": "rope", "sla": "sla", "sagesla": "sagesla", "original": "original", "linear": "linear",
    "block": "gated_norm", "vae": "rimmed_conv",
}  # fmt: skip
VARIABLES = {operation: variable for variable, operations in registry.VARIABLES.items() for operation in operations}
VARIABLES |= {name: VARIABLES[operation] for name, operation in SHOWN.items()}


@dataclass(frozen=True)
class Choice:
    """The decision about one operation.

    Attributes:
        operation: a name of `ops.registry`.
        chosen: name of the implementation that runs it, None where nothing can.
        rejected: (name, reason) of each implementation that was preferred to the chosen one but cannot run.
    """

    operation: str
    chosen: str | None
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def implementation(self) -> Implementation | None:
        """The chosen row of the registry."""
        return None if self.chosen is None else registry.find(self.operation, self.chosen)

    @property
    def function(self) -> Callable:
        """The chosen function. Raises BackendError where nothing can run the operation."""
        self.require()
        return self.implementation.load()

    @property
    def uses_triton(self) -> bool:
        """Whether one of our Triton or Gluon kernels was chosen."""
        return self.chosen is not None and self.implementation.uses_triton

    def require(self) -> str:
        """Return the chosen implementation's name.

        Raises:
            BackendError: nothing can run the operation; the text gives the reasons and what to do.
        """
        if self.chosen is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.rejected)
            raise BackendError(
                f"attention_type {self.operation!r} cannot run here ({reasons}). Expected an NVIDIA GPU of sm_80 or "
                "newer with a working Triton. Use --attention_type sla, which runs the same checkpoints; or, where "
                "such a GPU has the CUDA toolkit of your torch, build SpargeAttn: pip install "
                "git+https://github.com/thu-ml/SpargeAttn.git --no-build-isolation"
            )
        return self.chosen


@dataclass(frozen=True, kw_only=True)
class Backends(Machine):
    """The machine, and the choice for each operation or group of operations on it."""

    rope: Choice
    sla: Choice
    sagesla: Choice
    original: Choice
    linear: Choice
    block: Choice
    vae: Choice

    @property
    def attention(self) -> Choice:
        """The choice for SLA, the attention that the models are made for."""
        return self.sla


# (operation, GPU, override, variable) → (machine, choice, its row): every layer of every step asks
_cache: dict[tuple, tuple[Machine, Choice, Implementation | None]] = {}


def choose(
    operation: str, device: "Device" = None, override: str | None = None, machine: Machine | None = None
) -> Choice:
    """Choose the implementation of an operation on a device.

    Args:
        operation: a key of `VARIABLES`: "rope", "sla", "sagesla", …; "block" and "vae" stand for their groups.
        device: where the tensors are, such as "cuda:1". None: the first GPU.
        override: name of an implementation. None: what the operation's TURBO_NB_… variable names. With "auto", or
            without the variable, the first implementation that can run. A name that only another operation of the
            variable has is ignored.
        machine: None: this machine.

    Raises:
        InputError: the operation is unknown.
        BackendError: the override is unknown or cannot run here.
    """
    if machine is None:
        return _chosen(operation, probe.gpu_index(device), override)[1]
    return _choose(operation, machine.on(device), override, os.environ.get(_variable(operation)))


def _chosen(operation: str, index: int | None, override: str | None) -> tuple[Machine, Choice, Implementation | None]:
    """Return this machine, its choice for GPU `index` (None: the CPU) and the row."""
    machine, wish = probe.this_machine(), os.environ.get(_variable(operation))
    key = operation, index, override, wish
    found = _cache.get(key)
    if found is None or found[0] is not machine:
        choice = _choose(operation, machine.on(-1 if index is None else index), override, wish)
        found = _cache[key] = machine, choice, choice.implementation
    return found


def _variable(operation: str) -> str:
    """Return the operation's environment variable. Raises InputError for an unknown operation."""
    if operation not in VARIABLES:
        raise InputError(f"operation is {operation!r}. Expected one of {', '.join(VARIABLES)}.")
    return VARIABLES[operation]


def variables() -> dict[str, str | None]:
    """Return the TURBO_NB_… variables that decide how a step is computed, with None for one that is not set."""
    return {variable: os.environ.get(variable) for variable in dict.fromkeys(VARIABLES.values())}


def take_variables(wanted: dict[str, str | None]) -> None:
    """Set the variables of this process to those of another one, as `variables` returned them.

    It writes only what differs, because NCCL's threads may read the environment meanwhile.
    """
    for variable, value in wanted.items():
        if value is None:
            os.environ.pop(variable, None)
        elif os.environ.get(variable) != value:
            os.environ[variable] = value


def check_variables() -> None:
    """Check Python, the variables that decide how a step is computed, switches and folders. Probes nothing.

    Raises:
        BackendError: a variable has a value that no implementation has.
        InputError: TURBO_NB_EXCHANGE or a switch has an unknown value, a folder is an address of another place, or
            Python runs without docstrings.
    """
    environment.check_python()
    environment.check_folders()
    for variable in environment.SWITCHES:
        environment.switch(variable)
    for variable, asked in variables().items():
        asked = asked or "auto"
        _require_known(variable, asked, f"{variable}={asked}")
    probe.exchange()


def _require_known(variable: str, asked: str, source: str) -> None:
    known = [row.name for row in registry.IMPLEMENTATIONS if VARIABLES[row.operation] == variable]
    if asked not in ("auto", *known):
        raise BackendError(f"{source} is unknown; give one of {', '.join(dict.fromkeys(['auto', *known]))}")


def _choose(operation: str, machine: Machine, override: str | None, wish: str | None) -> Choice:
    """Choose from the rows: `machine` as seen from the device, `wish` the value of the operation's variable."""
    variable, operation = VARIABLES[operation], SHOWN.get(operation, operation)
    asked = override or wish or "auto"
    source = f"{operation} backend {asked!r}" if override else f"{variable}={asked}"
    _require_known(variable, asked, source)
    rows = registry.implementations(operation)
    by_name = asked in [row.name for row in rows]
    rejected = []
    for row in rows:
        if by_name and row.name != asked:
            reason = f"{source} was asked for"
        elif row.by_name_only and not by_name:
            reason = f"slow; runs only where {variable}={row.name} asks for it"
        else:
            reason = row.requires(machine)
        if reason is None:
            return Choice(operation, row.name, tuple(rejected))
        if row.name == asked:
            raise BackendError(f"{source} cannot run here: {reason}; leave it out to use what can")
        rejected.append((row.name, reason))
    return Choice(operation, None, tuple(rejected))


def kernel(
    operation: str, *tensors: "Tensor", override: str | None = None, writes_parts: bool = False
) -> Callable | None:
    """Return the function that was chosen for these tensors, None where only the reference computes them.

    A kernel computes bf16 and fp16 tensors of one GPU, in the shapes that its row takes. writes_parts: None also where
    it has no argument `to`.
    """
    if not _half_on_gpu(tensors):
        return None
    row = _chosen(operation, tensors[0].get_device(), override)[2]
    if row is None or row.is_reference or not row.takes(*tensors) or (writes_parts and not row.writes_parts):
        return None
    return row.load()


def _half_on_gpu(tensors: "tuple[Tensor, ...]") -> bool:
    return all(x.is_cuda and x.is_floating_point() and x.element_size() == 2 for x in tensors)


def function(operation: str, *tensors: "Tensor", override: str | None = None) -> Callable:
    """Return the function that computes these tensors: `kernel`, else the reference."""
    return kernel(operation, *tensors, override=override) or registry.implementations(operation)[-1].load()


def number_format(device: "Device" = None) -> "torch.dtype":
    """Return the dtype that a model computes in on a device.

    This is bfloat16 on a GPU, float16 on one without it (before sm_80), and float32 on a CPU, which is slower in 16
    bits.
    """
    import torch

    if probe.gpu_index(device) is None:
        return torch.float32
    return torch.float16 if no_bfloat16(probe.this_machine().on(device)) else torch.bfloat16


def load_kernels(device: "Device" = None) -> None:
    """Import the kernels that run on a device. Call it before torch.compile, which cannot trace an import."""
    machine = probe.this_machine().on(device)
    for row in registry.IMPLEMENTATIONS:
        if row.uses_triton and row.requires(machine) is None:
            row.load()


def detect(
    *,
    rope: str | None = None,
    attention: str | None = None,
    linear: str | None = None,
    refused: dict[str, BackendError] | None = None,
) -> Backends:
    """Return this machine and the choice for each operation on its first GPU.

    Args:
        rope, attention, linear: overrides, as in `choose`.
        refused: gets the error of each override that cannot run, by operation. None: the first one is raised.

    Raises:
        BackendError: an override is unknown or cannot run here.
    """
    machine, choices = probe.probe(), {}
    overrides = {"rope": rope, "sla": attention, "sagesla": attention, "original": attention, "linear": linear}
    for name, operation in SHOWN.items():
        try:
            choices[name] = choose(name, override=overrides.get(name), machine=machine)
        except BackendError as error:
            if refused is None:
                raise
            refused[name] = error
            asked = overrides.get(name) or os.environ[VARIABLES[name]]
            choices[name] = Choice(operation, None, ((asked, str(error)),))
    return Backends(**vars(machine), **choices)
