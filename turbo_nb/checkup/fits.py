"""Which models of the catalogue fit this machine, and how long a clip takes."""

from collections.abc import Iterator
from dataclasses import dataclass

from .. import backends, catalog
from ..machine.probe import Machine
from ..runtime import estimate, plan
from .tables import decimal


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a model fits, plain or with int8 linears.

    Args:
        model: its name.
        int8: with int8 linears.
        fits: it can run here.
        plan: name of the memory plan that it would get, None for a released model without a GPU.
        text: the plan in words, or why the model does not fit.
        downloaded: all its files are in the cache and checked.
        to_fetch: estimated bytes that are missing.
        time: what a clip of the model's own size takes in 4 steps, in words. Empty where nothing is known.
    """

    model: str
    int8: bool = False
    fits: bool
    plan: str | None = None
    text: str
    downloaded: bool = True
    to_fetch: int = 0
    time: str = ""


def every_fit(machine: Machine, free: int, host: int | None) -> Iterator[Fit]:
    """Yield a Fit for each model of the catalogue, plain and int8. The arguments are those of `fit`."""
    for spec in catalog.MODELS.values():
        if spec.folder:
            text = f"on the {'GPU' if machine.arch else 'CPU'}, comes with the package"
            takes = _time(spec, False, "resident", machine)
            yield Fit(model=spec.name, fits=True, plan="resident", text=text, time=takes)
        else:
            yield from (fit(spec, quantized, machine, free, host) for quantized in (False, True))


def fit(spec: catalog.ModelSpec, quantized: bool, machine: Machine, free: int, host: int | None = None) -> Fit:
    """Check a released model against a machine.

    Args:
        spec: the model.
        quantized: with int8 linears.
        machine: the GPU, with its free memory.
        free: free bytes on the disk of the Hub's cache, for the files that are missing.
        host: free bytes of main memory. None: not known, so not checked.
    """
    missing, sizes = _missing(spec, quantized), plan.file_sizes(spec, quantized=quantized)
    to_fetch = int(sum(sizes.get(file, 0) for file in missing))
    common = {"model": spec.name, "int8": quantized, "downloaded": not missing, "to_fetch": to_fetch}
    if not machine.arch:
        return Fit(fits=False, text="needs a CUDA GPU", **common)
    given = {"budget": machine.free_memory, "host_budget": host, "fused": plan.fused_on(machine=machine)}
    chosen = plan.for_model(spec, quantized=quantized, **given)
    if chosen.fits and to_fetch > free:
        disk = f"too large for the disk: {decimal(to_fetch)} to fetch, {decimal(free)} free"
        return Fit(fits=False, plan=chosen.name, text=disk, **common)
    if slow := backends.no_tensor_cores(machine):
        return Fit(fits=chosen.fits, plan=chosen.name, text=f"{chosen}; very slow, because {slow}", **common)
    if slow := backends.no_bfloat16(machine):  # estimates and guesses are of newer GPUs
        return Fit(fits=chosen.fits, plan=chosen.name, text=f"{chosen}; in float16, because {slow}", **common)
    takes = _time(spec, quantized, chosen.name, machine) if chosen.fits else ""
    return Fit(fits=chosen.fits, plan=chosen.name, text=str(chosen), time=takes, **common)


def _time(spec: catalog.ModelSpec, quantized: bool, memory_plan: str, machine: Machine) -> str:
    """Return what a clip of the model's own size takes here, in words"""
    (width, height), sla = spec.size, {"attention_type": "sla", "sla_topk": spec.sla_topk}
    clip = {"width": width, "height": height, "num_frames": spec.num_frames, "num_steps": 4}
    how = {"model": spec.name, "quant_linear": quantized, "memory_plan": memory_plan}
    return str(estimate.estimate(clip | sla | how, spec.arch, device="cuda" if machine.arch else "cpu") or "")


def _missing(spec: catalog.ModelSpec, quantized: bool) -> tuple[catalog.HubFile, ...]:
    """Return the model's files that are not in the cache, all of them where the cache cannot be read"""
    try:
        from ..files import hub

        return hub.missing(spec.needs(quantized))
    # A missing package, a malformed HF_ENDPOINT (huggingface_hub raises ValueError on import), an unreadable folder.
    # The doctor reports each of these as a problem of its own.
    except (ImportError, ValueError, OSError):
        return spec.needs(quantized)
