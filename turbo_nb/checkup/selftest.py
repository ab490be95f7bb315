"""The self-test: does this machine compute the formulas, and does the model make a clip?

`verify(model)` checks the operations, the model's files, a short clip, and a step of the transformer with every
attention that can run here.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import backends, catalog
from ..errors import CheckpointError, DownloadError, first_line
from ..machine import probe
from ..runtime.plan import GB
from ..settings import LoadOptions, options
from . import doctor, operations, speed, tables

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..ops.tuning import Measured, Shape

SUMS = "SHA256SUMS"  # beside a model that comes with the package, in the format of `sha256sum`
NUM_FRAMES, NUM_STEPS = 5, 2  # of the short clip
# Largest relative error of a whole transformer, where roundings add up
STEP_BOUNDS, SAGE_STEP_BOUND = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.05}, 0.1


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check, with its time in seconds."""

    name: str
    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(tables.Tables):
    """The outcome of `verify`. It prints as tables, and shows as HTML in a notebook. Paste it into a bug report."""

    model: str
    report: doctor.Report
    checks: tuple[Check, ...]
    speed: "speed.Speed | None" = None
    launches: "dict[tuple[str, Shape], Measured]" = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 where all checks passed, else 2."""
        return 0 if all(check.passed for check in self.checks) else 2

    @property
    def verdict(self) -> str:
        """How many checks passed, and which failed."""
        failed = [check.name for check in self.checks if not check.passed]
        if failed:
            return f"Verdict: {len(failed)} of {len(self.checks)} checks FAILED: {', '.join(failed)}."
        return f"Verdict: all {len(self.checks)} checks passed. {self.model} runs here."

    def to_dict(self) -> dict:
        """Return everything, with the doctor's report, as plain data for JSON."""
        return {
            "model": self.model,
            "passed": self.exit_code == 0,
            "checks": [asdict(check) for check in self.checks],
            "speed": self.speed and asdict(self.speed),
            "launches": speed.launches(self.launches),
            "doctor": self.report.to_dict(),
        }

    def tables(self) -> Iterator[tables.Table]:
        """Yield "Machine", "Versions", and "Checks of" the model; of a GPU also "Speed of" a clip, and "Launches"."""
        yield from self.report.only("Machine").tables()
        rows = [(package.name, package.installed or "none") for package in self.report.environment.packages]
        rows += [(name, library.version or "") for name, library in self.report.backends.libraries.items()]
        yield "Versions", ("", ""), rows
        rows = [
            ("passed" if check.passed else "FAILED", check.name, f"{check.seconds:.2f}", check.detail)
            for check in self.checks
        ]
        yield f"Checks of {self.model}", ("", "check", "seconds", "result"), rows
        if self.speed:
            yield f"Speed of {self.speed.clip}", ("", "ms here", "ms on an H100", "times"), speed.rows(self.speed)
        if self.launches:
            head = "kernel", "shape", "launch (tile, warps, stages)", "ms of each candidate, * the one in use"
            yield "Launches timed on this GPU", head, speed.launches(self.launches)


def verify(model: str = "nano", *, quantized: bool = False, device: str = "auto") -> Result:
    """Check this machine and a model of the catalogue. It downloads nothing.

    Args:
        model: its name. A released model must have been downloaded.
        quantized: use the released files with int8 linears.
        device: "auto", "cpu", "cuda", or one GPU such as "cuda:1".

    Returns:
        The checks. Whatever raises an exception is a failed check.

    Raises:
        UnknownModelError: the catalogue does not have the model.
        InputError: the machine does not have the device.
    """
    spec, device = catalog.find(model), probe.device_of(options(LoadOptions)["device"].check("device", device))
    report = doctor.doctor()
    checks = [*check_operations(report.backends, device), run("mp4", encoder), run("files", files, spec, quantized)]
    measured: list[speed.Speed] = []
    if checks[-1].passed:
        checks += check_model(spec, quantized, device, measured)
    return Result(
        model=spec.name, report=report, checks=tuple(checks), speed=next(iter(measured), None), launches=timed(device)
    )


def timed(device: str) -> "dict[tuple[str, Shape], Measured]":
    """Return the kernels whose launches were timed on a device."""
    if device == "cpu":
        return {}
    from ..ops import tuning

    return tuning.winners(probe.gpu_index(device))


def run(name: str, work: Callable[..., tuple[bool, str]], *arguments) -> Check:
    """Return the Check of work(*arguments), which returns (passed, detail). It failed if it raises."""
    begin = time.perf_counter()
    try:
        passed, detail = work(*arguments)
    except Exception as error:  # whatever breaks on a user's machine belongs into the report
        passed, detail = False, f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
    return Check(name=name, passed=passed, detail=detail, seconds=time.perf_counter() - begin)


def encoder() -> tuple[bool, str]:
    """Write an mp4 as a clip is written, and compare what is read from it."""
    import numpy as np

    from ..video import mp4

    frames, metadata = np.zeros((5, 64, 96, 3), np.uint8), {"prompt": '一个红色的圆 "=;#'}
    frames[:, :, 48:] = 200
    with tempfile.TemporaryDirectory() as folder:
        path = mp4.write_mp4(Path(folder, "12:30 %d.mp4"), frames, 16, metadata)
        read, found = mp4.read_frames(path, 96, 64), mp4.read_metadata(path)
    same = read.shape == frames.shape and found == metadata and abs(read.astype(int) - frames).mean() < 5
    return bool(same), mp4.encoder() if same else "what was read from the file is not what was written"


def check_operations(found: backends.Backends, device: str) -> Iterator[Check]:
    """Yield a check of each operation in float32 on the CPU, then of each backend that was chosen for the GPU."""
    yield run("rope: reference, float64", operations.rope, "cpu", "float32")
    yield run("sla at topk 1: dense attention, float64", operations.sparse, "cpu", "float32")
    yield run("sla's linear branch: float64", operations.linear_branch)
    yield run("int8 linear: float64", operations.int8, "cpu", "float32")
    if device == "cpu":
        return
    dtype = str(backends.number_format(device)).removeprefix("torch.")
    for operation, work in (("rope", operations.rope), ("sla", operations.sparse), ("linear", operations.int8)):
        chosen = getattr(found, operation).chosen
        yield run(f"{operation} by {chosen} on the GPU: float64", work, device, dtype)
    if sage := found.sagesla.chosen:
        yield run(f"sagesla by {sage} on the GPU: float64", operations.sparse, device, dtype, sage)


def sums(folder: Path) -> str:
    """Return the sha256 of every file under a folder except SHA256SUMS, in the format of `sha256sum`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in paths)


def files(spec: catalog.ModelSpec, quantized: bool) -> tuple[bool, str]:
    """Check that the model's files have the right bytes and contents.

    Raises:
        CheckpointError: a file was changed, or holds something else.
        DownloadError: a file is not downloaded.
    """
    from ..files import hub, recognise

    if spec.folder:
        wrong = set((spec.folder / SUMS).read_text(encoding="utf-8").splitlines()) ^ set(sums(spec.folder).splitlines())
        if wrong:
            names = ", ".join(sorted({line.split("  ", 1)[1] for line in wrong}))
            raise CheckpointError(f"these files are not as they were shipped: {names}. Install turbo_nb again.")
        parts = {"transformer": [spec.folder / "transformer"], "vae": [spec.folder / "vae"]}
        parts["text encoder"] = [spec.folder / "text_encoder"]
    else:
        if (here := hub.cached(spec.needs(quantized))) is None:
            command = f"turbo-nb download {spec.name}{' --quant' if quantized else ''}"
            raise DownloadError(f"the files are not downloaded, or were changed later. Run: {command}")
        *transformers, vae, text_encoder, _ = here
        parts = {"transformer": transformers, "vae": [vae], "text encoder": [text_encoder]}
    for kind, paths in parts.items():
        for path in paths:
            recognise.require(recognise.read(path), kind, spec if kind == "transformer" else None)
    return True, "the right bytes of a transformer, a VAE and a text encoder"


def check_model(
    spec: catalog.ModelSpec, quantized: bool, device: str, measured: "list[speed.Speed]"
) -> Iterator[Check]:
    """Yield checks of loading, of a short clip, on a GPU of its speed, and of a step with each attention.

    measured: gets the speed.
    """
    loaded = []
    yield run("load", load, spec, quantized, device, loaded)
    if not loaded:
        return
    (pipeline,) = loaded
    yield run("clip", clip, pipeline)
    if device != "cpu":
        yield run("speed", fast, pipeline, measured)
    sage = device != "cpu" and backends.choose("sagesla", device).chosen is not None
    for name in ("transformer", "transformer_2"):
        if (transformer := getattr(pipeline, name, None)) is not None:
            for kind in ["sla"] + ["sagesla"] * sage:
                yield run(f"{name}: a step with {kind} at topk 1: dense", step, pipeline, transformer, kind)


def _model(pipeline):
    """Return the LoadedModel of a pipeline"""
    from ..pipeline import LoadedModel  # here, because a missing package has to be a failed check

    return LoadedModel.of(pipeline)


def load(spec: catalog.ModelSpec, quantized: bool, device: str, into: list) -> tuple[bool, str]:
    """Load the model's pipeline, and append it to `into`."""
    from ..pipeline import load_pipeline

    quant_linear = quantized if spec.files else "auto"
    pipeline = load_pipeline(spec.name, device=device, quant_linear=quant_linear, text_cache=False)
    into.append(pipeline)
    return True, str(_model(pipeline).plan)


def clip(pipeline) -> tuple[bool, str]:
    """Make a short clip of the model's own size. It must not be flat, and nano's must have the red of its prompt."""
    from ..generation import generate

    spec = _model(pipeline).spec
    video = generate(pipeline, spec.example, num_frames=NUM_FRAMES, num_steps=NUM_STEPS, **speed.pictures(spec))
    frames = video.frames.astype("int16")
    seen = [f"{stage} {seconds:.2f} s" for stage, seconds in video.timings.items()]
    seen += [f"{stage} {peak / GB:.1f} GB" for stage, peak in video.peaks.items()]
    detail = f"{frames.shape[0]} frames of {spec.size[0]}x{spec.size[1]}: {', '.join(seen)}"
    if frames.std() < 2:
        return False, f"{detail}; the picture is flat"
    red = (frames[..., 0] - frames[..., 1:].max(-1) > 100).mean()
    if spec is catalog.NANO and not 0.05 < red < 0.25:
        return False, f"{detail}; {red:.0%} of the picture is red, and the prompt has a large red circle"
    return True, detail


def fast(pipeline, into: "list[speed.Speed]") -> tuple[bool, str]:
    """Time a clip of the model's own size, and append its speed to `into`."""
    found = speed.measure(pipeline)
    into.append(found)
    return True, f"{found.clip}: a step {found.step:.1f} ms, decode {found.decode:.1f} ms"


def step(pipeline, transformer: "nn.Module", kind: str) -> tuple[bool, str]:
    """Compare a step of a transformer with sparse attention that keeps every block to one with dense attention.

    It leaves the transformer with the attention `original`, whose linear branch is lost.
    """
    import torch

    from .. import sla
    from ..runtime.place import place

    config = transformer.config
    latents = operations.noise(1, config.in_channels, 2, 24, 24)  # 288 tokens, ragged in blocks of 128 and 64
    embeds = operations.noise(1, 512, config.text_dim)

    def velocity(attention_type: str) -> "Tensor":
        sla.set_attention_type(transformer, "original")  # so that the next attention has a linear branch of zero
        plan = _model(pipeline).plan
        backend = backends.choose("sagesla", plan.device).chosen or "auto"
        sla.set_attention_type(transformer, attention_type, 1.0, backend=backend, device=plan.device)
        place(pipeline, plan)
        where, dtype = pipeline._execution_device, transformer.dtype
        with torch.inference_mode():
            return transformer(
                latents.to(where, dtype),
                timestep=torch.tensor([932.0], device=where),
                encoder_hidden_states=embeds.to(where, dtype),
                return_dict=False,
            )[0]

    name = str(transformer.dtype).removeprefix("torch.")
    bound = SAGE_STEP_BOUND if kind == "sagesla" else STEP_BOUNDS[name]
    return operations.close(velocity(kind), velocity("original"), bound)
