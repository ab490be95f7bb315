"""Run memory plans: make clips on a GPU that seems smaller, with random weights of the released models' shapes.

Each row is a model and a size of the GPU. A row that fails is printed, and the next one runs. The weights are drawn
once for a model and kept in main memory. Each row loads them as from files. All rows are printed again at the end.

The check is that of `e2e`: the last run's frames are those of the first run, and the picture is not flat. A row also
fails if memory ran out on the way, because then a plan was chosen that does not fit.

On a CPU the plans of a GPU are carried out in main memory. That shows that they work, and nothing about their speed.
"""

import gc
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from PIL import Image

from turbo_nb import errors
from turbo_nb.errors import TurboNbError
from turbo_nb.runtime import plan as plans

from . import e2e, harness
from .harness import Check, Job, Timing

STAGES = ("text", "denoise", "decode")
# Name → clip, and GB of GPU memory: at first what the model needs at least, as the README says
CASES = {
    "1.3B": ((832, 480, 81), (2, 3, 8, 12, 18)),
    "14B": ((1280, 720, 81), (10, 12, 16, 24)),
    "A14B": ((1280, 720, 81), (10, 16, 24)),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a row measured.

    Args:
        plan: the plan that made the last clip.
        seconds: of each stage and of all, medians of the warm runs.
        first: seconds of the first run.
        allocated, reserved: the most bytes of tensors, and of memory that torch's allocator held, in each stage.
        check: of the frames.
    """

    plan: plans.Plan
    seconds: dict[str, float]
    first: dict[str, float]
    allocated: dict[str, int]
    reserved: dict[str, int]
    check: Check


def jobs(
    names: list[str], device: str, load: dict, clip: dict, size: tuple[int, int, int] | None,
    gigabytes: list[float] | None, *, runs: int,
) -> Iterator[Job]:  # fmt: skip
    """Yield a job for each stage of each row. The work is done by a row's first job.

    Args:
        names: of `e2e.random_pipeline`.
        device: "cpu" or a GPU such as "cuda:0".
        load, clip: options of `load_pipeline` and of `generate`.
        size: width, height and frames. None: as in `CASES`.
        gigabytes: GB of GPU memory. None: as in `CASES`.
        runs: warm runs of a row.
    """
    lines = [HEAD]
    print(HEAD, flush=True)
    for name in names:
        usual, amounts = CASES.get(name, ((64, 64, 5), ()))
        shape = size or usual
        parts = e2e.random_parts(name, device, "cpu", int8=load["quant_linear"])
        for amount in gigabytes or amounts:
            yield from _row(name, parts, device, load, clip, shape, amount, runs, lines)
        del parts
    print(*lines, sep="\n", flush=True)


def _row(name, parts, device, load, clip, shape, amount, runs, lines: list[str]) -> Iterator[Job]:
    """Measure a row, and yield the jobs that report it"""
    found: list[Run] = []
    width, height, frames = shape
    clip = clip | {"resolution": f"{width}x{height}", "num_frames": frames}
    common = {"shape": f"{width}x{height}x{frames}", "weights": f"random {name}"}
    linears = "int8" if load["quant_linear"] else "bf16"

    def job(stage: str) -> Job:
        def run() -> tuple[Timing, Check]:
            if not found:
                raise TurboNbError("the row failed")
            one = found[0]
            peak = one.allocated.get(stage)
            timing = Timing(
                ms=1e3 * one.seconds[stage], ms_min=1e3 * one.seconds[stage], n=runs,
                first_ms=1e3 * one.first[stage], peak_gib=peak and peak / 2**30,
            )  # fmt: skip
            return timing, one.check

        mode = f"{_words(found[0].plan)} in {amount:g} GB" if found else f"{amount:g} GB"
        work = f"{stage} of a clip, {clip['num_steps']} steps, {load['attention_type']}, {linears}"
        return Job(work=work, mode=mode, run=run, **common)

    try:
        found.append(measure(name, parts, device, load, clip, shape, amount * 1e9, runs))
        lines.append(line(name, common["shape"], amount, found[0]))
    except Exception as error:  # because the next row can still be measured
        traceback.print_exc()
        reason = f"FAILED: {type(error).__name__}: {errors.first_line(error)}"
        lines.append(f"| {name} {common['shape']} | {amount:g} | {reason} |")
    gc.collect()  # after the error, which holds the row's tensors
    if device != "cpu":
        torch.cuda.empty_cache()
    print(lines[-1], flush=True)
    yield from map(job, ("all", *STAGES) if found else ("all",))


def measure(
    name: str, parts: e2e.Parts, device: str, load: dict, clip: dict, shape: tuple[int, int, int], memory: float,
    runs: int,
) -> Run:  # fmt: skip
    """Load a model as on a GPU with so many bytes, and make clips. Arguments as those of `jobs`."""
    reserved = {}

    def on_stage(stage: str | None) -> None:
        """Note what torch held in the stage that has ended, before `StageRunner` counts anew"""
        if device != "cpu":
            if stages:
                reserved[stages[-1]] = max(reserved.get(stages[-1], 0), torch.cuda.max_memory_reserved(device))
            stages.append(stage)

    with e2e.gpu_of(memory, device), errors.collect_warnings() as told:
        pipeline = load_as_on_a_gpu(name, parts, device, load, shape, memory)
        model = pipeline.turbo_nb
        if model.spec.task == "i2v":
            clip = clip | {"image": Image.fromarray(picture(*shape[:2]))}
        made = []
        for number in range(1 + runs):
            stages: list[str | None] = []
            made.append(e2e.make(pipeline, model.spec.example + " " * number, clip, on_stage=on_stage))
            on_stage(None)
    for text in told:
        print(f"warning: {text}", flush=True)
    first, *warm = made
    out, ref = (one.video.frames.astype(np.float32) for one in (warm[-1], first))
    error = harness.relative_error(torch.from_numpy(out), torch.from_numpy(ref))
    fell = any("out of memory" in text for text in told)
    return Run(
        plan=model.plan,
        seconds={stage: median(one.seconds[stage] for one in warm) for stage in warm[-1].seconds},
        first=first.seconds,
        allocated={stage: max(one.video.peaks[stage] for one in made) for stage in made[0].video.peaks},
        reserved=reserved,
        check=Check(
            error=math.inf if fell or out.std() < e2e.FLAT else error,
            limit=harness.WORST,
            what=f"frames of the last and the first run, standard deviation {out.std():.1f}"
            + ("; memory ran out on the way" if fell else ""),
        ),
    )


def load_as_on_a_gpu(name: str, parts: e2e.Parts, device: str, load: dict, shape: tuple[int, int, int], memory: float):
    """Load a model with the plan of a GPU with so many bytes. A CPU carries the plan out in main memory."""
    load = load | {"device": device, "text_cache": False, "memory_plan": "auto", "memory": memory, "clip": shape}
    if device != "cpu":
        return e2e.random_pipeline(name, load, parts)
    pipeline = e2e.random_pipeline(name, load | {"memory_plan": "resident"}, parts)
    resolved = pipeline.turbo_nb.resolved
    chosen = plans.choose(resolved.sizes, resolved.spec.arch, *shape, budget=memory, fused=False)
    pipeline.turbo_nb.follow(_on_cpu(chosen))
    return pipeline


def _on_cpu(plan: plans.Plan | None) -> plans.Plan | None:
    return plan and replace(plan, device="cpu", next=_on_cpu(plan.next))


def picture(width: int, height: int) -> np.ndarray:
    """Return a picture (height, width, 3) uint8 with a gradient in each direction."""
    rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    channels = np.broadcast_arrays(rows, columns, (rows + columns) / 2)
    return np.stack(channels, 2).astype(np.uint8)


def line(name: str, shape: str, amount: float, run: Run) -> str:
    """Return a row of a Markdown table under `HEAD`."""
    gib = lambda peaks: " / ".join(f"{peaks.get(stage, 0) / 2**30:.1f}" for stage in STAGES)  # noqa: E731
    times = [f"{run.seconds[stage]:.2f}" for stage in ("all", *STAGES)]
    cells = (
        f"{name} {shape}", f"{amount:g}", _words(run.plan), *times, f"{run.seconds.get('switch', 0):.2f}",
        f"{run.first['all']:.1f}", f"{run.plan.needs / 1e9:.1f}", gib(run.allocated), gib(run.reserved),
        "passed" if run.check.passed else f"FAILED {run.check}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| model, clip | GB | plan | all, s | text | denoise | decode | switch | first, s | needs, GB | allocated, GiB "
    f"({' / '.join(STAGES)}) | reserved, GiB | check |\n{'|---' * 13}|"
)


def _words(plan: plans.Plan) -> str:
    return f"plan {plan.name}" + (f", {plan.keep} of {plan.blocks} blocks" if plan.offload == "group" else "")
