"""The choice of backends: a table of machines that nobody has all of, and the probes against real failures."""

import gc
import inspect
import os
import re
import subprocess
import sys
import textwrap
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import OnGpu, set_machine

from turbo_nb import backends
from turbo_nb.backends import Choice, choose, detect
from turbo_nb.errors import BackendError, InputError
from turbo_nb.machine import probe
from turbo_nb.machine.probe import Gpu, Library, Machine
from turbo_nb.ops import registry
from turbo_nb.sla import SparseLinearAttention

CARDS = {
    "none": None, "T4": (7, 5), "RTX 3090": (8, 6), "A100": (8, 0), "L40S": (8, 9), "RTX 4090": (8, 9), "H100": (9, 0),
    "RTX 5090": (12, 0), "B200": (10, 0),
}  # fmt: skip
SYMBOL = "import failed: undefined symbol: _ZN3c105ErrorC2E"
NO_COMPILER = "its trial kernel failed: RuntimeError: Failed to find C compiler."
WORKS = Library(version="2.8.3")


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    for variable in backends.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


TRITON = Library(version="3.6.0")


def machine(card, flash_attn=None, spas_sage_attn=None, triton=TRITON):
    """flash_attn, spas_sage_attn, triton: a Library, None for not installed"""
    named = {"flash_attn": flash_attn, "spas_sage_attn": spas_sage_attn, "triton": triton}
    libraries = {name: library for name, library in named.items() if library}
    if CARDS[card] is None:
        return Machine(libraries=libraries)
    return Machine(gpu=card, gpu_count=1, arch=CARDS[card], libraries=libraries)


@pytest.mark.parametrize("card", CARDS)
def test_every_machine_gets_a_choice_and_reasons(card):
    broken = Library(version="2.8.3", error=SYMBOL)
    for flash, sparge, triton in product((None, WORKS, broken), (None, WORKS, broken), (None, TRITON, broken)):
        here = machine(card, flash, sparge, triton)
        fast_rope = card != "none" and flash is WORKS and triton is TRITON
        assert choose("rope", machine=here).chosen == ("flash_attn" if fast_rope else "reference")
        assert choose("original", machine=here) == Choice("original", "sdpa")
        kernels = card not in ("none", "T4") and triton is TRITON
        assert choose("block", machine=here).chosen == ("triton" if kernels else "reference")
        best = "gluon" if card == "H100" else "triton"
        sage = card in ("RTX 3090", "A100", "L40S", "RTX 4090", "H100", "B200") and sparge is WORKS
        assert choose("sagesla", machine=here).chosen == (best if kernels else "spargeattn" if sage else None)
        assert choose("linear", machine=here).chosen == (best if kernels else "reference")
        without = "reference" if card == "none" else "gathered"
        assert choose("sla", machine=here).chosen == (best if kernels else without)
        assert choose("tile_linear", machine=here).chosen == ("reference" if card == "none" else "dequantized")
        for operation in backends.SHOWN:
            assert all(reason for _, reason in choose(operation, machine=here).rejected)


@pytest.mark.parametrize(
    ("here", "operation", "reason"),
    [
        (machine("none", WORKS), "rope", "no CUDA GPU"),
        (machine("none"), "sagesla", "no CUDA GPU"),
        (machine("H100"), "rope", "flash_attn not installed"),
        (machine("H100", triton=None), "sagesla", "Triton not installed"),
        (machine("L40S", Library(version="2.8.3", error=SYMBOL)), "rope", f"flash_attn 2.8.3 found but {SYMBOL}"),
        (machine("A100", WORKS, triton=None), "rope", "Triton not installed"),
        (machine("A100", WORKS, triton=Library(version="3.5.0", error=NO_COMPILER)), "rope",
         f"Triton 3.5.0 found but {NO_COMPILER}"),
        (machine("A100", triton=Library(version="3.3.1")), "block",
         "the kernels need Triton 3.4 or newer, and this is 3.3.1"),
        (machine("T4"), "sla", "the kernels need sm_80 or newer, and this GPU is sm_75"),
        (machine("H100", triton=Library(version="3.10.0")), "sla", "tried with Triton up to 3.9, and this is 3.10.0"),
        (machine("RTX 5090"), "sla", "made for sm_90, and this GPU is sm_120"),
        (machine("H100", triton=Library(version="3.5.1")), "sla",
         "the kernels need Triton 3.6 or newer, and this is 3.5.1"),
        (Machine(gpu="H100", cuda_error="torch 2.9.0+cpu is built without CUDA"), "rope",
         "torch cannot use the H100: torch 2.9.0+cpu is built without CUDA"),
    ],
)  # fmt: skip
def test_reasons_in_words(here, operation, reason):
    assert choose(operation, machine=here).rejected[0][1] == reason


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (machine("T4", spas_sage_attn=WORKS), "SpargeAttn is made for sm_80 to sm_100, and this GPU is sm_75"),
        (machine("RTX 5090", spas_sage_attn=WORKS, triton=None),
         "SpargeAttn is made for sm_80 to sm_100, and this GPU is sm_120"),
        (machine("A100", triton=None), "SpargeAttn not installed"),
        (machine("A100", spas_sage_attn=Library(error=SYMBOL), triton=None), f"SpargeAttn found but {SYMBOL}"),
    ],
)  # fmt: skip
def test_sagesla_where_nothing_runs_it_says_what_to_do(here, reason):
    choice = choose("sagesla", machine=here)
    assert [name for name, _ in choice.rejected] == ["gluon", "triton", "spargeattn", "reference"]
    assert choice.rejected[2][1] == reason
    with pytest.raises(BackendError, match=rf"triton: .*{reason}.*--attention_type sla.*build SpargeAttn"):
        choice.require()
    assert choose("sla", machine=here).require() == "gathered"


def test_spargeattn_is_taken_where_it_is_asked_for_or_triton_does_not_work():
    here = machine("H100", spas_sage_attn=WORKS)
    assert choose("sagesla", machine=here) == Choice("sagesla", "gluon")
    assert choose("sagesla", override="spargeattn", machine=here).chosen == "spargeattn"
    here = machine("H100", spas_sage_attn=WORKS, triton=Library(version="3.5.0", error=NO_COMPILER))
    reason = f"Triton 3.5.0 found but {NO_COMPILER}"
    assert choose("sagesla", machine=here).rejected == (("gluon", reason), ("triton", reason))
    assert choose("sagesla", machine=here).chosen == "spargeattn"


def test_an_override_by_argument_or_variable(monkeypatch):
    here = machine("H100", WORKS, WORKS)
    assert choose("rope", override="reference", machine=here) == Choice(
        "rope", "reference", (("flash_attn", "rope backend 'reference' was asked for"),)
    )
    monkeypatch.setenv("TURBO_NB_ROPE", "reference")
    assert choose("rope", machine=here).rejected == (("flash_attn", "TURBO_NB_ROPE=reference was asked for"),)
    assert choose("rope", override="flash_attn", machine=here).chosen == "flash_attn"  # the argument is nearer
    assert choose("rope", override="auto", machine=here).chosen == "flash_attn"
    monkeypatch.setenv("TURBO_NB_ROPE", "")
    assert choose("rope", machine=here).chosen == "flash_attn"


def test_an_attention_override_is_for_the_kinds_that_know_it(monkeypatch):
    monkeypatch.setenv("TURBO_NB_ATTENTION", "reference")
    here = machine("H100", spas_sage_attn=WORKS)
    assert [choose(kind, machine=here).chosen for kind in ("sla", "sagesla", "original")] == [
        "reference",
        "reference",
        "sdpa",
    ]
    monkeypatch.setenv("TURBO_NB_ATTENTION", "spargeattn")
    assert [choose(kind, machine=here).chosen for kind in ("sla", "sagesla", "original")] == [
        "gluon",
        "spargeattn",
        "sdpa",
    ]
    monkeypatch.setenv("TURBO_NB_ATTENTION", "triton")
    assert choose("sla", machine=here).chosen == "triton"


@pytest.mark.parametrize(
    ("operation", "override", "words"),
    [
        ("rope", "flash_attn", r"rope backend 'flash_attn' cannot run here: no CUDA GPU"),
        ("rope", "triton3", r"rope backend 'triton3' is unknown; give one of auto, flash_attn, reference"),
        ("sagesla", "spargeattn", r"no CUDA GPU"),
        ("linear", "int4", r"give one of auto, gluon, triton, reference"),
        ("sla", "int4", r"give one of auto, gluon, triton, gathered, reference, spargeattn, sdpa"),
    ],
)
def test_an_impossible_override_says_why(operation, override, words, monkeypatch):
    with pytest.raises(BackendError, match=words):
        choose(operation, override=override, machine=Machine())
    variable = backends.VARIABLES[operation]
    monkeypatch.setenv(variable, override)
    with pytest.raises(BackendError, match=f"{variable}={override}"):
        choose(operation, machine=Machine())


def test_an_unknown_operation():
    with pytest.raises(InputError, match="rope, sla, sagesla, original, linear"):
        choose("attention", machine=Machine())


TWO_CARDS = Machine(
    gpu="H100", gpu_count=2, arch=(9, 0), libraries={"triton": TRITON, "spas_sage_attn": WORKS},
    gpus=(Gpu("H100", (9, 0), 80), Gpu("RTX 3090", (8, 6), 24)),
)  # fmt: skip


def test_every_gpu_gets_its_own_choice(monkeypatch):
    set_machine(monkeypatch, TWO_CARDS)
    for device in (None, 0, "cuda:0", torch.device("cuda:0")):
        assert choose("sla", device).chosen == "gluon"
    for device in (1, "cuda:1", torch.device("cuda:1")):
        assert choose("sla", device) == Choice("sla", "triton", (("gluon", "made for sm_90, and this GPU is sm_86"),))
    assert choose("sla", "cpu").chosen == choose("sla", -1).chosen == "reference"
    second = TWO_CARDS.on("cuda:1")
    assert (second.gpu, second.arch, second.total_memory) == ("RTX 3090", (8, 6), 24)
    assert TWO_CARDS.on("cpu").arch is None


def test_a_tensor_gets_the_kernel_of_its_own_gpu(monkeypatch):
    set_machine(monkeypatch, TWO_CARDS)
    monkeypatch.setattr(registry.Implementation, "load", lambda row: row.name)

    def on(index, *shape, dtype=torch.bfloat16):
        x = torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)
        x.index = index
        return x

    assert [backends.kernel("sla", on(i, 1, 200, 2, 128)) for i in (0, 1)] == ["gluon", "triton"]
    assert [backends.function("linear", on(i, 1, 200)) for i in (0, 1)] == ["gluon", "triton"]
    assert backends.kernel("sla", on(1, 1, 200, 2, 96)) is None  # no kernel has this head_dim
    assert backends.kernel("sla", on(1, 1, 200, 2, 128, dtype=torch.float32)) is None
    assert backends.function("sla", on(1, 1, 200, 2, 128, dtype=torch.float32)) == "reference"
    assert backends.kernel("sagesla", on(1, 1, 200, 2, 128), override="spargeattn") == "spargeattn"
    assert backends.kernel("sagesla", on(1, 1, 100, 2, 128), override="spargeattn") is None  # too short
    assert backends.kernel("sla", torch.zeros(1, 200, 2, 128, dtype=torch.bfloat16)) is None
    monkeypatch.setenv("TURBO_NB_ATTENTION", "reference")
    assert backends.kernel("sla", on(0, 1, 200, 2, 128)) is None


def test_asking_again_is_one_look_up(monkeypatch):
    set_machine(monkeypatch, TWO_CARDS)
    choose("sla", 1)
    monkeypatch.setattr(backends, "_choose", None)
    assert choose("sla", 1).chosen == "triton"


def test_a_new_kernel_is_one_file_and_one_row(monkeypatch, tmp_path):
    """The steps of CONTRIBUTING.md, with its row"""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("How to add an attention kernel for sm_120") :]
    code = textwrap.dedent(re.search(r"```python\n( *def no_blackwell.*?)```", section, re.DOTALL)[1])
    (tmp_path / "blackwell_sla.py").write_text(
        "from turbo_nb.ops.attention.reference import sparse_linear_attention as reference\n\n\n"
        "def sparse_linear_attention(q, k, v, weight, bias, topk, block_q, block_k, sums=(None, None)):\n"
        "    return reference(q, k, v, weight, bias, topk, block_q, block_k, sums) + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = dict(vars(registry))
    exec(code.replace("turbo_nb.ops.attention.", ""), names)
    row = names["BLACKWELL"]
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", [row, *registry.IMPLEMENTATIONS])
    assert choose("sla", machine=machine("RTX 5090")).chosen == row.name
    assert choose("sla", machine=machine("H100")).rejected[0] == (row.name, "made for sm_120, and this GPU is sm_90")
    set_machine(monkeypatch, machine("RTX 5090"))
    q = torch.randn(1, 200, 2, 128).bfloat16().as_subclass(OnGpu)
    module = SparseLinearAttention(128, 0.5).bfloat16()
    slow = module(*[q.as_subclass(torch.Tensor)] * 3)
    assert torch.equal(module(q, q, q), slow + 1)
    monkeypatch.setenv("TURBO_NB_ATTENTION", "triton")
    assert choose("sla").rejected[0] == (row.name, "TURBO_NB_ATTENTION=triton was asked for")


def test_every_row_names_a_function_with_the_signature_of_the_reference():
    pytest.importorskip("triton")
    for row in registry.IMPLEMENTATIONS:
        if row.name in ("flash_attn", "sdpa"):
            continue
        reference = registry.implementations(row.operation)[-1]
        ours, theirs = (list(inspect.signature(r.load()).parameters) for r in (row, reference))
        assert row.writes_parts == ("to" in ours)
        ours = [name for name in ours if name != "to"]
        assert ours == [name for name in theirs if name in ours] and reference.is_reference
        assert set(theirs) - set(ours) <= {"attend"}, row


def test_detect_is_the_machine_with_its_choices(monkeypatch):
    here = machine("H100", WORKS, WORKS)
    monkeypatch.setattr(probe, "probe", lambda: here)
    found = detect(attention="reference")
    assert (found.gpu, found.arch, found.libraries) == ("H100", (9, 0), here.libraries)
    assert found.rope.chosen == "flash_attn" and found.attention is found.sla
    assert (found.sagesla.chosen, found.linear.operation) == ("reference", "linear")
    with pytest.raises(FrozenInstanceError):
        found.rope = None
    with pytest.raises(BackendError, match="'none' is unknown"):
        detect(linear="none")
    refused = {}
    assert detect(linear="none", refused=refused).linear.chosen is None
    assert list(refused) == ["linear"] and "'none' is unknown" in str(refused["linear"])


def test_detect_here():
    found = detect()
    assert found.torch and found.rope.chosen in ("flash_attn", "reference")
    assert (found.arch is None) == (found.free_memory is None)
    assert probe.this_machine() is probe.this_machine()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes an importable module of a new name"""

    def make(name, code):
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        path = tmp_path / name / "layers"
        path.mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(code)
        (path / "__init__.py").write_text("")
        (path / "rotary.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    for module in [m for m in sys.modules if m.split(".")[0] in ("flash_attn", "spas_sage_attn")]:
        del sys.modules[module]


def test_an_import_that_fails_is_a_result(package):
    package("flash_attn", "raise OSError('libfoo.so: undefined symbol: bar\\nand more')")
    found = probe._probe_library("flash_attn", usable=True)
    assert found.error == "import failed: libfoo.so: undefined symbol: bar"


def test_without_a_gpu_nothing_is_imported(package):
    package("spas_sage_attn", "raise SystemExit('imported')")
    assert probe._probe_library("spas_sage_attn", usable=False).error == "not imported: no CUDA GPU"
    package("flash_attn", "")
    assert probe._probe_library("flash_attn", usable=True) == Library()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("pass", None),
        ("import os; os.kill(os.getpid(), 11)", "its trial kernel crashed (SIGSEGV)"),
        ("raise RuntimeError('Failed to find C compiler.')",
         "its trial kernel failed: RuntimeError: Failed to find C compiler."),
        ("import sys; print('main.c:3:10: fatal error: Python.h: No such file or directory', file=sys.stderr); 1/0",
         "its trial kernel failed: main.c:3:10: fatal error: Python.h: No such file or directory"),
        ("raise SystemExit(3)", "its trial kernel failed: exit code 3"),
        ("import os; assert os.listdir(os.environ['TRITON_CACHE_DIR']) == ['stderr']", None),  # a fresh cache
    ],
)  # fmt: skip
def test_the_trial_kernel_fails_in_its_own_process(tmp_path, code, words):
    (tmp_path / "script.py").write_text(code)
    assert probe._probe_triton(tmp_path / "script.py") == words


def test_the_trial_kernel_adds_one():
    pytest.importorskip("triton")
    code = (
        "import torch; from turbo_nb.machine.triton_trial import add_one\n"
        "x = torch.arange(63.); out = torch.full_like(x, torch.nan)\n"
        "add_one[(1,)](x, out, 63, BLOCK=64); assert torch.equal(out, x + 1)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_the_trial_kernel_without_a_gpu_fails_in_words():
    assert re.match(r"its trial kernel failed: \w+(Error|Exception): .*(CUDA|NVIDIA)", probe._probe_triton())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_trial_kernel_on_a_gpu(monkeypatch, tmp_path):
    assert probe._probe_triton() is None
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "none" in probe._probe_triton()


def test_a_trial_kernel_that_hangs_is_ended_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    (tmp_path / "script.py").write_text(
        "import subprocess, time\n"
        f"open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "time.sleep(60)\n"
    )
    assert probe._probe_triton(tmp_path / "script.py", 4) == "its trial kernel gave no answer in 4 s"
    for _ in range(100):  # a killed process may be seen for a moment on a busy machine
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True).stdout
        if state.strip() in ("", "Z"):
            break
        time.sleep(0.1)
    assert state.strip() in ("", "Z")


def test_nvidia_smi_as_it_answers(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'NVIDIA H100 80GB HBM3, 580.65.06\\nNVIDIA H100 80GB HBM3, 580.65.06\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert probe._nvidia_smi() == ("NVIDIA H100 80GB HBM3", "580.65.06")
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert probe._nvidia_smi() == (None, None)


@pytest.mark.parametrize(
    ("cuda", "available", "words"),
    [
        (None, False, "is built without CUDA"),
        ("12.8", True, "no kernel image is available"),
        ("12.8", False, "no kernel image is available"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told(tmp_path, monkeypatch, cuda, available, words):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA L4, 550.54'\n")
    smi.chmod(0o755)

    def no(*args, **more):
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "init", no)
    monkeypatch.setattr(torch, "zeros", no)
    _, told = choose("rope", machine=probe.this_machine.__wrapped__()).rejected[0]
    assert told.startswith("torch cannot use the NVIDIA L4: ") and words in told and "\n" not in told


@pytest.mark.parametrize("gpu", [True, False])
def test_memory_is_released_on_a_gpu(monkeypatch, gpu):
    released = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("GPU"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: released.append("pinned"), raising=False)
    probe.release_memory()
    assert released == (["GPU", "pinned"] if gpu else [])


def test_memory_of_modules_that_refer_to_each_other_is_released():
    """A pipeline and its hooks do, and its memory stayed until Python happened to look for such circles."""

    class Module:
        pass

    module = Module()
    module.hook = [module]
    left = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert left() is not None
        probe.release_memory()
        assert left() is None
    finally:
        gc.enable()


def test_two_threads_can_load_an_implementation_at_once(tmp_path, monkeypatch):
    (tmp_path / "slow_kernel.py").write_text("import time\ntime.sleep(0.2)\ndef run(): return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = registry.Implementation("rope", "slow", lambda *_: None, "slow_kernel:run")
    with ThreadPoolExecutor(4) as pool:
        assert [load() for load in pool.map(lambda _: row.load(), range(4))] == [7] * 4
    del sys.modules["slow_kernel"]
