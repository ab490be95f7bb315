"""Run code that was written for CUDA on the CPU of a machine without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .support import in_new_processes, replaced


class _CudaToCpu(TorchFunctionMode):
    """Let torch's functions take the CPU where they are given CUDA."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is torch.Tensor.cuda:
            return arguments[0]
        return function(*map(_on_cpu, arguments), **{name: _on_cpu(value) for name, value in (named or {}).items()})


def _on_cpu(value: Any) -> Any:
    """Return the CPU for a CUDA device, any other value as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")) else value


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls, _on_cpu(device))


class _Autocast(torch.amp.autocast):
    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more: Any):
        # torch lets the CPU cast to 16 bits only; its casts to float32 work as well
        narrow = torch.bfloat16 if dtype is torch.float32 else dtype
        super().__init__(_on_cpu(device_type), narrow, enabled, **more)
        self.fast_dtype = dtype or self.fast_dtype


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Let code of this thread that asks for CUDA get the CPU, where torch has no CUDA. Does nothing where it has.

    Tensors and modules that are moved to "cuda" stay on the CPU. `torch.cuda.is_available()` stays False. Code that
    asks a GPU about itself, such as `torch.cuda.get_device_capability()`, still fails.
    """
    if torch.cuda.is_available():
        yield
        return
    load, layer_norm = torch.load, F.layer_norm

    def load_on_cpu(file: Any, map_location: Any = None, *arguments: Any, **named: Any) -> Any:
        return load(file, _on_cpu(map_location), *arguments, **named)

    def in_float32(*arguments: Any, **named: Any) -> Tensor:
        """Compute a norm in float32 within autocast, as a GPU does. A backward that recomputes blocks calls it, too."""
        if torch.is_autocast_enabled("cpu"):
            arguments = [x.float() if isinstance(x, Tensor) else x for x in arguments]
            named = {name: x.float() if isinstance(x, Tensor) else x for name, x in named.items()}
        return layer_norm(*arguments, **named)

    cuda = replaced(torch.cuda, current_device=lambda: 0, synchronize=lambda device=None: None)
    functions = replaced(torch, load=load_on_cpu, Generator=_Generator, autocast=_Autocast)
    # torch remembers the module of a device by its name
    forget = getattr(torch.get_device_module, "cache_clear", lambda: None)
    try:
        with cuda, functions, replaced(torch.amp, autocast=_Autocast), replaced(F, layer_norm=in_float32):
            forget()
            with in_new_processes(_for_good), _CudaToCpu():
                yield
    finally:
        forget()


_kept = []


def _for_good() -> None:
    """Enter `cuda_on_cpu` until the process ends."""
    _kept.append(cuda_on_cpu())
    _kept[-1].__enter__()
