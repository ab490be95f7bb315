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
from helpers import OnGpu, set_machine

import turbo_nb
from turbo_nb import rope
from turbo_nb.errors import TurboNbWarning
from turbo_nb.machine import probe
from turbo_nb.machine.probe import Library, Machine

COS, SIN = torch.zeros(4, 4), torch.ones(4, 4)
X = torch.arange(1.0, 65.0).view(1, 4, 2, 8).to(torch.bfloat16)
TURNED = rope.apply_rotary_emb_torch(X, COS, SIN)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes this a machine with a GPU and flash_attn, working or with an error"""

    def make(error=None):
        libraries = {"triton": Library(version="3.6"), "flash_attn": Library(version="2.8.3", error=error)}
        set_machine(monkeypatch, Machine(gpu="H100", arch=(9, 0), libraries=libraries))
        monkeypatch.setattr(probe, "installed", lambda name: True)

    monkeypatch.delenv("TURBO_NB_ROPE", raising=False)
    rope._warn_of_fallback.cache_clear()
    yield make
    rope._warn_of_fallback.cache_clear()


def turn(x=X):
    return rope.apply_rotary_emb(x.as_subclass(OnGpu), COS, SIN)


def turns_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.equal(turn(), TURNED)


def test_absent_it_is_not_missed(gpu, monkeypatch):
    monkeypatch.setattr(probe, "installed", lambda name: False)
    assert turns_without_a_warning()


def test_working_it_is_used(gpu, monkeypatch):
    gpu()
    rotary = SimpleNamespace(apply_rotary_emb=lambda x, cos, sin, interleaved, inplace: x)
    for name in ("flash_attn", "flash_attn.layers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.layers.rotary", rotary)
    assert torch.equal(turn(), X)
    assert torch.equal(turn(X.float()), TURNED.float())  # it takes 16 bits only


def test_broken_it_is_rejected_with_one_warning_that_gives_the_reason(gpu):
    gpu(error="import failed: undefined symbol: _ZN3c105Error")
    words = r"plain PyTorch: flash_attn 2.8.3 found but .*undefined symbol"
    with pytest.warns(TurboNbWarning, match=words) as caught:
        assert torch.equal(turn(), TURNED) and torch.equal(turn(), TURNED)
    assert len(caught) == 1


def test_a_module_that_only_looks_like_it_is_not_it(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert turns_without_a_warning()


def test_rejected_on_request_it_gives_no_warning(gpu, monkeypatch):
    gpu(error="broken")
    monkeypatch.setenv("TURBO_NB_ROPE", "reference")
    assert turns_without_a_warning()


def test_on_a_cpu_nothing_of_it_is_asked(gpu):
    gpu(error="broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(rope.apply_rotary_emb(X, COS, SIN), TURNED)


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
        from turbo_nb.machine import probe
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
