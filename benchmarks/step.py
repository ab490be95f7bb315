"""Run one step of a Wan transformer with random weights, because speed does not depend on their values.

The check uses a smaller clip and fewer layers. It compares a mode with the same bf16 weights in float32 and with exact
attention. The mode may err 1.1 times as much as the plain bf16 modules (mode "reference") do.

Near ties decide which blocks sparse attention keeps, and another block outweighs every rounding. So the check records
the block maps of the plain bf16 modules, and hands them to the mode and to the float32 model ("same block maps"). A
mode that does not ask for its maps at one of `MAP_SEAMS` is checked with topk 1 ("every block kept").
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from turbo_nb import backends, catalog, sla
from turbo_nb.checkpoint import ROWS, load_transformer
from turbo_nb.checkup.selftest import SAGE_STEP_BOUND
from turbo_nb.errors import InputError
from turbo_nb.files.numbers import Encoded
from turbo_nb.files.recognise import Contents
from turbo_nb.fused import transformer as fused_transformer
from turbo_nb.linear import row_quantize
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.settings import LoadOptions, options

from . import harness
from .harness import Check, Job

# Name → shape, and width of the text embedding
MODELS = {
    "1.3B": (catalog.ARCH_1_3B, 4096),
    "14B": (catalog.ARCH_14B, 4096),
    "nano": (catalog.NANO.arch, 128),
    "tiny": (catalog.Arch(dim=128, num_heads=2, num_layers=2, ffn_dim=256), 64),
    "A14B": (catalog.ARCH_A14B, 4096),
    "tiny-i2v": (catalog.Arch(dim=128, num_heads=2, num_layers=2, ffn_dim=256, in_channels=36), 64),
}
TEXT_TOKENS, PROMPT_TOKENS = 512, 64  # length of the text embedding, and how much of it is not padding
TIMESTEP = 932.0
LINEARS = ("bf16", "int8")
COMPILE = {"fullgraph": True}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A transformer and a clip.

    Args:
        layers: how many, None for all.
        size: (width, height, frames) in pixels.
        seed: of the weights.
    """

    model: str
    layers: int | None
    size: tuple[int, int, int]
    attention: str
    topk: float
    linears: str
    device: str
    seed: int = 0

    @property
    def arch(self) -> catalog.Arch:
        arch = MODELS[self.model][0]
        return replace(arch, num_layers=min(self.layers or arch.num_layers, arch.num_layers))

    @property
    def work(self) -> str:
        topk = "" if self.attention == "original" else f" {self.topk:g}"
        layers = f"{self.arch.num_layers} of {MODELS[self.model][0].num_layers} layers"
        return f"step of {self.model}, {layers}, {self.attention}{topk}, {self.linears} linears"


def jobs(
    setup: Setup, modes: list[str], *, check_layers: int, check_size: tuple[int, int, int], runs: int, warmup: int
) -> Iterator[Job]:
    """Yield a job for each mode (names of `MODES` joined by +). Raises InputError for an unknown name."""
    check_modes(modes)
    for name, value, known in (
        ("model", setup.model, MODELS), ("attention", setup.attention, sla.ATTENTION_TYPES),
        ("linears", setup.linears, LINEARS),
    ):  # fmt: skip
        if value not in known:
            raise InputError(f"{name} is {value!r}. Expected one of {', '.join(known)}.")
    options(LoadOptions)["sla_topk"].check("sla_topk", setup.topk)
    transformer, inputs = build(setup), make_inputs(setup)
    small = replace(setup, layers=min(check_layers, setup.arch.num_layers), size=check_size)
    plain = cache(lambda topk: Plain(replace(small, topk=topk)))  # shared by the modes

    def job(mode: str) -> Job:
        out = torch.empty(0)

        def work() -> None:
            nonlocal out
            out = velocity(transformer, inputs)

        def run() -> tuple[harness.Timing, Check]:
            with using(mode, transformer):
                timing = harness.measure(work, setup.device, runs=runs, warmup=warmup)
            if not out.isfinite().all():
                return timing, Check(error=float("nan"), limit=0, what="the timed step's output is not finite")
            return timing, check(mode, small, plain)

        shape = "x".join(map(str, setup.size))
        return Job(work=setup.work, shape=shape, mode=mode, weights="random", run=run)

    yield from map(job, modes)


def build(setup: Setup, dtype: torch.dtype = torch.bfloat16) -> WanTransformer3DModel:
    """Return the transformer with random bf16 weights in `dtype`. The same setup gives the same weights."""
    return load_transformer(
        random_contents(
            setup.model,
            setup.device,
            layers=setup.arch.num_layers,
            with_sla=setup.attention != "original",
            seed=setup.seed,
        ),
        attention_type=setup.attention,
        sla_topk=setup.topk,
        quant_linear=setup.linears == "int8" or "auto",
        device=setup.device,
        dtype=dtype,
    )


def random_contents(
    model: str, device: str, *, layers: int | None = None, with_sla: bool = True, home: str | None = None,
    int8: bool = False, seed: int = 0,
) -> Contents:  # fmt: skip
    """Return a transformer file with random bf16 weights, as `recognise.read` would.

    Args:
        model: a name of `MODELS`.
        device: where the weights are drawn.
        layers: None: all.
        with_sla: whether the file has SLA projections.
        home: the device that keeps the weights. None: the same device.
        int8: whether the linears of blocks are in int8 with one scale per row.
        seed: of the weights.
    """
    arch, text_dim = MODELS[model]
    arch = replace(arch, num_layers=layers or arch.num_layers)
    with torch.device("meta"):
        meta = WanTransformer3DModel(
            attention_head_dim=arch.dim // arch.num_heads, num_attention_heads=arch.num_heads,
            num_layers=arch.num_layers, ffn_dim=arch.ffn_dim, in_channels=arch.in_channels, out_channels=16,
            text_dim=text_dim,
        )  # fmt: skip
        if with_sla:
            sla.set_attention_type(meta, "sla")
    generator, home = torch.Generator(device).manual_seed(seed), home or device

    def draw(name: str, shape: torch.Size) -> Tensor | Encoded:
        values = _draw(name, shape, generator)
        if not int8 or not name.startswith("blocks.") or len(shape) != 2 or "proj_l." in name:
            return values.to(home)
        q, scale = (torch.cat(part) for part in zip(*(row_quantize(x)[:2] for x in values.split(ROWS)), strict=True))
        return Encoded("int8 rows", shape, q.to(home), scale.to(home))

    return Contents(
        path=Path("random weights"),
        kind="transformer",
        names="diffusers",
        tensors={name: draw(name, tensor.shape) for name, tensor in meta.state_dict().items()},
        arch=arch,
        head_dim=arch.dim // arch.num_heads,
        text_dim=text_dim,
        sla=with_sla,
    )


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return random values at a scale that keeps activations near 1, so that every part of the step counts"""
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("scale_shift_table"):
        noise = 0.5 * noise
    elif name.endswith("bias"):
        noise = 0.02 * noise
    elif noise.ndim == 1:  # the weight of a norm
        noise = 1 + 0.1 * noise
    else:
        noise = noise / noise[0].numel() ** 0.5
    return noise.to(torch.bfloat16)


def make_inputs(setup: Setup, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return random latents, a timestep and a zero-padded text embedding, in bf16 precision and of type `dtype`."""
    width, height, frames = setup.size
    generator = torch.Generator(setup.device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setup.device).to(torch.bfloat16).to(dtype)

    text = noise(1, TEXT_TOKENS, MODELS[setup.model][1])
    text[:, PROMPT_TOKENS:] = 0
    return {
        "hidden_states": noise(1, setup.arch.in_channels, 1 + (frames - 1) // 4, height // 8, width // 8),
        "timestep": torch.tensor([TIMESTEP], device=setup.device),
        "encoder_hidden_states": text,
    }


@torch.inference_mode()
def velocity(transformer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the output of the step, (1, 16, T, H/8, W/8)."""
    return transformer(**inputs, return_dict=False)[0]


@contextmanager
def _fused(transformer: nn.Module) -> Iterator[None]:
    print(fused_transformer.fuse(transformer))
    try:
        yield
    finally:
        fused_transformer.unfuse(transformer)


@contextmanager
def _compiled(transformer: nn.Module) -> Iterator[None]:
    torch.compiler.reset()
    backends.load_kernels(transformer.device)
    transformer.compile_repeated_blocks(**COMPILE)
    try:
        yield
    finally:
        for block in transformer.blocks:
            block._compiled_call_impl = None


def plain_pytorch():
    """Return a context in which every operation runs its reference."""
    return patch.dict(os.environ, dict.fromkeys(backends.VARIABLES.values(), "reference"))


def _reference(transformer: nn.Module):
    return plain_pytorch()


# "reference" is plain PyTorch. "eager" is diffusers' blocks with the kernels that `backends` chooses.
MODES = {"reference": _reference, "eager": nullcontext, "fused": _fused, "compile": _compiled}


def check_modes(modes: list[str]) -> None:
    """Raise InputError for a mode that is not a name of `MODES`, or several joined by +."""
    for mode in modes:
        if not set(mode.split("+")) <= MODES.keys():
            raise InputError(f"mode is {mode!r}. Expected one of {', '.join(MODES)}, or several such as fused+compile.")


@contextmanager
def using(mode: str, transformer: nn.Module) -> Iterator[None]:
    """Put the transformer into a mode, or into several ("fused+compile"), and undo that afterwards."""
    with ExitStack() as stack:
        for name in mode.split("+"):
            stack.enter_context(MODES[name](transformer))
        yield


_source = attention_reference.block_map  # makes the block maps inside `maps_from`


# A custom operation, because a compiled block must ask again at every call.
@torch.library.custom_op("turbo_nb_benchmarks::block_map", mutates_args=())
def _block_map(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int) -> Tensor:
    return _source(q, k, topk, block_q, block_k)


@_block_map.register_fake
def _(q, k, topk, block_q, block_k):
    batch, length, heads, _ = q.shape
    return q.new_empty((batch, heads, -(-length // block_q), -(-length // block_k)), dtype=torch.bool)


def _kept_blocks(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int, *_) -> Tensor:
    """Return the kept blocks of a map as ascending indices, (B, H, Q_blocks, n) int32"""
    kept = _block_map(q, k, topk, block_q, block_k)
    return (
        kept.int().topk(attention_reference.kept_count(topk, kept.shape[-1]), dim=-1).indices.int().sort(dim=-1).values
    )


# Where modes ask for their block maps: module, attribute, and the replacement, which asks `_source`.
MAP_SEAMS = [
    ("turbo_nb.ops.attention.reference", "block_map", _block_map),
    ("turbo_nb.ops.attention.triton_sla", "kept_blocks", _kept_blocks),
]


@contextmanager
def maps_from(source: Callable[..., Tensor]) -> Iterator[None]:
    """Take every block map from source(q, k, topk, block_q, block_k) inside this context."""
    global _source
    before, _source = _source, source
    with ExitStack() as stack:
        for name, attribute, stand_in in MAP_SEAMS:
            try:
                module = import_module(name)
            except ImportError:  # Triton is not installed
                continue
            stack.enter_context(patch.object(module, attribute, stand_in))
        try:
            yield
        finally:
            _source = before


class Plain:
    """The plain bf16 modules, with 8-bit linears if the setup asks for them.

    `maps` are the block maps that they choose. `ref` is the float32 output of the same weights on the same maps, and
    `error` their relative error against it.
    """

    def __init__(self, setup: Setup):
        choose, self.maps = attention_reference.block_map, []

        def record(*arguments) -> Tensor:
            self.maps.append(choose(*arguments))
            return self.maps[-1]

        with plain_pytorch():  # loading included, because it makes 8-bit weights for the chosen kernel
            transformer = build(setup)
        with maps_from(record), using("reference", transformer):
            out = velocity(transformer, make_inputs(setup))
        attention = "original" if setup.attention == "original" else "sla"
        exact = build(replace(setup, attention=attention, linears="bf16"), torch.float32)
        if self.maps:  # because blocks of SageSLA may have other sizes
            for ours, theirs in zip(exact.blocks, transformer.blocks, strict=True):
                ours, theirs = ours.attn1.processor.sla, theirs.attn1.processor.sla
                ours.block_q, ours.block_k = theirs.block_q, theirs.block_k
        with maps_from(Given(self.maps)), using("reference", exact):
            self.ref = velocity(exact, make_inputs(setup, torch.float32))
        self.error = harness.relative_error(out, self.ref)


class Given:
    """A source of recorded block maps. count: how many were asked for."""

    def __init__(self, maps: list[Tensor]):
        self.maps, self.count = maps, 0

    def __call__(self, *arguments) -> Tensor:
        self.count += 1
        return self.maps[self.count - 1]


def check(mode: str, setup: Setup, plain: Callable[[float], Plain]) -> Check:
    """Compare a mode with float32: with the same block maps if it takes them, else with every block kept."""
    for topk in dict.fromkeys((setup.topk, 1.0)):
        setup, own = replace(setup, topk=topk), plain(topk)
        transformer, given = build(setup), Given(own.maps)
        with maps_from(given), using(mode, transformer):
            out = velocity(transformer, make_inputs(setup))
        if given.count == len(own.maps):
            break
    kept = "dense" if not own.maps else "every block kept" if setup.topk == 1 else "same block maps"
    worst = SAGE_STEP_BOUND if setup.attention == "sagesla" else harness.WORST
    return Check(
        error=harness.relative_error(out, own.ref),
        limit=harness.limit(None if mode == "reference" else own.error, worst),
        what=f"against float32, {kept}, {setup.arch.num_layers} layers, {'x'.join(map(str, setup.size))}; "
        f"plain bf16 modules {own.error:.2e}",
    )
