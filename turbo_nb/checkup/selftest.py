"""The self-test: does this machine compute what the formulas say, and does the model make a clip?

`verify(model)` checks the operations against independent float64 formulas, every backend that was chosen against the
reference, the model's files, a step of its transformer with every attention that can run here, and a short clip.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import backends, catalog
from ..errors import CheckpointError, DownloadError
from ..machine import probe
from ..runtime import place, plan
from . import doctor, tables

if TYPE_CHECKING:
    from torch import Tensor, nn

SUMS = "SHA256SUMS"  # beside a model that comes with the package: what `sha256sum` prints
NUM_FRAMES, NUM_STEPS = 5, 2  # of the short clip
# Largest relative error (‖out − ref‖ / ‖ref‖) of an operation by dtype, or by what its 8 bits cost
BOUNDS = {"float32": 1e-4, "bfloat16": 0.02}
INT8_BOUND, SAGE_BOUND = 0.02, 0.08
STEP_BOUNDS, SAGE_STEP_BOUND = (
    {"float32": 1e-4, "bfloat16": 0.05},
    0.1,
)  # of a whole transformer, where roundings add up


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was tried: whether it is as it should be, what was seen, and the seconds it took."""

    name: str
    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(tables.Tables):
    """What `verify` saw. Prints as tables, shows as HTML in a notebook; paste it, or `to_dict()`, into a bug report."""

    model: str
    report: doctor.Report
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """0: all checks passed; 2: not."""
        return 0 if all(check.passed for check in self.checks) else 2

    def to_dict(self) -> dict:
        """Everything, the doctor's report too, as JSON takes it."""
        return {
            "model": self.model,
            "passed": self.exit_code == 0,
            "checks": [asdict(check) for check in self.checks],
            "doctor": self.report.to_dict(),
        }

    def tables(self) -> Iterator[tables.Table]:
        """The machine, the versions, the checks."""
        yield from self.report.only("Machine").tables()
        rows = [(package.name, package.installed or "none") for package in self.report.environment.packages]
        rows += [(name, library.version or "") for name, library in self.report.backends.libraries.items()]
        yield "Versions", ("", ""), rows
        rows = [
            ("passed" if check.passed else "FAILED", check.name, f"{check.seconds:.2f}", check.detail)
            for check in self.checks
        ]
        yield f"Checks of {self.model}", ("", "check", "seconds", "seen"), rows


def verify(model: str = "nano", *, quantised: bool = False, device: str = "auto") -> Result:
    """Try this machine and a model of the catalogue. Fetches nothing: a released model must have been downloaded.

    quantised: the released files with int8 linears. Raises UnknownModelError, or InputError for a device that is not
    here; whatever fails later is a failed check.
    """
    spec, device = catalog.find(model), probe.device_of(device)
    report = doctor.doctor()
    checks = [*_operations(report.backends, device), run("files", files, spec, quantised)]
    if checks[-1].passed:
        checks += _model(spec, quantised, device)
    return Result(model=spec.name, report=report, checks=tuple(checks))


def run(name: str, work: Callable[..., tuple[bool, str]], *arguments) -> Check:
    """The Check of work(*arguments) → (passed, detail); one that raises has failed."""
    begin = time.perf_counter()
    try:
        passed, detail = work(*arguments)
    except Exception as error:  # whatever breaks on a user's machine is what the report is for
        lines = str(error).strip().splitlines() or ["no message"]
        passed, detail = False, f"{type(error).__name__}: {lines[0]}"
    return Check(name=name, passed=passed, detail=detail, seconds=time.perf_counter() - begin)


def close(out: "Tensor", ref: "Tensor", bound: float) -> tuple[bool, str]:
    """Whether ‖out − ref‖ / ‖ref‖ is at most `bound`, which NaN is not, and that in words."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    error = ((out - ref).norm() / ref.norm()).item()
    return error <= bound, f"relative error {error:.1e}, at most {bound:.1e}"


def _operations(found: backends.Backends, device: str) -> Iterator[Check]:
    """Every operation in float32 on the CPU, then by what was chosen for this machine's GPU"""
    yield run("rope: reference, float64", rope, "cpu", "float32")
    yield run("sla at topk 1: dense attention, float64", sparse, "cpu", "float32")
    yield run("sla's linear branch: float64", linear_branch)
    yield run("int8 linear: float64", int8, "cpu", "float32")
    if device == "cpu":
        return
    for operation, work in (("rope", rope), ("sla", sparse), ("linear", int8)):
        chosen = getattr(found, operation).chosen
        yield run(f"{operation} by {chosen} on the GPU: float64", work, device, "bfloat16")
    if sage := found.sagesla.chosen:
        yield run(f"sagesla by {sage} on the GPU: float64", sparse, device, "bfloat16", sage)


def _noise(*shape: int, seed: int = 0, device: str = "cpu", dtype: str = "float32") -> "Tensor":
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, getattr(torch, dtype))


def rope(device: str, dtype: str) -> tuple[bool, str]:
    """Rotary embedding against complex numbers in float64."""
    import torch

    from ..rope import VideoSize, rope_apply, rope_freqs

    size, head_dim = VideoSize(3, 4, 5), 128
    x = _noise(2, 3 * 4 * 5, 3, head_dim, device=device, dtype=dtype)
    out = rope_apply(x, size, rope_freqs(size, head_dim).to(device))
    places = torch.cartesian_prod(*map(torch.arange, size)).double()  # (tokens, 3): frame, row, column
    pairs = (22, 21, 21)  # of the 64, for the frame, the row and the column
    angles = [places[:, axis, None] / 10_000 ** (torch.arange(n).double() / n) for axis, n in enumerate(pairs)]
    turn = torch.polar(torch.ones(1).double(), torch.cat(angles, dim=1))  # (tokens, 64)
    ref = torch.view_as_complex(x.double().cpu().unflatten(-1, (-1, 2))) * turn[:, None]
    return close(out, torch.view_as_real(ref).flatten(-2), BOUNDS[dtype])


def sparse(device: str, dtype: str, sage: str | None = None) -> tuple[bool, str]:
    """Sparse attention that keeps every block, without its linear branch, against dense attention in float64.

    sage: the backend of SageSLA to try in place of SLA.
    """
    from .. import sla

    q, k, v = (_noise(1, 700, 2, 128, seed=seed, device=device, dtype=dtype) for seed in range(3))
    if sage:
        module = sla.SageSparseLinearAttention(128, topk=1.0, backend=sage)
    else:
        module = sla.SparseLinearAttention(128, topk=1.0)
    out = module.to(device)(q, k, v)
    q, k, v = (x.double().cpu().transpose(1, 2) for x in (q, k, v))
    ref = (q @ k.mT / 128**0.5).softmax(-1) @ v
    return close(out, ref.transpose(1, 2), SAGE_BOUND if sage else BOUNDS[dtype])


def linear_branch() -> tuple[bool, str]:
    """Linear attention against its quadratic form in float64."""
    from ..ops.attention import reference as attention_reference

    q, k, v = (_noise(1, 300, 2, 64, seed=seed) for seed in range(3))
    out = attention_reference.linear_attention(q, k, v)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = q.softmax(-1) @ k.softmax(-1).mT  # (B, H, L, L)
    ref = weights @ v / (1e-5 + weights.sum(-1, keepdim=True))
    return close(out, ref.transpose(1, 2), BOUNDS["float32"])


def int8(device: str, dtype: str) -> tuple[bool, str]:
    """An 8-bit linear against the plain one in float64; in tiles, or in rows where the kernels run."""
    from ..linear import int8_linear, int8_quantize, row_linear, row_quantize

    shapes = enumerate(((200, 320), (264, 320), (264,)))
    x, weight, bias = (_noise(*shape, seed=seed, device=device, dtype=dtype) for seed, shape in shapes)
    if device != "cpu" and backends.on_triton("linear"):
        q, scale, _ = row_quantize(weight)
        out = row_linear(x, q, scale, bias)
    else:
        out = int8_linear(x, *int8_quantize(weight), bias)
    return close(out, x.double() @ weight.double().T + bias.double(), INT8_BOUND)


def sums(folder: Path) -> str:
    """The sha256 of every file under a folder but SHA256SUMS itself, as `sha256sum` prints them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in paths)


def files(spec: catalog.ModelSpec, quantised: bool) -> tuple[bool, str]:
    """The model's files: the right bytes, and recognised as what they should be."""
    from ..files import hub, recognise

    if spec.folder:
        wrong = set((spec.folder / SUMS).read_text(encoding="utf-8").splitlines()) ^ set(sums(spec.folder).splitlines())
        if wrong:
            names = ", ".join(sorted({line.split("  ", 1)[1] for line in wrong}))
            raise CheckpointError(f"not as they were shipped: {names}; install turbo_nb again")
        parts = {"transformer": [spec.folder / "transformer"], "vae": [spec.folder / "vae"]}
        parts["text encoder"] = [spec.folder / "text_encoder"]
    else:
        here = hub.cached(spec, quantised=quantised)
        if here is None:
            raise DownloadError(
                f"not downloaded, or touched since: turbo-nb download {spec.name}{' --quant' if quantised else ''}"
            )
        parts = {"transformer": here.transformers, "vae": [here.vae], "text encoder": [here.text_encoder]}
    for kind, paths in parts.items():
        for path in paths:
            recognise.require(recognise.read(path), kind, spec if kind == "transformer" else None)
    return True, "the right bytes; transformer, VAE and text encoder recognised"


def _model(spec: catalog.ModelSpec, quantised: bool, device: str) -> Iterator[Check]:
    loaded = []
    yield run("load", load, spec, quantised, device, loaded)
    if not loaded:
        return
    (pipeline,) = loaded
    yield run("clip", clip, pipeline)
    if pipeline.plan.offload == "group":
        return  # blocks that are moved one by one keep the attention they came with
    kinds = ["sla"] + ["sagesla"] * (backends.choose("sagesla").chosen is not None)
    for name in ("transformer", "transformer_2"):
        if (transformer := getattr(pipeline, name, None)) is not None:
            for kind in kinds:
                yield run(f"{name}: a step with {kind} at topk 1: dense", step, pipeline, transformer, kind)


def load(spec: catalog.ModelSpec, quantised: bool, device: str, into: list) -> tuple[bool, str]:
    """The model's pipeline, put into the list `into`."""
    from ..pipeline import load_pipeline

    quant_linear = quantised if spec.files else "auto"
    pipeline = load_pipeline(
        spec.name, device=device, quant_linear=quant_linear, text_cache=False, on_plan=lambda chosen: None
    )
    into.append(pipeline)
    return True, str(pipeline.plan)


def clip(pipeline) -> tuple[bool, str]:
    """A short clip of the model's own size: not flat, and red where nano was asked for red."""
    from PIL import Image

    from ..generation import generate

    spec = pipeline.spec
    image = {"image": Image.linear_gradient("L").convert("RGB")} if spec.task == "i2v" else {}
    video = generate(pipeline, spec.example, num_frames=NUM_FRAMES, num_steps=NUM_STEPS, **image)
    frames = video.frames.astype("int16")
    seen = [f"{stage} {seconds:.2f} s" for stage, seconds in video.timings.items()]
    seen += [f"{stage} {peak / plan.GB:.1f} GB" for stage, peak in video.peaks.items()]
    detail = f"{frames.shape[0]} frames of {spec.size[0]}x{spec.size[1]}: {', '.join(seen)}"
    if frames.std() < 2:
        return False, f"{detail}; the picture is flat"
    red = (frames[..., 0] - frames[..., 1:].max(-1) > 100).mean()
    if spec is catalog.NANO and not 0.05 < red < 0.25:
        return False, f"{detail}; {red:.0%} of the picture is red, where the prompt has a large red circle"
    return True, detail


def step(pipeline, transformer: "nn.Module", kind: str) -> tuple[bool, str]:
    """A step of a transformer with sparse attention that keeps every block, against the same with dense attention.

    The transformer keeps the attention that was tried last, without the linear branch.
    """
    import torch

    from .. import sla

    config = transformer.config
    latents = _noise(1, config.in_channels, 2, 24, 24)  # 288 tokens, ragged in blocks of 128 and 64
    embeds = _noise(1, 512, config.text_dim)

    def velocity(attention_type: str) -> "Tensor":
        sla.set_attention_type(transformer, "original")  # what follows it has a linear branch of zero
        sla.set_attention_type(transformer, attention_type, 1.0, backend=backends.choose("sagesla").chosen or "auto")
        place.apply(pipeline.plan, pipeline)
        where, dtype = pipeline._execution_device, transformer.dtype
        with torch.inference_mode():
            return transformer(
                latents.to(where, dtype),
                timestep=torch.tensor([932.0], device=where),
                encoder_hidden_states=embeds.to(where, dtype),
                return_dict=False,
            )[0]

    name = str(transformer.dtype).removeprefix("torch.")
    return close(velocity(kind), velocity("original"), SAGE_STEP_BOUND if kind == "sagesla" else STEP_BOUNDS[name])
