"""`turbo-nb run` runs a script as Python does, and CUDA is the CPU for it where torch has no CUDA."""

import builtins
import io
import multiprocessing.spawn
import shutil
import sys
import warnings
from contextlib import redirect_stdout

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from turbo_nb import cli, shims, terminal
from turbo_nb.errors import InputError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a script's text through the command line: (exit code, standard output, standard error)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["bin", *sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(text, *arguments, name="script.py", call=("script.py",)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        out, err, code = io.StringIO(), io.StringIO(), 0
        monkeypatch.setattr(sys, "__stdout__", out)
        monkeypatch.setattr(sys, "__stderr__", err)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "argv", ["turbo-nb", "run", *call, *arguments])
        try:
            with warnings.catch_warnings():
                cli.main()
        except SystemExit as end:
            code = end.code
        return code, out.getvalue(), err.getvalue()

    yield run
    shims.uninstall()


SHOW = """
import sys, warnings
if __name__ == "__main__":
    from flash_attn.layers.rotary import apply_rotary_emb
    print(sys.argv, sys.path[0], sys.modules["__main__"].__file__)
    warnings.warn("a script's own warning")
"""


def test_a_script_sees_what_python_shows_it(run, tmp_path, monkeypatch):
    own = []
    monkeypatch.setattr(terminal, "PYTHONS_WARNING", lambda message, *more: own.append(str(message)))
    arguments = "--save_path", "a_b.mp4", "--help", "-m", "--num_steps=4", "--", "-x"
    code, out, err = run(SHOW, *arguments, name="deep/script.py", call=("deep/script.py",))
    assert (code, out) == (0, f"{['deep/script.py', *arguments]} {tmp_path / 'deep'} deep/script.py\n")
    assert err.startswith("note: upstream's code runs with stand-ins: ")
    assert own == ["a script's own warning"]


def test_a_module_is_run_as_with_python_m(run, tmp_path):
    (tmp_path / "package").mkdir()
    code, out, _ = run(SHOW, "--mode", "t2v", name="package/__main__.py", call=("-m", "package"))
    path = str(tmp_path / "package" / "__main__.py")
    assert (code, out) == (0, f"{[path, '--mode', 't2v']} {tmp_path} {path}\n")


def test_upstreams_folder_is_found_from_its_scripts(run, checkout, monkeypatch):
    sys.path.remove(str(checkout))
    text = "import sys, ops.core; from rcm.utils.umt5 import encoder; print(sys.path[-1])"
    for name, call in {"inference/t2v.py": (), "serve/__main__.py": ("-m", "turbodiffusion.serve")}.items():
        name = f"turbodiffusion/{name}"
        code, out, err = run(text, name=name, call=call or (name,))
        assert (code, out) == (0, f"{checkout}\n"), err
        shims.uninstall()
        sys.path.remove(str(checkout))


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("exit('no prompt')", "no prompt", ""),
        ("raise KeyboardInterrupt", 130, "cancelled; finished files are kept\n"),
        ("import turbo_nb.errors as e; raise e.InputError('a typed error')", 2, "error: a typed error\n"),
    ],
    ids=["code", "message", "Ctrl-C", "typed error"],
)
def test_exit_codes_are_the_scripts(run, text, code, words):
    given, out, err = run(text)
    assert given == code and out == "" and err.endswith(words) and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "call", "shown"),
    [
        ("def f(): 1 / 0\nf()", (), ["line 2, in <module>", "line 1, in f", "ZeroDivisionError: "]),
        ("f(:", (), ["line 1\n", "SyntaxError: "]),
        ("import nothing_here", ("-m", "script"), ["line 1, in <module>", "ModuleNotFoundError: "]),
        ("import runpy\nrunpy.run_path('script.py', run_name='x' * (__name__ == '__main__') or 1 / 0)", (),
         ["line 2, in <module>", "run_path", "ZeroDivisionError: "]),
    ],
    ids=["exception", "syntax", "module of a module", "script of a script"],
)  # fmt: skip
def test_an_exception_shows_the_lines_of_the_script_only(run, text, call, shown):
    with pytest.raises((ZeroDivisionError, SyntaxError, ImportError)) as caught:
        run(text, call=call or ("script.py",))
    sys.excepthook(caught.type, caught.value, caught.tb)
    err = sys.stderr.getvalue()
    assert "turbo_nb/" not in err and "typer" not in err
    places = [err.index(words) for words in shown]
    assert places == sorted(places)


def test_no_folder_is_added_where_python_adds_none(run, monkeypatch):
    flags = {"safe_path": True, "__getattr__": lambda self, name, real=sys.flags: getattr(real, name)}
    monkeypatch.setattr(sys, "flags", type("Flags", (), flags)())  # PYTHONSAFEPATH=1
    assert run("import sys; print(sys.path[0])")[1] == "bin\n"


def test_an_unsupported_call_shows_its_line(run):
    text = "import torch, flash_attn\nx = torch.zeros(1, 2, 1, 8)\n\nflash_attn.flash_attn_func(x, x, x, 0.1)"
    code, _, err = run(text)
    assert code == 2 and "error: flash_attn.flash_attn_func: dropout_p is 0.1" in err
    assert err.endswith("\nscript.py:4 calls it: flash_attn.flash_attn_func(x, x, x, 0.1)\n")


NO_SCRIPT = {
    "no.py": "which does not exist",
    "a" * 5000: "which does not exist",
    "no\0.py": "which does not exist",
    "folder": "a folder without __main__.py",
    "/dev/zero": "which is not a file",
    "/proc/self/mem": "which cannot be read (Input/output error)",
}


@pytest.mark.parametrize("target", NO_SCRIPT, ids=lambda target: ascii(target)[1:12])
def test_what_cannot_be_a_script_is_an_error(run, tmp_path, target):
    (tmp_path / "folder").mkdir()
    code, _, err = run("", call=(target,))
    assert code == 2 and err.startswith(f"error: SCRIPT is {target[:4]!r}"[:-3])
    assert err.endswith(f", {NO_SCRIPT[target]}. Expected the path of a Python script. Check the path.\n")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nothing_here", "No module named nothing_here"),
        ("nothing.here", "ModuleNotFoundError: No module named 'nothing'"),
        ("folder", "'folder' is a package and cannot be directly executed"),
        ("", "ValueError: "),
    ],
)
def test_what_cannot_be_a_module_is_an_error(run, tmp_path, target, reason):
    (tmp_path / "folder").mkdir()
    code, _, err = run("", call=("-m", target))
    assert code == 2 and f"error: SCRIPT is {target!r}, which Python cannot run as a module (" in err
    assert reason in err and err.endswith(
        "). Expected a name as after python -m. Check the name, and the folder in which turbo-nb runs.\n"
    )


def test_folders_and_archives_are_scripts(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text("print('ran')")
    shutil.make_archive("packed", "zip", "folder")
    assert [run("", call=(target,))[1] for target in ("folder", "packed.zip")] == ["ran\n"] * 2


def test_a_script_may_leave_an_executor_open(run):
    text = """
from concurrent.futures import ThreadPoolExecutor
executor = ThreadPoolExecutor(1)
executor.submit(print, "done").result()
def shutdown(): executor.shutdown()
import builtins; builtins.shutdown_of_the_test = shutdown
"""
    try:
        assert run(text)[:2] == (0, "done\n")  # Python ends the workers, and waits for other threads, when it exits
    finally:
        vars(builtins).pop("shutdown_of_the_test")()


def test_in_python_a_script_leaves_argv_and_path_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["first", *sys.path])  # a kernel has no folder of a script there
    before = list(sys.argv), list(sys.path)
    (tmp_path / "script.py").write_text("import sys\nprint(sys.argv, sys.path[:2])\nsys.path.append('x')\n1 / 0")
    out = io.StringIO()
    try:
        with redirect_stdout(out), warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
            warnings.simplefilter("ignore")
            shims.run(str(tmp_path / "script.py"), ["--a"])
    finally:
        shims.uninstall()
    assert out.getvalue() == f"{[str(tmp_path / 'script.py'), '--a']} {[str(tmp_path), 'first']}\n"
    assert (sys.argv, sys.path) == before


# --- CUDA on the CPU ---

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")


@pytest.fixture
def cuda():
    with shims.cuda_on_cpu():
        yield


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.tensor([1.0], device=torch.device("cuda", 1)),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2).cuda(0, non_blocking=True),
        lambda: torch.zeros(2).to("cuda:0", torch.bfloat16),
        lambda: torch.zeros(2).to(device="cuda"),
        lambda: torch.zeros_like(torch.zeros(2), device="cuda"),
        lambda: nn.Linear(2, 2, device="cuda").weight,
        lambda: nn.Linear(2, 2).cuda().weight,
        lambda: nn.Linear(2, 2).to("cuda").weight,
        lambda: torch.randn(2, device="cuda", generator=torch.Generator(device="cuda").manual_seed(0)),
    ],
)
def test_what_is_asked_of_cuda_is_on_the_cpu(make):
    assert make().device == torch.device("cpu")


@pytest.mark.usefixtures("cuda")
def test_calls_of_cuda_itself(tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert torch.cuda.current_device() == 0 and not torch.cuda.is_available()
    torch.save({"x": torch.ones(3)}, tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", map_location="cuda", weights_only=True)["x"].sum() == 3
    with torch.device("cuda"):
        assert torch.zeros(2).device == torch.device("cpu")
    assert torch.einsum("i,i->", torch.ones(3), torch.ones(3)) == 3


@pytest.mark.usefixtures("cuda")
def test_seeds_are_those_of_the_cpu():
    own = torch.randn(3, generator=torch.Generator("cuda").manual_seed(7), device="cuda")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert torch.equal(own, torch.randn(3))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_casts_as_on_a_gpu(dtype):
    torch.manual_seed(0)
    x, linear = torch.randn(4, 8).bfloat16(), nn.Linear(8, 8)
    if dtype is torch.float32:
        linear, x = linear.bfloat16(), x.float()
    for autocast in (torch.amp.autocast, torch.autocast):
        with autocast("cuda", dtype=dtype):
            out = linear(x)
        expected = nn.functional.linear(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype))
        assert out.dtype == dtype and torch.equal(out, expected)
        with autocast("cuda", dtype=dtype, enabled=False), pytest.raises(RuntimeError):
            linear(x)


@pytest.mark.usefixtures("cuda")
def test_autocast_computes_norms_in_float32():
    x, norm = torch.randn(4, 8), nn.LayerNorm(8).bfloat16()
    with torch.amp.autocast("cuda", dtype=torch.float32):
        assert torch.equal(norm(x), nn.functional.layer_norm(x, (8,)))
    with pytest.raises(RuntimeError, match="dtype"):
        norm(x)


@pytest.mark.usefixtures("cuda")
def test_a_backward_that_recomputes_blocks_has_the_same_norms():
    norm = nn.LayerNorm(8).bfloat16()

    def block(x):
        with torch.amp.autocast("cuda", dtype=torch.float32):
            return norm(x)

    x = torch.randn(4, 8, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).square().sum().backward()
    assert x.grad.isfinite().all() and norm.weight.grad.any()


def test_torch_is_itself_afterwards():
    holders = torch, torch.cuda, torch.amp, nn.functional, multiprocessing.spawn
    before = [dict(vars(holder)) for holder in holders]
    with pytest.raises(ZeroDivisionError), shims.cuda_on_cpu():
        raise ZeroDivisionError
    assert [dict(vars(holder)) for holder in holders] == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_a_missing_script_is_a_typed_error():
    with pytest.raises(InputError):
        shims.run("no.py", [])
