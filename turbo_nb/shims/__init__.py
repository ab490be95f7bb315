"""Run upstream's own scripts (thu-ml/TurboDiffusion) unmodified, with nothing compiled.

`install()` supplies the compiled modules that its code imports and that are not installed here. `turbo-nb run` does it
for a script. Nothing changes before one of the two is called.
"""

from .hooks import install, uninstall
from .on_cpu import cuda_on_cpu
from .script import run
from .support import UnsupportedCall

__all__ = ["UnsupportedCall", "cuda_on_cpu", "install", "run", "uninstall"]
