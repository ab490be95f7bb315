"""What is wrong with this machine, each problem with its fix."""

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import backends, catalog
from ..backends import Backends
from ..errors import InputError, OutputError
from ..files import endpoint
from ..machine import environment, probe
from ..machine.environment import Environment
from ..machine.probe import TORCH_SITE
from .fits import Fit
from .hub_check import Hub
from .tables import gib


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem.

    Args:
        level: "error" where nothing can run, else "warning".
        text: what is wrong.
        fix: what to do about it.
    """

    level: str
    text: str
    fix: str


def _warning(text: str, fix: str) -> Problem:
    return Problem(level="warning", text=text, fix=fix)


def _error(text: str, fix: str) -> Problem:
    return Problem(level="error", text=text, fix=fix)


def of_packages(seen: Environment) -> Iterator[Problem]:
    """Yield packages that are missing or too old."""
    for package in seen.packages:
        if package.ok:
            continue
        if package.name == "Python":
            fix = f"make an environment with Python {package.needed}"
        elif package.name == "torch":
            fix = f"start from an image with a newer torch, or install one for your driver: {TORCH_SITE}"
        else:
            fix = f"pip install '{package.name}{package.needed}'"
        yield _error(f"{package.name} is {package.installed or 'missing'}; turbo_nb needs {package.needed}", fix)


def of_torch(seen: Environment, found: Backends) -> Iterator[Problem]:
    """Yield what keeps torch from using a GPU."""
    if found.torch is None:
        yield _error(f"torch cannot be imported: {found.cuda_error}", f"install torch again: {TORCH_SITE}")
    elif unused := probe.unused_gpu(found):
        yield _warning(*unused)
    elif found.arch is None and seen.place not in ("plain", "Jupyter"):
        fix = "Runtime > Change runtime type > GPU" if seen.place == "Colab" else "start a pod with a GPU"
        yield _warning(f"this machine has no GPU: only {catalog.NANO.name} is fast enough here", fix)


def of_gpu(found: Backends) -> Iterator[Problem]:
    """Yield what is wrong with a GPU that torch can use, and with the libraries for it."""
    if not found.arch:
        return
    if found.free_memory < found.total_memory / 2:
        taken = gib(found.total_memory - found.free_memory)
        yield _warning(
            f"other work takes {taken} of the GPU's {gib(found.total_memory)}",
            "find the process with nvidia-smi, and restart the notebook's kernel if it is this one's",
        )
    if reason := backends.no_tensor_cores(found):
        yield _warning(
            f"only {catalog.NANO.name} is fast enough here: {reason}",
            "take a GPU of sm_70 or newer, such as a T4 or an L4; in Colab: Runtime > Change runtime type",
        )
    elif reason := backends.no_bfloat16(found):
        yield _warning(
            f"models compute in float16 here, which takes several times as long: {reason}",
            "take a GPU of sm_80 or newer, such as an L4 or an A100; in Colab: Runtime > Change runtime type",
        )
    if reason := backends.no_triton(found):
        yield _warning(f"Triton kernels cannot run: {reason}", _triton_fix(reason, found))
    for name in ("flash_attn", "spas_sage_attn"):
        library = found.libraries.get(name)
        if library and library.error:
            title, _ = probe.LIBRARIES[name]
            yield _warning(
                f"{title} {library.version or '(no version)'} {library.error}",
                f"install a {title} built for torch {found.torch}, or pip uninstall it, because it is optional",
            )


def _triton_fix(reason: str, found: Backends) -> str:
    if "not installed" in reason:
        return "pip install triton"
    if "Python.h" in reason:
        python = ".".join(platform.python_version_tuple()[:2])
        return f"apt-get install -y python{python}-dev (or use a Python that comes with its headers)"
    if found.compiler is None:
        return "apt-get install -y gcc"
    return "pip install a triton that fits this torch; until then turbo_nb uses plain PyTorch"


def of_disks(seen: Environment) -> Iterator[Problem]:
    """Yield what is wrong with the place where downloaded models are kept."""
    cache = seen.caches[0]
    if not cache.writable:
        yield _warning(f"cannot write to {cache.path}", "set HF_HOME to a folder that you can write to")
    if seen.place != "RunPod pod" or not environment.same_disk(Path(cache.path), environment.CONTAINER):
        return
    if any(disk.name == "volume" for disk in seen.disks):
        yield _warning(
            f"models are kept in {cache.path}, on the container's disk, which is wiped when the pod stops",
            "export HF_HOME=/workspace/.cache/huggingface before anything is downloaded",
        )
    else:
        yield _warning(
            "this pod has no volume: models are downloaded again after every stop",
            "give the pod a volume on /workspace",
        )


def of_start() -> Iterator[Problem]:
    """Yield the steps of runpod_start.sh that failed at the last start of the pod, from the file that it writes."""
    if not (home := environment.folder_of("TURBO_NB_HOME")):
        return
    logs = home / "logs"
    with suppress(OSError):  # no start has written there
        for line in (logs / "failed.txt").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                yield _warning(line.strip(), f"see the log in {logs}")


def of_price() -> Iterator[Problem]:
    """Yield a price that is not a number."""
    try:
        environment.price_per_hour()
    except InputError as error:
        yield _warning(str(error), f"set or unset {environment.PRICE}")


def of_exchange() -> Iterator[Problem]:
    """Yield an unknown exchange between GPUs, with which no model is loaded."""
    try:
        probe.exchange()
    except InputError as error:
        yield _error(str(error), f"unset {probe.EXCHANGE}")


def of_switches() -> Iterator[Problem]:
    """Yield a switch that is neither 0 nor 1, with which no model is loaded."""
    for variable in environment.SWITCHES:
        try:
            environment.switch(variable)
        except InputError as error:
            yield _error(str(error), f"unset {variable}")


def of_encoder() -> Iterator[Problem]:
    """Yield an encoder that cannot write an mp4, which every clip needs."""
    from ..video import mp4

    try:
        mp4.check_encoder()
    except InputError as error:
        yield _error(str(error), f"unset {mp4.ENCODER}")
    except OutputError as error:
        own = f"unset {mp4.FFMPEG}" if os.environ.get(mp4.FFMPEG) else "pip install --force-reinstall imageio-ffmpeg"
        yield _error(str(error), own)
    except ImportError:  # `of_packages` names it
        return


def of_hub(hub: Hub) -> Iterator[Problem]:
    """Yield variables with which no request succeeds, and a Hub that does not answer."""
    wrong = [] if hub.state == "offline" else [*endpoint.faults(endpoint.token())]
    for text in wrong:
        what, _, fix = text.partition(". ")
        yield _warning(what, fix)
    if not wrong and hub.state == "unreachable":
        yield _warning(
            f"the Hub at {hub.endpoint} does not answer: {hub.error}",
            hub.fix or "check network, proxy and HF_ENDPOINT; downloaded models run with HF_HUB_OFFLINE=1",
        )


def of_models(found: Backends, fits: Iterable[Fit]) -> Iterator[Problem]:
    """Yield a GPU on which no released model fits."""
    released = [fit for fit in fits if fit.model != catalog.NANO.name]
    if found.arch and not any(fit.fits for fit in released):
        yield _warning(
            f"of the models only {catalog.NANO.name} fits: {released[1].text}",
            "take a GPU or a machine with more memory, or a larger disk (HF_HOME names the folder)",
        )
