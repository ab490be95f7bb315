"""A JupyterLab and a headless Chromium for tests of a page.

The tests are skipped, with the reason, where Chromium or JupyterLab is missing. TURBO_NB_BROWSER=required makes that a
failure.
"""

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from helpers import home_or

ROOT = Path(__file__).parents[1]
WAIT = 120_000  # ms


def missing(reason: str) -> None:
    """Skip the test, or fail where the browser is required"""
    if os.environ.get("TURBO_NB_BROWSER") == "required":
        pytest.fail(f"{reason}, and TURBO_NB_BROWSER=required")
    pytest.skip(reason)


def notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells"""
    made = [
        {"cell_type": "code", "id": f"c{at}", "metadata": {}, "execution_count": None, "outputs": [], "source": text}
        for at, text in enumerate(cells)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else JupyterLab asks for one
    content = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content))


@contextmanager
def jupyter_lab(root: Path, folder: Path, name: str, **environment: str) -> Iterator[str]:
    """Start a JupyterLab with a token over `root`, its state in `folder`: the address of a notebook"""
    if importlib.util.find_spec("jupyterlab") is None:
        missing("JupyterLab is not installed")
    token = secrets.token_hex(16)
    news = folder / "CONFIG/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # else the page asks
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests/quick"), os.environ.get("PYTHONPATH"))))
    folders = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "RUNTIME")}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
                f"--port={port}", f"--ServerApp.root_dir={root}", "--expose-app-in-browser",
            ],
            env=os.environ | home_or(folder) | folders | {"JUPYTER_TOKEN": token, "PYTHONPATH": path} | environment,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.5)
        yield f"{address}/lab/tree/{name}?token={token}"
    finally:
        server.terminate()
        server.wait(30)


def end_kernels(address: str) -> None:
    """End the notebooks' kernels of the JupyterLab at an address"""
    base, token = address.split("/lab/")[0], address.partition("?token=")[2]
    head = {"Authorization": f"token {token}"}
    with urllib.request.urlopen(urllib.request.Request(f"{base}/api/sessions", headers=head), timeout=60) as answer:
        sessions = json.load(answer)
    for one in sessions:
        ended = urllib.request.Request(f"{base}/api/sessions/{one['id']}", headers=head, method="DELETE")
        urllib.request.urlopen(ended, timeout=60).close()


@contextmanager
def browser() -> Iterator:
    """Start a headless Chromium: playwright's browser"""
    try:
        from playwright import sync_api
    except ImportError:
        missing("playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        missing("no chromium on the PATH (Debian: apt-get install chromium)")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
        mock.patch.dict(os.environ, home_or(Path(home))),
        sync_api.sync_playwright() as playwright,
    ):
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


def command(page, name: str, **arguments) -> None:
    """Execute a command of JupyterLab"""
    page.evaluate("([name, more]) => { window.jupyterapp.commands.execute(name, more) }", [name, arguments])


def wait_until_opened(page) -> None:
    """Wait for the notebook and its kernel"""
    page.wait_for_function("window.jupyterapp && window.jupyterapp.restored.then(() => true)")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
    page.evaluate(
        """async () => {
            const panel = window.jupyterapp.shell.currentWidget;
            await panel.context.ready;
            await panel.sessionContext.ready;
            await panel.sessionContext.session.kernel.info;
            window.jupyterapp.shell.activateById(panel.id);
        }"""
    )
