"""model="auto": the best that is downloaded and fits; never a download unasked."""

import shutil

import pytest
from diffusers import AutoencoderKLWan
from helpers import upstream_names
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import turbo_nb
from turbo_nb import catalog, cli, pipeline
from turbo_nb.errors import CheckpointError, DownloadError, InputError, TurboNbError, TurboNbWarning
from turbo_nb.files import download, fingerprint, hub, resolve
from turbo_nb.machine import probe
from turbo_nb.runtime import plan
from turbo_nb.runtime.plan import GB
from turbo_nb.settings import LoadOptions

NANO = catalog.NANO.folder
SMALL, MIDDLE, LARGE, I2V = (name for name in catalog.MODELS if name != "nano")


@pytest.fixture
def machine(monkeypatch):
    """machine(gigabytes of GPU memory or None, (model, int8), …, host=gigabytes of main memory): those models are
    downloaded"""

    def make(gigabytes, *downloaded, host=500):
        known = {catalog.find(name).needs(quantized) for name, quantized in downloaded}
        monkeypatch.setattr(
            probe, "device_of", lambda device: device if device != "auto" else "cuda" if gigabytes else "cpu"
        )
        monkeypatch.setattr(probe, "free_memory", lambda device: (host if device == "cpu" else gigabytes) * GB)
        monkeypatch.setattr(plan, "fused_on", lambda device: True)
        monkeypatch.setattr(hub, "cached", lambda files: ["here"] if files in known else None)
        monkeypatch.setattr(hub, "find", lambda file: None)

    def refuse(*args, **kwargs):
        raise AssertionError("a download was begun unasked")

    monkeypatch.setattr(hub, "plan", refuse)
    monkeypatch.setattr(hub, "fetch", refuse)
    return make


def taken(**options) -> tuple[str, bool]:
    """The model and the number format that "auto" stands for"""
    found = resolve.resolve(LoadOptions(**options))
    return found.spec.name, found.quant_linear


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
        (80, [(I2V, False)], ("nano", False)),
        (3, [(SMALL, True)], ("nano", False)),
        (None, [(LARGE, False)], ("nano", False)),
    ],
)
@pytest.mark.filterwarnings("ignore:model auto takes")
def test_the_best_that_is_here_and_fits(machine, gigabytes, downloaded, chosen):
    machine(gigabytes, *downloaded)
    assert taken() == chosen


@pytest.mark.filterwarnings("ignore:model auto takes")
def test_main_memory_counts(machine):
    machine(24, (SMALL, False), (MIDDLE, True), host=64)
    assert taken() == (MIDDLE, True)
    machine(24, (SMALL, False), (MIDDLE, True), host=8)
    assert taken() == (SMALL, False)


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
        taken()
    assert len(told) == 1 and "\n" not in str(told[0].message)


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_nothing_would_be_better(machine):
    machine(80, (LARGE, True))
    taken()
    machine(None)
    taken()
    machine(2)
    taken()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("arch", "taken_model"), [((6, 0), "nano"), ((7, 5), SMALL), ((8, 0), SMALL)], ids=["P100", "T4", "A100"]
)
def test_auto_takes_no_released_model_on_a_gpu_without_tensor_cores(machine, monkeypatch, arch, taken_model):
    machine(15, (SMALL, False), host=12)
    monkeypatch.setattr(probe, "probe", lambda device=None: probe.Machine(gpu="a card", gpu_count=1, arch=arch))
    found = resolve.resolve(LoadOptions())
    assert found.spec.name == taken_model and ("no Tensor Cores" in found.reason) == (arch == (6, 0))
    assert resolve.resolve(LoadOptions(model=SMALL)).spec.name == SMALL  # a name is obeyed


@pytest.mark.filterwarnings("ignore:model auto takes")
def test_device_memory_and_linears_that_are_asked_for_count(machine):
    machine(80, (LARGE, True), (LARGE, False), (SMALL, False))
    assert taken(device="cpu") == ("nano", False)
    assert taken(memory=16 * GB) == (SMALL, False)
    assert taken(quant_linear=True) == (LARGE, True)
    machine(32, (LARGE, True), (SMALL, False))
    assert taken(quant_linear=False) == (SMALL, False)


def test_the_number_format_that_auto_decides_for_is_loaded(machine):
    """On 32 GB both files are here and only the int8 file stays on the GPU; the decision was dropped once."""
    machine(32, (LARGE, True), (LARGE, False))
    found = resolve.resolve()
    assert found.quant_linear and found.transformers == found.spec.quant_files
    assert found.plan().offload == "none" and found.sizes.transformer < 16 * GB


def test_a_model_by_name_takes_the_number_format_that_suits_the_gpu(machine):
    machine(32, (LARGE, True), (LARGE, False))
    assert taken(model=LARGE) == (LARGE, True)
    machine(80, (LARGE, True), (LARGE, False))
    assert taken(model=LARGE) == (LARGE, False)
    machine(80, (LARGE, True))
    assert taken(model=LARGE) == (LARGE, True)  # because the other file would be a download
    assert taken(model=LARGE, quant_linear=False) == (LARGE, False)
    machine(None)
    assert taken(model=LARGE) == (LARGE, False)


def test_what_was_resolved_stays_resolved_when_memory_changes(machine):
    machine(48, (LARGE, True), (SMALL, False))
    found = resolve.resolve()
    machine(10, (LARGE, True), (SMALL, False))  # the model is loaded now
    assert found.spec.name == LARGE and found.plan().budget == 48 * GB


def test_everything_is_checked_before_a_download_or_a_load(machine, monkeypatch):
    machine(80)
    monkeypatch.setattr(pipeline, "_modules", lambda *_: pytest.fail("loaded"))
    for options in (
        {"memory_plan": "cpu-tex"}, {"memory_plan": "group", "device": "cpu"}, {"sla_topk": 2}, {"quant_linear": "yes"},
        {"memory": -3}, {"memory": 0}, {"device": "gpu"}, {"model": "Wan3"}, {"vae": "nowhere.pth"},
        {"attention_type": "sagesla", "device": "cpu"},
    ):  # fmt: skip
        with pytest.raises(TurboNbError):
            turbo_nb.load_pipeline(**{"model": LARGE} | options)


def test_a_topk_that_dense_attention_does_not_use_is_reported():
    with pytest.warns(TurboNbWarning, match=r"^sla_topk is 0.5, which dense attention does not use"):
        resolve.resolve(LoadOptions(model="nano", attention_type="original", sla_topk=0.5))


def test_a_file_without_projections_gets_dense_attention_unless_sla_is_asked_for(tmp_path):
    state = load_file(catalog.NANO.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({key: t for key, t in state.items() if "proj_l" not in key}, tmp_path / "plain.safetensors")
    given = {"model": tmp_path / "plain.safetensors", "device": "cpu", "vae": NANO / "vae",
             "text_encoder": NANO / "text_encoder", "tokenizer": NANO / "tokenizer"}  # fmt: skip
    with pytest.warns(TurboNbWarning, match="has no SLA projections, so dense attention is used"):
        assert resolve.resolve(LoadOptions(**given)).attention_type == "original"
    assert resolve.resolve(LoadOptions(**given, attention_type="sla")).attention_type == "sla"


def test_the_identity_follows_what_a_clip_depends_on(tmp_path):
    nano = {"model": "nano", "device": "cpu"}
    same = resolve.resolve(LoadOptions(**nano)).identity
    assert resolve.resolve(LoadOptions(**nano, memory=1e12, memory_plan="free-text")).identity == same
    assert resolve.resolve(LoadOptions(device="cpu")).identity == same
    others = [{"sla_topk": 0.5}, {"attention_type": "original"}, {"quant_linear": True}]
    found = [resolve.resolve(LoadOptions(**nano, **more)).identity for more in others]
    assert same not in found and len({str(one) for one in found}) == 3
    moved = shutil.copytree(NANO / "vae", tmp_path / "vae")
    given, elsewhere = (resolve.resolve(LoadOptions(**nano, vae=path)).identity for path in (NANO / "vae", moved))
    assert given == elsewhere != same


def test_auto_with_a_checkpoint_is_what_its_tensors_say():
    found = resolve.resolve(LoadOptions(checkpoint=catalog.NANO.folder / "transformer", device="cpu"))
    assert found.spec is catalog.NANO and "files were given" in found.reason


def test_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="'cuda:1', and torch sees no GPU"):
        resolve.resolve(LoadOptions(device="cuda:1"))


@pytest.fixture
def planned(machine, monkeypatch):
    """What a download is planned for; it ends there"""
    calls = []

    def record(name, needed):
        calls.append((name, tuple(needed) == catalog.find(name).needs(True) and name != "nano"))
        raise DownloadError("as far as this test goes")

    monkeypatch.setattr(hub, "plan", record)
    return calls


@pytest.mark.parametrize(
    ("gigabytes", "model", "quantized", "wanted"),
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
def test_a_download_that_is_asked_for_is_of_the_files_that_fit(machine, planned, gigabytes, model, quantized, wanted):
    machine(gigabytes)
    with pytest.raises(DownloadError):
        download.download_model(model, quantized=quantized)
    assert planned == [wanted]


@pytest.mark.parametrize(("flags", "quantized"), [([], None), (["--quant"], True), (["--no-quant"], False)])
def test_on_the_command_line_too(monkeypatch, flags, quantized):
    calls = []
    monkeypatch.setattr(download, "download_model", lambda model, quantized, on_plan: calls.append((model, quantized)))
    assert CliRunner().invoke(cli.app, ["download", LARGE, *flags]).exit_code == 0
    assert calls == [(LARGE, quantized)]


def test_what_comes_with_the_package_is_not_fetched(capsys):
    plans = []
    assert turbo_nb.download_model("nano", on_plan=plans.append) is None
    assert "nothing to download" in str(plans[0]) and capsys.readouterr().out == ""


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(NANO, tmp_path / "copy")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_any_change_in_any_part_of_a_folder_is_another_identity(copy, part):
    before = resolve.resolve(LoadOptions(model=copy, device="cpu")).identity
    assert resolve.resolve(LoadOptions(model=copy, device="cpu")).identity == before
    file = max((copy / part).iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 1 if part != "tokenizer" else 0
    file.write_bytes(bytes(data) + (b" " if part == "tokenizer" else b""))
    assert resolve.resolve(LoadOptions(model=copy, device="cpu")).identity != before


def test_a_change_in_one_matrix_of_a_large_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE", 0)
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(range(256)) * 2**17)  # 32 MiB: a piece of 16 KiB in every 32 KiB
    before = fingerprint.fingerprint(path)
    data = bytearray(path.read_bytes())
    data[2**23 : 2**23 + 2**16] = bytes(2**16)
    path.write_bytes(data)
    assert fingerprint.fingerprint(path) != before


def test_parts_that_do_not_fit_together_are_found_before_a_load(tmp_path):
    state = load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "condition_embedder.text_embedder.linear_1.weight"
    state[name] = state[name][:, :64].contiguous()
    save_file(state, tmp_path / "narrow.safetensors")
    given = {"vae": NANO / "vae", "text_encoder": NANO / "text_encoder", "tokenizer": NANO / "tokenizer"}
    with pytest.raises(CheckpointError, match=r"text width is 64 in .*128 in .*Expected the same"):
        resolve.resolve(LoadOptions(model=tmp_path / "narrow.safetensors", device="cpu", **given))


def test_a_wrong_tokenizer_or_encoder_is_found_before_a_download(machine, tmp_path):
    machine(80)
    for given in ({"tokenizer": tmp_path}, {"tokenizer": tmp_path / "nope"}, {"text_encoder": NANO / "vae"}):
        with pytest.raises(CheckpointError):
            resolve.resolve(LoadOptions(model=LARGE, **given))


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_half_of_a_vae_is_found_before_a_download(machine, tmp_path, part):
    machine(80)
    state = load_file(NANO / "vae" / "diffusion_pytorch_model.safetensors")
    kept = {key: one for key, one in state.items() if part in key or key.startswith("decoder.conv_in")}
    save_file(kept, tmp_path / "vae.safetensors")
    found = resolve.resolve(LoadOptions(model=SMALL, vae=tmp_path / "vae.safetensors"))
    with pytest.raises(CheckpointError, match=r"vae\.safetensors.* Expected "):
        found.fetch()


def test_a_backend_of_sagesla_without_sagesla_is_an_error():
    with pytest.raises(InputError, match="attention_backend is"):
        resolve.resolve(LoadOptions(model="nano", device="cpu", attention_backend="reference"))


@pytest.mark.parametrize(
    "options", [{"model": "x" * 300}, {"checkpoint": "x" * 300}, {"model": "nano", "vae": "x" * 300}]
)
def test_a_name_that_no_file_can_have_is_an_error_of_ours(options):
    with pytest.raises(TurboNbError):
        resolve.resolve(LoadOptions(device="cpu", **options))


def test_parts_in_the_transformers_own_file_are_taken(tmp_path):
    """ComfyUI's files can hold the transformer, the VAE and umT5 together."""
    arch = catalog.Arch(dim=128, num_heads=1, num_layers=1, ffn_dim=64)
    encoder = load_file(catalog.NANO.folder / "text_encoder" / "model.safetensors")
    parts = {
        "model.diffusion_model.": upstream_names(arch, sla=True, int8=False, text_dim=128),
        "first_stage_model.": AutoencoderKLWan(base_dim=8).state_dict(),
        "text_encoders.umt5.": encoder,
    }
    path = tmp_path / "whole.safetensors"
    save_file({prefix + name: tensor.clone() for prefix, part in parts.items() for name, tensor in part.items()}, path)
    tokenizer = catalog.NANO.folder / "tokenizer"
    found = resolve.resolve(LoadOptions(model=path, tokenizer=tokenizer, device="cpu"))
    assert (found.vae.kind, found.text_encoder.kind, found.downloads) == ("vae", "text encoder", ())
    assert found.vae.path == found.text_encoder.path == path
    given = resolve.resolve(LoadOptions(model=path, vae=path, text_encoder=path, tokenizer=tokenizer, device="cpu"))
    assert (given.vae.kind, given.text_encoder.kind) == ("vae", "text encoder")
