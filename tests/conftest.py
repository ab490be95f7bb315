import gc
import os
import shutil
import signal
import tempfile

import pytest
from forks import forks

os.environ["HF_HUB_OFFLINE"] = "1"
_cache = tempfile.TemporaryDirectory(prefix="turbo_nb-")
os.environ["TURBO_NB_CACHE"] = os.environ["TURBO_NB_CONFIG"] = _cache.name  # nothing of the user's is read or written
if not shutil.which("nvidia-smi"):  # before anything imports Triton: its kernels run on the CPU, interpreted
    os.environ["TRITON_INTERPRET"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # run in the background, the tests' children would ignore it


gc.disable()  # while modules are imported, which leave little garbage


def pytest_collection_finish():
    """Exempt the objects of the imports from garbage collection, which would take a fifth of the tests' time"""
    gc.freeze()
    gc.enable()


GPU_MACHINE = shutil.which("nvidia-smi") is not None


@pytest.fixture(autouse=GPU_MACHINE)
def automatically_on_the_cpu(monkeypatch):
    """On a GPU machine, too, a test that asks for no device means the CPU, where its expectations were made"""
    from turbo_nb.machine import probe

    device_of = probe.device_of
    monkeypatch.setattr(probe, "device_of", lambda device: device_of("cpu" if device == "auto" else device))


@pytest.fixture(scope="session")
def nano():
    """The embedded model, loaded once."""
    import turbo_nb

    return turbo_nb.load_pipeline("nano", device="cpu")


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Forks of one process that has imported what a clip needs, see `forks`"""
    with forks(tmp_path_factory.mktemp("forks")) as made:
        yield made
