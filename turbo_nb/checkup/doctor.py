"""The doctor: what this machine is, what will run here, and a fix for every problem."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain

from .. import backends
from ..backends import Backends
from ..errors import BackendError, InputError, TurboNbError
from ..machine import environment
from ..machine.environment import Environment
from . import problems
from .fits import Fit, every_fit
from .hub_check import Hub, ask_hub
from .problems import Problem
from .tables import Table, Tables, decimal, gib

# The rows of the table of backends: the operations that one variable (`backends.VARIABLES`) overrides together
GROUPS = {
    "rotary embedding": ("rope",),
    "attention": ("sla", "sagesla", "original"),
    "8-bit linears": ("linear",),
    "norms, cross-attention": ("block",),
    "VAE": ("vae",),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Tables):
    """What the doctor found. It prints as tables, and shows as HTML in a notebook.

    Args:
        environment: place, system, packages, memory, disks and caches.
        backends: the machine, and what runs each operation on it.
        hub: whether the Hub answers.
        encoder: what writes mp4s, None where nothing can.
        models: for each model of the catalogue whether it fits.
        price_per_hour: in dollars, None where TURBO_NB_PRICE_PER_HOUR is not set.
        problems: what is wrong, with fixes.
    """

    environment: Environment
    backends: Backends
    hub: Hub
    encoder: str | None
    models: tuple[Fit, ...]
    price_per_hour: float | None
    problems: tuple[Problem, ...]

    def exit_code(self, strict: bool = False) -> int:
        """Return 0 where all is well, 1 for warnings (only with `strict`), 2 where nothing can run."""
        levels = {problem.level for problem in self.problems}
        return 2 if "error" in levels else int(strict and bool(levels))

    @property
    def verdict(self) -> str:
        """Whether this machine can make videos, with which models, and how many problems are listed."""
        levels = [problem.level for problem in self.problems]
        errors, warned = levels.count("error"), len(levels) - levels.count("error")
        if errors:
            return f"Verdict: {_count(errors, 'error')} to fix before a video can be made here."
        able = [f"{fit.model}{', int8' if fit.int8 else ''}" for fit in self.models if fit.fits]
        runs = f"{_count(len(able), 'model')} of {len(self.models)} can run here ({able[0]}{', …' if able[1:] else ''})"
        return f"Verdict: ready. {runs}" + (f", with {_count(warned, 'warning')}." if warned else ".")

    def to_dict(self) -> dict:
        """Return everything as plain data for JSON."""
        return asdict(self)

    def tables(self) -> Iterator[Table]:
        """Yield "Machine", "Backends", "Disks and caches", "Models", and "Problems" where there are problems."""
        yield "Machine", ("", ""), [*self._machine()]
        rows = [(title, *self._backend(operations)) for title, operations in GROUPS.items()]
        yield "Backends", ("operation", "runs on", "rejected"), rows
        seen = self.environment
        rows = [(d.name, d.path, "", f"{decimal(d.free)} of {decimal(d.total)}") for d in seen.disks]
        rows += [(f"{c.name} cache", c.path, decimal(c.size), decimal(c.free)) for c in seen.caches]
        yield "Disks and caches", ("", "path", "size", "free on its disk"), rows
        rows = [
            (
                f"{fit.model}{', int8' if fit.int8 else ''}",
                "yes" if fit.fits else "no",
                fit.text + (f"\na clip takes {fit.time}" if fit.time else ""),
                "yes" if fit.downloaded else f"no, {decimal(fit.to_fetch)} to fetch",
            )
            for fit in self.models
        ]
        yield "Models", ("model", "fits", "plan", "downloaded"), rows
        if self.problems:
            yield "Problems", ("level", "problem", "fix"), [(p.level, p.text, p.fix) for p in self.problems]

    def _machine(self) -> Iterator[tuple[str, str]]:
        seen, found = self.environment, self.backends
        yield "place", seen.place + (", in a notebook" if seen.notebook and seen.place != "Jupyter" else "")
        yield "system", seen.system
        yield "turbo_nb", seen.version or "not installed, used from a folder"
        right = sum(package.ok for package in seen.packages)
        yield "packages", f"Python {seen.python}, {right} of {len(seen.packages)} as needed"
        if found.arch:
            count = f"{found.gpu_count} × " if found.gpu_count > 1 else ""
            memory = f"{gib(found.free_memory)} free of {gib(found.total_memory)}"
            yield "GPU", f"{count}{found.gpu}, {backends.sm(found.arch)}, {memory}"
        else:
            yield "GPU", f"{found.gpu}, which torch cannot use" if found.gpu else "none"
        if found.driver:
            yield "driver", found.driver
        built = f"CUDA {found.cuda}" if found.cuda else "CPU"
        yield "torch", f"{found.torch}, built for {built}" if found.torch else "cannot be imported"
        yield "C compiler", found.compiler or "none"
        yield "encoder", self.encoder or "none"
        if None not in (seen.memory.available, seen.memory.total):
            yield "memory", f"{gib(seen.memory.available)} free of {gib(seen.memory.total)}"
        took = "" if self.hub.seconds is None else f" in {self.hub.seconds:.1f} s"
        yield "Hub", f"{self.hub.endpoint}: {self.hub.state}{took}"
        if self.price_per_hour is not None:
            yield "cost", f"${self.price_per_hour:.2f} an hour, ${self.price_per_hour / 60:.3f} a minute"

    def _backend(self, operations: tuple[str, ...]) -> tuple[str, str]:
        """Return what runs a group of operations, and what was rejected for which reason, a line each"""
        runs, rejected = [], {}
        for operation in operations:
            choice = getattr(self.backends, operation)
            runs.append((f"{operation}: " if len(operations) > 1 else "") + (choice.chosen or "nothing"))
            for name, reason in choice.rejected:
                rejected.setdefault(reason, {})[name] = None  # a dict, because it keeps the order
        return "\n".join(runs), "\n".join(f"{', '.join(names)}: {reason}" for reason, names in rejected.items())


def doctor() -> Report:
    """Check this machine. It takes seconds, and sends one request to the Hub unless offline."""
    with environment.usable_folders() as wrong:
        return _check([Problem(level="error", text=text, fix=f"unset {name}") for name, text in wrong.items()])


def _check(folders: list[Problem]) -> Report:
    """Check this machine, whose folders have the problems that were found"""
    seen = environment.survey()
    found, overrides = _backends()
    hub = ask_hub()
    models = tuple(every_fit(found, seen.caches[0].free, seen.memory.available))
    wrong = chain(
        folders, overrides, problems.of_packages(seen), problems.of_torch(seen, found), problems.of_gpu(found),
        problems.of_disks(seen), problems.of_start(), problems.of_price(), problems.of_hub(hub), problems.of_encoder(),
        problems.of_exchange(), problems.of_switches(), problems.of_models(found, models),
    )  # fmt: skip
    try:
        price = environment.price_per_hour()
    except InputError:  # one of the problems
        price = None
    return Report(
        environment=seen, backends=found, hub=hub, encoder=_encoder(), models=models, price_per_hour=price,
        problems=tuple(wrong),
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _encoder() -> str | None:
    from ..video import mp4  # here, because a missing package has to be a problem

    try:
        return mp4.encoder()
    except (TurboNbError, ImportError):  # one of the problems
        return None


def _backends() -> tuple[Backends, list[Problem]]:
    """Return what runs each operation, and a problem for each override that cannot run"""
    refused: dict[str, BackendError] = {}
    found = backends.detect(refused=refused)
    errors = {backends.VARIABLES[operation]: str(error) for operation, error in refused.items()}
    return found, [Problem(level="error", text=text, fix=f"unset {name}") for name, text in errors.items()]
