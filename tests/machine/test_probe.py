"""A GPU that torch cannot use is named, with the reason and the fix, before anything is downloaded for a CPU."""

import os
import shutil
import threading

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
        probe.this_machine.cache_clear()

    yield make
    probe.this_machine.cache_clear()


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


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Count the trials of Triton on a machine with a GPU, which give `answers` in turn"""
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_probe_triton", lambda: (ran.append(1), answers.pop(0) if answers else None)[1])
    ran, answers = [], []
    return ran, answers


def facts(**changed):
    gpus = (probe.Gpu("NVIDIA H100", (9, 0)),)
    return {"gpus": gpus, "driver": "580", "torch": "2.11", "cuda": "13.0", "compiler": "sh"} | changed


def test_triton_is_tried_once_for_a_machine(trials):
    for _ in range(3):
        assert probe._try_triton(facts(), "3.6.0") is None
    assert len(trials[0]) == 1


@pytest.mark.parametrize(
    "changed",
    [{"driver": "581"}, {"torch": "2.12"}, {"cuda": "12.8"}, {"compiler": None}, {"compiler": "/bin/ls"},
     {"gpus": (probe.Gpu("NVIDIA L4", (8, 9)),)}, "3.7.0", {"CC": "clang"}, {"TRITON_PTXAS_PATH": "/x"}],
    ids=str,
)  # fmt: skip
def test_another_machine_is_tried_again(trials, changed, monkeypatch):
    probe._try_triton(facts(), "3.6.0")
    version = changed if isinstance(changed, str) else "3.6.0"
    changed = changed if isinstance(changed, dict) else {}
    for name in [name for name in changed if name.isupper()]:
        monkeypatch.setenv(name, changed.pop(name))
    probe._try_triton(facts(**changed), version)
    assert len(trials[0]) == 2


def test_an_unknown_driver_is_tried_every_time(trials):
    for _ in range(2):
        assert probe._try_triton(facts(driver=None), "3.6.0") is None
    assert len(trials[0]) == 2


def test_a_failure_is_not_kept(trials):
    trials[1].append("its trial kernel failed: no compiler")
    assert probe._try_triton(facts(), "3.6.0") == "its trial kernel failed: no compiler"
    assert probe._try_triton(facts(), "3.6.0") is None and len(trials[0]) == 2


def test_a_damaged_answer_is_tried_again(trials, tmp_path):
    probe._try_triton(facts(), "3.6.0")
    (file,) = (tmp_path / "cache" / "facts").iterdir()
    file.write_text(file.read_text().replace('"works"', '"fails"'))
    assert probe._try_triton(facts(), "3.6.0") is None and len(trials[0]) == 2


def test_threads_probe_once(monkeypatch):
    calls, gate = [], threading.Event()

    def slow():
        calls.append(gate.wait(5))
        return probe.Machine()

    found = probe._once(slow)
    threads = [threading.Thread(target=found) for _ in range(3)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert calls == [True] and found() is found()


@pytest.mark.parametrize("name", ["_accelerator_setAllocatorSettings", "of_an_older_torch"])
def test_the_allocator_joins_memory_unless_the_user_has_set_it(name, monkeypatch):
    asked = []
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings", raising=False)
    monkeypatch.setattr(torch._C, name, asked.append, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append)
    for variable in probe.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    probe.avoid_fragments()
    assert asked == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    probe.avoid_fragments()
    assert len(asked) == 1
