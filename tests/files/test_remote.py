"""Repositories, files and revisions of the Hub as a model: judged, planned, fetched, checked and found again."""

import hashlib
import io
import json
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import command_line, tiny_transformer, to_upstream
from huggingface_hub import constants, hf_hub_download
from loopback_hub import T5, WAN
from safetensors.torch import load_file, save, save_file
from transformers import UMT5Config, UMT5EncoderModel

import turbo_nb
from turbo_nb import batch, catalog, pipeline
from turbo_nb.catalog import HubFile
from turbo_nb.errors import CheckpointError, DownloadError, InputError
from turbo_nb.files import hub as download
from turbo_nb.files import locate, recognise, remote, resolve
from turbo_nb.files.filenames import VOCABULARIES
from turbo_nb.settings import LoadOptions

NANO = catalog.NANO.folder
TINY = catalog.Arch(dim=128, num_heads=2, num_layers=2, ffn_dim=256)
TINY_I2V = replace(TINY, in_channels=36)
SGLANG = "IPostYellow/TurboWan2.1-T2V-Tiny-Diffusers"
PROMPT = "a large red circle moving from left to right on a black background"
EVIL = b"import pathlib, os; pathlib.Path(os.environ['TURBO_NB_EVIL']).write_text('ran')"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def state(arch=TINY, seed=0) -> dict[str, torch.Tensor]:
    """A random transformer with diffusers' names, in bf16."""
    torch.manual_seed(seed)
    model = tiny_transformer(arch, text_dim=128)
    return {key: torch.randn_like(t).mul(0.02).bfloat16() for key, t in model.state_dict().items()}


def sglang(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".processor.sla.proj_l", ".attn_op.local_attn.proj_l"): t for key, t in tensors.items()}


def int8_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with SGLang's int8 tiles."""
    from turbo_nb.linear import int8_quantize

    out = {}
    for key, tensor in tensors.items():
        if key.startswith("blocks.") and key.endswith(".weight") and tensor.ndim == 2 and "proj_l" not in key:
            out[key], out[f"{key}_scale_inv"] = int8_quantize(tensor.float())
        else:
            out[key] = tensor
    return out


def torch_bytes(tensors) -> bytes:
    out = io.BytesIO()
    torch.save(tensors, out)
    return out.getvalue()


def config(arch=TINY) -> bytes:
    return json.dumps(
        {"_class_name": "WanTransformer3DModel", "num_layers": arch.num_layers, "num_attention_heads": arch.num_heads,
         "attention_head_dim": arch.dim // arch.num_heads, "ffn_dim": arch.ffn_dim, "in_channels": arch.in_channels,
         "out_channels": 16, "text_dim": 128, "attention_type": "sla", "sla_topk": 0.1,
         "auto_map": {"AutoModel": "modeling.Evil"}}
    ).encode()  # fmt: skip


def folder_of(part: str, prefix: str = "") -> dict[str, bytes]:
    """The files of a part of nano, as a repository has them."""
    return {f"{prefix or part}/{path.name}": path.read_bytes() for path in (NANO / part).iterdir()}


@pytest.fixture(scope="module")
def repository() -> dict[str, bytes]:
    """SGLang's layout: two shards with an index, SGLang's names, a foreign pipeline class, and code."""
    tensors = sglang(state())
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    files = {f"transformer/{name}": save({key: tensors[key] for key in keys}) for name, keys in shards.items()}
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    tokenizer = folder_of("tokenizer") | {"tokenizer/tokenizer.json": b"{}", "tokenizer/tokenization_evil.py": EVIL}
    tokenizer.pop("tokenizer/added_tokens.json", None)
    return {
        **files, INDEX: json.dumps(index).encode(), "transformer/config.json": config(),
        "model_index.json": json.dumps({"_class_name": ["evil", "WanDMDPipeline"]}).encode(),
        "evil.py": EVIL, "transformer/modeling.py": EVIL,
        "transformer/diffusion_pytorch_model.fp16.safetensors": save(sglang(state(seed=9))), "README.md": b"# x",
        **folder_of("vae"), **folder_of("text_encoder"), **tokenizer,
    }  # fmt: skip


NEEDED = {INDEX, "transformer/config.json", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
          "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"}  # fmt: skip


@pytest.fixture
def parts() -> dict:
    return {"vae": NANO / "vae", "text_encoder": NANO / "text_encoder", "tokenizer": NANO / "tokenizer"}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """The file that the repositories' code would write."""
    monkeypatch.setenv("TURBO_NB_EVIL", str(tmp_path / "evil"))
    return tmp_path / "evil"


@pytest.fixture
def small_disk(monkeypatch):
    def make(free: int) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - free, free))

    return make


def found(model, **more) -> resolve.ResolvedModel:
    return resolve.resolve(LoadOptions(model=model, device="cpu", **more))


def bytes_sent(hub, repo) -> int:
    return sum(count for (name, _), count in hub.sent.items() if name == repo)


def go_offline(hub, monkeypatch):
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_repository_in_sglangs_layout_is_planned_before_a_byte_of_weights(hub, cache, repository):
    hub.add(SGLANG, repository)
    model = found(SGLANG)
    assert hub.fetched() == [] and not cache.exists()
    assert model.spec.arch == TINY and model.spec.name == f"{SGLANG}@{hub.commits[SGLANG]}"
    assert (model.attention_type, model.quant_linear) == ("sla", False)
    assert [file.path for file in model.downloads] == ["transformer/", "vae/", "text_encoder/", "tokenizer/"]
    assert {file.commit for file in model.downloads} == {hub.commits[SGLANG]}
    numbers = sum(tensor.numel() for tensor in state().values())
    assert model.sizes.transformer == 4 * numbers and model.plan().needs > 0
    assert len([path for kind, path in hub.log if kind == "API"]) == 1  # because a commit does not change
    assert bytes_sent(hub, SGLANG) < sum(map(len, repository.values()))


def test_a_repository_is_fetched_as_one_plan_and_found_again_offline(hub, cache, repository, monkeypatch, evil):
    hub.add(SGLANG, repository)
    before = found(SGLANG)
    after = before.fetch()
    assert not after.downloads and after.identity == before.identity
    here = {path.relative_to(cache).as_posix().split("/", 3)[3] for path in cache.rglob("snapshots/*/**/*.*")}
    tokenizer = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert here == NEEDED | {*folder_of("vae")} | {*folder_of("text_encoder")} | tokenizer
    assert torch.equal(
        after.transformers[0].tensors["blocks.1.attn2.to_q.weight"], state()["blocks.1.attn2.to_q.weight"]
    )
    assert after.transformers[0].sla

    go_offline(hub, monkeypatch)
    again = found(SGLANG)
    assert not again.downloads and again.identity == before.identity and hub.log == []
    assert again.identity["model"] == [f"{SGLANG}/transformer@{hub.commits[SGLANG]}"]
    assert again.identity["vae"] == f"{SGLANG}/vae@{hub.commits[SGLANG]}"
    assert found(f"{SGLANG}@{hub.commits[SGLANG]}").identity == before.identity
    assert found(f"{SGLANG}/transformer").identity == before.identity
    assert not evil.exists() and not any("evil" in path for _, path in hub.log)


def test_a_clip_of_a_repository_shows_where_its_files_are_from(hub, cache, repository, parts, evil, tmp_path):
    hub.add(SGLANG, repository)
    clip = {"num_frames": 5, "num_steps": 2, "resolution": "64x48"}
    made = turbo_nb.generate(turbo_nb.load_pipeline(SGLANG, device="cpu", tokenizer=NANO / "tokenizer"), PROMPT, **clip)
    save_file(state(), tmp_path / "tiny.safetensors")
    local = turbo_nb.load_pipeline(tmp_path / "tiny.safetensors", device="cpu", **parts)
    assert (made.frames == turbo_nb.generate(local, PROMPT, **clip).frames).all()
    assert made.record.model == f"{SGLANG}@{hub.commits[SGLANG]}"
    assert not evil.exists() and "evil" not in sys.modules and not any(path.endswith(".py") for _, path in hub.log)


def test_code_in_a_repository_is_never_asked_for_or_run(hub, cache, repository, evil, tmp_path, monkeypatch):
    """A tokenizer that brings code is an error, also where something answers "y" on stdin."""
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    hub.add(SGLANG, repository | {"tokenizer/tokenizer_config.json": json.dumps(settings).encode()})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        pipeline.load_pipeline(SGLANG, device="cpu")
    assert not evil.exists() and not list(cache.rglob("*.py")) and not any(path.endswith(".py") for _, path in hub.log)


def test_the_command_line_makes_a_clip_from_a_repository(hub, cache, repository, tmp_path):
    hub.add(SGLANG, repository)
    result = command_line(
        "t2v", "--model", SGLANG, "--device", "cpu", "--tokenizer_path", NANO / "tokenizer", "--prompt", PROMPT,
        "--num_frames", 5, "--num_steps", 1, "--resolution", "64x48", "--save_path", tmp_path / "x.mp4", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"^note: .* files, .* MB; .* MB to fetch, .* free in ", result.stderr)  # before the download
    assert f"{SGLANG}@{hub.commits[SGLANG]}" in command_line("info", tmp_path / "x.mp4", cwd=tmp_path).stdout


def test_download_prints_the_plan_and_fetches_all_that_the_model_needs(hub, cache, repository, tmp_path, monkeypatch):
    files = {name: data for name, data in repository.items() if not name.startswith(("vae", "text", "tokenizer"))}
    hub.add(SGLANG, files)
    result = command_line("download", SGLANG, cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert lines[0].startswith(f"{SGLANG}@{hub.commits[SGLANG]}: 10 files, ") and len(lines) == 1 + 10 + 4
    assert [line.split()[0] for line in lines[-4:]] == ["transformer", "vae", "text", "tokenizer"]
    assert {"Wan2.1_VAE.pth", T5, "spiece.model"} <= {*hub.fetched()}
    assert {line.split()[3].split("/", 2)[2].rstrip(",") for line in lines[1:5]} == NEEDED
    result = command_line("download", SGLANG, "--quant", cwd=tmp_path)
    assert result.returncode == 2 and "which names its files" in result.stderr
    hub.log.clear()
    assert "nothing to fetch" in command_line("download", SGLANG, cwd=tmp_path).stdout


def test_download_follows_a_branch_and_loading_does_not(hub, cache, repository):
    hub.add(SGLANG, repository)
    turbo_nb.download_model(SGLANG, on_progress=print)
    old = hub.commits[SGLANG]
    hub.add(SGLANG, repository | {"new.txt": b""})
    hub.commits[SGLANG] = "f" * 40
    assert found(SGLANG).spec.name.endswith(old)
    turbo_nb.download_model(SGLANG, on_progress=print)
    assert found(SGLANG).spec.name.endswith("f" * 40)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tiny.safetensors", lambda: save(sglang(state()))),
        ("sub/tiny.safetensors", lambda: save(to_upstream(state()))),
        ("tiny.pth", lambda: torch_bytes(to_upstream(state()))),
        ("tiny.pt", lambda: torch_bytes(state())),
        ("tiny.ckpt", lambda: torch_bytes({"state_dict": state()})),
        ("tiny.bin", lambda: torch_bytes(state())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_single_file(hub, cache, monkeypatch, caplog, parts, name, file):
    hub.add("o/r", {name: file(), "README.md": b""})
    monkeypatch.setattr(remote, "HEAD", 1 << 16)  # so that the file is larger than its head
    monkeypatch.setattr(remote, "TAIL", 1 << 16)
    model = found(f"o/r/{name}", **parts)
    assert model.spec.arch == TINY and model.attention_type == "sla" and hub.fetched() == []
    assert bytes_sent(hub, "o/r") < 0.5 * len(hub.repos["o/r"][name])
    if "/" not in name:
        assert found("o/r", **parts).downloads == model.downloads
    assert 0.4 * len(hub.repos["o/r"][name]) < model.to_fetch < 1.1 * len(hub.repos["o/r"][name])
    with caplog.at_level("INFO", "turbo_nb"):
        after = model.fetch()
    assert "1 files" in caplog.text and "to fetch" in caplog.text  # before the first byte
    assert hub.fetched() == [Path(name).name] and after.identity == model.identity
    assert torch.equal(after.transformers[0].tensors["blocks.1.attn2.to_q.weight"].bfloat16(),
                       state()["blocks.1.attn2.to_q.weight"])  # fmt: skip
    go_offline(hub, monkeypatch)
    for form in (f"o/r/{name}", f"{hub.url}/o/r/resolve/main/{name}?download=true", f"{hub.url}/o/r/blob/main/{name}",
                 f"https://huggingface.co/o/r/raw/{hub.commits['o/r']}/{name}"):  # fmt: skip
        assert found(form, **parts).identity == model.identity


def test_gguf_is_judged_by_its_head(hub, cache, monkeypatch, parts):
    gguf = pytest.importorskip("gguf")
    reading = pytest.importorskip("turbo_nb.files.gguf_file")
    assert reading
    path = Path(cache.parents[1], "tiny.gguf")
    writer = gguf.GGUFWriter(path, "wan")
    for key, tensor in to_upstream(state()).items():
        writer.add_tensor(key, tensor.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.add("o/r", {"tiny-F16.gguf": path.read_bytes()})
    monkeypatch.setattr(remote, "HEAD", 1 << 16)
    model = found("o/r/tiny-F16.gguf", **parts)
    assert model.spec.arch == TINY and hub.fetched() == []
    assert bytes_sent(hub, "o/r") == 1 << 16
    assert model.fetch().transformers[0].arch == TINY


def test_two_experts_as_a_pair_of_references_or_a_repository(hub, cache, parts):
    high, low = (save(state(TINY_I2V, seed)) for seed in (1, 2))
    hub.add("o/pair", {"high.safetensors": high, "low.safetensors": low})
    both = {"transformer/model.safetensors": high, "transformer_2/model.safetensors": low}
    hub.add("o/both", both | {f"transformer{end}/config.json": config(TINY_I2V) for end in ("", "_2")})
    pair = found(("o/pair/high.safetensors", "o/pair/low.safetensors@main"), **parts)
    assert pair.spec.task == "i2v" and [file.path for file in pair.downloads] == ["high.safetensors", "low.safetensors"]
    commit = hub.commits["o/pair"]
    assert pair.spec.name == f"o/pair/high.safetensors@{commit} + o/pair/low.safetensors@{commit}"
    both = found("o/both", **parts)
    key = "blocks.0.attn1.to_q.weight"
    for model in (pair.fetch(), both.fetch()):
        assert [torch.equal(one.tensors[key], state(TINY_I2V, seed)[key])
                for one, seed in zip(model.transformers, (1, 2), strict=True)] == [True, True]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"o/pair@\w+ has 2 weight files: high.safetensors, low.safetensors"):
        found("o/pair", **parts)
    hub.add("o/same", {"a.safetensors": high, "b.safetensors": high})
    with pytest.raises(CheckpointError, match="the same weights"):
        found(("o/same/a.safetensors", "o/same/b.safetensors"), **parts).fetch()
    with pytest.raises(InputError, match="Expected 2 files"):
        found("o/pair/high.safetensors", **parts)


def test_a_revision_is_another_file(hub, cache, parts, monkeypatch):
    hub.add("o/r", {"a.safetensors": save(state())})
    hub.tags["o/r"] = {"v1": ("1" * 40, {"a.safetensors": save(state(seed=5))}),
                       "refs/pr/2": ("2" * 40, {"a.safetensors": save(state(seed=6))})}  # fmt: skip
    key, models = "blocks.0.attn1.to_q.weight", {}
    for form, seed in (("o/r", 0), ("o/r/a.safetensors@v1", 5), ("o/r@refs/pr/2", 6), (f"o/r@{'2' * 40}", 6)):
        models[form] = found(form, **parts).fetch()
        assert torch.equal(models[form].transformers[0].tensors[key], state(seed=seed)[key])
    go_offline(hub, monkeypatch)
    assert all(found(form, **parts).identity == model.identity for form, model in models.items())
    with pytest.raises(DownloadError, match=r"o/r/a.safetensors: HF_HUB_OFFLINE is set .* No file or folder here is"):
        found("o/r/a.safetensors@v2", **parts)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DownloadError, match="404"):
        found("o/r/a.safetensors@v2", **parts)


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("a.safetensors", lambda: {k: t.to(torch.int8) if "to_q.weight" in k else t for k, t in state().items()},
         "is int8 without a scale"),
        ("a.pth", lambda: state() | {"blocks.0.attn1.to_q.weight": torch.zeros(128, 128, dtype=torch.int16)}, "int16"),
        ("a.safetensors", lambda: state() | {"blocks.0.attn1.to_q.weight_scale_2": torch.zeros(1)}, "NVFP4"),
        ("a.safetensors", lambda: {"x": torch.zeros(1 << 18)}, "Expected a transformer"),
        ("a.safetensors", lambda: {"blocks.0.attn.lora_A.weight": torch.zeros(1 << 18)}, "is a LoRA"),
        ("a.safetensors", lambda: {k: t for k, t in state().items() if "ffn" not in k}, "parts are missing"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_loaded_is_refused_before_it_is_downloaded(hub, cache, monkeypatch, parts, name, file,
                                                                         words):  # fmt: skip
    monkeypatch.setattr(remote, "HEAD", 1 << 16)
    monkeypatch.setattr(remote, "TAIL", 1 << 16)
    data = save(file()) if name.endswith("safetensors") else torch_bytes(file())
    hub.add("o/r", {name: data})
    with pytest.raises(CheckpointError, match=words) as caught:
        found(f"o/r/{name}", **parts)
    assert f"o/r/{name}@{hub.commits['o/r']}" in str(caught.value) and "turbo_nb-" not in str(caught.value)
    assert bytes_sent(hub, "o/r") < 0.7 * len(data) and hub.fetched() == [] and not list(cache.rglob("a.*"))
    if "Expected a transformer" not in words and "LoRA" not in words:
        with pytest.raises(CheckpointError, match=words):
            turbo_nb.download_model(f"o/r/{name}", on_progress=print)
        assert hub.fetched() == []


@pytest.mark.parametrize(
    "data", [b"", b"x" * 90_000, b"\xff" * 90_000, b"\x10\0\0\0\0\0\0\0{}" + bytes(90_000), b"<html>" + bytes(90_000),
             b"\x02\0\0\0\0\0\0\0{}", b'\x30\0\0\0\0\0\0\0{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,1]}}   ',
             b'\x30\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,1]}}  ',
             b'\x2f\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":"x","data_offsets":[]}}    ',
             b"\x02\0\0\0\0\0\0\0[]" + bytes(90_000), b"\xff\xff\xff\xff\xff\xff\xff\x7f{" + bytes(90_000)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_damaged_head_is_an_error_of_ours(hub, cache, parts, name, data):
    hub.add("o/r", {name: data})
    with pytest.raises(CheckpointError):
        found(f"o/r/{name}", **parts)
    assert not list(cache.rglob("a.*"))


def test_a_torch_file_that_would_run_code_is_refused_by_its_head(hub, cache, parts, evil, monkeypatch):
    class Evil:
        def __reduce__(self):
            return exec, (EVIL.decode(),)

    hub.add("o/r", {"a.pth": torch_bytes(state() | {"x": Evil()})})
    with pytest.raises(CheckpointError, match="could run code"):
        found("o/r/a.pth", **parts)
    assert not evil.exists()


def test_a_transformer_is_judged_before_another_part_is_fetched(hub, cache, repository, monkeypatch):
    """What no head shows, such as a number format that the tensors' numbers name."""
    hub.add(SGLANG, repository)
    model = found(SGLANG)
    read = recognise.read

    def refuse(path):
        if Path(path).name == "transformer":
            raise CheckpointError("not this one")
        return read(path)

    monkeypatch.setattr(recognise, "read", refuse)
    hub.log.clear()
    with pytest.raises(CheckpointError, match="not this one"):
        model.fetch()
    assert not {"config.json", "model.safetensors", "tokenizer.json"} & {path.rsplit("/", 1)[-1] for _, path in hub.log
                                                                         if "transformer" not in path}  # fmt: skip
    assert all(path.startswith("transformer/") for method, path in hub.log if method == "GET-FILE")


def test_parts_that_do_not_fit_together_are_found_by_their_heads(hub, cache, repository):
    config = UMT5Config(
        vocab_size=384, d_model=64, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    encoder = UMT5EncoderModel(config).state_dict()
    encoder = {key: tensor for key, tensor in encoder.items() if key != "encoder.embed_tokens.weight"}
    hub.add(SGLANG, repository | {"text_encoder/model.safetensors": save(encoder)})
    with pytest.raises(CheckpointError, match=r"text width is 128 in .*, 64 in .*Expected the same"):
        found(SGLANG)
    assert not any(path.name.endswith(".safetensors") for path in cache.rglob("*"))


def test_a_small_disk_is_an_error_before_the_first_byte(hub, cache, repository, small_disk):
    hub.add(SGLANG, {name: data for name, data in repository.items() if not name.startswith("vae")})
    model = found(SGLANG)
    planned = download.plan("x", model.downloads)
    assert {file.file.repo for file in planned.files} == {SGLANG, WAN}
    hub.log.clear()
    small_disk(planned.to_fetch - 1)
    with pytest.raises(DownloadError, match=r"needs .* more in .*Free some space"):
        model.fetch()
    assert hub.fetched() == []
    small_disk(planned.to_fetch)
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth"):  # which are random bytes
        model.fetch()


def test_wrong_bytes_of_a_shard_are_removed(hub, cache, repository, monkeypatch):
    hub.add(SGLANG, repository)
    model, name = found(SGLANG), "diffusion_pytorch_model-00002-of-00002.safetensors"
    hub.faults[name] = ("wrong",)
    with pytest.raises(DownloadError, match=f"{name} came with wrong bytes"):
        model.fetch()
    hub.faults.clear()
    assert not list(cache.rglob(name)) and found(SGLANG).downloads == model.downloads
    assert not model.fetch().downloads


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(hub, cache, repository):
    hub.add(SGLANG, repository)
    found(SGLANG).fetch()
    path = next(cache.rglob("transformer/diffusion_pytorch_model-00001-of-00002.safetensors"))
    path.resolve().write_bytes(path.read_bytes()[:-1] + b"!")
    model = found(SGLANG)
    assert [file.path for file in model.downloads] == ["transformer/"]
    with pytest.raises(DownloadError, match="wrong bytes"):
        model.fetch()
    assert not found(SGLANG).fetch().downloads


def test_a_snapshot_that_another_program_fetched_is_used_offline(hub, cache, repository, monkeypatch):
    hub.add(SGLANG, repository)
    for name in repository:
        if not name.endswith((".fp16.safetensors", ".py")):
            hf_hub_download(SGLANG, name)
    go_offline(hub, monkeypatch)
    model = found(SGLANG)
    assert [file.path for file in model.downloads] == ["transformer/", "vae/", "text_encoder/", "tokenizer/"]
    assert not model.fetch().downloads and not found(SGLANG).downloads and hub.log == []
    next(cache.rglob("diffusion_pytorch_model-00002*")).unlink()
    with pytest.raises(DownloadError, match=r"/transformer/diffusion_pytorch_model-00002-of-00002\.safetensors: HF"):
        found(SGLANG)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"{", "not an index of shards"), (b"[]", "not an index of shards"), (b'{"weight_map": 3}', "not an index"),
        (b'{"weight_map": {"a": "../evil.py"}}', "names transformer/../evil.py"),
        (b'{"weight_map": {"a": "modeling.py"}}', "names transformer/modeling.py"),
        (b'{"weight_map": {"a": "nothing.safetensors"}}', "names transformer/nothing.safetensors"),
        (b"[" * 100_000, "not an index of shards"),
    ],
)  # fmt: skip
def test_an_index_names_weights_of_its_folder_only(hub, cache, repository, index, words):
    hub.add(SGLANG, repository | {INDEX: index})
    with pytest.raises(CheckpointError, match=words):
        found(SGLANG)
    assert not any(path.endswith(".py") for _, path in hub.log)


def test_a_hub_without_ranges_sends_no_whole_torch_file(hub, cache, parts, monkeypatch):
    monkeypatch.setattr(remote, "HEAD", 1 << 16)
    hub.add("o/r", {"a.pth": torch_bytes(state())})
    hub.ranges = False
    with pytest.raises(DownloadError, match=r"cannot send a part of it\. Download it first, with turbo-nb download"):
        found("o/r/a.pth", **parts)
    assert turbo_nb.download_model("o/r/a.pth", on_progress=print).name == "a.pth"
    assert found("o/r/a.pth", **parts).spec.arch == TINY


def test_parts_may_be_references_too(hub, cache, repository, tmp_path):
    hub.add(SGLANG, repository)
    hub.add("o/vae", {"vae_bf16.safetensors": repository["vae/diffusion_pytorch_model.safetensors"]})
    save_file(state(), tmp_path / "tiny.safetensors")
    given = {"vae": "o/vae", "text_encoder": SGLANG, "tokenizer": f"{SGLANG}/tokenizer"}
    model = found(tmp_path / "tiny.safetensors", **given)
    assert [str(file) for file in model.downloads] == [
        f"o/vae/vae_bf16.safetensors@{hub.commits['o/vae']}", f"{SGLANG}/text_encoder@{hub.commits[SGLANG]}",
        f"{SGLANG}/tokenizer@{hub.commits[SGLANG]}",
    ]  # fmt: skip
    after = model.fetch()
    assert after.vae.kind == "vae" and after.text_encoder.kind == "text encoder"
    assert {path.name for path in after.tokenizer.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert after.identity == model.identity
    with pytest.raises(CheckpointError, match="Expected a vae"):
        found(tmp_path / "tiny.safetensors", **given | {"vae": f"{SGLANG}/transformer"})


def test_a_checkpoint_of_a_named_model_is_judged_by_its_head(hub, cache, parts):
    hub.add("o/r", {"a.safetensors": save(state())})
    with pytest.raises(CheckpointError, match=r"Expected TurboWan2\.1-T2V-1\.3B-480P, which has dim 1536"):
        found("Wan2.1-1.3B", checkpoint="o/r/a.safetensors", **parts)
    assert hub.fetched() == []


def test_the_identity_is_the_commit_before_and_after_a_download(hub, cache, tmp_path):
    save_file(state(), tmp_path / "tiny.safetensors")
    hub.repos[WAN]["Wan2.1_VAE.pth"] = torch_bytes(load_file(NANO / "vae" / "diffusion_pytorch_model.safetensors"))
    given = {"text_encoder": NANO / "text_encoder", "tokenizer": NANO / "tokenizer"}
    before = found(tmp_path / "tiny.safetensors", **given)
    after = before.fetch()
    assert before.identity == after.identity == found(tmp_path / "tiny.safetensors", **given).identity
    assert after.identity["vae"] == f"{WAN}/Wan2.1_VAE.pth"
    pinned = found(tmp_path / "tiny.safetensors", **given, vae=f"{WAN}/Wan2.1_VAE.pth@main")
    assert pinned.identity["vae"] == f"{WAN}/Wan2.1_VAE.pth@{hub.commits[WAN]}"


def test_a_file_that_is_not_a_model_is_fetched_alone(hub, cache):
    hub.add("o/lora", {"style.safetensors": save({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 8)})})
    path = turbo_nb.download_model("o/lora", on_progress=print)
    assert path.name == "style.safetensors" and hub.fetched() == ["style.safetensors"]
    hub.log.clear()
    assert locate.local("o/lora") == locate.local("o/lora/style.safetensors@main") == path and hub.log == []


def test_a_lora_is_a_path_or_is_fetched_and_checked(hub, cache, tmp_path):
    hub.add("o/lora", {"a/style.safetensors": b"x" * 5000})
    assert locate.local(tmp_path) == tmp_path and locate.local("nothing.safetensors") == Path("nothing.safetensors")
    hub.faults["style.safetensors"] = ("wrong",)
    with pytest.raises(DownloadError, match="wrong bytes"):
        locate.local("o/lora/a/style.safetensors")
    hub.faults.clear()
    assert locate.local("o/lora/a/style.safetensors").read_bytes() == b"x" * 5000
    with pytest.raises(InputError, match=r"lora is 'https://example\.org"):
        locate.local("https://example.org/a.safetensors")


# Case 26: caches that other programs made


def cache_of_umt5(hub, cache, names) -> None:
    for name in names:
        hf_hub_download(catalog.TOKENIZER.repo, name)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_tokenizer_in_the_cache_is_whole_with_one_vocabulary(hub, cache, monkeypatch, vocabulary):
    cache_of_umt5(hub, cache, ["tokenizer_config.json", "special_tokens_map.json", vocabulary])
    go_offline(hub, monkeypatch)
    planned = download.plan("x", [catalog.TOKENIZER])
    assert vocabulary in {file.file.path for file in planned.files} and planned.to_fetch == 0
    folder = download.fetch(planned)[catalog.TOKENIZER]
    assert (folder / vocabulary).is_file() and download.find(catalog.TOKENIZER) == folder and hub.log == []


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["tokenizer_config.json", "special_tokens_map.json"], "tokenizer.json"),
        (["tokenizer.json", "spiece.model"], "tokenizer_config.json"),
        ([], "tokenizer_config.json"),
    ],
)
def test_the_file_that_a_cache_lacks_is_named(hub, cache, monkeypatch, names, missing):
    cache_of_umt5(hub, cache, names)
    go_offline(hub, monkeypatch)
    with pytest.raises(DownloadError, match=f"^google/umt5-xxl/{missing}: HF_HUB_OFFLINE is set and it is not in"):
        download.plan("x", [catalog.TOKENIZER])


def test_a_missing_vae_is_named(hub, cache, monkeypatch):
    go_offline(hub, monkeypatch)
    with pytest.raises(DownloadError, match=r"^Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth: HF_HUB_OFFLINE"):
        download.plan("x", [catalog.VAE, catalog.TEXT_ENCODER])


def test_sizes_and_hashes_are_those_of_the_hub(hub, cache, repository):
    hub.add(SGLANG, repository)
    planned = download.plan("x", [HubFile(SGLANG, "transformer/")])
    assert {file.file.path for file in planned.files} == NEEDED
    for file in planned.files:
        data = repository[file.file.path]
        assert file.size == len(data) and file.sha256 in (None, hashlib.sha256(data).hexdigest())


def test_a_tokenizer_may_be_a_file_or_inside_a_text_encoder(hub, cache, tmp_path):
    encoder = load_file(NANO / "text_encoder" / "model.safetensors")
    save_file(state(), tmp_path / "tiny.safetensors")
    hub.add("o/te", {"umt5.safetensors": save(encoder | {"spiece_model": torch.zeros(64, dtype=torch.uint8)}),
                     "plain.safetensors": save(encoder), "spiece.model": b"x" * 100})  # fmt: skip
    given = {"model": tmp_path / "tiny.safetensors", "vae": NANO / "vae"}
    both = found(**given, text_encoder="o/te/umt5.safetensors")
    assert both.tokenizer == both.text_encoder and [file.path for file in both.downloads] == ["umt5.safetensors"]
    file = found(**given, text_encoder="o/te/plain.safetensors", tokenizer="o/te/spiece.model")
    assert [file.path for file in file.downloads] == ["plain.safetensors", "spiece.model"]
    with pytest.raises(CheckpointError, match="Expected a tokenizer, or a text encoder with one"):
        found(**given, tokenizer="o/te/plain.safetensors")
    path = download.fetch(download.plan("x", [file.tokenizer]))[file.tokenizer]
    assert path.read_bytes() == b"x" * 100 and download.find(file.tokenizer) == path


def test_a_batch_has_the_same_ids_before_and_after_the_download(hub, cache, repository, tmp_path):
    hub.add(SGLANG, repository)
    load = {"model": SGLANG, "device": "cpu", "tokenizer": NANO / "tokenizer"}
    run = {"num_frames": 5, "num_steps": 1, "resolution": "64x48"}
    first = batch.run([PROMPT], load, tmp_path / "out", **run)
    second = batch.run([PROMPT], load, tmp_path / "out", **run)
    assert (first.made, second.made) == (1, 0) and not first.failed


def test_a_lora_by_reference_is_the_lora_of_its_file(hub, cache, tmp_path):
    torch.manual_seed(0)
    key = "blocks.0.attn1.to_q"
    style = {f"{key}.lora_A.weight": torch.randn(4, 256), f"{key}.lora_B.weight": torch.randn(256, 4)}
    hub.add("o/lora", {"style.safetensors": save(style)})
    save_file(style, tmp_path / "style.safetensors")
    one, other = (
        found("nano", loras=[(file, 0.5), (file, 0.25)]) for file in ("o/lora@main", tmp_path / "style.safetensors")
    )
    assert one.identity == other.identity and len(one.loras) == 2
    assert one.with_loras(one.options.loras).loras == one.loras and hub.fetched() == ["style.safetensors"]
    with pytest.raises(DownloadError, match="No file or folder here is called 'o/nothing'"):
        found("nano", loras="o/nothing:0.5")
