"""A step with a LoRA, and a change of its strength: merged into the weights, or as a branch beside each product.

Modes:
- base: without a LoRA.
- merge: `turbo_nb.files.lora`. The weights are read again from main memory at each change.
- branch: two more products in plain PyTorch at each linear, y + strength · (x Aᵀ) Bᵀ. A fused block computes such
  linears one by one, because a kernel's epilogue has no place for the branch.

The LoRA and the weights are random. The check of both works: a smaller model of the same seed, with dense attention,
against W + strength · B A in float32. A mode may err 1.2 times as much as the same linears without a LoRA do.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from turbo_nb.checkpoint import load_transformer, reload_tensors
from turbo_nb.errors import InputError
from turbo_nb.files import lora
from turbo_nb.files.names import PROJ_L
from turbo_nb.files.recognise import Contents
from turbo_nb.fused import transformer as fused_transformer

from . import harness, step
from .harness import Check, Job

MODES = ("base", "merge", "branch")
STRENGTHS = (1.0, 0.5)  # which a change goes to and fro between
EFFECT = 0.3  # the size of B A beside the weight's


def jobs(
    setup: step.Setup, rank: int, modes: list[str], *, check_layers: int, check_size: tuple[int, int, int], runs: int,
    warmup: int,
) -> Iterator[Job]:  # fmt: skip
    """Yield two jobs for each mode: a step, and a change of strength. Raises InputError for an unknown name."""
    for name, value, known in (
        ("model", setup.model, step.MODELS), ("linears", setup.linears, step.LINEARS),
        *(("mode", mode, MODES) for mode in modes),
    ):  # fmt: skip
        if value not in known:
            raise InputError(f"{name} is {value!r}. Expected one of {', '.join(known)}.")
    small = replace(
        setup, layers=min(check_layers, setup.arch.num_layers), size=check_size, attention="original", linears="bf16"
    )
    reference = cache(lambda strength: exact(small, rank, strength))
    shape = "x".join(map(str, setup.size))

    def job(mode: str, change: bool) -> Job:
        def run() -> tuple[harness.Timing, Check]:
            model = LoadedLoRA(setup, rank, mode)
            inputs, strengths = step.make_inputs(setup), [*STRENGTHS]

            def work() -> None:
                if change:
                    strengths.reverse()
                    model.set_strength(strengths[0])
                else:
                    step.velocity(model.transformer, inputs)

            timing = harness.measure(work, setup.device, runs=runs, warmup=warmup)
            return timing, check(mode, change)

        layers = f"{setup.arch.num_layers} of {step.MODELS[setup.model][0].num_layers} layers"
        change_work = f"change of strength, {setup.model}, {layers}, {setup.linears} linears"
        work = change_work if change else setup.work
        return Job(work=f"{work}, LoRA of rank {rank}", shape=shape, mode=mode, weights="random", run=run)

    def check(mode: str, change: bool) -> Check:
        inputs = step.make_inputs(small)
        tested = replace(small, linears=setup.linears)
        own = step.velocity(LoadedLoRA(tested, rank, "base").transformer, inputs)
        alone = harness.relative_error(own.float(), reference(0.0))
        model, strength = LoadedLoRA(tested, rank, mode), 0.0 if mode == "base" else STRENGTHS[0]
        if change and mode != "base":
            for strength in STRENGTHS:
                model.set_strength(strength)
        out = step.velocity(model.transformer, inputs).float()
        size = "x".join(map(str, small.size))
        return Check(
            error=harness.relative_error(out, reference(strength)),
            limit=min(1.2 * alone + 1e-3, 2 * harness.WORST),
            what=f"against the float32 merge at strength {strength:g}, dense, {small.arch.num_layers} layers, {size}; "
            f"without a LoRA {alone:.2e}",
        )

    for mode in modes:
        yield job(mode, change=False)
        if mode != "base":
            yield job(mode, change=True)


def contents_of(setup: step.Setup) -> Contents:
    """Return the random model in main memory, as a file is."""
    return step.random_contents(
        setup.model, setup.device, layers=setup.arch.num_layers, with_sla=setup.attention != "original", home="cpu"
    )


def random_lora(contents: Contents, rank: int) -> lora.LoRA:
    """Return a LoRA for all linears of the blocks. The same model and rank give the same numbers."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, weight in contents.tensors.items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2 and PROJ_L not in name:
            rows, columns = weight.shape
            scale = EFFECT * weight[0].float().norm() * (weight.shape[1] ** -0.5) / rank**0.5
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, columns, generator=generator).bfloat16()
            tensors[f"{stem}.lora_up.weight"] = (torch.randn(rows, rank, generator=generator) * scale).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(tensors, path)
        return lora.read(path)


def exact(setup: step.Setup, rank: int, strength: float) -> Tensor:
    """Return the output of the float32 model with W + strength · B A."""
    contents = contents_of(setup)
    tensors = {name: tensor.float() for name, tensor in contents.tensors.items()}
    for name, change in random_lora(contents, rank).changes.items():
        tensors[name] = tensors[name] + strength * (change.up.float() @ change.down.float())
    model = load_transformer(
        replace(contents, tensors=tensors), attention_type=setup.attention, device=setup.device, dtype=torch.float32
    )
    with step.plain_pytorch():
        return step.velocity(model, step.make_inputs(setup, torch.float32))


class LoadedLoRA:
    """A fused transformer with a LoRA at strength 1, merged or as a branch."""

    def __init__(self, setup: step.Setup, rank: int, mode: str):
        self.mode, self.device = mode, setup.device
        self.contents = contents_of(setup)
        self.lora = random_lora(self.contents, rank)
        self.transformer = load_transformer(
            self.contents,
            attention_type=setup.attention,
            sla_topk=setup.topk,
            quant_linear=setup.linears == "int8" or "auto",
            device=setup.device,
            loras=self._applied(STRENGTHS[0]) if mode == "merge" else (),
        )
        if setup.device != "cpu":
            fused_transformer.fuse(self.transformer, setup.device)
        if mode == "branch":
            self.branches = add_branches(self.transformer, self.lora)

    def _applied(self, strength: float) -> Sequence[lora.Applied]:
        return [lora.Applied(lora=self.lora, strength=strength)]

    def set_strength(self, strength: float) -> None:
        """Change the strength."""
        if self.mode == "branch":
            for branch in self.branches:
                branch.strength = strength
            return
        reload_tensors(
            self.transformer, self.contents, self.lora.changes, self._applied(strength), device=self.device,
            run_device=self.device,
        )  # fmt: skip


class Branch(nn.Module):
    """A linear with a low-rank branch beside it."""

    def __init__(self, linear: nn.Module, change: lora.Change, device: torch.device):
        super().__init__()
        self.linear, self.strength = linear, STRENGTHS[0]
        self.down, self.up = (x.to(device, torch.bfloat16) for x in (change.scale * change.down, change.up))

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear of x (…, K) plus the branch, (…, N)."""
        out = self.linear(x)
        inner = x.flatten(0, -2) @ self.down.T.to(x.dtype)
        return torch.addmm(out.flatten(0, -2), inner, self.up.T.to(x.dtype), alpha=self.strength).view(out.shape)


def add_branches(transformer: WanTransformer3DModel, one: lora.LoRA) -> list[Branch]:
    """Put a branch beside each linear that a LoRA changes."""
    branches = []
    for name, change in one.changes.items():
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        branch = Branch(transformer.get_submodule(path), change, transformer.device)
        setattr(transformer.get_submodule(parent), leaf, branch)
        branches.append(branch)
    return branches
