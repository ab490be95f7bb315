"""Import hooks that supply what upstream's code imports and what is not installed here.

An installed package takes precedence. One that is installed but raises at import is replaced, because upstream would
stop there or later: most often it was compiled for another torch. The warning of `install` gives the reason.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .. import backends
from ..errors import InputError, collect_warnings, first_line, warn
from ..machine import probe
from ..ops.registry import no_cuda, no_triton
from . import flash_attn, spas_sage_attn, turbo_diffusion_ops, upstream
from .support import UnsupportedName, in_new_processes

# Module that upstream's code imports → the names that it takes from there
MODULES: dict[str, dict[str, Callable]] = {
    "flash_attn": {
        "flash_attn_func": flash_attn.flash_attn_func,
        "flash_attn_varlen_func": flash_attn.flash_attn_varlen_func,
    },
    "flash_attn.flash_attn_interface": {
        "flash_attn_func": flash_attn.flash_attn_func,
        "flash_attn_varlen_func": flash_attn.flash_attn_varlen_func,
    },
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {"apply_rotary_emb": flash_attn.apply_rotary_emb},
    "turbo_diffusion_ops": {
        name: getattr(turbo_diffusion_ops, name)
        for name in ("quant_cuda", "gemm_cuda", "rms_norm_cuda", "layer_norm_cuda")
    },
    "spas_sage_attn": {},
    "spas_sage_attn._qattn": {
        spas_sage_attn.SM_90: spas_sage_attn.attention_sm90,
        spas_sage_attn.FP8: spas_sage_attn.attention_fp8,
        spas_sage_attn.FP16: spas_sage_attn.attention_fp16,
    },
    "spas_sage_attn._fused": {
        name: getattr(spas_sage_attn, name) for name in ("transpose_pad_permute_cuda", "scale_fuse_quant_cuda")
    },
    "spas_sage_attn.utils": {
        name: getattr(spas_sage_attn, name) for name in ("get_vanilla_qk_quant", "block_map_lut_triton")
    },
}
# Package → the modules whose import shows that it works
PACKAGES = {
    "flash_attn": ("flash_attn.layers.rotary",),
    "turbo_diffusion_ops": ("turbo_diffusion_ops",),
    "spas_sage_attn": ("spas_sage_attn._qattn", "spas_sage_attn._fused", "spas_sage_attn.utils"),
}


class _Hooks(MetaPathFinder, Loader):
    """Finds the stand-ins, and patches upstream's own modules when they are imported."""

    is_stand_in = True

    def __init__(self):
        self.replaced: dict[str, str] = {}  # package → why
        self.before = dict(sys.modules)
        self.processes = in_new_processes(_install_quietly)

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name in MODULES and name.partition(".")[0] in self.replaced:
            return ModuleSpec(name, self, is_package=any(other.startswith(f"{name}.") for other in MODULES))
        patch = upstream.PATCHES.get(name.removeprefix("turbodiffusion."))
        spec = PathFinder.find_spec(name, path, target) if patch else None
        if spec and spec.loader:
            patch(spec.loader)
        return spec

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(MODULES[module.__name__])

        def missing(name: str):
            if name.startswith("__"):  # Python and other libraries look for __path__, __file__, __version__
                raise AttributeError(name)
            package = module.__name__.partition(".")[0]
            raise UnsupportedName(
                f"{module.__name__}.{name} is missing. Expected one of {', '.join(MODULES[module.__name__])}, "
                f"because turbo_nb stands in for {package} in the calls of upstream's Wan code only. Install {package}."
            )

        module.__getattr__ = missing


_installed: _Hooks | None = None


def install() -> dict[str, str]:
    """Let imports of upstream's compiled modules find stand-ins where these are not installed.

    Warns once of what replaces what. A second call changes nothing.

    Returns:
        Package that is replaced → why.

    Raises:
        InputError: upstream's modules were imported before.
    """
    global _installed
    if _installed is not None:
        return _installed.replaced
    early = [name for name in upstream.PATCHES if name in sys.modules or f"turbodiffusion.{name}" in sys.modules]
    if early:
        raise InputError(f"{early[0]} is imported already. Expected install() before it. Restart Python.")
    hooks = _Hooks()
    hooks.replaced |= {package: reason for package in PACKAGES if (reason := _reason(package))}
    for name in [name for name in sys.modules if name.partition(".")[0] in hooks.replaced]:
        del sys.modules[name]
    sys.meta_path.insert(0, hooks)
    hooks.processes.__enter__()
    _installed = hooks
    if notes := _notes(hooks.replaced):
        warn(f"upstream's code runs with stand-ins: {'; '.join(notes)}")
    return hooks.replaced


def _install_quietly() -> None:
    """Install in a new process; its parent gave the warning."""
    with collect_warnings():
        install()


def uninstall() -> None:
    """Take the stand-ins out of Python, and upstream's modules that were imported with them."""
    global _installed
    if _installed is None:
        return
    hooks, _installed = _installed, None
    sys.meta_path.remove(hooks)
    hooks.processes.__exit__(None, None, None)
    ours = (*hooks.replaced, *upstream.TOP_LEVEL)
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        if sys.modules[name] is not hooks.before.get(name):
            del sys.modules[name]
    sys.modules.update({name: module for name, module in hooks.before.items() if name.partition(".")[0] in ours})


def _reason(package: str) -> str | None:
    """Return why a package cannot be used, None where it works."""
    if sys.modules.get(package) is not None:
        return None
    try:
        for module in PACKAGES[package]:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            return "not installed"
        return f"installed, but broken: {first_line(error)}"
    except (Exception, SystemExit) as error:  # an undefined symbol, a wrong torch
        return f"installed, but broken: {first_line(error)}"
    return None


def _notes(replaced: dict[str, str]) -> list[str]:
    """Return what replaces what on this machine."""
    by = {
        "flash_attn": lambda: "RoPE in plain PyTorch, attention through its SDPA",
        "turbo_diffusion_ops": lambda: _by(backends.choose("tile_product")),
        "spas_sage_attn": lambda: _by(backends.choose("sagesla")),
    }
    notes = [f"{package} ({reason}) by {by[package]()}" for package, reason in replaced.items()]
    machine = probe.this_machine()
    if reason := no_triton(machine):
        notes.append(f"upstream's Triton kernels ({reason}) by plain PyTorch")
    if no_cuda(machine):
        notes.append("the GPU by the CPU, within turbo-nb run or turbo_nb.shims.cuda_on_cpu()")
    return notes


def _by(choice: backends.Choice) -> str:
    if choice.chosen is None:
        return "nothing: SageSLA cannot run here"
    return "Triton kernels of turbo_nb" if choice.uses_triton else "plain PyTorch"
