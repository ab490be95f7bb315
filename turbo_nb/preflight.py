"""The doctor: what this machine is, what will run here, and for every problem one line with its remedy."""

import html
import io
import os
import platform
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from . import backends, catalog, environment
from .backends import Backends, Choice
from .environment import Environment
from .errors import BackendError, InputError

HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # as huggingface_hub reads them
GIB = 2**30
OPERATIONS = {
    "rope": "rotary embedding", "sla": "attention: sla", "sagesla": "attention: sagesla",
    "original": "attention: original (dense)", "linear": "8-bit linears",
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
    """Whether a model of the catalogue fits: `plan` is how it would run, or why not. to_fetch: bytes not cached yet."""

    model: str
    fits: bool
    plan: str
    to_fetch: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
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

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
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
            (fit.model, "yes" if fit.fits else "no", fit.plan, decimal(fit.to_fetch) if fit.to_fetch else "nothing")
            for fit in self.models
        ]
        yield "Models", ("model", "fits", "plan", "to download"), rows
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

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        drawn = []
        for title, head, rows in self.tables():
            table = Table(title=title, title_justify="left", show_header=any(head))
            for name in head:
                table.add_column(name, overflow="fold")
            for row in rows:
                style = {"error": "red", "warning": "yellow"}.get(row[0])
                table.add_row(*map(Text, row), style=style)
            drawn.append(table)
        return Group(*drawn)

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=shutil.get_terminal_size((120, 24)).columns)
        console.print(self)
        return console.file.getvalue()

    def _repr_html_(self) -> str:
        parts = []
        for title, head, rows in self.tables():
            top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
            lines = "".join(
                f'<tr><th scope="row">{html.escape(row[0])}</th>'
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in rows
            )
            header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
            parts.append(f"<table><caption>{html.escape(title)}</caption>{header}<tbody>{lines}</tbody></table>")
        return "".join(parts)


def doctor() -> Report:
    """Look at this machine and say what will run here. Takes seconds; sends one request to the Hub, unless offline."""
    seen = environment.survey()
    found, problems = _backends()
    problems += _problems(seen, found)
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
    models = tuple(fit(spec, found, Path(seen.caches[0].path), seen.caches[0].free) for spec in catalog.MODELS.values())
    released = [model for model in models if model.model != catalog.NANO.name]
    if found.arch and not any(model.fits for model in released):
        problems.append(
            Problem(
                level="warning",
                text=f"of the models only {catalog.NANO.name} fits: {released[0].plan}",
                remedy="take a GPU with more memory, or a larger disk (HF_HOME names the folder)",
            )
        )
    return Report(
        environment=seen, backends=found, hub=hub, models=models, price_per_hour=price, problems=tuple(problems)
    )


def _backends() -> tuple[Backends, list[Problem]]:
    """As `backends.detect`, with an override that cannot be had as a problem."""
    machine, choices, problems = backends.probe(), {}, {}
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
            title, _ = backends.LIBRARIES[name]
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


# From here to the end: an estimate that stands until plan.plan() (memory, placement) and download.cached() take over.

SHARED_BYTES = {catalog.VAE: 0.5 * GIB, catalog.TEXT_ENCODER: 10.6 * GIB, catalog.TOKENIZER: 0.02 * GIB}


def fit(spec: catalog.ModelSpec, found: Backends, cache: Path, free: int) -> Fit:
    """Whether `spec` fits the GPU, and the disk with `free` bytes that holds the Hub's cache, at its own size."""
    if spec.folder:
        where = "GPU" if found.arch else "CPU"
        return Fit(model=spec.name, fits=True, plan=f"on the {where}; comes with the package", to_fetch=0)
    if not found.arch:
        return Fit(model=spec.name, fits=False, plan="needs a CUDA GPU", to_fetch=_to_fetch(spec, True, cache))
    needs = {quantised: _gpu_bytes(spec, quantised) for quantised in (False, True)}
    quantised = needs[False] > found.total_memory
    to_fetch = _to_fetch(spec, quantised, cache)
    need = f"{'int8' if quantised else 'bf16'} weights, about {gib(needs[quantised])} of {gib(found.total_memory)}"
    if needs[quantised] > found.total_memory:
        return Fit(model=spec.name, fits=False, plan=f"too large for the GPU: {need}", to_fetch=to_fetch)
    if to_fetch > free:
        return Fit(
            model=spec.name,
            fits=False,
            plan=f"too large for the disk: {decimal(to_fetch)} to fetch, {decimal(free)} free in {cache}",
            to_fetch=to_fetch,
        )
    return Fit(model=spec.name, fits=True, plan=need, to_fetch=to_fetch)


def _weight_bytes(arch: catalog.Arch, quantised: bool) -> int:
    """The linears of the blocks at 1 or 2 bytes, everything around them at 2."""
    blocks = arch.num_layers * (8 * arch.dim**2 + 2 * arch.dim * arch.ffn_dim)
    around = 8 * arch.dim**2 + 4352 * arch.dim
    return blocks * (1 if quantised else 2) + 2 * around


def _gpu_bytes(spec: catalog.ModelSpec, quantised: bool) -> int:
    """One expert's weights, and 25 bytes for each channel of each token: read off upstream's peaks on an H100."""
    (width, height), latent_frames = spec.size, 1 + (spec.num_frames - 1) // 4
    tokens = latent_frames * (width // 16) * (height // 16)
    return int(_weight_bytes(spec.arch, quantised) + 25 * tokens * spec.arch.dim + GIB // 2)


def _to_fetch(spec: catalog.ModelSpec, quantised: bool, cache: Path) -> int:
    weights = spec.quant_files if quantised else spec.files
    sizes = dict.fromkeys(weights, _weight_bytes(spec.arch, quantised)) | SHARED_BYTES
    return int(sum(size for file, size in sizes.items() if not _is_cached(file, cache)))


def _is_cached(file: catalog.HubFile, cache: Path) -> bool:
    folder = cache / f"models--{file.repo.replace('/', '--')}" / "snapshots"
    return any((snapshot / file.path.strip("/")).exists() for snapshot in folder.glob("*"))


def gib(size: float) -> str:
    """Bytes of memory → "13.5 GiB" """
    return f"{size / GIB:.1f} GiB"


def decimal(size: int) -> str:
    """Bytes on a disk → "14.2 GB" """
    from rich import filesize

    return filesize.decimal(size)
