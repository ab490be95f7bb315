"""The stand-ins come when they are asked for, yield to what is installed, and leave nothing behind."""

import importlib
import multiprocessing.spawn
import pickle
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import choose_triton, set_machine

from turbo_nb import shims
from turbo_nb.errors import BackendError, CheckpointError, InputError, TurboNbWarning
from turbo_nb.machine.probe import Machine
from turbo_nb.shims.hooks import MODULES

PACKAGES = ("flash_attn", "turbo_diffusion_ops", "spas_sage_attn")


@pytest.fixture
def install(monkeypatch):
    """A function that installs the stand-ins without their warning, on a machine without a GPU"""
    set_machine(monkeypatch, Machine())

    def quietly():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return shims.install()

    yield quietly
    shims.uninstall()


def everything():
    """What install could change: modules, the hooks, and what torch's modules hold"""
    holders = torch, torch.cuda, torch.amp, torch.nn.Module, torch.Tensor, F, multiprocessing.spawn
    return dict(sys.modules), list(sys.meta_path), list(sys.path), [dict(vars(holder)) for holder in holders]


def test_nothing_is_supplied_before_it_is_asked_for():
    for name in MODULES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_python_and_torch_are_afterwards_what_they_were(checkout, install, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # a block, as tests of other projects set it
    importlib.import_module("turbo_nb.rope")
    install(), shims.uninstall()  # imports of our own
    before = everything()
    install()
    assert importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb
    for name in ("rcm.networks.wan2pt1", "rcm.utils.umt5", "ops", "SLA"):
        importlib.import_module(name)
    shims.uninstall()
    assert everything() == before
    shims.uninstall()  # a second time does nothing
    assert everything() == before


def test_one_warning_says_what_replaces_what():
    with pytest.warns(TurboNbWarning) as caught:
        assert shims.install() == dict.fromkeys(PACKAGES, "not installed")
        shims.install()
    shims.uninstall()
    assert len(caught) == 1 and caught[0].filename == __file__
    text = str(caught[0].message)
    assert all(f"{package} (not installed) by " in text for package in PACKAGES) and "PyTorch" in text


@pytest.mark.parametrize("kind", ["on disk", "in sys.modules"])
def test_an_installed_library_takes_precedence(kind, tmp_path, monkeypatch, install):
    if kind == "on disk":
        (tmp_path / "flash_attn" / "layers").mkdir(parents=True)
        (tmp_path / "flash_attn" / "__init__.py").touch()
        (tmp_path / "flash_attn" / "layers" / "rotary.py").write_text("apply_rotary_emb = 'installed'")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        for name in ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["flash_attn.layers.rotary"].apply_rotary_emb = "installed"
    replaced = install()
    try:
        from flash_attn.layers.rotary import apply_rotary_emb

        assert apply_rotary_emb == "installed" and "flash_attn" not in replaced
    finally:
        shims.uninstall()
        for name in [name for name in sys.modules if name.startswith("flash_attn")]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("body", "reason"),
    [("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"), ("import nothing_here", "nothing_here"),
     ("", "flash_attn.layers"), ("raise SystemExit('no GPU')", "no GPU")],
    ids=["symbol", "dependency", "other package", "exit"],
)  # fmt: skip
def test_a_broken_library_is_replaced_and_the_warning_says_why(body, reason, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(f"import json\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(TurboNbWarning, match=rf"flash_attn \(installed, but broken: .*{reason}"):
        shims.install()
    from flash_attn.layers.rotary import apply_rotary_emb

    assert apply_rotary_emb is MODULES["flash_attn.layers.rotary"]["apply_rotary_emb"]
    shims.uninstall()
    assert not [name for name in sys.modules if name.startswith("flash_attn")]


@pytest.mark.parametrize("within", [False, True])
def test_new_processes_have_the_stand_ins_and_the_cpu_for_cuda(within, install, monkeypatch):
    install()
    with shims.cuda_on_cpu() if within else nullcontext():
        data = multiprocessing.spawn.get_preparation_data("one")
        sent = pickle.dumps([value for name, value in data.items() if name.startswith("turbo_nb")])
    shims.uninstall()
    monkeypatch.setattr(shims.on_cpu, "_kept", kept := [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the parent has given it
        pickle.loads(sent)  # as a new process does before it imports the main module
    try:
        assert importlib.import_module("flash_attn").flash_attn_func
        assert len(kept) == within and str(Path(shims.__file__).parents[2]) in sys.path
        assert not within or torch.cuda.is_available() or torch.zeros(1, device="cuda").device.type == "cpu"
    finally:
        for one in kept:
            one.__exit__(None, None, None)
        shims.uninstall()
    assert not [name for name in multiprocessing.spawn.get_preparation_data("one") if name.startswith("turbo_nb")]


def test_a_stand_in_is_not_taken_for_the_library(install):
    from turbo_nb.machine import probe

    install()
    for _ in range(2):
        assert not probe.installed("flash_attn")  # the doctor and the choice of a backend ask
        module = importlib.import_module("flash_attn")
    # diffusers and transformers ask for a version, and call a module without a file a folder
    assert not hasattr(module, "__version__") and not hasattr(module, "__file__")


def test_installing_after_upstream_is_an_error(checkout, monkeypatch):
    monkeypatch.setitem(sys.modules, "rcm.utils.umt5", ModuleType("rcm.utils.umt5"))
    with pytest.raises(InputError, match=r"rcm\.utils\.umt5 is imported already.*Restart"):
        shims.install()
    assert not any(name in sys.modules for name in MODULES)


# --- Upstream's own modules ---


def test_importing_without_cuda_works_and_changes_torch_for_the_import_only(checkout, install):
    if torch.cuda.is_available():
        pytest.skip("a machine without CUDA")
    install()
    current_device = torch.cuda.current_device
    assert importlib.import_module("rcm.utils.umt5").encoder() == torch.device("cpu")
    assert torch.cuda.current_device is current_device


@pytest.mark.parametrize("triton", [False, True])
def test_the_norms_are_plain(checkout, install, monkeypatch, triton):
    if triton:
        choose_triton(monkeypatch)
    install()
    ops = importlib.import_module("ops")
    x, weight, bias = torch.randn(2, 5, 96) + 3, torch.rand(96), torch.rand(96)
    torch.testing.assert_close(ops.rmsnorm(x, weight, 1e-6), F.rms_norm(x, (96,), weight, 1e-6))
    torch.testing.assert_close(ops.layernorm(x, weight, bias, 1e-6), F.layer_norm(x, (96,), weight, bias, 1e-6))
    torch.testing.assert_close(ops.layernorm(x, None, None, 1e-6, False), F.layer_norm(x, (96,), eps=1e-6))


def test_with_triton_upstreams_own_kernels_run(checkout, install, monkeypatch):
    choose_triton(monkeypatch)
    install()
    core = importlib.import_module("SLA.core")
    for length, ratio, kept in (1, 0.1, 1), (300, 0.01, 1), (49 * 64, 0.001, 1), (3200, 0.1, 5):
        q = torch.zeros(1, 1, length, 8)
        assert core.get_block_map(q, q, topk_ratio=ratio, BLKQ=128, BLKK=64) == ("upstream's", kept)
    assert core.SageSparseLinearAttention(64, 0.1).topk == 0.1  # without SpargeAttn


@pytest.mark.parametrize("triton", [False, True])
def test_a_fork_may_be_without_parts_of_upstream(checkout, install, monkeypatch, triton):
    if triton:
        choose_triton(monkeypatch)
    for name in "SLA/core.py", "SLA/__init__.py", "rcm/networks/wan2pt1.py":
        (checkout / name).write_text("other = 1")
    install()
    for name in "SLA.core", "rcm.networks.wan2pt1":
        assert importlib.import_module(name).other == 1


def test_sagesla_without_a_gpu_names_spargeattn_and_the_flag(checkout, install):
    install()
    with pytest.raises(BackendError, match=r"--attention_type sla.*SpargeAttn"):
        importlib.import_module("SLA").SageSparseLinearAttention(64, 0.1)


def test_without_triton_sla_runs_and_can_be_trained(checkout, install):
    install()
    core = importlib.import_module("SLA.core")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 32, requires_grad=True) for _ in range(3))  # (B, H, L, D)
    block_map, lut, count = core.get_block_map(q, k, topk_ratio=0.01, BLKQ=128, BLKK=64)
    assert count == 1 and lut.shape == (1, 2, 3, 1)  # upstream keeps none, and gives NaN
    assert block_map.dtype == torch.int8 and torch.equal(block_map.argmax(-1, keepdim=True), lut)
    out = core._attention.apply(q, k, v, block_map, lut, count, 128, 64)
    mask = block_map.bool().repeat_interleave(128, 2)[:, :, :300].repeat_interleave(64, 3)[..., :300]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)
    half = core._attention.apply(q, k, v, block_map, lut, count, 128, 64, 0.5)
    torch.testing.assert_close(half, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5))


@pytest.fixture
def model(checkout, install):
    install()
    with torch.device("meta"):
        return importlib.import_module("rcm.networks.wan2pt1").WanModel()


STATE = {"q.weight": torch.ones(4, 4), "q.bias": torch.ones(4)}
PROJECTION = {"attn.local_attn.proj_l.weight": torch.ones(2, 2), "attn.local_attn.proj_l.bias": torch.ones(2)}


def test_surplus_tensors_are_counted_and_named(model):
    extra = {f"blocks.9.attn.local_attn.proj_l.{index}": torch.ones(1) for index in range(3)}
    with pytest.warns(TurboNbWarning) as caught:
        model.load_state_dict(STATE | PROJECTION | extra | {"ema.step": torch.ones(1)}, assign=True)
    assert [str(one.message).split(":")[0] for one in caught] == [
        "3 tensors of SLA projections are not used",
        "1 tensors that the model does not have are not used",
    ]
    assert "ema.step" in str(caught[1].message) and model.q.bias.sum() == 4


def test_missing_projections_are_zero_and_a_warning(model):
    with pytest.warns(TurboNbWarning, match=r"no SLA projections \(2 tensors\)"):
        model.load_state_dict(STATE, assign=True)
    assert not model.attn.local_attn.proj_l.weight.any() and not model.attn.local_attn.proj_l.weight.is_meta


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"q.weight": STATE["q.weight"]}, r"1 tensors of the model are missing: q\.bias\. .*Download"),
        ({"q.int8_weight": torch.ones(4, 4), "q.bias": STATE["q.bias"]}, "is quantised: add --quant_linear"),
        ({**STATE, "q.weight": torch.ones(5, 5)}, r"q\.weight \(5, 5\)\. Expected \(4, 4\)\. .*--model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_which_would(model, state, words):
    with pytest.raises(CheckpointError, match=words):
        model.load_state_dict(state | PROJECTION, assign=True)


def test_a_fitting_checkpoint_gives_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.load_state_dict(STATE | PROJECTION, assign=True)
        assert not result.missing_keys and not result.unexpected_keys
        model.load_state_dict({}, strict=False)  # whoever asks for it gets torch's own tolerance


def test_afterwards_torch_finds_the_module_of_cuda_again():
    with shims.cuda_on_cpu():
        torch.get_device_module("cuda")
    assert torch.get_device_module("cuda") is torch.cuda
