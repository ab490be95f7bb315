"""Run a script as Python does, with the stand-ins installed."""

import os
import runpy
import sys
import traceback
from pathlib import Path
from types import TracebackType

import torch

from ..errors import InputError, first_line
from .hooks import install
from .on_cpu import cuda_on_cpu
from .support import UnsupportedCall


def run(target: str, arguments: list[str], *, module: bool = False) -> None:
    """Run a script or a module as `__main__` in this process, such as a notebook's kernel.

    Until it ends, its folder is the first of `sys.path`. The folder of upstream's packages is the last if the script
    lies in it. The stand-ins stay installed.

    Args:
        target: path of the script, or name of the module.
        arguments: what follows it in `sys.argv`.
        module: whether target is a module, as with `python -m`.

    Raises:
        InputError: the target is not a file, a folder with __main__.py, or a module that Python finds. What the script
            itself raises stays.
    """
    before = list(sys.argv), list(sys.path)
    try:
        execute(target, arguments, module)
    finally:
        sys.argv[:], sys.path[:] = before


def execute(target: str, arguments: list[str], module: bool) -> None:
    """Do what `run` does, and leave `sys.argv` and `sys.path` to the script's threads and exit handlers."""
    if not module:
        _require_script(target)
    script = Path(target)
    sys.argv[:] = [target, *arguments]
    if not sys.flags.safe_path:  # because Python then adds no folder
        sys.path.insert(0, os.getcwd() if module else str(script.resolve().parent))
    sys.path += _upstream(Path.cwd() / "turbodiffusion" / "x" if module else script.resolve())
    install()
    try:
        with cuda_on_cpu():
            if module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
    except ImportError as error:
        if module and _below_runpy(error.__traceback__) is None:  # runpy itself raised it, and no line of the script
            raise InputError(
                f"SCRIPT is {target!r}, which Python cannot run as a module ({first_line(error)}). Expected a name as "
                "after python -m. Check the name, and the folder in which turbo-nb runs."
            ) from error
        raise
    except UnsupportedCall as error:
        own = str(Path(__file__).parents[1]), os.path.dirname(torch.__file__)
        calls = [call for call in traceback.extract_tb(error.__traceback__) if not call.filename.startswith(own)]
        error.add_note(f"{calls[-1].filename}:{calls[-1].lineno} calls it: {calls[-1].line}")
        raise


def _require_script(target: str) -> None:
    """Raise InputError for a path that Python cannot run, or that has no end"""
    fault = ""
    if os.path.isdir(target):  # os.path's functions take any name, and Path's raise for some
        fault = "" if os.path.isfile(os.path.join(target, "__main__.py")) else "a folder without __main__.py"
    elif not os.path.isfile(target):
        fault = "which is not a file" if os.path.exists(target) else "which does not exist"
    else:
        try:
            with open(target, "rb") as file:
                file.read(1)
        except OSError as error:
            fault = f"which cannot be read ({error.strerror})"
    if fault:
        raise InputError(f"SCRIPT is {target!r}, {fault}. Expected the path of a Python script. Check the path.")


def show_exception(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception as Python does for a script: `sys.excepthook` without the calls that led to it."""
    error = error.with_traceback(_below_runpy(trace))
    sys.__excepthook__(kind, error, error.__traceback__)


def _below_runpy(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that is the script's own: what follows runpy's calls. All of it without runpy"""
    own = trace
    while own and not _in_runpy(own):
        own = own.tb_next
    if own is None:
        return trace
    while own and _in_runpy(own):
        own = own.tb_next
    return own


def _in_runpy(trace: TracebackType) -> bool:
    return trace.tb_frame.f_globals.get("__name__") == "runpy"


def _upstream(path: Path) -> list[str]:
    """Return the folder above a path that holds upstream's packages, as a list of none or one."""
    return [str(folder) for folder in path.parents if (folder / "rcm" / "networks").is_dir()][:1]
