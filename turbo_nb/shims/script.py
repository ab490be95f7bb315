"""Run a script as Python does, with the stand-ins installed."""

import os
import runpy
import sys
import threading
from pathlib import Path
from types import TracebackType

from ..errors import InputError
from .hooks import install
from .on_cpu import cuda_on_cpu


def run(target: str, arguments: list[str], *, module: bool = False) -> None:
    """Run a script or a module as `__main__`, and wait for its threads.

    The folder of upstream's packages is added to the end of `sys.path` if the script lies in it.

    Args:
        target: path of the script, or name of the module.
        arguments: what follows it in `sys.argv`.
        module: whether target is a module, as with `python -m`.

    Raises:
        InputError: the script does not exist.
    """
    script = Path(target)
    if not module and not script.exists():
        raise InputError(f"{target} does not exist. Expected the path of a Python script. Check the path.")
    sys.argv[:] = [target, *arguments]
    if not sys.flags.safe_path:  # because Python then adds no folder
        sys.path[0] = os.getcwd() if module else str(script.resolve().parent)
    sys.path += _upstream(Path.cwd() / "turbodiffusion" / "x" if module else script.resolve())
    install()
    with cuda_on_cpu():
        if module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def show_exception(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception as Python does for a script: `sys.excepthook` without the calls that led to it."""
    own = trace
    while own and not _in_runpy(own):
        own = own.tb_next
    if own:
        while own and _in_runpy(own):
            own = own.tb_next
        error = error.with_traceback(own)
    sys.__excepthook__(kind, error, error.__traceback__)


def _in_runpy(trace: TracebackType) -> bool:
    return trace.tb_frame.f_globals.get("__name__") == "runpy"


def _upstream(path: Path) -> list[str]:
    """Return the folder above a path that holds upstream's packages, as a list of none or one."""
    return [str(folder) for folder in path.parents if (folder / "rcm" / "networks").is_dir()][:1]
