"""How fast this GPU makes a clip of the model's own size, beside an H100, and how it launches the kernels."""

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..catalog import ModelSpec
    from ..ops.tuning import Measured, Shape

NUM_STEPS = 4  # of the clip; the first one compiles and records, so the others count


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Milliseconds of a clip's step and decoding; h100: of both on an H100, where these were measured."""

    clip: str
    step: float
    decode: float
    h100: tuple[float, float] | None = None


# Model, attention, 8-bit linears → ms of a step and of the decoding of a clip of the model's own size on an H100 80GB.
# Each has its commit, from the rows "step of a clip" and "decode of a clip" of benchmarks/results/h100.csv.
H100 = {
    ("TurboWan2.1-T2V-1.3B-480P", "sla", False): ((189.4, "19546fb2"), (482.7, "16f42e3")),
    ("TurboWan2.1-T2V-1.3B-480P", "sla", True): ((142.8, "19546fb2"), (482.7, "16f42e3")),
    ("TurboWan2.1-T2V-1.3B-480P", "sagesla", True): ((140.0, "16f42e3"), (482.7, "16f42e3")),
    ("nano", "sla", False): ((0.9135, "f919eec"), (27.53, "f919eec")),
}


def measure(pipeline) -> Speed:
    """Make a clip of the model's own size, and time it."""
    from ..generation import generate
    from ..pipeline import LoadedModel

    model = LoadedModel.of(pipeline)
    spec, attention = model.spec, model.attention
    video = generate(pipeline, spec.example, num_steps=NUM_STEPS, **pictures(spec))
    known = H100.get((spec.name, attention["attention_type"], attention["quant_linear"]))
    linears = "int8" if attention["quant_linear"] else "16-bit"
    width, height = spec.size
    return Speed(
        clip=f"{width}x{height}x{spec.num_frames}, {attention['attention_type']}, {linears} linears",
        step=1000 * median(video.steps[1:]),
        decode=1000 * video.timings["decode"],
        h100=known and tuple(ms for ms, _ in known),
    )


def pictures(spec: "ModelSpec") -> dict:
    """Return the options of `generate` with the pictures that a clip of a model needs."""
    if spec.task == "t2v":
        return {}
    from PIL import Image

    return {"image": Image.linear_gradient("L").convert("RGB")}


def rows(found: Speed) -> list[tuple[str, ...]]:
    """Return a row for the step and for the decoding: what, ms here, ms on an H100, and how many times as long."""
    here, there = (found.step, found.decode), found.h100 or (None, None)
    return [
        (name, f"{ms:.1f}", "not measured" if other is None else f"{other:.1f}", f"{ms / other:.1f}" if other else "")
        for name, ms, other in zip(("a step", "decode"), here, there, strict=True)
    ]


def launches(measured: "dict[tuple[str, Shape], Measured]") -> list[tuple[str, ...]]:
    """Return a row for each kernel that was timed: its name, its shape, its launch, and the ms of all launches."""
    return [
        (
            kernel,
            "x".join(map(str, shape)),
            str(one.launch),
            ", ".join(f"{ms:.2f}" + " *" * (how == one.launch) for how, ms in one.times.items()),
        )
        for (kernel, shape), one in sorted(measured.items())
    ]
