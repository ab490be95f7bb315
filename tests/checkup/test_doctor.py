"""The doctor's report: problems with their remedies, the exit code, and nothing unescaped."""

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from helpers import command_line

import turbo_nb
from turbo_nb import backends, catalog
from turbo_nb.checkup import hub_check, problems, tables
from turbo_nb.checkup.doctor import GROUPS
from turbo_nb.checkup.fits import fit
from turbo_nb.checkup.hub_check import Hub, ask_hub
from turbo_nb.checkup.tables import GIB
from turbo_nb.files import hub as download
from turbo_nb.machine import environment, probe
from turbo_nb.machine.environment import Cache, Disk, Environment, Memory, Package
from turbo_nb.machine.probe import Library, Machine
from turbo_nb.runtime.plan import GB

VARIABLES = (
    *backends.VARIABLES.values(),
    "TURBO_NB_PRICE_PER_HOUR",
    "TURBO_NB_HOME",
    "HF_ENDPOINT",
    "TRANSFORMERS_OFFLINE",
)
TRITON = {"triton": Library(version="3.5.0")}
H100 = Machine(
    gpu="NVIDIA H100", gpu_count=1, arch=(9, 0), free_memory=79 * GIB, total_memory=80 * GIB, driver="580.65",
    torch="2.9.0+cu130", cuda="13.0", compiler="/usr/bin/gcc", libraries=TRITON,
)  # fmt: skip
CPU = Machine(torch="2.9.0+cpu")
T4 = replace(H100, gpu="Tesla T4", arch=(7, 5), free_memory=14.4 * GIB, total_memory=14.6 * GIB)


def surroundings(tmp_path, **changes):
    cache = Cache(name="Hub", path=str(tmp_path / "hub"), size=0, free=10**12, writable=True)
    seen = Environment(
        place="plain", notebook=False, system="Linux", python="3.12.3", version="0.1.0",
        memory=Memory(available=60 * GIB, total=64 * GIB), caches=(cache,),
        disks=(Disk(name="machine", path="/", free=10**11, total=10**12),),
        packages=(Package(name="torch", needed=">=2.7", installed="2.9.0", ok=True),),
    )  # fmt: skip
    return replace(seen, **changes)


@pytest.fixture
def report(monkeypatch, tmp_path):
    """report(machine, **changes of the surroundings) → the doctor's Report for them"""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(machine=CPU, **changes):
        monkeypatch.setattr(probe, "probe", lambda: machine)
        monkeypatch.setattr(environment, "survey", lambda: surroundings(tmp_path, **changes))
        return turbo_nb.doctor()

    return make


def test_a_sound_machine_has_no_problem(report):
    for machine in (CPU, H100):
        found = report(machine)
        assert found.problems == () and found.exit_code() == found.exit_code(strict=True) == 0


@pytest.mark.parametrize(
    ("variable", "value", "fix"),
    [
        ("IMAGEIO_FFMPEG_EXE", "/opt/missing/ffmpeg", "unset IMAGEIO_FFMPEG_EXE"),
        ("TURBO_NB_ENCODER", "av2", "unset TURBO_NB_ENCODER"),
    ],
)
def test_the_encoder_is_shown_and_one_that_does_not_work_is_a_problem(report, monkeypatch, variable, value, fix):
    assert re.search(r"encoder\W+libx264 of ffmpeg \S+", str(report()))
    monkeypatch.setenv(variable, value)
    found = report()
    (problem,) = found.problems
    assert (problem.level, problem.fix) == ("error", fix) and f"{variable} is '{value}'" in problem.text
    assert found.encoder is None and found.exit_code() == 2 and re.search(r"encoder\W+none", str(found))


OLD = Package(name="peft", needed=">=0.17", installed="0.16.1", ok=False)


def libraries(**named):
    return replace(H100, libraries=TRITON | named)


@pytest.mark.parametrize(
    ("machine", "changes", "level", "words", "fix"),
    [
        (CPU, {"packages": (OLD,)}, "error", "peft is 0.16.1; turbo_nb needs >=0.17", "pip install 'peft>=0.17'"),
        (CPU, {"packages": (replace(OLD, name="ftfy", installed=None),)}, "error", "ftfy is missing", "'ftfy>=0.17'"),
        (CPU, {"packages": (replace(OLD, name="torch"),)}, "error", "torch is 0.16.1", "image with a newer torch"),
        (Machine(cuda_error="libcudart.so.13 not found"), {}, "error", "libcudart", "install torch again"),
        (replace(CPU, gpu="NVIDIA L4", cuda_error="torch 2.9.0+cpu is built without CUDA"), {}, "warning",
         "torch cannot use the NVIDIA L4: torch 2.9.0+cpu is built without CUDA", "pytorch.org"),
        (CPU, {"place": "RunPod pod"}, "warning", "this machine has no GPU: only nano", "start a pod with a GPU"),
        (CPU, {"place": "Colab"}, "warning", "this machine has no GPU", "Change runtime type"),
        (replace(H100, free_memory=9 * GIB), {}, "warning",
         "other work takes 71.0 GiB of the GPU's 80.0 GiB", "nvidia-smi"),
        (T4, {"place": "Colab"}, "warning",
         "models compute in float16 here, which takes several times as long: this GPU (sm_75) has no bfloat16",
         "Change runtime type"),
        (replace(T4, gpu="Tesla P100", arch=(6, 0)), {"place": "Colab"}, "warning",
         "only nano is fast enough here: this GPU (sm_60) has no Tensor Cores", "sm_70 or newer"),
        (replace(H100, libraries={}), {}, "warning", "Triton not installed", "pip install triton"),
        (libraries(triton=Library(version="3.5", error="its trial kernel failed: Python.h: No such file")), {},
         "warning", "Python.h", "apt-get install -y python3."),
        (replace(libraries(triton=Library(version="3.5", error="its trial kernel failed: no compiler")), compiler=None),
         {}, "warning", "no compiler", "apt-get install -y gcc"),
        (libraries(flash_attn=Library(version="2.8.3", error="import failed: undefined symbol: _ZN")), {}, "warning",
         "flash_attn 2.8.3 import failed: undefined symbol: _ZN", "pip uninstall"),
        (replace(H100, total_memory=1.5 * GIB, free_memory=1.5 * GIB), {}, "warning",
         "only nano fits: plan group: needs 1.8 GB of 1.6 GB", "more memory"),
    ],
)  # fmt: skip
def test_every_problem_has_its_fix(report, machine, changes, level, words, fix):
    found = report(machine, **changes)
    mine = [problem for problem in found.problems if words in problem.text]
    assert len(mine) == 1, found.problems
    assert mine[0].level == level and fix in mine[0].fix
    assert found.exit_code() == (2 if level == "error" else 0)
    assert found.exit_code(strict=True) == (2 if level == "error" else 1)


def test_models_on_a_pod_belong_on_its_volume(report, monkeypatch, tmp_path):
    volume = Disk(name="volume", path="/workspace", free=10**11, total=10**12)
    monkeypatch.setattr(environment, "same_disk", lambda one, other: True)
    with_volume = report(H100, place="RunPod pod", disks=(volume,)).problems
    assert [problem.fix.split()[:2] for problem in with_volume] == [["export", "HF_HOME=/workspace/.cache/huggingface"]]
    assert ["no volume" in problem.text for problem in report(H100, place="RunPod pod").problems] == [True]
    monkeypatch.setattr(environment, "same_disk", lambda one, other: False)
    assert report(H100, place="RunPod pod", disks=(volume,)).problems == ()


def test_a_cache_that_cannot_be_written(report, tmp_path):
    cache = Cache(name="Hub", path="/mnt/[ro]", size=0, free=10**12, writable=False)
    assert "cannot write to /mnt/[ro]" in [problem.text for problem in report(caches=(cache,)).problems]


def test_an_impossible_override_is_an_error_of_the_report(report, monkeypatch):
    monkeypatch.setenv("TURBO_NB_ROPE", "flash_attn")
    monkeypatch.setenv("TURBO_NB_ATTENTION", "wrong")
    monkeypatch.setenv("TURBO_NB_EXCHANGE", "wrong")
    monkeypatch.setenv("TURBO_NB_TEXT_CACHE", "off")
    found = report(CPU)
    assert [(p.level, p.fix) for p in found.problems] == [
        ("error", "unset TURBO_NB_ROPE"),
        ("error", "unset TURBO_NB_ATTENTION"),
        ("error", "unset TURBO_NB_EXCHANGE"),
        ("error", "unset TURBO_NB_TEXT_CACHE"),
    ]
    assert found.backends.rope.chosen is None and "no CUDA GPU" in found.backends.rope.rejected[0][1]
    assert found.backends.linear.chosen == "reference"


def test_a_folder_that_is_an_address_is_an_error_of_the_report(report, monkeypatch):
    for name in environment.FOLDERS:
        monkeypatch.setenv(name, "s3://bucket/x")
    found = report()
    assert [problem.fix for problem in found.problems] == [f"unset {name}" for name in environment.FOLDERS]
    assert found.problems[0].text.startswith("TURBO_NB_HOME is 's3://bucket/x'. Expected a path on this machine.")
    assert os.environ["TURBO_NB_HOME"] == "s3://bucket/x" and "bucket" not in str(found.environment)


def test_the_last_line_is_a_verdict(report, monkeypatch):
    assert repr(report()).splitlines()[-1] == "Verdict: ready. 1 model of 9 can run here (nano)."
    assert "models of 9 can run here (nano, …)" in report(H100).verdict
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "cheap")
    assert report().verdict.endswith("(nano), with 1 warning.")
    monkeypatch.setenv("TURBO_NB_ROPE", "flash_attn")
    found = report()
    assert found.verdict == "Verdict: 1 error to fix before a video can be made here."
    assert found._repr_html_().endswith(f"<p><strong>{found.verdict}</strong></p>")
    assert "Verdict" not in repr(found.only("Machine"))


def test_cost(report, monkeypatch):
    assert "$" not in repr(report())
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "2.99")
    found = report()
    assert found.price_per_hour == 2.99 and "$2.99 an hour, $0.050 a minute" in repr(found)
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "cheap")
    assert [problem.level for problem in report().problems] == ["warning"]


def cells(html):
    return re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", html)


def test_html_and_text_say_the_same_and_nothing_in_them_is_markup(report, monkeypatch):
    monkeypatch.setattr(tables.shutil, "get_terminal_size", lambda fallback: os.terminal_size((300, 24)))
    bad = "import failed: <script>alert(1)</script> [red]&amp; [Errno 2]"
    found = report(libraries(flash_attn=Library(version="<b>", error=bad)), system="<i>Linux</i>")
    page, text = found._repr_html_(), repr(found)
    assert "<script" not in page and "<i>" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [red]&amp;amp; [Errno 2]" in page
    assert bad in text and "<i>Linux</i>" in text
    assert found.problems and page.count("<caption>") == len(list(found.tables())) == 5
    for title, head, rows in found.tables():
        assert f"<caption>{title}</caption>" in page and title in text
        for row in rows:
            assert len(row) == len(head) and all(line in text for cell in row for line in cell.splitlines())


def test_a_notebook_shows_it_once(report, monkeypatch, capsys):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: shown.append(args))
    assert "Machine" in repr(report(CPU)) and shown == [] and capsys.readouterr().out == ""


def test_the_dict_is_json(report):
    found = report(libraries(flash_attn=Library(version="2.8.3")))
    told = json.loads(json.dumps(found.to_dict()))
    assert told["backends"]["rope"]["chosen"] == "flash_attn" and told["backends"]["arch"] == [9, 0]
    assert [(model["model"], model["int8"]) for model in told["models"]] == [
        ("nano", False),
        *((name, int8) for name in catalog.MODELS if name != "nano" for int8 in (False, True)),
    ]
    assert told["problems"] == [] and told["hub"]["state"] == "offline"


SMALL, LARGE = catalog.find("Wan2.1-1.3B"), catalog.find("TurboWan2.1-T2V-14B-720P")


@pytest.mark.parametrize(
    ("spec", "quantized", "gigabytes", "fits", "plan"),
    [
        (SMALL, False, 24, True, "resident"),
        (SMALL, True, 12, True, "cpu-text"),
        (LARGE, False, 80, True, "resident"),
        (LARGE, True, 24, True, "offload-cpu-text"),
        (LARGE, False, 8, False, "group"),
    ],
)
def test_a_model_is_told_with_the_plan_it_would_get(spec, quantized, gigabytes, fits, plan):
    machine = replace(H100, free_memory=gigabytes * GB)
    found = fit(spec, quantized, machine, 10**12)
    assert (found.model, found.int8, found.fits, found.plan) == (spec.name, quantized, fits, plan)
    assert found.text.startswith(f"plan {plan}: needs ") and f" of {gigabytes:.1f} GB: " in found.text
    assert ("may run out of memory" in found.text) is not fits


def test_a_model_that_main_memory_is_too_small_for(report):
    machine = replace(H100, free_memory=16 * GB)
    told = {
        gigabytes: next(
            fit
            for fit in report(machine, memory=Memory(available=gigabytes and gigabytes * GB, total=None)).models
            if (fit.model, fit.int8) == (LARGE.name, True)
        )
        for gigabytes in (None, 16, 32)
    }
    assert [fit.fits for fit in told.values()] == [True, False, True]
    assert "takes 26.1 GB of main memory, of which 16.0 GB are free: take a machine with more" in told[16].text


def test_without_a_gpu_only_nano_fits(report):
    nano, *rest = report(CPU).models
    assert (nano.fits, nano.plan, nano.text) == (True, "resident", "on the CPU, comes with the package")
    assert {(fit.fits, fit.plan, fit.text, fit.downloaded) for fit in rest} == {
        (False, None, "needs a CUDA GPU", False)
    }
    assert report(H100).models[0].text == "on the GPU, comes with the package"


def test_what_is_here_is_not_fetched_again_and_the_rest_must_fit_the_disk(monkeypatch):
    missing = [*LARGE.needs()]
    monkeypatch.setattr(download, "missing", lambda files: tuple(missing))
    whole = fit(LARGE, False, H100, 10**12)
    assert whole.fits and not whole.downloaded and whole.to_fetch == pytest.approx(40.2 * GB, rel=0.02)
    assert fit(LARGE, False, H100, whole.to_fetch).fits
    short = fit(LARGE, False, H100, whole.to_fetch - 1)
    assert not short.fits and short.text.startswith("too large for the disk: 40.")
    missing.remove(catalog.TEXT_ENCODER)
    assert whole.to_fetch - fit(LARGE, False, H100, 10**12).to_fetch == pytest.approx(11.36 * GB)
    missing.clear()
    here = fit(LARGE, False, H100, 0)
    assert here.fits and here.downloaded and here.to_fetch == 0


def test_a_hub_library_that_is_missing_is_no_crash(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "turbo_nb.files.hub", None)
    monkeypatch.delattr(turbo_nb, "download", raising=False)
    assert not any(fit.downloaded for fit in report(H100).models[1:])


@contextlib.contextmanager
def not_root():
    """Drop root's rights for a while, because root can read every folder."""
    rights = os.geteuid()
    if rights == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(rights)


def test_unreadable_folders_are_not_a_crash(monkeypatch, tmp_path):
    closed = tmp_path / "closed"
    for variable in ("HF_HOME", "TURBO_NB_HOME", "TURBO_NB_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, str(closed / variable / "deep"))
    closed.mkdir()
    closed.chmod(0)
    turbo_nb.doctor()  # imports what is imported late, with all rights
    with not_root():
        found = turbo_nb.doctor()
    closed.chmod(0o700)
    assert found.environment.caches[0].path == str(closed / "HF_HOME" / "deep" / "hub")
    assert not any(fit.downloaded for fit in found.models[1:])


def test_a_machine_without_a_home_is_not_a_crash(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    for variable in ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "TURBO_NB_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    found = turbo_nb.doctor()
    assert found.environment.caches[0].path == "~/.cache/huggingface/hub" and repr(found)
    assert "cannot write to ~/.cache/huggingface/hub" in [problem.text for problem in found.problems]
    assert not list(tmp_path.iterdir())


def test_attention_is_one_row_of_the_backends(report):
    rows = next(rows for title, _, rows in report(CPU).tables() if title == "Backends")
    assert [row[0] for row in rows] == list(GROUPS) and len(GROUPS) < len(backends.SHOWN)
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(backends.SHOWN)
    attention = {row[0]: row[1:] for row in rows}["attention"]
    assert attention[0].splitlines() == ["sla: reference", "sagesla: nothing", "original: sdpa"]
    assert "gluon, triton, gathered, spargeattn: no CUDA GPU" in attention[1].splitlines()


def test_one_table_by_itself(report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    models = report(H100).only("Models")
    assert [title for title, _, _ in models.tables()] == ["Models"]
    assert [table[0] for table in report(H100).only("Models", "Problems", "Machine").tables()] == ["Models", "Machine"]
    assert "comes with the package" in repr(models) and models._repr_html_().count("<caption>") == 1


def test_what_failed_at_the_start_of_the_pod_is_a_problem(report, monkeypatch, tmp_path):
    monkeypatch.setenv("TURBO_NB_HOME", str(tmp_path))
    assert report().problems == ()
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "failed.txt").write_text("")
    assert report().problems == ()
    (logs / "failed.txt").write_text("setup, exit 1: <no space>; see setup.log\n\ndownload nano, exit 2\n")
    found = report()
    assert [(p.level, p.text, p.fix) for p in found.problems] == [
        ("warning", "setup, exit 1: <no space>; see setup.log", f"see the log in {logs}"),
        ("warning", "download nano, exit 2", f"see the log in {logs}"),
    ]
    assert found.exit_code() == 0 and "&lt;no space&gt;" in found._repr_html_()


@pytest.fixture
def hub(monkeypatch):
    """hub(status) → the address of a Hub that answers with it; `.asked` counts requests"""
    servers = []

    def start(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                start.asked.append(self.headers)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    start.asked = []
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SSL_CERT_FILE"):
        monkeypatch.delenv(variable, raising=False)
    for scheme in ("http", "https", "all"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "state", "error"),
    [(200, "reachable", None), (401, "reachable", None), (503, "unreachable", "HTTP 503 Service Unavailable")],
)
def test_the_hubs_answer(hub, monkeypatch, status, state, error):
    address = hub(status)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{address}/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    answer = ask_hub()
    assert (answer.endpoint, answer.state, answer.error) == (f"http://{address}", state, error)
    assert (answer.seconds is None) == (state == "unreachable")
    assert len(hub.asked) == 1 and "hf_secret" not in str(hub.asked[0])


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("https://me:secret@mirror.example/hf", "https://mirror.example/hf"),
        ("https://mirror.example/hf?token=secret", "https://mirror.example/hf"),
        ("https://mirror.example/#secret", "https://mirror.example"),
        ("mirror.example?secret", "mirror.example"),
        ("me:secret@mirror.example", "mirror.example"),
        ("http://me:sec/secret@mirror.example", "http://mirror.example"),
        ("http://me:secret@[::1", "http://[::1"),
        ("http://[::1", "http://[::1"),
        ("http://me@x:secret@mirror.example:port", "http://mirror.example:port"),
        ("file:///etc", "file:///etc"),
    ],
)
def test_a_malformed_endpoint_is_a_problem_and_shows_no_password(report, hub, monkeypatch, capfd, endpoint, shown):
    report(H100)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask_hub() == Hub(endpoint=shown, state="offline")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub_check, "HUB_SECONDS", 0.3)
    found = turbo_nb.doctor()
    assert found.hub.state == "unreachable" and found.hub.endpoint == shown and found.exit_code() == 0
    told = repr(found) + found._repr_html_() + json.dumps(found.to_dict()) + "".join(capfd.readouterr())
    assert "secret" not in told


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(hub, monkeypatch, variable):
    monkeypatch.setenv("HF_ENDPOINT", f"http://{hub(200)}")
    monkeypatch.setenv(variable, "1")
    assert ask_hub().state == "offline" and not hub.asked


def test_a_hub_that_refuses_or_has_no_scheme(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        answer = ask_hub()
    assert answer.state == "unreachable" and "refused" in answer.error
    monkeypatch.setenv("HF_ENDPOINT", "mirror")
    assert "does not begin with https://" in ask_hub().error


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", "ALL_PROXY is a SOCKS proxy, 'socks5://127.0.0.1:9'", "pip"),
        (
            "https_proxy",
            "http://me:secret@127.0.0.1:9",
            "the proxy of https_proxy, 'http://127.0.0.1:9'",
            "https_proxy",
        ),
        ("SSL_CERT_FILE", "/missing.pem", "SSL_CERT_FILE is '/missing.pem'", "Correct it or unset it"),
    ],
)
def test_the_variable_that_keeps_the_hub_from_answering_is_named(hub, monkeypatch, name, value, what, fix):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv(name, value)
    answer = ask_hub()
    assert answer.state == "unreachable" and what in answer.error and fix in answer.fix
    assert "secret" not in repr(answer)
    (problem,) = problems.of_hub(answer)
    assert what in problem.text and fix in problem.fix


def test_the_hub_is_asked_through_the_proxy_of_all_requests(hub, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", f"http://{hub(200)}")  # urllib does not read ALL_PROXY
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert ask_hub().state == "reachable" and hub.asked[0]["host"] == "hub.invalid"


def test_a_hub_that_hangs_is_given_its_seconds_and_is_a_warning(hub, monkeypatch, report):
    report()  # puts a sound machine in place, offline
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub_check, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        (problem,) = turbo_nb.doctor().problems
    assert problem.level == "warning" and "HF_ENDPOINT" in problem.fix
    assert "no answer in 0.3 s" in problem.text or "timed out" in problem.text


def doctor(*arguments, cwd, **variables):
    command = [sys.executable, "-m", "turbo_nb.cli", "doctor", *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), **variables}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def test_the_command(tmp_path):
    result = doctor("--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["environment"]["caches"][0]["path"] == str(tmp_path / "hf" / "hub")
    assert told["backends"]["rope"]["chosen"] and not list(tmp_path.iterdir())


def test_the_commands_exit_code(tmp_path, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TURBO_NB_ROPE", "wrong")
    result = command_line("doctor", cwd=tmp_path)
    assert result.returncode == 2 and "unset TURBO_NB_ROPE" in result.stdout and result.stderr == ""
    monkeypatch.delenv("TURBO_NB_ROPE")
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "cheap")
    assert command_line("doctor", cwd=tmp_path).returncode == 0
    assert command_line("doctor", "--strict", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("package", ["psutil", "huggingface_hub", "diffusers", "transformers", "torch"])
def test_the_command_runs_without_a_package(tmp_path, package):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = doctor("--json", cwd=tmp_path, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    assert result.returncode == (2 if package == "torch" else 0), result.stderr
    assert json.loads(result.stdout)["models"] and "Traceback" not in result.stderr
