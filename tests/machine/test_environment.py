"""Where we are and what is there, from files and variables of other machines."""

import json
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from turbo_nb.errors import InputError
from turbo_nb.machine import environment
from turbo_nb.machine.environment import Memory

GIB = 2**30
VARIABLES = ("RUNPOD_POD_ID", "RUNPOD_ENDPOINT_ID", "RUNPOD_WEBHOOK_GET_JOB", "COLAB_RELEASE_TAG", "HF_HOME",
             "HF_HUB_CACHE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TURBO_NB_PRICE_PER_HOUR")  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"RUNPOD_POD_ID": "abc"}, "RunPod pod"),
        ({"RUNPOD_POD_ID": "abc", "RUNPOD_ENDPOINT_ID": "def"}, "RunPod serverless"),
        ({"RUNPOD_WEBHOOK_GET_JOB": "url"}, "RunPod serverless"),
        ({"COLAB_RELEASE_TAG": "release-colab"}, "Colab"),
        ({}, "plain"),
    ],
)
def test_place(variables, place, monkeypatch):
    monkeypatch.setattr(environment, "in_notebook", lambda: False)
    assert environment.place(variables) == place


@pytest.mark.parametrize(
    ("shell", "expected"), [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True)]
)
def test_a_notebook_is_a_kernel(monkeypatch, shell, expected):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert environment.in_notebook() is expected
    assert environment.place({}) == ("Jupyter" if expected else "plain")


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({}, "{home}/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c", "HF_HOME": "/workspace/.cache/huggingface"}, "/workspace/.cache/huggingface/hub"),
        ({"HF_HOME": "~/hf"}, "{home}/hf/hub"),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/models"}, "/models"),
    ],
)
def test_the_hubs_cache_is_where_huggingface_hub_puts_it(monkeypatch, tmp_path, variables, path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(environment.hub_cache()) == path.format(home=tmp_path)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    assert str(environment.hub_cache()) == theirs


def test_a_volume_is_a_disk_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "VOLUMES", {"RunPod pod": tmp_path})
    assert environment.volume() is None  # not on a pod
    monkeypatch.setenv("RUNPOD_POD_ID", "abc")
    monkeypatch.setattr(environment, "same_disk", lambda one, other: True)
    assert environment.volume() is None  # a folder on the container's disk
    assert [disk.name for disk in environment.disks()] == ["container"]
    monkeypatch.setattr(environment, "same_disk", lambda one, other: False)
    assert environment.volume() == tmp_path
    assert [(disk.name, disk.path) for disk in environment.disks()] == [("volume", str(tmp_path)), ("container", "/")]
    assert all(0 <= disk.free <= disk.total for disk in environment.disks())


def test_same_disk_of_a_folder_that_is_not_yet_there(tmp_path):
    assert environment.same_disk(tmp_path / "a" / "b", tmp_path)
    assert not environment.same_disk(environment.Path("/proc/none"), tmp_path)


def test_caches_and_their_sizes(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    blobs = tmp_path / "hf" / "hub" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "one").write_bytes(bytes(700))
    (blobs / "two").write_bytes(bytes(63))
    (blobs.parent / "link").symlink_to(blobs / "one")
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "ours"))
    hub, triton, prompt = environment.caches()
    assert (hub.name, hub.path, hub.writable) == ("Hub", str(tmp_path / "hf" / "hub"), True)
    assert 763 <= hub.size < 700 + 763  # the link is not a second copy
    assert (triton.name, triton.size, triton.path) == ("Triton", 0, str(tmp_path / ".triton" / "cache"))
    assert (prompt.name, prompt.path) == ("prompt", str(tmp_path / "ours" / "text"))
    assert not (tmp_path / ".triton").exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {}, {"HF_HOME": "~/hf"}, {"HF_HOME": "$ELSEWHERE/hf"}, {"XDG_CACHE_HOME": "/x"},
        {"HF_HUB_CACHE": "$ELSEWHERE/hub"}, {"HF_HOME": ""}, {"XDG_CACHE_HOME": "~/x$UNSET"},
        {"HUGGINGFACE_HUB_CACHE": "/old/hub"}, {"HUGGINGFACE_HUB_CACHE": "~/$ELSEWHERE", "HF_HOME": "/no"},
        {"HUGGINGFACE_HUB_CACHE": "/old/hub", "HF_HUB_CACHE": "~/new"},
    ],
    ids=str,
)  # fmt: skip
def test_the_hubs_cache_is_where_huggingface_hub_has_it(monkeypatch, variables):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"ELSEWHERE": "/elsewhere"}).items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert environment.hub_cache() == environment.Path(result.stdout.strip())


def test_what_a_user_keeps_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("TURBO_NB_CONFIG", "~/mine")
    assert environment.config() == environment.Path.home() / "mine"
    monkeypatch.delenv("TURBO_NB_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    monkeypatch.delenv("TURBO_NB_HOME", raising=False)
    monkeypatch.setattr(environment, "volume", lambda: None)
    assert environment.config() == environment.Path("/x/turbo_nb")
    monkeypatch.setenv("TURBO_NB_HOME", "/home/kept")
    assert environment.config() == environment.Path("/home/kept/config")


def test_a_user_without_a_home_gets_a_temporary_cache(tmp_path):
    code = (
        "import os, pwd, tempfile\nos.environ.pop('HOME', None)\npwd.getpwuid = lambda uid: {}['no such user']\n"
        "for name in ('TURBO_NB_CACHE', 'TURBO_NB_HOME', 'XDG_CACHE_HOME', 'HF_HOME'): os.environ.pop(name, None)\n"
        "from turbo_nb.machine import environment\n"
        "assert environment.cache().is_relative_to(tempfile.gettempdir())\n"
        "assert environment.survey().caches"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_folders_that_may_not_be_read_do_not_raise(monkeypatch, tmp_path):
    def refused(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(environment, "VOLUMES", {"RunPod pod": tmp_path})
    monkeypatch.setenv("RUNPOD_POD_ID", "abc")
    for owner, name in [(environment.shutil, "disk_usage"), (environment.Path, "is_dir"), (environment.Path, "exists")]:
        monkeypatch.setattr(owner, name, refused)
    assert environment.disks() == () and [one.free for one in environment.caches()] == [0, 0, 0]


@pytest.mark.parametrize("path", ["a" * 256, "nul\0byte", "a" * 5000], ids=["long name", "nul", "long path"])
def test_predicates_answer_for_paths_that_no_system_takes(tmp_path, path):
    for predicate in (environment.exists, environment.is_dir, environment.is_file):
        assert not predicate(tmp_path / path)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = f"MemTotal:       {64 * 2**20} kB\nMemFree:  100 kB\nMemAvailable:   {48 * 2**20} kB\n"


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 64, 48),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, 64, 48),
        ({"sys/fs/cgroup/memory.max": f"{32 * GIB}\n", "sys/fs/cgroup/memory.current": f"{12 * GIB}\n",
          "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n"}, 32, 24),
        ({"sys/fs/cgroup/memory.max": f"{60 * GIB}\n", "sys/fs/cgroup/memory.current": f"{GIB}\n"}, 60, 48),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{16 * GIB}\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{17 * GIB}\n"}, 16, 0),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n"}, 64, 48),
    ],
    ids=["plain", "cgroup 2 unlimited", "cgroup 2", "limit near all", "cgroup 1 full", "cgroup 1 unlimited"],
)  # fmt: skip
def test_memory_is_the_lesser_of_machine_and_container(tmp_path, files, total, available):
    write(tmp_path, {"proc/meminfo": MEMINFO} | files)
    assert environment.memory(tmp_path) == Memory(total=total * GIB, available=available * GIB)


def test_memory_of_a_system_that_does_not_tell(tmp_path):
    assert environment.memory(tmp_path) == Memory(total=None, available=None)


class Distribution:
    requires = ("torch>=2.7", "peft>=0.17", "ghost>=1", "jupyterlab>=4.4; extra == 'notebook'",
                "pytest>=8; extra == 'dev'")  # fmt: skip
    metadata = {"Requires-Python": ">=3.11"}  # noqa: RUF012


@pytest.mark.parametrize("notebook", [False, True])
def test_packages_against_what_we_need(monkeypatch, notebook):
    installed = {"torch": "2.8.0a0+nv25.5", "peft": "0.16.1", "jupyterlab": "4.6.6", "pytest": "9"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(environment.metadata, "distribution", lambda name: Distribution)
    monkeypatch.setattr(environment.metadata, "version", version)
    monkeypatch.setattr(environment, "in_notebook", lambda: notebook)
    found = {p.name: (p.installed, p.ok) for p in environment.needed_packages()}
    assert found.pop("Python")[1]
    expected = {"torch": ("2.8.0a0+nv25.5", True), "peft": ("0.16.1", False), "ghost": (None, False)}
    assert found == expected | ({"jupyterlab": ("4.6.6", True)} if notebook else {})


def test_not_installed_there_is_nothing_to_compare_with(monkeypatch):
    monkeypatch.setattr(environment, "DISTRIBUTION", "turbo-nb-that-nobody-has")
    assert environment.needed_packages() == () and environment.survey().version is None


@pytest.mark.parametrize(("text", "price"), [("", None), ("2.99", 2.99), (" .5 ", 0.5), ("3", 3.0)])
def test_price(monkeypatch, text, price):
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", text)
    assert environment.price_per_hour() == price


@pytest.mark.parametrize("text", ["$3", "-1", "nan", "1e9", "free", "9" * 400, "１.5"])
def test_a_price_that_is_none(monkeypatch, text):
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", text)
    with pytest.raises(InputError, match=r"such as 2\.99"):
        environment.price_per_hour()
    with pytest.warns(UserWarning, match=r"such as 2\.99"):
        assert environment.cost(60) is None


def test_cost(monkeypatch):
    assert environment.cost(60) is None and environment.dollars(None) == ""
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "3.60")
    assert environment.cost(12) == pytest.approx(0.012)
    assert environment.dollars(environment.cost(12)) == ", $0.0120"


def test_survey_here_makes_nothing_and_is_data(tmp_path):
    code = (
        "import dataclasses, json, sys; from turbo_nb.machine import environment\n"
        "print(json.dumps(dataclasses.asdict(environment.survey())))\n"
        "assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["place"] == "plain" and not list(tmp_path.iterdir())
