"""Fixtures of the tests that download: a Hub on this machine, and a cache of its own."""

import time

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from loopback_hub import Hub


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(hub, tmp_path, monkeypatch):
    """The Hub's cache in an empty folder, with this process online at `hub`. Sleeps only go to `hub.slept`."""
    folder = tmp_path / "home" / "hub"
    settings = {
        "HF_HUB_OFFLINE": False, "ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder), "HF_HUB_DISABLE_TELEMETRY": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(time, "sleep", hub.slept.append)
    close_session()
    yield folder
    close_session()
