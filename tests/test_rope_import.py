"""flash_attn absent, working or broken: RoPE always runs, and says once why it runs without."""

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import turbo_nb
from turbo_nb import rope
from turbo_nb.machine import probe
from turbo_nb.machine.probe import Library, Machine


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes this a machine with a GPU and flash_attn, working or with an error"""

    def make(error=None):
        libraries = {"triton": Library(version="3.6"), "flash_attn": Library(version="2.8.3", error=error)}
        here = Machine(gpu="H100", arch=(9, 0), libraries=libraries)
        monkeypatch.setattr(probe, "_probe_once", lambda: here)
        monkeypatch.setattr(probe, "installed", lambda name: True)

    monkeypatch.delenv("TURBO_NB_ROPE", raising=False)
    rope._flash_attn.cache_clear()
    yield make
    rope._flash_attn.cache_clear()


def test_absent_it_is_not_missed(gpu, monkeypatch):
    monkeypatch.setattr(probe, "installed", lambda name: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rope._flash_attn() is None


def test_working_it_is_used(gpu, monkeypatch):
    gpu()
    rotary = SimpleNamespace(apply_rotary_emb=lambda x, cos, sin, interleaved, inplace: x)
    for name in ("flash_attn", "flash_attn.layers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.layers.rotary", rotary)
    assert rope._flash_attn() is rotary.apply_rotary_emb


def test_broken_it_is_passed_over_with_one_warning_that_says_why(gpu):
    gpu(error="import failed: undefined symbol: _ZN3c105Error")
    with pytest.warns(UserWarning, match=r"plain PyTorch: flash_attn 2.8.3 found but .*undefined symbol") as caught:
        assert rope._flash_attn() is None
        assert rope._flash_attn() is None
    assert len(caught) == 1


def test_a_module_that_only_looks_like_it_is_not_it(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert rope._flash_attn() is None


def test_passed_over_on_request_it_is_not_spoken_of(gpu, monkeypatch):
    gpu()
    monkeypatch.setenv("TURBO_NB_ROPE", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rope._flash_attn() is None


def test_on_a_cpu_nothing_of_it_is_asked(gpu):
    gpu(error="broken")
    x = torch.randn(1, 4, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(rope.apply_rotary_emb(x, torch.ones(4, 4), torch.zeros(4, 4)), x)


@pytest.mark.parametrize(
    "body", ["raise ImportError('libcudart.so.11')", "raise RuntimeError('boom')", "import nothing"]
)
def test_a_broken_flash_attn_never_breaks_the_import(tmp_path, body):
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    code = """
        import torch, turbo_nb
        from turbo_nb import backends, rope, sla
        x = torch.randn(1, 4, 2, 8)
        rope.apply_rotary_emb(x, torch.ones(4, 4), torch.zeros(4, 4))
        print(probe._probe_library("flash_attn", usable=True).error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(turbo_nb.__file__).parents[1]}"},
        cwd=tmp_path.parent,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("import failed: ")
