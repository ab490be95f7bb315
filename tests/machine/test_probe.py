"""A GPU that torch cannot use is named, with the reason and the fix, before anything is downloaded for a CPU."""

import os
import shutil

import pytest
import torch

from turbo_nb import errors
from turbo_nb.errors import InputError
from turbo_nb.files import resolve
from turbo_nb.machine import probe
from turbo_nb.settings import LoadOptions

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU here answers for itself")
OLD = "The NVIDIA driver on your system is too old (found version 11040)."
UNUSED = [
    ("a CPU build", None, None, "", "is built without CUDA", "install a torch that is built for this GPU"),
    ("an old driver", "13.0", None, OLD, "driver on your system is too old", "update the driver (it is 470.57)"),
    ("hidden by nothing", "13.0", "", "", "CUDA_VISIBLE_DEVICES is '', which hides it", "unset CUDA_VISIBLE_DEVICES"),
    ("hidden by -1", "13.0", "-1", "", "CUDA_VISIBLE_DEVICES is '-1'", "unset CUDA_VISIBLE_DEVICES"),
    ("an index too far", "13.0", "7", "No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES is '7'", "unset CUDA_VIS"),
]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """gpu(torch's CUDA, CUDA_VISIBLE_DEVICES, what CUDA raises): a machine with a GPU that torch cannot use"""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA L4, 470.57'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(cuda, visible, error):
        def init():
            raise RuntimeError(f"{error}\nmore")

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.delenv(probe.HIDES, raising=False)
        if visible is not None:
            monkeypatch.setenv(probe.HIDES, visible)
        probe._probe_once.cache_clear()

    yield make
    probe._probe_once.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "visible", "error", "words", "fix"), [c[1:] for c in UNUSED], ids=[c[0] for c in UNUSED]
)
def test_a_gpu_that_is_not_used_warns_before_a_download(gpu, monkeypatch, tmp_path, cuda, visible, error, words, fix):
    gpu(cuda, visible, error)
    with errors.collect_warnings() as said:
        resolved = resolve.resolve(LoadOptions(model="TurboWan2.1-T2V-1.3B-480P"))
    assert resolved.device == "cpu"
    (warned,) = [one for one in said if "NVIDIA L4" in one]
    assert words in warned and fix in warned and "runs on the CPU" in warned
    with errors.collect_warnings() as said:
        probe.device_of("cpu")
    assert not said  # the CPU was asked for
    with pytest.raises(InputError, match="torch sees no GPU here") as caught:
        probe.device_of("cuda")
    assert words in str(caught.value) and fix in str(caught.value)


def test_a_machine_without_a_gpu_does_not_warn(gpu, tmp_path):
    gpu(None, None, "")
    (tmp_path / "nvidia-smi").unlink()
    with errors.collect_warnings() as said:
        assert probe.device_of("auto") == "cpu"
    assert not said
