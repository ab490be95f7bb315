"""The doctor: what this machine is, what will run here, and for every problem one line with its remedy."""

import os
import platform
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .. import backends, catalog
from ..backends import Backends, Choice
from ..errors import BackendError, InputError
from ..machine import environment, probe
from ..machine.environment import Environment
from ..runtime import estimate, plan
from .tables import Shown, Table, Tables, decimal, gib

HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # as huggingface_hub reads them
OPERATIONS = {
    "rope": "rotary embedding", "sla": "attention: sla", "sagesla": "attention: sagesla",
    "original": "attention: original (dense)", "linear": "8-bit linears",
    "block": "norms, cross-attention", "vae": "VAE",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Problem:
    """level: "error" (nothing can run) or "warning"; what is wrong, and the line that mends it."""

    level: str
    text: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Hub:
    """state: "reachable" (after `seconds`), "offline" (as HF_HUB_OFFLINE asks), or "unreachable", with the error."""

    endpoint: str
    state: str
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a model of the catalogue fits, plain or with int8 linears.

    plan: the name of the plan it would get, None without a GPU; text: the plan in words, or why the model does not fit.
    downloaded: its files are here and checked; to_fetch: bytes that are not, by its shape. time: what a clip of its own
    size and 4 steps takes, in words; "" where nothing tells.
    """

    model: str
    int8: bool = False
    fits: bool
    plan: str | None = None
    text: str
    downloaded: bool = True
    to_fetch: int = 0
    time: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Tables):
    """What the doctor found. Prints as tables, shows as HTML in a notebook, and `to_dict()` is plain data."""

    environment: Environment
    backends: Backends
    hub: Hub
    models: tuple[Fit, ...]
    price_per_hour: float | None
    problems: tuple[Problem, ...]

    def exit_code(self, strict: bool = False) -> int:
        """0: all well; 1: warnings, only with `strict`; 2: nothing can run."""
        levels = {problem.level for problem in self.problems}
        return 2 if "error" in levels else int(strict and bool(levels))

    def to_dict(self) -> dict:
        """Everything, as JSON takes it."""
        return asdict(self)

    def only(self, title: str) -> Shown:
        """One of the tables, by its title: "Machine", "Backends", "Disks and caches", "Models" or "Problems"."""
        return Shown(tuple(table for table in self.tables() if table[0] == title))

    def tables(self) -> Iterator[Table]:
        """(title, head, rows) of each table, all plain text."""
        yield "Machine", ("", ""), [*self._machine()]
        rows = [
            (title, choice.chosen or "nothing", "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over))
            for operation, title in OPERATIONS.items()
            for choice in (getattr(self.backends, operation),)
        ]
        yield "Backends", ("operation", "runs on", "passed over"), rows
        seen = self.environment
        rows = [(d.name, d.path, "", f"{decimal(d.free)} of {decimal(d.total)}") for d in seen.disks]
        rows += [(f"{c.name} cache", c.path, decimal(c.size), decimal(c.free)) for c in seen.caches]
        yield "Disks and caches", ("", "path", "size", "free on its disk"), rows
        rows = [
            (
                f"{fit.model}{', int8' if fit.int8 else ''}",
                "yes" if fit.fits else "no",
                fit.text + (f"; a clip takes {fit.time}" if fit.time else ""),
                "yes" if fit.downloaded else f"no, {decimal(fit.to_fetch)} to fetch",
            )
            for fit in self.models
        ]
        yield "Models", ("model", "fits", "plan", "downloaded"), rows
        if self.problems:
            rows = [(problem.level, problem.text, problem.remedy) for problem in self.problems]
            yield "Problems", ("level", "what", "remedy"), rows

    def _machine(self) -> Iterator[tuple[str, str]]:
        seen, found = self.environment, self.backends
        yield "place", seen.place + (", in a notebook" if seen.notebook and seen.place != "Jupyter" else "")
        yield "system", seen.system
        yield "turbo_nb", seen.version or "not installed: used from a folder"
        short = [package for package in seen.packages if not package.ok]
        yield "packages", f"Python {seen.python}; {len(seen.packages) - len(short)} of {len(seen.packages)} as needed"
        if found.arch:
            count = f"{found.gpu_count} × " if found.gpu_count > 1 else ""
            memory = f"{gib(found.free_memory)} free of {gib(found.total_memory)}"
            yield "GPU", f"{count}{found.gpu}, {backends.sm(found.arch)}, {memory}"
        else:
            yield "GPU", f"{found.gpu}, which torch cannot use" if found.gpu else "none"
        if found.driver:
            yield "driver", found.driver
        yield (
            "torch",
            f"{found.torch or 'cannot be imported'}, built for {f'CUDA {found.cuda}' if found.cuda else 'CPU'}",
        )
        yield "C compiler", found.compiler or "none"
        if seen.memory.total is not None:
            yield "memory", f"{gib(seen.memory.available)} free of {gib(seen.memory.total)}"
        took = "" if self.hub.seconds is None else f" in {self.hub.seconds:.1f} s"
        yield "Hub", f"{self.hub.endpoint}: {self.hub.state}{took}"
        if self.price_per_hour is not None:
            yield "cost", f"${self.price_per_hour:.2f} an hour, ${self.price_per_hour / 60:.3f} a minute"


def doctor() -> Report:
    """Look at this machine and say what will run here. Takes seconds; sends one request to the Hub, unless offline."""
    seen = environment.survey()
    found, problems = _backends()
    problems += _problems(seen, found)
    problems += _failed_steps()
    try:
        price = environment.price_per_hour()
    except InputError as error:
        price = None
        problems.append(Problem(level="warning", text=str(error), remedy=f"set or unset {environment.PRICE}"))
    hub = ask_hub()
    if hub.state == "unreachable":
        problems.append(
            Problem(
                level="warning",
                text=f"the Hub at {hub.endpoint} does not answer: {hub.error}",
                remedy="check network, proxy and HF_ENDPOINT; models already downloaded run with HF_HUB_OFFLINE=1",
            )
        )
    models = tuple(_fits(found, seen.caches[0].free, seen.memory.available))
    released = [model for model in models if model.model != catalog.NANO.name]
    if found.arch and not any(model.fits for model in released):
        problems.append(
            Problem(
                level="warning",
                text=f"of the models only {catalog.NANO.name} fits: {released[1].text}",
                remedy="take a GPU or a machine with more memory, or a larger disk (HF_HOME names the folder)",
            )
        )
    return Report(
        environment=seen, backends=found, hub=hub, models=models, price_per_hour=price, problems=tuple(problems)
    )


def _backends() -> tuple[Backends, list[Problem]]:
    """As `backends.detect`, with an override that cannot be had as a problem."""
    machine, choices, problems = probe.probe(), {}, {}
    for operation in OPERATIONS:
        try:
            choices[operation] = backends.choose(operation, machine)
        except BackendError as error:
            variable = backends.VARIABLES[operation]
            choices[operation] = Choice(operation, None, ((os.environ[variable], str(error)),))
            problems[variable] = Problem(level="error", text=str(error), remedy=f"unset {variable}")
    return Backends(**vars(machine), **choices), [*problems.values()]


def _problems(seen: Environment, found: Backends) -> list[Problem]:
    problems = []

    def add(level: str, text: str, remedy: str) -> None:
        problems.append(Problem(level=level, text=text, remedy=remedy))

    for package in seen.packages:
        if package.ok:
            continue
        if package.name == "Python":
            remedy = f"make an environment with Python {package.needed}"
        elif package.name == "torch":
            remedy = "start from an image with a newer torch, or install one for your driver: pytorch.org/get-started"
        else:
            remedy = f"pip install '{package.name}{package.needed}'"
        add("error", f"{package.name} is {package.installed or 'missing'}; turbo_nb needs {package.needed}", remedy)
    if found.torch is None:
        add("error", f"torch cannot be imported: {found.cuda_error}", "install torch again: pytorch.org/get-started")
    elif found.arch is None and found.gpu:
        add(
            "warning",
            f"torch cannot use the {found.gpu}: {found.cuda_error}",
            "take a torch that is built for this GPU and its driver: pytorch.org/get-started",
        )
    elif found.arch is None and seen.place not in ("plain", "Jupyter"):
        remedy = "Runtime > Change runtime type > GPU" if seen.place == "Colab" else "start a pod with a GPU"
        add("warning", f"no GPU here: only {catalog.NANO.name} runs in good time", remedy)
    if found.arch:
        problems += _gpu_problems(found)
    hub_cache = seen.caches[0]
    if not hub_cache.writable:
        add("warning", f"cannot write to {hub_cache.path}", "set HF_HOME to a folder of yours")
    on_pod = seen.place == "RunPod pod" and environment.same_disk(Path(hub_cache.path), environment.CONTAINER)
    if on_pod and any(disk.name == "volume" for disk in seen.disks):
        add(
            "warning",
            f"models are kept in {hub_cache.path}, on the container's disk, which is wiped when the pod stops",
            "export HF_HOME=/workspace/.cache/huggingface before anything is downloaded",
        )
    elif on_pod:
        add(
            "warning",
            "this pod has no volume: models are downloaded again after every stop",
            "give the pod a volume on /workspace",
        )
    return problems


def _failed_steps() -> Iterator[Problem]:
    """What failed at the last start of the pod, a line for each step: runpod_start.sh writes it down"""
    if not (home := os.environ.get("TURBO_NB_HOME")):
        return
    logs = Path(home) / "logs"
    with suppress(OSError):  # no start has written there
        for line in (logs / "failed.txt").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                yield Problem(level="warning", text=line.strip(), remedy=f"see the log in {logs}")


def _gpu_problems(found: Backends) -> Iterator[Problem]:
    """What is wrong with a GPU that torch can use, and with the libraries for it."""
    if found.free_memory < found.total_memory / 2:
        yield Problem(
            level="warning",
            text=f"{gib(found.total_memory - found.free_memory)} of the GPU's {gib(found.total_memory)} are taken",
            remedy="see whose with nvidia-smi; restart the notebook's kernel if it is this one's",
        )
    if reason := backends.no_triton(found):
        python = ".".join(platform.python_version_tuple()[:2])
        if "not installed" in reason:
            remedy = "pip install triton"
        elif "Python.h" in reason:
            remedy = f"apt-get install -y python{python}-dev (or use a Python that comes with its headers)"
        elif found.compiler is None:
            remedy = "apt-get install -y gcc"
        else:
            remedy = "pip install a triton that fits this torch; until then plain PyTorch does its work"
        yield Problem(level="warning", text=f"Triton kernels cannot run: {reason}", remedy=remedy)
    for name in ("flash_attn", "spas_sage_attn"):
        library = found.libraries.get(name)
        if library and library.error:
            title, _ = probe.LIBRARIES[name]
            yield Problem(
                level="warning",
                text=f"{title} {library.version or '(no version)'} {library.error}",
                remedy=f"install a {title} built for torch {found.torch}, or pip uninstall it: it is optional",
            )


def ask_hub() -> Hub:
    """Whether the Hub (HF_ENDPOINT) answers within 3 s; nothing is sent where HF_HUB_OFFLINE asks for silence."""
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    parts = urlsplit(endpoint)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # a report is pasted: no password in it
    if any(
        os.environ.get(v, "").upper() in ("1", "ON", "YES", "TRUE") for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return Hub(endpoint=shown, state="offline")
    answer = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
                answer.append(None)
        except urllib.error.HTTPError as error:  # any answer below 500 is the Hub's
            answer.append(None if error.code < 500 else f"HTTP {error.code} {error.reason}")
        except (OSError, ValueError) as error:
            answer.append(str(getattr(error, "reason", error)))

    begin = time.monotonic()
    thread = threading.Thread(target=ask, daemon=True)  # a name server that hangs knows no timeout
    thread.start()
    thread.join(HUB_SECONDS)
    if answer == [None]:
        return Hub(endpoint=shown, state="reachable", seconds=time.monotonic() - begin)
    return Hub(endpoint=shown, state="unreachable", error=answer[0] if answer else f"no answer in {HUB_SECONDS:g} s")


def _fits(found: Backends, free: int, host: int | None) -> Iterator[Fit]:
    """Every model of the catalogue, plain and int8, on this GPU, as `fit` sees it"""
    for spec in catalog.MODELS.values():
        if spec.folder:
            text = f"on the {'GPU' if found.arch else 'CPU'}; comes with the package"
            takes = _time(spec, False, "resident", found)
            yield Fit(model=spec.name, fits=True, plan="resident", text=text, time=takes)
        else:
            yield from (fit(spec, quantised, found, free, host) for quantised in (False, True))


def fit(spec: catalog.ModelSpec, quantised: bool, found: Backends, free: int, host: int | None = None) -> Fit:
    """Whether a released model fits the GPU and the `host` bytes of main memory (None: not known) as they are now, and
    what is not downloaded the `free` bytes of the disk of the Hub's cache."""
    sizes = plan.sizes(spec, quantised=quantised)
    missing = _missing(spec, quantised)
    shared = {catalog.VAE: sizes.vae, catalog.TEXT_ENCODER: sizes.text_encoder}
    weights = dict.fromkeys(spec.quant_files if quantised else spec.files, sizes.transformer)
    to_fetch = int(sum((shared | weights).get(file, 0) for file in missing))
    told = {"model": spec.name, "int8": quantised, "downloaded": not missing, "to_fetch": to_fetch}
    if not found.arch:
        return Fit(fits=False, text="needs a CUDA GPU", **told)
    given = {"budget": found.free_memory, "host_budget": host, "fused": plan.fused_on(found)}
    chosen = plan.for_model(spec, quantised=quantised, **given)
    if chosen.fits and to_fetch > free:
        disk = f"too large for the disk: {decimal(to_fetch)} to fetch, {decimal(free)} free"
        return Fit(fits=False, plan=chosen.name, text=disk, **told)
    takes = _time(spec, quantised, chosen.name, found) if chosen.fits else ""
    return Fit(fits=chosen.fits, plan=chosen.name, text=str(chosen), time=takes, **told)


def _time(spec: catalog.ModelSpec, quantised: bool, memory_plan: str, found: Backends) -> str:
    """What a clip of the model's own size takes here"""
    (width, height), sla = spec.size, {"attention_type": "sla", "sla_topk": spec.sla_topk}
    clip = {"width": width, "height": height, "num_frames": spec.num_frames, "num_steps": 4}
    how = {"model": spec.name, "quant_linear": quantised, "memory_plan": memory_plan}
    return str(estimate.estimate(clip | sla | how, spec.arch, device="cuda" if found.arch else "cpu") or "")


def _missing(spec: catalog.ModelSpec, quantised: bool) -> tuple[catalog.HubFile, ...]:
    try:
        from ..files import hub
    except ImportError:  # of a package that is missing, which is a problem of its own
        return (*(spec.quant_files if quantised else spec.files), catalog.VAE, catalog.TEXT_ENCODER)
    return hub.missing(spec, quantised=quantised)
