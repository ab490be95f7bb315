"""What goes where in memory, decided before anything is loaded.

`choose(sizes, arch, …)` takes the first plan whose peak fits the budget; they go from all on the GPU to one block at a
time. A plan is data: print it, or ask for another by name. `apply` carries it out, by `offload` or diffusers' own.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .. import backends, catalog
from ..errors import InputError
from ..machine import probe

if TYPE_CHECKING:
    pass

GB = 1e9
USABLE = 0.95  # of the budget; the rest is the CUDA context's and the allocator's
# Peaks measured in bf16 on one H100: bytes a pixel of a frame, of the fused VAE with one latent frame at a time and of
# diffusers'; and with tiling in all
DECODE_FUSED, DECODE_PLAIN, DECODE_TILED = 8_600, 12_500, 1.2 * GB
TEXT_PARAMETERS, VAE_PARAMETERS = 5.68e9, 127e6  # umT5-xxl's encoder and Wan's VAE


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of the weights as they are loaded: of one expert, how many experts, the text encoder, the VAE."""

    transformer: float
    experts: int
    text_encoder: float
    vae: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where the parts of a pipeline are while it works.

    text_encoder: "resident", "freed" after each new prompt is encoded, or "cpu", where it runs and stays. offload:
    "none", "model" (the expert that works is on the GPU) or "group" (only the blocks that work are). needs: the peak in
    bytes of `budget`, on `device`; host: bytes that are in main memory meanwhile, of `host_budget` (None: not known).
    """

    name: str
    text_encoder: str
    offload: str
    vae_tiling: bool
    needs: float = 0
    budget: float = 0
    host: float = 0
    host_budget: float | None = None
    device: str = "cuda"
    next: "Plan | None" = field(default=None, repr=False)  # for when memory runs out after all

    @property
    def fits(self) -> bool:
        return self.fits_device and (self.host_budget is None or self.host <= self.host_budget)

    @property
    def fits_device(self) -> bool:
        return self.needs <= self.budget * USABLE

    def __str__(self) -> str:
        text = {"resident": None, "freed": "text encoder freed after encoding", "cpu": "text encoder on the CPU"}
        offload = {
            "none": None,
            "model": "one model at a time on the GPU",
            "group": "one block at a time on the GPU (slow)",
        }
        does = [text[self.text_encoder], offload[self.offload], "VAE in tiles" if self.vae_tiling else None]
        how = ", ".join(filter(None, does)) or "everything stays loaded"
        doubt = "" if self.fits_device else "; it may run out of memory"
        if self.fits_device and not self.fits:
            doubt = (
                f"; that takes {self.host / GB:.1f} GB of main memory, and {self.host_budget / GB:.1f} GB are free: "
                "take a machine with more of it, a larger GPU, or int8 files"
            )
        return f"plan {self.name}: needs {self.needs / GB:.1f} GB of {self.budget / GB:.1f} GB: {how}{doubt}"


PLANS = tuple(
    Plan(name=name, text_encoder=text, offload=offload, vae_tiling=tiling)
    for name, text, offload, tiling in (
        ("resident", "resident", "none", False),
        ("free-text", "freed", "none", False),
        ("cpu-text", "cpu", "none", False),
        ("offload", "freed", "model", False),
        ("offload-cpu-text", "cpu", "model", False),
        ("offload-tiled", "cpu", "model", True),
        ("group", "cpu", "group", True),
    )
)
NAMES = ("auto", *(plan.name for plan in PLANS))


def sizes(spec: catalog.ModelSpec, *, quantised: bool = False) -> Sizes:
    """Estimated from a model's shape, for one that is not here yet; from its files, for one that ships with us.

    Raises InputError for a spec without a shape.
    """
    if spec.folder:
        parts = ("transformer", "text_encoder", "vae")
        one, text, vae = (sum(f.stat().st_size for f in (spec.folder / part).iterdir()) for part in parts)
        return Sizes(transformer=one, experts=1, text_encoder=text, vae=vae)
    if spec.arch is None:
        raise InputError(f"the shape of {spec.name} is not known before it is loaded")
    dim, ffn = spec.arch.dim, spec.arch.ffn_dim
    linears = spec.arch.num_layers * (8 * dim * dim + 2 * dim * ffn)
    rest = 8 * dim * dim + 4096 * dim + spec.arch.in_channels * 4 * dim
    return Sizes(
        transformer=linears * (1 if quantised else 2) + 2 * rest,
        experts=2 if spec.task == "i2v" else 1,
        text_encoder=2 * TEXT_PARAMETERS,
        vae=2 * VAE_PARAMETERS,
    )


def for_model(
    spec: catalog.ModelSpec, *, quantised: bool = False, budget: float, host_budget: float | None = None,
    fused: bool = True,
) -> Plan:  # fmt: skip
    """The plan that a model of the catalogue would get in `budget` bytes of a GPU, for a clip of its own size."""
    weights, clip = sizes(spec, quantised=quantised), (*spec.size, spec.num_frames)
    return choose(weights, spec.arch, *clip, budget=budget, host_budget=host_budget, fused=fused)


def fused_on(machine: probe.Machine | None = None) -> bool:
    """Whether the fused kernels of the transformer's blocks and of the VAE run on a machine (None: this one); without
    them both take more memory."""
    return all(backends.choose(operation, machine).chosen == "triton" for operation in ("block", "vae"))


def _activations(arch: catalog.Arch, width: int, height: int, num_frames: int, fused: bool) -> float:
    """Bytes at work in one forward, in bf16: of fused blocks the feed-forward's tensor, its 8-bit form and 5.5 of the
    model's width (on an H100 14B in 8 bits took 6.8 GB at 1280x720x81, for which this says 7.4); else two and ten"""
    tokens = (1 + (num_frames - 1) // 4) * (height // 16) * (width // 16)
    return 2.0 * tokens * (1.5 * arch.ffn_dim + 5.5 * arch.dim if fused else 2 * arch.ffn_dim + 10 * arch.dim)


def _needs(
    plan: Plan, sizes: Sizes, arch: catalog.Arch, width: int, height: int, num_frames: int, fused: bool
) -> float:
    """Peak bytes over the stages text, denoise and decode"""
    denoise = _activations(arch, width, height, num_frames, fused)
    decode = DECODE_TILED if plan.vae_tiling else (DECODE_FUSED if fused else DECODE_PLAIN) * width * height
    text = 0 if plan.text_encoder == "cpu" else sizes.text_encoder
    if plan.offload == "none":
        models = sizes.transformer * sizes.experts + sizes.vae
        if plan.text_encoder == "resident":  # "freed" and "cpu" part here: the first needs the room while it encodes
            return models + text + max(denoise, decode)
        return models + max(text, denoise, decode)
    at_work = sizes.transformer if plan.offload == "model" else 3 * sizes.transformer / arch.num_layers
    return max(text, at_work + sizes.vae + denoise, sizes.vae + decode)


def _host(plan: Plan, sizes: Sizes) -> float:
    """Bytes of the parts that a plan for a GPU keeps in main memory"""
    text = sizes.text_encoder if plan.text_encoder == "cpu" else 0
    return text + (0 if plan.offload == "none" else sizes.transformer * sizes.experts + sizes.vae)


def choose(
    sizes: Sizes,
    arch: catalog.Arch,
    width: int,
    height: int,
    num_frames: int,
    *,
    budget: float,
    host_budget: float | None = None,
    device: str = "cuda",
    fused: bool = True,
    name: str = "auto",
) -> Plan:
    """The first plan that fits `budget` bytes of `device` and `host_budget` of main memory (None: as much as it takes),
    or the one asked for by name, with what it needs. fused: whether the fused kernels run there, as `fused_on` says.

    If none fits it is the most frugal one, of the device's memory before main memory, and its text says so. Without a
    GPU everything is in memory, and only the text encoder can be freed. Raises InputError for an unknown name.
    """
    if name not in NAMES:
        raise InputError(f"plan is {name!r}; it is one of {', '.join(NAMES)}")
    plans = []
    for plan in reversed(PLANS):
        if device != "cpu" or plan.name in CPU_PLANS:
            needs = _needs(plan, sizes, arch, width, height, num_frames, fused and device != "cpu")
            # half measures would fail again, so the next plan is one in tiles
            following = next((other for other in plans if other.vae_tiling), None)
            host = 0 if device == "cpu" else _host(plan, sizes)
            plan = replace(plan, needs=needs, budget=budget, host=host, host_budget=host_budget)
            plans.insert(0, replace(plan, device=device, next=following))
    if name != "auto":
        asked = [plan for plan in plans if plan.name == name]
        if not asked:
            raise InputError(
                f"plan {name!r} moves things to a GPU, and the device is the CPU; use {', '.join(CPU_PLANS)}"
            )
        return asked[0]
    enough = [plan for plan in plans if plan.fits_device] or plans[-1:]
    return next((plan for plan in enough if plan.fits), min(enough, key=lambda plan: plan.host))


CPU_PLANS = ("resident", "free-text")
