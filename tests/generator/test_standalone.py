"""The generator as a page of its own: a Jupyter server with Voilà, and its login."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from turbo_nb.errors import InputError, OutputError
from turbo_nb.generator import standalone

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path):
    """start(**variables): `turbo-nb ui`, and the address that it prints"""
    running = []

    def start(**variables) -> str:
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests/quick"), os.environ.get("PYTHONPATH"))))
        folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "RUNTIME")}
        kept = {name: value for name, value in os.environ.items() if name not in ("JUPYTER_TOKEN", "JUPYTER_PASSWORD")}
        process = subprocess.Popen(
            [sys.executable, "-m", "turbo_nb.cli", "ui", "--no-browser", "--port", str(free_port()), "clips"],
            cwd=tmp_path, env=kept | folders | {"PYTHONPATH": path} | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        running.append(process)
        line = process.stdout.readline()
        assert line.startswith("the generator: "), line + process.stdout.read()
        return line.split()[-1]

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def get(address: str) -> tuple[int, str]:
    """Return the answer's status and text, once the server listens."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=240) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError:
        time.sleep(0.5)
        return get(address)


def test_the_page_asks_for_the_token_and_shows_the_generator(server, tmp_path):
    pytest.importorskip("voila")
    homeless = {"HOME": "/dev/null", "JUPYTER_CONFIG_DIR": "", "JUPYTER_RUNTIME_DIR": ""}  # as a user of a container
    address = urllib.parse.urlsplit(server(JUPYTER_PASSWORD=" s3cret ", **homeless))
    page = f"{address.scheme}://{address.netloc}/voila/render/{standalone.PAGE}"
    assert "s3cret" not in address.query  # a token that the user knows is not printed
    status, text = get(page)
    assert "Generate" not in text and (status in (401, 403) or "login" in text.lower())
    status, text = get(f"{page}?token=s3cret")
    assert status == 200 and "application/vnd.jupyter.widget-view+json" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("variables", "secret"),
    [
        ({}, ""),
        ({"JUPYTER_TOKEN": "t"}, "t"),
        ({"JUPYTER_PASSWORD": " p\n", "JUPYTER_TOKEN": "t"}, "p"),
        ({"JUPYTER_PASSWORD": "{{ RUNPOD_SECRET_x }}"}, ""),
    ],
)
def test_the_token_is_that_of_the_environment(monkeypatch, variables, secret):
    for name in ("JUPYTER_TOKEN", "JUPYTER_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert standalone._secret() == secret


def test_the_notebook_shows_the_generator_of_a_folder_with_any_name(tmp_path):
    book = json.loads(standalone.notebook(tmp_path / 'it\'s a "clip" 红', "nano"))
    (cell,) = book["cells"]
    calls = {}
    source = cell["source"].replace("from turbo_nb.generator import widgets", "")
    show = type("Widgets", (), {"show": staticmethod(lambda folder, model: calls.update(folder=folder, model=model))})
    exec(source, {"widgets": show})
    assert calls == {"folder": str(tmp_path / 'it\'s a "clip" 红'), "model": "nano"}


def test_a_port_in_use_is_an_error_before_the_server_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="Expected a free port"):
            standalone.serve(port=taken.getsockname()[1])


@pytest.mark.parametrize("host", ["", "☃..a", "a" * 64 + ".b", "::g"])
def test_a_host_that_is_not_an_address_is_named_and_not_the_port(host):
    with pytest.raises(InputError, match=r"^host is .*Correct --host"):
        standalone.serve(host=host)


@pytest.mark.parametrize("name", ["file", "file/clips", "x" * 300])
def test_a_folder_that_cannot_keep_clips_is_an_error_before_the_server_starts(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^folder is .*cannot keep clips"):
        standalone.serve(tmp_path / name, port=free_port())


@pytest.mark.parametrize("package", ["voila", "jupyter_server"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, package):
    find = standalone.importlib.util.find_spec
    monkeypatch.setattr(standalone.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=rf"{package} is not installed.*turbo-nb\[notebook\]"):
        standalone.serve()
