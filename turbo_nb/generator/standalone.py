"""The generator as a page of its own, without JupyterLab around it: `turbo-nb ui`.

Voilà renders a notebook that shows the generator, inside a Jupyter server. So the page has JupyterLab's login: the
token of JUPYTER_TOKEN or JUPYTER_PASSWORD, a password that was configured for Jupyter, or a token made at the start.
"""

import importlib.util
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError, OutputError, first_line, not_installed
from ..machine import environment
from ..settings import Weights
from ..values import local, shown

PAGE = "generator.ipynb"
CELL = "from turbo_nb.generator import widgets\n\nwidgets.show({folder!r}, model={model!r})"


def serve(
    folder: str | os.PathLike = "outputs",
    *,
    model: Weights = "auto",
    host: str = "127.0.0.1",
    port: int = 8866,
    browser: bool = True,
    on_address: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the generator until the process is interrupted.

    Every browser tab gets a kernel of its own, and so a model of its own. A job that was queued when a tab was closed
    is offered again by the next one.

    Args:
        folder: of the clips.
        model: the model chosen at first; a name or a path.
        host: the address to listen on. "0.0.0.0" lets other machines in, with the token.
        port: the port to listen on.
        browser: open the page in a browser.
        on_address: called with the page's address before the server starts. It has a token that was made for this
            start, and no token that the user chose.

    Raises:
        InputError: Voilà or the Jupyter server is not installed, or something listens on the port already. Or a
            variable that names a folder has an address of another place.
        OutputError: no clip can be written into the folder.
    """
    environment.check_folders()
    for package in ("voila", "jupyter_server"):
        if importlib.util.find_spec(package) is None:
            raise not_installed(package, "notebook")
    from jupyter_server.serverapp import ServerApp

    _require_free(host, port)
    folder = Path(local(folder, "folder")).absolute()
    try:
        environment.require_writable(folder)
    except OSError as error:
        raise OutputError(
            f"folder is {shown(folder)}, which cannot keep clips ({error.strerror or error}). Expected a folder that "
            "can be written. Choose another folder."
        ) from error
    shown_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address, secret = f"http://{shown_host}:{port}/voila/render/{PAGE}", _secret()
    if not secret:
        secret = secrets.token_urlsafe(24)
        address += f"?token={secret}"
    os.environ["JUPYTER_TOKEN"] = secret  # where the server looks; an argument would show in the list of processes
    on_address(address)
    with tempfile.TemporaryDirectory(prefix="turbo_nb_ui_") as root, tempfile.TemporaryDirectory() as spare:
        _provide_jupyters_folders(Path(spare))
        (Path(root) / PAGE).write_text(notebook(folder, model), encoding="utf-8")
        argv = [
            f"--ServerApp.root_dir={root}", f"--ip={host}", f"--port={port}", "--ServerApp.port_retries=0",
            f"--ServerApp.default_url=/voila/render/{PAGE}",
            "--ServerApp.jpserver_extensions={'voila.server_extension': True}",
            "--ServerApp.answer_yes=True",  # Ctrl-C ends it without a question
            "--log-level=WARN",
            *([] if browser else ["--no-browser"]),
            *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        ]  # fmt: skip
        ServerApp.launch_instance(argv)


def _require_free(host: str, port: int) -> None:
    """Raise InputError where the server could not listen"""
    try:
        if not host:  # which would be every address of this machine
            raise ValueError("it is empty")
        socket.getaddrinfo(host, port)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"host is {shown(host)}, which is not an address ({reason}). Expected one of this machine, such as "
            "127.0.0.1, or 0.0.0.0 for all of them. Correct --host."
        ) from error
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port is {port} on {host!r}, where the page cannot listen ({error.strerror or error}). Expected a "
                "free port of this machine. Give another --port."
            ) from error


def _provide_jupyters_folders(spare: Path) -> None:
    """Give Jupyter folders in `spare` in place of its own that cannot be made, because a user may have no home"""
    from jupyter_core import paths

    own = {
        "JUPYTER_CONFIG_DIR": paths.jupyter_config_dir,
        "JUPYTER_DATA_DIR": paths.jupyter_data_dir,
        "JUPYTER_RUNTIME_DIR": paths.jupyter_runtime_dir,  # in the data's folder, unless the variable is set
    }
    for variable, find in own.items():
        try:
            os.makedirs(find(), mode=0o700, exist_ok=True)
            usable = variable != "JUPYTER_RUNTIME_DIR" or os.access(find(), os.W_OK)
        except OSError:
            usable = False
        if not usable:
            os.environ[variable] = str(spare / variable)


def _secret() -> str:
    """Return the token that the environment sets, "" where it sets none; RunPod leaves "{{ … }}" unresolved"""
    secret = (os.environ.get("JUPYTER_PASSWORD") or os.environ.get("JUPYTER_TOKEN") or "").strip()
    return "" if "{{" in secret else secret


def notebook(folder: Path, model: Weights) -> str:
    """Return the JSON of a notebook that shows the generator and nothing else."""
    cell = {
        "cell_type": "code", "id": "generator", "metadata": {}, "outputs": [], "execution_count": None,
        "source": CELL.format(folder=str(folder), model=model if isinstance(model, str) else str(model)),
    }  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps({"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
