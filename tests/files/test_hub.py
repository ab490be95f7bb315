"""Downloads against a loopback server that speaks the Hub's HTTP, and the ways they go wrong."""

import contextlib
import hashlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import close_session
from loopback_hub import MODEL, T5, TURBO, UMT5, WAN, Hub, some_bytes

from turbo_nb import catalog
from turbo_nb.errors import DownloadError, InputError, without_secrets
from turbo_nb.files import hub as download
from turbo_nb.files import hub_requests
from turbo_nb.files.download import Files, progress_bars
from turbo_nb.files.filenames import TOKENIZER_FILES
from turbo_nb.machine import environment

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
SPEC = catalog.find(MODEL)
SLOW = 300  # seconds that a process may take to start on a busy machine


def fetch(spec=SPEC, quantized=False, **more) -> Files:
    """The files of a model of the catalogue, fetched."""
    needed = spec.needs(quantized)
    planned = download.plan(spec.name, needed)
    return Files.of(download.fetch(planned, **more)[file] for file in needed)


def cached(spec=SPEC) -> Files | None:
    paths = download.cached(spec.needs())
    return paths and Files.of(paths)


def turbo_nb(*arguments, hub: Hub, home: Path, **environment) -> subprocess.Popen:
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-m", "turbo_nb.cli", *arguments],
        env=kept | variables | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def assert_whole(hub: Hub, files: Files, stem: str = MODEL) -> None:
    """Every file that is handed out has the Hub's bytes."""
    assert [path.name for path in files.transformers] == [f"{stem}.pth"]
    assert files.transformers[0].read_bytes() == hub.repos[TURBO][f"{stem}.pth"]
    assert files.vae.read_bytes() == hub.repos[WAN][catalog.VAE.path]
    assert files.text_encoder.read_bytes() == hub.repos[WAN][T5]
    for name in TOKENIZER_FILES:
        assert (files.tokenizer / name).read_bytes() == hub.repos[UMT5][name]


def leftovers(cache: Path) -> list[Path]:
    return [*cache.rglob("*.incomplete"), *cache.rglob("*.tmp"), *cache.rglob(".turbo_nb-*")]


def fails(**settings) -> str:
    """The one line of the DownloadError that fetching raises; nothing is then taken for whole."""
    with pytest.raises(DownloadError) as caught:
        fetch(SPEC, **settings)
    assert "\n" not in str(caught.value)
    assert cached(SPEC) is None
    return str(caught.value)


def test_plan_lists_the_needed_files_and_writes_nothing(hub, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**12, used=0, free=10**12 - 1))
    plan = download.plan(MODEL, SPEC.needs())
    assert [f.file.path for f in plan.files] == [f"{MODEL}.pth", catalog.VAE.path, T5, *TOKENIZER_FILES]
    assert plan.to_fetch == 3 * 200_000 + 4 * 3000 == sum(f.size for f in plan.files)
    assert plan.files[0].sha256 == hashlib.sha256(hub.repos[TURBO][f"{MODEL}.pth"]).hexdigest()
    assert [f.file.path for f in plan.files if f.sha256 is None] == ["tokenizer_config.json", "special_tokens_map.json"]
    assert {f.commit for f in plan.files} == set(hub.commits.values())
    assert plan.free == 10**12 - 1 and plan.cache == cache
    text = str(plan).splitlines()
    assert text[0].startswith(f"{MODEL}: 7 files, 612.0 kB; 612.0 kB to fetch, ") and text[0].endswith(str(cache))
    assert text[1].split() == ["fetch", "200.0", "kB", f"{TURBO}/{MODEL}.pth,", "main", f"({hub.commits[TURBO][:7]})"]
    assert len(hub.log) == 3 and hub.fetched() == [] and not cache.parent.exists()


def test_a_second_run_fetches_nothing_and_hashes_nothing(hub, cache):
    assert cached(SPEC) is None
    steps = []
    files = fetch(SPEC, on_progress=steps.append)
    assert_whole(hub, files)
    assert not leftovers(cache) and not list(cache.rglob("checkpoints"))
    fetched = [step for step in steps if step.stage == "fetch"]
    assert [s.done for s in fetched] == sorted(s.done for s in fetched) and {s.total for s in steps} == {612_000}
    assert fetched[-1].done == 612_000 and steps[-1].stage == "check"
    assert {s.file.file.path for s in steps if s.stage == "check" and s.file_done == s.file.size} == {
        f.file.path for f in download.plan(MODEL, SPEC.needs()).files
    }
    assert cached(SPEC) == files and download.cached(SPEC.needs(True)) is None

    hub.log.clear()
    plan = download.plan(MODEL, SPEC.needs())
    assert plan.to_fetch == 0 and "7 files, 612.0 kB; nothing to fetch" in str(plan)
    again = []
    assert fetch(SPEC, on_progress=again.append) == files
    assert hub.fetched() == [] and again == []


def test_quantised_weights_share_the_other_files(hub, cache):
    fetch(SPEC)
    hub.log.clear()
    assert download.plan(MODEL, SPEC.needs(True)).to_fetch == 200_000
    assert_whole(hub, fetch(SPEC, quantized=True), stem=f"{MODEL}-quant")
    assert hub.fetched() == [f"{MODEL}-quant.pth"]


def test_two_experts_are_fetched_as_two_files(hub, cache):
    spec = catalog.find("TurboWan2.2-I2V-A14B-720P")
    repo = spec.files[0].repo
    hub.repos[repo] = {file.path: some_bytes(file.path) for file in spec.files}
    hub.commits[repo] = "c" * 40
    files = fetch(spec)
    assert [path.read_bytes() for path in files.transformers] == list(hub.repos[repo].values())


def test_nano_needs_no_download(hub, cache):
    plan = download.plan("nano", catalog.NANO.needs())
    assert (plan.files, plan.to_fetch, str(plan)) == ((), 0, "nano comes with the package: nothing to download")
    assert download.cached(catalog.NANO.needs()) is None and hub.log == []


def test_a_pinned_commit_is_asked_for_once(hub, cache):
    pinned = [replace(file, revision=hub.commits[file.repo]) for file in SPEC.needs()]
    paths = download.fetch(download.plan(MODEL, pinned))
    assert_whole(hub, Files.of(paths.values()))
    hub.log.clear()
    plan = download.plan(MODEL, pinned)
    assert plan.to_fetch == 0 and hub.log == [] and "(" not in str(plan) and hub.commits[TURBO][:7] in str(plan)


def test_branch_moves_in_the_cache_after_its_files_are_there(hub, cache):
    before = fetch(SPEC)
    old = hub.repos[TURBO][f"{MODEL}.pth"]
    hub.repos[TURBO][f"{MODEL}.pth"] = some_bytes("newer")
    hub.commits[TURBO] = "d" * 40
    hub.faults[f"{MODEL}.pth"] = ("cut",)
    with pytest.raises(DownloadError, match="broke off"):
        fetch(SPEC)
    assert cached(SPEC) == before and before.transformers[0].read_bytes() == old
    hub.faults.clear()
    after = fetch(SPEC)
    assert_whole(hub, after)
    assert cached(SPEC) == after != before


def test_a_new_commit_with_the_same_files_fetches_nothing(hub, cache):
    fetch(SPEC)
    hub.commits[WAN] = "e" * 40
    hub.log.clear()
    assert download.plan(MODEL, SPEC.needs()).to_fetch == 0
    files = fetch(SPEC)
    assert_whole(hub, files)
    assert hub.fetched() == [] and files.vae.parent.name == "e" * 40 and cached(SPEC) == files


def test_cache_without_links_is_checked_and_found_again(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    hub.faults[T5] = ("wrong",)
    assert "wrong bytes" in fails()
    hub.faults.clear()
    files = fetch(SPEC)
    assert_whole(hub, files)
    assert not files.vae.is_symlink() and cached(SPEC) == files
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(SPEC) == files
    files.vae.write_bytes(b"half")
    assert cached(SPEC) is None


def test_files_that_another_program_fetched_are_only_checked(hub, cache):
    for file in download.plan(MODEL, SPEC.needs()).files:
        hf_hub_download(file.file.repo, file.file.path)
    assert cached(SPEC) is None  # nobody has looked at the bytes
    hub.log.clear()
    assert download.plan(MODEL, SPEC.needs()).to_fetch == 0
    files = fetch(SPEC)
    assert_whole(hub, files)
    assert hub.fetched() == [] and cached(SPEC) == files


@pytest.mark.parametrize("name", [f"{MODEL}.pth", "tokenizer_config.json"])
def test_wrong_bytes_are_removed_and_the_rest_stays(hub, cache, name):
    hub.faults[name] = ("wrong",)
    text = fails()
    assert f"{name} came with wrong bytes" in text and "run it again" in text
    assert not [path for path in cache.rglob("*") if path.name == name]
    hub.faults.clear()
    fetched = hub.fetched()
    hub.log.clear()
    assert_whole(hub, fetch(SPEC))
    every = [file.file.path for file in download.plan(MODEL, SPEC.needs()).files]
    assert hub.fetched() == [name, *(file for file in every if file not in fetched)]


def test_bytes_that_rot_later_are_found(hub, cache):
    files = fetch(SPEC)
    blob = files.vae.resolve()
    blob.write_bytes(bytes(200_000))
    assert cached(SPEC) is None
    assert "wrong bytes" in fails()
    assert not blob.exists() and not files.vae.is_symlink()
    hub.log.clear()
    assert_whole(hub, fetch(SPEC))
    assert hub.fetched() == [catalog.VAE.path]


def test_a_cut_goes_on_by_itself_if_the_hub_answers_again(hub, cache, monkeypatch):
    hub.faults[T5] = ("cut",)
    monkeypatch.setattr(time, "sleep", lambda seconds: hub.faults.clear())
    steps = []
    assert_whole(hub, fetch(SPEC, on_progress=steps.append))
    assert [method for method, path in hub.log if path == T5].count("GET-FILE") == 2
    assert max(step.done for step in steps) == 612_000


def test_a_cut_that_lasts_is_an_error_and_the_finished_files_stay(hub, cache):
    hub.faults[T5] = ("cut",)
    assert f"{WAN}/{T5}: the transfer broke off" in fails()
    assert len(hub.slept) <= 10 and not leftovers(cache)
    hub.faults.clear()
    hub.log.clear()
    assert download.plan(MODEL, SPEC.needs()).to_fetch == 200_000 + 4 * 3000
    assert_whole(hub, fetch(SPEC))
    assert hub.fetched() == [T5, *TOKENIZER_FILES]


@pytest.mark.parametrize(
    ("where", "status", "headers", "words"),
    [
        (TURBO, 401, {}, "does not show it to you (401)"),
        (f"{MODEL}.pth", 401, {"X_Error_Code": "GatedRepo"}, "accept its licence"),
        (f"{MODEL}.pth", 403, {}, "HF_TOKEN"),
        (TURBO, 404, {"X_Error_Code": "RepoNotFound"}, "does not have it (404)"),
        (T5, 404, {"X_Error_Code": "EntryNotFound"}, "does not have it (404)"),
        (WAN, 500, {}, "failed (500)"),
        (T5, 503, {}, "failed (503)"),
        (T5, 429, {"Retry_After": "2"}, "asked too often (429)"),
    ],
)
def test_http_status_raises_one_line_with_a_fix(hub, cache, where, status, headers, words):
    hub.faults[where] = ("status", status, headers)
    text = fails()
    assert words in text and where in text and hub.url in text
    assert len(hub.slept) <= 6 and not leftovers(cache)
    hub.faults.clear()
    assert_whole(hub, fetch(SPEC))


@pytest.mark.parametrize("headers", [{"Retry_After": "7"}, {"RateLimit": '"api";r=0;t=7'}], ids=lambda h: next(iter(h)))
def test_too_many_requests_waits_as_asked(hub, cache, headers):
    hub.faults[TURBO] = ("status", 429, headers, 2)
    with pytest.warns(UserWarning, match="asking again in 7 s"):
        assert_whole(hub, fetch(SPEC))
    assert hub.slept == [7, 7]


def test_too_many_requests_for_long_is_an_error(hub, cache):
    hub.faults[WAN] = ("status", 429, {"Retry_After": "2"})
    with pytest.warns(UserWarning, match="asking again in 2 s"):
        assert f"{WAN}: {hub.url} is asked too often (429). Wait 2 s" in fails()
    assert hub.slept == [2, 2]


def test_a_very_long_wait_is_left_to_the_user(hub, cache):
    hub.faults[TURBO] = ("status", 429, {"Retry_After": "3600"})
    assert "Wait 3600 s" in fails()
    assert hub.slept == []


def test_missing_file_on_the_hub_names_the_files_there(hub, cache):
    hub.repos[WAN]["Wan2.1_VAE_v2.pth"] = hub.repos[WAN].pop(catalog.VAE.path)
    text = fails()
    assert f"{WAN} has no 'Wan2.1_VAE.pth' at main" in text and "Wan2.1_VAE_v2.pth" in text
    assert hub.fetched() == []


def test_refused_connection_raises_at_once_and_writes_nothing(hub, cache):
    hub.shutdown()
    hub.server_close()
    text = fails()
    assert f"cannot reach {hub.url}" in text and hub.slept == [] and not cache.exists()


@pytest.mark.parametrize("silent", ["the host", "the name server"])
def test_a_hub_that_does_not_answer_raises_in_time_and_is_not_asked_again(silent, hub, cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(hub_requests, "ANSWER_SECONDS", 0.5)
    asked, released = [], threading.Event()

    def never(*arguments, **more):
        asked.append(arguments)
        released.wait(20)

    with monkeypatch.context() as context:
        if silent == "the host":
            context.setattr(hub, "process_request", never)
        else:
            context.setattr(socket, "getaddrinfo", never)
        begin = time.monotonic()
        text = fails()
        assert time.monotonic() - begin < 5
        released.set()
    assert f"cannot reach {hub.url} (no answer in 0.5 s; HF_HUB_ETAG_TIMEOUT allows more). Check the network" in text
    assert len(asked) == 1 and hub.slept == [] and not cache.exists()


def test_the_clients_own_variable_decides_how_long_an_answer_may_take(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "20")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 20)
    monkeypatch.setattr(hub_requests, "ANSWER_SECONDS", 0)
    assert_whole(hub, fetch(SPEC))


def test_refused_with_everything_in_the_cache_goes_on_with_a_warning(hub, cache):
    files = fetch(SPEC)
    hub.shutdown()
    hub.server_close()
    close_session()
    with pytest.warns(UserWarning, match="files in the cache, because .* cannot reach"):
        assert fetch(SPEC) == files


def test_offline_uses_the_cache_alone(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and it is not in" in fails()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = fetch(SPEC)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert fetch(SPEC) == cached(SPEC) == files and hub.log == []
    files.vae.resolve().write_bytes(b"half")  # the cache alone is enough to tell
    assert "wrong bytes" in fails() and hub.log == []


def test_foreign_page_raises_download_error(hub, cache):
    hub.faults[TURBO] = ("status", 200, {"Content_Type": "text/html"})
    assert "no answer that the Hub would give" in fails()


def test_small_disk_raises_before_the_first_byte(hub, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6 - 611_999, 611_999))
    assert download.plan(MODEL, SPEC.needs()).free == 611_999
    text = fails()
    assert "needs 612.0 kB more" in text and "has 612.0 kB free" in text and "HF_HOME" in text
    assert hub.fetched() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6 - 612_000, 612_000))
    assert_whole(hub, fetch(SPEC))


def test_a_user_without_a_home_gets_no_folder_of_that_name(hub, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.path.join("~", ".cache", "huggingface", "hub"))
    text = fails()
    assert "'~/.cache/huggingface/hub'" in text and "no home folder. Set HF_HOME" in text
    assert not hub.fetched() and not (tmp_path / "~").exists()


def test_disk_that_fills_up_raises_download_error(hub, cache, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "hf_hub_download", full)
    text = fails()
    assert "no space left in" in text and "HF_HOME" in text


def test_stale_partial_files_are_removed_and_fresh_ones_stay(hub, cache):
    blobs = cache / "models--Wan-AI--Wan2.1-T2V-1.3B" / "blobs"
    blobs.mkdir(parents=True)
    old, fresh = blobs / "a.1.incomplete", blobs / "b.2.incomplete"
    for path, days in ((old, 1.1), (fresh, 0.9)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - days * 24 * 3600,) * 2)
    download.plan(MODEL, SPEC.needs())
    assert old.exists()
    fetch(SPEC)
    assert leftovers(cache) == [fresh]


def test_token_for_a_foreign_endpoint_warns(hub, cache, monkeypatch):
    download.plan(MODEL, SPEC.needs())  # no token, no warning
    assert hub.tokens == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.warns(UserWarning, match=f"token goes to {hub.url}, which is not the Hub") as warned:
        download.plan(MODEL, SPEC.needs())
    assert "hf_secret" not in str(warned[0].message) and "Bearer hf_secret" in hub.tokens


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.mark.parametrize(("where", "status"), [(TURBO, 500), (WAN, 404), (T5, 429), (T5, 403), (f"{MODEL}.pth", 200)])
def test_password_and_query_of_the_endpoint_are_never_shown(hub, cache, monkeypatch, where, status):
    host = hub.url.removeprefix("http://")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://user:hunter2@{host}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://user:hunter2@{host}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    records = Records()
    monkeypatch.setattr(log := logging.getLogger("huggingface_hub"), "handlers", [*log.handlers, records])
    hub.faults[where] = ("status", status, {})
    with pytest.warns(UserWarning, match="token goes to http://127"), pytest.raises(DownloadError) as caught:
        fetch(SPEC)
    shown = "".join([*traceback.format_exception(caught.value), *records.lines])
    assert bool(records.lines) == (status == 429)
    assert "hunter2" not in shown and "hf_secret" not in shown and host in shown, shown


@pytest.mark.parametrize(
    "text",
    [
        "hf-mirror.com", "http://[::1", "ftp://a.b", "http://", "http://u:hunter2@[::1", "http://a:b",
        "http://u:1/hunter2@a.b", "http://u:hunter2＠a.b", "ftp://a.b#hunter2", "hf_hunter2", "s:hunter2@://a.b",
    ],
)  # fmt: skip
def test_malformed_endpoint_raises_input_error_that_names_the_variable(cache, monkeypatch, text):
    monkeypatch.setattr(constants, "ENDPOINT", text)
    with pytest.raises(InputError, match=r"HF_ENDPOINT is .* Expected an http") as caught:
        fetch(SPEC)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("HF_ENDPOINT", "http://[::1"), ("HF_HUB_DOWNLOAD_TIMEOUT", "10s")])
def test_malformed_variable_is_one_line_on_the_command_line(hub, tmp_path, name, value):
    process = turbo_nb("download", MODEL, hub=hub, home=tmp_path, **{name: value})
    out, err = process.communicate(timeout=SLOW)
    assert (process.returncode, out) == (2, "") and err.startswith(f"error: {name} is {value!r}. Expected ")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@host:8/x?key=1 failed", "https://host:8/x failed"),
        ("url 'http://u:p@[::1]/a' and http://b?c", "url 'http://[::1]/a' and http://b"),
        ("no address? none", "no address? none"),
        ("HTTPS:/u:p@h/x#k=1?2 as a path", "HTTPS:/h/x as a path"),
        ("a folder run 1:/x#1?.mp4", "a folder run 1:/x#1?.mp4"),
        ("file:///home/me@work/a?b.png", "file:///home/me@work/a?b.png"),
    ],
)
def test_secrets_are_removed_from_addresses_in_text(text, shown):
    assert without_secrets(text) == str(InputError(text)) == shown


def test_exception_of_on_progress_ends_the_run(hub, cache):
    class Cancel(Exception):
        pass

    def cancel(progress):
        if progress.file.file.path == T5:
            raise Cancel

    with pytest.raises(Cancel):
        fetch(SPEC, on_progress=cancel)
    assert not leftovers(cache) and cached(SPEC) is None
    assert_whole(hub, fetch(SPEC))


def test_progress_in_a_log_is_a_line_a_file(hub, cache, capsys):
    with progress_bars() as show:
        fetch(SPEC, on_progress=show)
    assert capsys.readouterr().err.splitlines() == [
        f"{f.file.path}: {'200.0' if f.size == 200_000 else '3.0'} kB, checked"
        for f in download.plan(MODEL, SPEC.needs()).files
    ]


def test_progress_in_a_notebook_is_tqdm(hub, cache, monkeypatch, capsys):
    monkeypatch.setattr(environment, "in_notebook", lambda: True)
    with progress_bars() as show:
        fetch(SPEC, on_progress=show)
    text = capsys.readouterr().err
    assert "all files: 100%" in text and "check spiece.model: 100%" in text


def test_command_line_shows_plan_progress_and_paths(hub, tmp_path):
    home = tmp_path / "home"
    first = turbo_nb("download", MODEL, hub=hub, home=home)
    out, err = first.communicate(timeout=SLOW)
    assert first.returncode == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(f"{MODEL}: 7 files, 612.0 kB; 612.0 kB to fetch") and len(lines) == 1 + 7 + 4
    assert [line.split()[0] for line in lines[-4:]] == ["transformer", "vae", "text", "tokenizer"]
    assert all(Path(line[13:]).exists() and str(home / "hub") in line for line in lines[-4:])
    assert f"{MODEL}.pth: 200.0 kB, checked" in err and "Traceback" not in err
    hub.log.clear()
    hub.faults[UMT5] = ("status", 500, {})
    second = turbo_nb("download", MODEL, hub=hub, home=home)
    out, err = second.communicate(timeout=SLOW)
    assert second.returncode == 0 and "nothing to fetch" in out and hub.fetched() == []
    assert err.count("\n") == 1 and err.startswith("note: going on with the files in the cache")
    third = turbo_nb("download", "Wan2.1-14B", hub=hub, home=home, HF_HUB_OFFLINE="1")
    nano = turbo_nb("download", "nano", hub=hub, home=home, PYTHONPROFILEIMPORTTIME="1")
    out, err = third.communicate(timeout=SLOW)
    assert (third.returncode, out) == (2, "") and err.startswith("error: TurboDiffusion/") and err.count("\n") == 1
    out, err = nano.communicate(timeout=SLOW)
    assert out == "nano comes with the package: nothing to download\n"
    assert {line.partition(":")[0] for line in err.splitlines()} == {"import time"}
    assert "diffusers" not in err  # because its import takes 2 s


def test_run_after_a_kill_fetches_the_rest(hub, cache):
    hub.faults[T5] = ("stuck",)
    process = turbo_nb("download", MODEL, hub=hub, home=cache.parent)
    assert hub.stuck.wait(SLOW)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=SLOW)
    hub.release.set()
    assert cached(SPEC) is None
    half = leftovers(cache)
    assert len(half) == 1 and half[0].suffix == ".incomplete"
    with contextlib.suppress(FileNotFoundError):
        os.utime(half[0], (time.time() - 2 * 24 * 3600,) * 2)
    hub.faults.clear()
    hub.log.clear()
    assert_whole(hub, fetch(SPEC))
    assert hub.fetched() == [T5, *TOKENIZER_FILES] and not leftovers(cache)
