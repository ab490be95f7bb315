"""model="auto": the best that is downloaded and fits; never a download unasked."""

import pytest
from typer.testing import CliRunner

import turbo_nb
from turbo_nb import catalog, cli, generation
from turbo_nb.errors import DownloadError, InputError
from turbo_nb.files import hub, resolve
from turbo_nb.machine import probe
from turbo_nb.runtime import plan
from turbo_nb.runtime.plan import GB

SMALL, MIDDLE, LARGE, I2V = (name for name in catalog.MODELS if name != "nano")
HERE = hub.Files(transformers=(), vae=None, text_encoder=None, tokenizer=None)


@pytest.fixture
def machine(monkeypatch):
    """machine(gigabytes of GPU memory or None, (model, int8), …, host=gigabytes of main memory): those models are
    downloaded"""

    def make(gigabytes, *downloaded, host=500):
        known = {(catalog.find(name), quantised) for name, quantised in downloaded}
        monkeypatch.setattr(
            probe, "device_of", lambda device: device if device != "auto" else "cuda" if gigabytes else "cpu"
        )
        monkeypatch.setattr(probe, "free_memory", lambda device: (host if device == "cpu" else gigabytes) * GB)
        monkeypatch.setattr(plan, "fused_on", lambda: True)
        monkeypatch.setattr(hub, "cached", lambda spec, quantised=False: HERE if (spec, quantised) in known else None)

    def refuse(*args, **kwargs):
        raise AssertionError("a download was begun unasked")

    monkeypatch.setattr(hub, "plan", refuse)
    monkeypatch.setattr(hub, "fetch", refuse)
    monkeypatch.setattr(hub, "part", refuse)
    return make


@pytest.mark.parametrize(
    ("gigabytes", "downloaded", "chosen"),
    [
        (80, [(SMALL, False), (MIDDLE, True), (LARGE, True)], (LARGE, True)),
        (80, [(LARGE, True), (LARGE, False)], (LARGE, False)),
        (32, [(LARGE, True), (LARGE, False)], (LARGE, True)),
        (20, [(SMALL, False), (LARGE, True)], (SMALL, False)),
        (24, [(SMALL, False), (LARGE, True)], (LARGE, True)),
        (24, [(SMALL, False), (MIDDLE, True)], (MIDDLE, True)),
        (80, [(I2V, False), (SMALL, True)], (SMALL, True)),
        (80, [(I2V, False)], ("nano", "auto")),
        (3, [(SMALL, True)], ("nano", "auto")),
        (None, [(LARGE, False)], ("nano", "auto")),
    ],
)
@pytest.mark.filterwarnings("ignore:model auto takes")
def test_the_best_that_is_here_and_fits(machine, gigabytes, downloaded, chosen):
    machine(gigabytes, *downloaded)
    assert resolve.choose() == chosen


@pytest.mark.filterwarnings("ignore:model auto takes")
def test_main_memory_counts(machine):
    machine(24, (SMALL, False), (MIDDLE, True), host=64)
    assert resolve.choose() == (MIDDLE, True)
    machine(24, (SMALL, False), (MIDDLE, True), host=8)
    assert resolve.choose() == (SMALL, False)


@pytest.mark.parametrize(
    ("gigabytes", "downloaded", "words"),
    [
        (80, [], f"takes nano; this GPU could run {LARGE}, .* turbo-nb download {LARGE}$"),
        (20, [(SMALL, True)], f"takes {SMALL}; this GPU could run {MIDDLE}, .* turbo-nb download {MIDDLE} --quant$"),
    ],
)
def test_what_would_be_better_is_said_in_one_line(machine, gigabytes, downloaded, words):
    machine(gigabytes, *downloaded)
    with pytest.warns(UserWarning, match=words) as told:
        resolve.choose()
    assert len(told) == 1 and "\n" not in str(told[0].message)


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_nothing_would_be_better(machine):
    machine(80, (LARGE, True))
    resolve.choose()
    machine(None)
    resolve.choose()
    machine(2)
    resolve.choose()


@pytest.mark.filterwarnings("ignore:model auto takes")
def test_device_memory_and_linears_that_are_asked_for_count(machine):
    machine(80, (LARGE, True), (LARGE, False), (SMALL, False))
    assert resolve.choose(device="cpu") == ("nano", "auto")
    assert resolve.choose(memory=16 * GB) == (SMALL, False)
    assert resolve.choose(quant_linear=True) == (LARGE, True)
    machine(32, (LARGE, True), (SMALL, False))
    assert resolve.choose(quant_linear=False) == (SMALL, False)


class Stop(Exception):
    pass


@pytest.fixture
def resolved(monkeypatch):
    """What `load_pipeline` asks `sources` for"""
    calls = []

    def resolve(model, **named):
        calls.append((model, named["quantised"]))
        raise Stop

    monkeypatch.setattr(resolve, "resolve", resolve)
    return calls


def test_load_pipeline_takes_it(machine, resolved):
    machine(32, (LARGE, True), (LARGE, False))
    with pytest.raises(Stop):
        turbo_nb.load_pipeline()
    machine(None, (LARGE, True))
    with pytest.raises(Stop):
        turbo_nb.load_pipeline("auto", quant_linear=True)
    assert resolved == [(LARGE, True), ("nano", True)]


def test_a_clip_is_checked_against_it(machine):
    machine(80, (LARGE, False))
    assert generation.check_clip("auto", "x") == (1280, 720, 81)


def test_auto_with_a_checkpoint_is_what_its_tensors_say():
    found = resolve.resolve("auto", checkpoint=catalog.NANO.folder / "transformer")
    assert found.spec is catalog.NANO


def test_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="'cuda:1', and torch sees no GPU"):
        resolve.choose(device="cuda:1")


@pytest.fixture
def planned(machine, monkeypatch):
    """What a download is planned for; it ends there"""
    calls = []

    def record(spec, quantised):
        calls.append((spec.name, quantised))
        raise DownloadError("as far as this test goes")

    monkeypatch.setattr(hub, "plan", record)
    return calls


@pytest.mark.parametrize(
    ("gigabytes", "model", "quantised", "wanted"),
    [
        (80, "auto", None, (LARGE, False)),
        (20, "auto", None, (MIDDLE, True)),
        (24, "auto", None, (LARGE, True)),
        (80, "auto", True, (LARGE, True)),
        (32, LARGE, None, (LARGE, True)),
        (32, LARGE, False, (LARGE, False)),
        (80, I2V, None, (I2V, False)),
        (48, I2V, None, (I2V, True)),
        (None, LARGE, None, (LARGE, False)),
        (None, "auto", None, ("nano", False)),
    ],
)
def test_a_download_that_is_asked_for_is_of_the_files_that_fit(machine, planned, gigabytes, model, quantised, wanted):
    machine(gigabytes)
    with pytest.raises(DownloadError):
        resolve.download_model(model, quantised=quantised)
    assert planned == [wanted]


@pytest.mark.parametrize(("flags", "quantised"), [([], None), (["--quant"], True), (["--no-quant"], False)])
def test_on_the_command_line_too(monkeypatch, flags, quantised):
    calls = []
    monkeypatch.setattr(resolve, "download_model", lambda model, quantised: calls.append((model, quantised)))
    assert CliRunner().invoke(cli.app, ["download", LARGE, *flags]).exit_code == 0
    assert calls == [(LARGE, quantised)]


def test_what_comes_with_the_package_is_not_fetched(capsys):
    assert turbo_nb.download_model("nano") is None
    assert "nothing to download" in capsys.readouterr().out
