"""Memory plans: which part of a model is where, decided before anything is loaded. Pure data.

`choose` takes the first plan whose peak fits the device. The plans go from everything on the GPU to blocks that are
streamed through it. `runtime.place` carries a plan out.
"""

import math
from dataclasses import dataclass, field, replace

from .. import backends, catalog
from ..errors import InputError
from ..settings import PLAN_NAMES

GB = 1e9
USABLE = 0.95  # share of the budget; the CUDA context, kernels and cuBLAS' workspaces take the rest
TIGHT = 0.6  # share of the budget above which stages give cached memory back
# Bytes that torch's allocator holds for a byte of activations, because free memory between tensors of other sizes stays
# unused. 14B at 1280x720x81 ran out of 10 GB with tensors of 8.0 GB.
ALLOCATED = 1.1
BESIDE = 0.25 * GB  # at least, of a forward: RoPE's tables, latents, a prompt's keys and values; 1.3B ran out of 3 GB
# Peaks in bf16, measured on an H100: bytes a pixel of a frame. The fused VAE decodes one latent frame at a time.
DECODE_FUSED, DECODE_PLAIN = 8_600, 12_500
DECODE_TILED = 1.2 * GB  # measured likewise, in all
TEXT_PARAMETERS, VAE_PARAMETERS = 5.68e9, 127e6  # umT5-xxl's encoder and Wan's VAE, facts of the released files
TEXT_STREAMED = 0.1  # of a streamed text encoder's weights: two of 24 blocks, and as much as 512 tokens' activations
STREAMED_CELLS = 2  # blocks of a transformer on the GPU beside those that stay there, as `block_stream.CELLS`
WINDOWS = 4  # tensors of a step that other GPUs write: q, k, v and the result; their memory is never given back
# Name → where the text encoder is, what is offloaded, and whether the VAE may decode in tiles
KINDS = {
    "resident": ("resident", "none", False),
    "cpu-text": ("cpu", "none", False),
    "free-text": ("freed", "none", False),
    "offload-cpu-text": ("cpu", "model", False),
    "offload": ("freed", "model", False),
    "offload-tiled": ("cpu", "model", True),
    "group": ("cpu", "group", True),
}
CPU_PLANS = ("resident", "free-text")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of the weights as they are loaded.

    Args:
        transformer: of one expert. experts: how many there are.
        text_encoder, vae: of the other parts.
    """

    transformer: float
    experts: int
    text_encoder: float
    vae: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where the parts of a pipeline are while it works.

    Args:
        text_encoder: "resident", "freed" (after each new prompt is encoded) or "cpu" (it stays in main memory, and its
            blocks are streamed through the GPU).
        offload: "none", "model" (only the model that works is on the GPU) or "group" (some blocks of the transformer
            that works are streamed).
        vae_tiling: whether the VAE decodes in tiles where not even one latent frame fits.
        keep, blocks: how many blocks of a transformer stay on the GPU, and how many it has; under "group" only.
        needs: peak bytes of `device`, of which `budget` may be used.
        host: bytes of main memory that hold offloaded parts, of which `host_budget` are free (None: not known).
        next: the plan to take when memory runs out all the same. None: this is the smallest one.
        gpus: how many GPUs work together. `needs` and `budget` are those of the first one, which needs the most.
    """

    name: str
    text_encoder: str
    offload: str
    vae_tiling: bool
    keep: int = 0
    blocks: int = 0
    needs: float = 0
    budget: float = 0
    host: float = 0
    host_budget: float | None = None
    device: str = "cuda"
    next: "Plan | None" = field(default=None, repr=False)
    gpus: int = 1

    @property
    def fits(self) -> bool:
        """Whether the plan fits the device and main memory."""
        return self.fits_device and (self.host_budget is None or self.host <= self.host_budget)

    @property
    def fits_device(self) -> bool:
        """Whether the peak fits the usable share of the device's budget."""
        return self.needs <= self.budget * USABLE

    @property
    def is_tight(self) -> bool:
        """Whether one stage needs memory that torch may have cached for another one."""
        return self.needs > self.budget * TIGHT

    def for_rank(self, device: str) -> "Plan":
        """Return the plan for another rank, which has no text encoder."""
        return replace(self, device=device, text_encoder="freed", next=None)

    def __str__(self) -> str:
        text = {"resident": None, "freed": "text encoder freed after encoding", "cpu": "text encoder in main memory"}
        offload = {
            "none": None,
            "model": "one model at a time on the GPU",
            "group": f"{self.keep} of {self.blocks} blocks stay on the GPU",
        }
        does = [text[self.text_encoder], offload[self.offload]]
        how = ", ".join(filter(None, does)) or "everything stays loaded"
        each = f" on each of {self.gpus} GPUs" if self.gpus > 1 else ""
        line = f"plan {self.name}: needs {self.needs / GB:.1f} GB of {self.budget / GB:.1f} GB{each}: {how}"
        if not self.fits_device:
            return f"{line}; it may run out of memory"
        if not self.fits:
            return (
                f"{line}; it takes {self.host / GB:.1f} GB of main memory, of which {self.host_budget / GB:.1f} GB are "
                "free: take a machine with more of it, a larger GPU, or int8 files"
            )
        return line


PLANS = tuple(
    Plan(name=name, **dict(zip(("text_encoder", "offload", "vae_tiling"), KINDS[name], strict=True)))
    for name in PLAN_NAMES[1:]
)


def sizes(spec: catalog.ModelSpec, *, quantized: bool = False) -> Sizes:
    """Estimate the sizes of a model from its shape; of one that ships with the package, read them from its files.

    Raises:
        InputError: the shape of the model is not known.
    """
    if spec.folder:
        parts = ("transformer", "text_encoder", "vae")
        one, text, vae = (sum(f.stat().st_size for f in (spec.folder / part).iterdir()) for part in parts)
        return Sizes(transformer=one, experts=1, text_encoder=text, vae=vae)
    if spec.arch is None:
        raise InputError(
            f"model is {spec.name!r}, whose shape is not known. Expected one of {', '.join(catalog.MODELS)}."
        )
    dim, ffn = spec.arch.dim, spec.arch.ffn_dim
    linears = spec.arch.num_layers * (8 * dim * dim + 2 * dim * ffn)
    return Sizes(
        transformer=linears * (1 if quantized else 2) + _outside_blocks(spec.arch),
        experts=2 if spec.task == "i2v" else 1,
        text_encoder=2 * TEXT_PARAMETERS,
        vae=2 * VAE_PARAMETERS,
    )


def _outside_blocks(arch: catalog.Arch) -> float:
    """Return the bytes of a transformer's weights that belong to no block"""
    return 2 * (8 * arch.dim**2 + 4096 * arch.dim + arch.in_channels * 4 * arch.dim)


def file_sizes(spec: catalog.ModelSpec, *, quantized: bool = False) -> dict[catalog.HubFile, float]:
    """Estimate the bytes of a released model's files on the Hub, without the small tokenizer."""
    found = sizes(spec, quantized=quantized)
    weights = dict.fromkeys(spec.quant_files if quantized else spec.files, found.transformer)
    return weights | {catalog.VAE: found.vae, catalog.TEXT_ENCODER: found.text_encoder}


def for_model(spec: catalog.ModelSpec, *, quantized: bool = False, **given) -> Plan:
    """Choose the plan of a model of the catalogue for a clip of its own size; the rest is given as to `choose`."""
    return choose(sizes(spec, quantized=quantized), spec.arch, *spec.size, spec.num_frames, **given)


def fused_on(device=None, machine=None) -> bool:
    """Return whether the fused kernels of the blocks and of the VAE run; without them both take more memory."""
    return all(backends.choose(operation, device, machine=machine).uses_triton for operation in ("block", "vae"))


def _activations(arch: catalog.Arch, width: int, height: int, num_frames: int, fused: bool) -> float:
    """Estimate the bytes of activations in one forward, in bf16.

    Fused blocks hold the feed-forward's tensor, its 8-bit form and 5.5 tensors of the model's width. On an H100 14B
    with 8-bit linears took 6.8 GB at 1280x720x81, for which this gives 7.4. Plain blocks hold two and ten.
    """
    tokens = catalog.tokens_of(width, height, num_frames)
    return 2.0 * tokens * (1.5 * arch.ffn_dim + 5.5 * arch.dim if fused else 2 * arch.ffn_dim + 10 * arch.dim)


def _streamed(sizes: Sizes, arch: catalog.Arch, budget: float, denoise: float) -> tuple[int, float]:
    """Return how many blocks can stay on the GPU under "group", and the bytes of weights on the GPU with them"""
    outside = min(_outside_blocks(arch), sizes.transformer / 2)  # half: a model of the package has narrower embeddings
    block = (sizes.transformer - outside) / arch.num_layers
    cells = int(max(0, budget * USABLE - outside - denoise) / block)
    keep = arch.num_layers if cells >= arch.num_layers else max(0, cells - STREAMED_CELLS)
    return keep, outside + min(keep + STREAMED_CELLS, arch.num_layers) * block


def _decoding(plan: Plan, width: int, height: int, fused: bool) -> float:
    """Return the bytes that decoding takes, one latent frame or one tile at a time"""
    return DECODE_TILED if plan.vae_tiling else (DECODE_FUSED if fused else DECODE_PLAIN) * width * height


def _text(plan: Plan, sizes: Sizes) -> float:
    """Return the bytes that encoding a prompt takes"""
    return sizes.text_encoder * (TEXT_STREAMED if plan.text_encoder == "cpu" else 1)


def _needs(plan: Plan, sizes: Sizes, weights: float, denoise: float, decode: float, windows: float) -> float:
    """Return the peak bytes over the stages text, denoise and decode; `windows` stay from the first step on"""
    text, decode = _text(plan, sizes), decode + windows
    if plan.offload == "none":
        models = sizes.transformer * sizes.experts + sizes.vae
        if plan.text_encoder == "resident":
            return models + text + max(denoise, decode)
        return models + max(text + windows, denoise, decode)  # a freed encoder shares its room with the later stages
    return max(text + windows, weights + denoise, sizes.vae + decode)


def main_memory(
    sizes: Sizes, arch: catalog.Arch, width: int, height: int, num_frames: int, *, device: str, all_frames: int
) -> float:
    """Return the bytes of main memory that a clip takes at least, beside the weights.

    Args:
        sizes: of the weights as they are loaded.
        arch: the shape of the transformer.
        width, height, num_frames: of what the model makes at once.
        device: on "cpu" the activations are in main memory. For another device the frames alone count.
        all_frames: frames of the clip with all its parts, clips side by side counted one by one.
    """
    frames = 3.0 * width * height * all_frames
    if device != "cpu":
        return frames
    # Activations grow with the channels, which are as the root of the weights. Half, because decoding nano at 1024x1024
    # took 0.8 of the whole on a CPU, and what fits must not be refused.
    decode = 0.5 * DECODE_PLAIN * width * height * math.sqrt(sizes.vae / (2 * VAE_PARAMETERS))
    return frames + max(_activations(arch, width, height, num_frames, False), decode)


def after_denoise(plan: Plan, sizes: Sizes, width: int, height: int, fused: bool) -> float:
    """Return the bytes beside the transformers that decoding takes, or the text encoder for the next prompt."""
    text = 0 if plan.text_encoder == "resident" else _text(plan, sizes)
    return max(ALLOCATED * _decoding(plan, width, height, fused), text)


def _host(plan: Plan, sizes: Sizes, gpus: int) -> float:
    """Return the bytes that a plan keeps in main memory; every GPU has its own copy of the offloaded models"""
    text = sizes.text_encoder if plan.text_encoder == "cpu" else 0
    return text + gpus * (0 if plan.offload == "none" else sizes.transformer * sizes.experts + sizes.vae)


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
    gpus: int = 1,
) -> Plan:
    """Choose a memory plan.

    Args:
        sizes: of the weights.
        arch: the shape of the transformer.
        width, height, num_frames: of the clip.
        budget: bytes of `device` that may be used.
        host_budget: bytes of main memory that are free. None: as many as the plan takes.
        device: "cpu" keeps everything in main memory; only the text encoder can be freed there.
        fused: whether the fused kernels run, as `fused_on` says.
        name: a plan to take, one of settings.PLAN_NAMES; "auto" takes the first fitting plan.
        gpus: how many GPUs share the tokens of a step and the rows of the decoding.

    Returns:
        The plan, with what it needs. If none fits, the most frugal one, first of the device's memory, then of main
        memory; its text has a warning.

    Raises:
        InputError: the plan that was asked for offloads to a GPU, and the device is the CPU.
    """
    on_gpu = device != "cpu"
    fused, held = fused and on_gpu, ALLOCATED if on_gpu else 1
    denoise, windows = _activations(arch, width, height, num_frames, fused) / gpus, 0.0
    if gpus > 1:  # q, k and v before, in and after the exchange, and two tensors of the width beside them
        tensor = 2.0 * catalog.tokens_of(width, height, num_frames) * arch.dim / gpus
        denoise, windows = max(denoise, 11 * tensor), WINDOWS * tensor
    beside = min(BESIDE, sizes.transformer / 4)  # less for a model that is smaller than the released ones
    denoise = max(held * denoise, denoise + beside) if on_gpu else denoise

    def filled(plan: Plan, following: Plan | None, block_budget: float = budget) -> Plan:
        keep, weights = _streamed(sizes, arch, block_budget, denoise)
        blocks = {"keep": keep, "blocks": arch.num_layers} if plan.offload == "group" else {}
        weights = weights if blocks else sizes.transformer
        decode = _decoding(plan, width, height, fused) / (1 if plan.vae_tiling else gpus)
        needs = _needs(plan, sizes, weights, denoise, held * decode, windows)
        host = _host(plan, sizes, gpus) if on_gpu else 0
        given = {"budget": budget, "host": host, "host_budget": host_budget, "device": device, "gpus": gpus}
        return replace(plan, needs=needs, next=following, **blocks, **given)

    # A plan that saves a little would run out again. So the next plan may decode in tiles, and the last one keeps no
    # block on the GPU.
    following = filled(PLANS[-1], None, block_budget=0) if on_gpu else None
    plans: list[Plan] = []
    for plan in reversed(PLANS):
        if on_gpu or plan.name in CPU_PLANS:
            plan = filled(plan, following)
            if plan.offload == "group" and not plan.keep:
                plan = following
            plans.insert(0, plan)
            if plan.name == "offload-tiled":
                following = plan
    if name != "auto":
        asked = [plan for plan in plans if plan.name == name]
        if not asked:
            raise InputError(
                f"memory_plan is {name!r}, which offloads to a GPU. Expected {' or '.join(CPU_PLANS)}, because the "
                "device is the CPU."
            )
        return asked[0]
    enough = [plan for plan in plans if plan.fits_device] or plans[-1:]
    return next((plan for plan in enough if plan.fits), min(enough, key=lambda plan: plan.host))
