"""What "auto" stands for on this machine: the best model that is here and fits. Nothing is downloaded unasked."""

import warnings

from . import catalog, download, plan


def fitting(
    memory: float, quant_linear: bool | str = "auto", host: float | None = None
) -> list[tuple[catalog.ModelSpec, bool]]:
    """The released models that work in `memory` bytes of a GPU and `host` of main memory (None: as much as it takes)
    without moving block by block, the best first.

    Each comes with whether it is its files with int8 linears (quant_linear: only those, or only the plain ones). Larger
    models go first; of one model the files that stay on the GPU, and of these the plain ones.
    """
    found = []
    for spec in reversed(catalog.MODELS.values()):  # the catalogue goes from small to large
        kinds = (False, True) if quant_linear == "auto" else (quant_linear,)
        given = {"budget": memory, "host_budget": host, "fused": plan.fused_on()}
        plans = [(plan.for_model(spec, quantised=kind, **given), kind) for kind in kinds if spec.files]
        plans = [one for one in plans if one[0].fits and one[0].offload != "group"]
        found += [(spec, kind) for _, kind in sorted(plans, key=lambda one: one[0].offload == "model")]
    return found


def choose(
    *, device: str = "auto", memory: float | None = None, quant_linear: bool | str = "auto"
) -> tuple[str, bool | str]:
    """The model that "auto" stands for, and `quant_linear` for loading it.

    On a GPU it is the best text-to-video model that was downloaded and fits `memory` bytes (None: what is free); else,
    and on a CPU, nano. Warns, in one line, of a better one that could be downloaded. Raises InputError for a device
    that is not here.
    """
    fits = _text_to_video(device, memory, quant_linear)
    here = next((one for one in fits if download.cached(one[0], quantised=one[1])), (catalog.NANO, quant_linear))
    if fits and here[0] is not fits[0][0]:
        best, quantised = fits[0]
        warnings.warn(
            f"model auto takes {here[0].name}; this GPU could run {best.name}, which is not downloaded: "
            f"turbo-nb download {best.name}{' --quant' if quantised else ''}",
            stacklevel=1,  # told once a process, whoever asks
        )
    return here[0].name, here[1]


def download_model(model: str = "auto", *, quantised: bool | None = None) -> download.Files | None:
    """Fetch a model with its plan and progress shown, and say where its files lie; None for one of the package.

    "auto" is the best text-to-video model that fits this machine. quantised: the files with int8 linears or the plain
    ones; None takes what suits this GPU, the plain ones if neither does. Raises what `download.plan` and `fetch` raise.
    """
    quant_linear = "auto" if quantised is None else quantised
    if model == "auto":
        spec, quantised = next(iter(_text_to_video("auto", None, quant_linear)), (catalog.NANO, False))
    else:
        spec = catalog.find(model)
        if quantised is None:
            quantised = next((is_int8 for one, is_int8 in _fitting_here("auto", None, "auto") if one is spec), False)
    planned = download.plan(spec, quantised=quantised)
    print(planned, flush=True)
    if not planned.files:
        return None
    with download.progress_bars() as show:
        return download.fetch(spec, quantised=quantised, planned=planned, on_progress=show)


def _fitting_here(device: str, memory: float | None, quant_linear: bool | str) -> list[tuple[catalog.ModelSpec, bool]]:
    device = plan.device_of(device)
    return [] if device == "cpu" else fitting(memory or plan.free_memory(device), quant_linear, plan.free_memory("cpu"))


def _text_to_video(device: str, memory: float | None, quant_linear: bool | str) -> list[tuple[catalog.ModelSpec, bool]]:
    return [one for one in _fitting_here(device, memory, quant_linear) if one[0].task == "t2v"]
