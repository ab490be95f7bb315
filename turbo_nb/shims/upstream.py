"""What has to change in upstream's own modules. Each patch is put into a module while it is imported.

module              on a machine without CUDA, or without Triton         everywhere
rcm.utils.umt5      torch.cuda.current_device() works during its import
rcm.utils.attention SDPA chooses its own backend
ops.core                                                                 its Triton norms are PyTorch's norms
SLA.core            its Triton kernels are our references                SageSLA raises early where it cannot run,
                                                                         a query block keeps one block at least
rcm.networks.wan2*                                                       loading is tolerant, with a warning
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..errors import CheckpointError, listed, warn
from ..machine import probe
from ..ops.attention import reference
from ..ops.registry import no_triton
from .support import replaced
from .turbo_diffusion_ops import layer_norm_cuda, rms_norm_cuda

TOP_LEVEL = ("rcm", "imaginaire", "ops", "SLA", "modify_model", "serve", "turbodiffusion")
PROJECTION = "local_attn.proj_l."  # in the names of SLA's trained projections


def _after_import(patch: Callable[[ModuleType], None], during: Callable = nullcontext) -> Callable[[Any], None]:
    """Return a function that lets a loader patch the module which it executes."""

    def hook(loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with during():
                execute(module)
            patch(module)

        loader.exec_module = exec_module

    return hook


def _current_device_on_cpu():
    if torch.cuda.is_available():
        return nullcontext()
    return replaced(torch.cuda, current_device=lambda: torch.device("cpu"))


def _norms(core: ModuleType) -> None:
    """Replace the norms on every machine, because its Triton norms are wrong at widths beside powers of two.

    Its RMSNorm reads past the end of the weight, which can be an illegal memory access. Its LayerNorm counts columns
    that are padding.
    """
    core.rmsnorm = lambda x, weight, eps: _rows(rms_norm_cuda, x, eps, weight)
    core.layernorm = lambda x, weight, bias, eps, elementwise_affine=True: _rows(layer_norm_cuda, x, eps, weight, bias)


def _rows(norm: Callable, x: Tensor, eps: float, *weights: Tensor | None) -> Tensor:
    weights = (weight if weight is None else weight.float() for weight in weights)
    return norm(x.float().flatten(0, -2), eps, *weights, None).view(x.shape)


def _attention(core: ModuleType) -> None:
    if module := getattr(core, "SageSparseLinearAttention", None):  # a fork may be without it
        construct = module.__init__

        def checked(self, *arguments, **named) -> None:
            # SpargeAttn itself, where it is installed, has its own limits
            if not getattr(sys.modules.get("spas_sage_attn._qattn"), "__file__", None):
                backends.choose("sagesla").require()
            construct(self, *arguments, **named)

        module.__init__ = checked
    if no_triton(probe.this_machine()):
        core.get_block_map, core._attention = _block_map, SimpleNamespace(apply=_sparse_attention)
        core.get_cuda_arch = lambda device: "sm89"  # blocks of 128 × 64, as our reference has
    elif block_map := getattr(core, "get_block_map", None):
        core.get_block_map = _at_least_one(block_map)


def _at_least_one(block_map: Callable) -> Callable:
    """Let each query block keep one block, because upstream keeps none on a short clip, and computes NaN."""

    def get_block_map(q: Tensor, k: Tensor, topk_ratio: float, BLKQ: int = 64, BLKK: int = 64, **more: Any) -> tuple:
        blocks = -(-k.shape[-2] // BLKK)
        # 1.5 because upstream rounds the product down
        return block_map(q, k, topk_ratio=max(topk_ratio, 1.5 / blocks), BLKQ=BLKQ, BLKK=BLKK, **more)

    return get_block_map


def _block_map(q: Tensor, k: Tensor, topk_ratio: float, BLKQ: int = 64, BLKK: int = 64) -> tuple[Tensor, Tensor, int]:
    """Return the map of kept blocks in int8, their indices, and how many each query block keeps, at least 1."""
    kept = reference.block_map(q.transpose(1, 2), k.transpose(1, 2), topk_ratio, BLKQ, BLKK)
    count = reference.kept_count(topk_ratio, kept.shape[-1])
    return kept.to(torch.int8), kept.nonzero()[:, -1].view(*kept.shape[:-1], count), count


def _sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, lut: Tensor, topk: int, block_q: int, block_k: int,
    qk_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute attention over the kept blocks, q, k, v (B, H, L, D); autograd differentiates it."""
    if qk_scale is not None:
        q = q * (qk_scale * q.shape[-1] ** 0.5)
    heads_last = (x.transpose(1, 2) for x in (q, k, v))
    return reference.sparse_attention(*heads_last, block_map.bool(), block_q, block_k).transpose(1, 2)


def _dense(attention: ModuleType) -> None:
    if not torch.cuda.is_available():  # because the backends that it allows SDPA are those of GPUs
        attention._get_sdpa_config = lambda device, is_half: (0, [], lambda backends: nullcontext())


def _tolerant(networks: ModuleType) -> None:
    if model := getattr(networks, "WanModel", None):
        model.load_state_dict = load_state_dict


def load_state_dict(model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
    """Load a checkpoint into upstream's transformer, and warn of what is too much or, of SLA, missing.

    Raises:
        CheckpointError: other tensors are missing, or have another shape.
    """
    own = model.state_dict()
    missing, surplus = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    if not strict:
        return nn.Module.load_state_dict(model, state_dict, strict=False, assign=assign)
    wrong = [name for name in own if name in state_dict and state_dict[name].shape != own[name].shape]
    lost = sorted(name for name in missing if PROJECTION not in name)
    if wrong or lost:
        raise CheckpointError(_misfit(own, state_dict, wrong, lost, surplus))
    result = nn.Module.load_state_dict(model, state_dict, strict=False, assign=assign)
    for name in missing:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.zeros(own[name].shape)))
    projections = {name for name in surplus if PROJECTION in name}
    if missing:
        warn(f"the checkpoint has no SLA projections ({len(missing)} tensors): the linear branch is zero", stacklevel=2)
    if projections:
        warn(f"{len(projections)} tensors of SLA projections are not used: the attention is dense", stacklevel=2)
    if others := sorted(surplus - projections):
        warn(f"{len(others)} tensors that the model does not have are not used: {listed(others)}", stacklevel=2)
    return result


def _misfit(own: dict, state: dict, wrong: list[str], lost: list[str], surplus: set[str]) -> str:
    """Return why a checkpoint does not fit, with the flag that would."""
    if wrong:
        name = wrong[0]
        return (
            f"{len(wrong)} tensors have another shape than the model's, the first {name} {tuple(state[name].shape)}. "
            f"Expected {tuple(own[name].shape)}. Choose the model that the file is of with --model."
        )
    quantized = any(name.endswith(".int8_weight") for name in surplus)
    unquantized = any(name.endswith(".int8_weight") for name in lost)
    fix = "Download the file again."
    if quantized or unquantized:
        fix = (
            f"The file is {'' if quantized else 'not '}quantised: {'add' if quantized else 'leave out'} --quant_linear."
        )
    return f"{len(lost)} tensors of the model are missing: {listed(lost)}. Expected all of them. {fix}"


PATCHES: dict[str, Callable[[Any], None]] = {
    "rcm.utils.umt5": _after_import(lambda module: None, _current_device_on_cpu),
    "rcm.utils.attention": _after_import(_dense),
    "ops.core": _after_import(_norms),
    "SLA.core": _after_import(_attention),
    "rcm.networks.wan2pt1": _after_import(_tolerant),
    "rcm.networks.wan2pt2": _after_import(_tolerant),
}
