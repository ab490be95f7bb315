"""Forms of references, and what the names of a repository's files tell. No network."""

from pathlib import Path

import pytest

from turbo_nb import catalog
from turbo_nb.catalog import HubFile
from turbo_nb.errors import CheckpointError, InputError
from turbo_nb.files import reference
from turbo_nb.files.reference import beside, find, parse, read, weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HF = "https://huggingface.co"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("o/r", HubFile("o/r", "/")),
        ("o/r/", HubFile("o/r", "/")),
        ("IPostYellow/TurboWan2.1-T2V-1.3B-Diffusers", HubFile("IPostYellow/TurboWan2.1-T2V-1.3B-Diffusers", "/")),
        ("o/r@v1.0", HubFile("o/r", "/", "v1.0")),
        ("o/r@refs/pr/3", HubFile("o/r", "/", "refs/pr/3")),
        (f"o/r@{COMMIT}", HubFile("o/r", "/", COMMIT)),
        ("o/r/a.safetensors", HubFile("o/r", "a.safetensors")),
        ("o/r/sub dir/a (1).GGUF@dev", HubFile("o/r", "sub dir/a (1).GGUF", "dev")),
        ("o/r/a.pth", HubFile("o/r", "a.pth")),
        ("o/r/a.pt", HubFile("o/r", "a.pt")),
        ("o/r/a.ckpt", HubFile("o/r", "a.ckpt")),
        ("o/r/a.bin@main", HubFile("o/r", "a.bin", "main")),
        ("o/r/transformer", HubFile("o/r", "transformer/")),
        ("o/r/transformer/@v1", HubFile("o/r", "transformer/", "v1")),
        (f"{HF}/o/r", HubFile("o/r", "/")),
        (f"{HF}/o/r/", HubFile("o/r", "/")),
        ("https:/huggingface.co/o/r", HubFile("o/r", "/")),  # as a Path has it
        ("https://hf.co/o/r", HubFile("o/r", "/")),
        ("https://user:hunter2@HuggingFace.co/o/r", HubFile("o/r", "/")),
        (f"{HF}/o/r/tree/v1", HubFile("o/r", "/", "v1")),
        (f"{HF}/o/r/tree/main/transformer", HubFile("o/r", "transformer/", "main")),
        (f"{HF}/o/r/resolve/main/a/b.safetensors?download=true", HubFile("o/r", "a/b.safetensors", "main")),
        (f"{HF}/o/r/blob/refs%2Fpr%2F1/a.gguf", HubFile("o/r", "a.gguf", "refs/pr/1")),
        (f"{HF}/o/r/tree/refs/pr/1/vae#top", HubFile("o/r", "vae/", "refs/pr/1")),
        (f"{HF}/o/r/raw/{COMMIT}/a%20b.pth", HubFile("o/r", "a b.pth", COMMIT)),
        ("http://127.0.0.1:8/hub/o/r/resolve/main/a.pth", HubFile("o/r", "a.pth", "main")),
    ],
)
def test_every_form_of_a_reference(text, expected):
    assert parse(text, endpoint="http://127.0.0.1:8/hub") == expected
    assert reference.read(text, "vae", "http://127.0.0.1:8/hub") == expected
    if not text.startswith("http"):
        assert str(expected) == text.replace("/@", "@").rstrip("/")
        assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "o", "a.safetensors", "models/a.safetensors", "./o/r", "../o/r", "/o/r", "~/o/r", "C:\\o\\r", "o\\r", "o/../r",
     "o/r/../x.pth", "o/r/./x.pth", "o//r", "o/r//x.pth", "o/r@", "o/r@../x", "o/r@a@b", "o/r x@\n", "o/a--b",
     "o/r.git", "-o/r", "o/r/x\x1b.pth", "hf_tok en/r", "é/r", "o/..", "file:///o/r.pth", "s3://o/r",
     "o/r-", "o/r.", "o-/r", "o./r@main", f"o/{'r' * 97}", f"{'o' * 97}/r"],
)  # fmt: skip
def test_text_of_another_form_is_not_a_reference(text):
    assert parse(text) is None
    assert isinstance(reference.read(text or "x", "vae"), Path)


@pytest.mark.parametrize(
    "text",
    [
        "https://civitai.com/api/download/models/1?token=hunter2", "https://huggingface.co.evil.org/o/r", HF,
        f"{HF}/o", f"{HF}/datasets/o/r", f"{HF}/spaces/o/r", f"{HF}/o/r/commits/main", f"{HF}/o/r/discussions/1",
        f"{HF}/o/r/resolve", f"{HF}/o/r/resolve/main", f"{HF}/o/r/blob/main/../x.pth", f"{HF}/o/..", "https:///o/r",
        f"{HF}/o/r/blob/main/%2e%2e/x.pth", f"{HF}/o/r/resolve/main/a%2Fb.pth", "https://[::1/o/r",
        f"{HF}/o/r/raw/main/a%5Cb.pth", f"{HF}/o/r-", f"{HF}/o/{'r' * 97}",
    ],
)  # fmt: skip
def test_an_address_that_names_no_model_is_an_input_error(text):
    with pytest.raises(InputError, match=r"^vae is .*Expected an address such as https://huggingface\.co/") as caught:
        read(text, "vae")
    assert "hunter2" not in str(caught.value)


def test_a_name_of_the_catalogue_a_path_and_a_reference_in_this_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nano", "auto", "mine", "o/r"):
        (tmp_path / name).mkdir(parents=True)
    assert read("nano") == "nano" and read("auto") == "auto" and read(Path("nano")) == "nano"
    assert read("nano", "checkpoint") == Path("nano")  # a checkpoint has no name
    assert read("mine") == Path("mine") and read("o/r") == Path("o/r") and read(tmp_path) == tmp_path
    assert read("o/s") == HubFile("o/s", "/") == read(Path("o/s"))
    assert read("typo") == "typo" and read("typo", "vae") == Path("typo")
    assert read(Path("typo.pth")) == Path("typo.pth")


def test_the_repository_of_a_released_model_is_that_model():
    spec = catalog.find("Wan2.2-A14B")
    assert read(spec.files[0].repo) == spec.name == read(f"{HF}/{spec.files[0].repo}")
    assert read(f"{spec.files[0].repo}@v1") == HubFile(spec.files[0].repo, "/", "v1")
    assert catalog.of_file(HubFile(spec.files[1].repo, spec.files[1].path, "v1")) is spec
    assert catalog.of_file(HubFile(spec.files[1].repo, "other.pth")) is None


DIFFUSERS = [
    "model_index.json", "README.md", "evil.py", "scheduler/scheduler_config.json",
    "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json", "transformer/modeling.py",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenization_evil.py",
]  # fmt: skip
WAN_AI = [
    "config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json", "google/umt5-xxl/spiece.model",
]  # fmt: skip
PAIR = ["high_noise_model/diffusion_pytorch_model.safetensors", "low_noise_model/diffusion_pytorch_model.safetensors"]


def places(names, part="transformer", path="/"):
    return [file.path for file in find(HubFile("o/r", path), names, part)]


@pytest.mark.parametrize(
    ("names", "transformers", "vae", "text_encoder", "tokenizer"),
    [
        (DIFFUSERS, ["transformer/"], "vae/", "text_encoder/", "tokenizer/"),
        ([*DIFFUSERS, "transformer_2/a.gguf"], ["transformer/", "transformer_2/"], "vae/", "text_encoder/",
         "tokenizer/"),
        (WAN_AI, ["/"], "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/"),
        ([*PAIR, *WAN_AI[2:]], ["high_noise_model/", "low_noise_model/"], "Wan2.1_VAE.pth",
         "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/"),
        (["a.safetensors", "README.md"], ["a.safetensors"], None, None, None),
        (["wan.gguf", "wan_VAE.safetensors", "umt5.safetensors"], ["wan.gguf"], None, None, None),
        (["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], ["/"], None, None, None),
    ],
)  # fmt: skip
def test_the_parts_of_a_repository(names, transformers, vae, text_encoder, tokenizer):
    assert places(names) == transformers
    found = {part: beside(HubFile("o/r", "/"), names, part) for part in ("vae", "text_encoder", "tokenizer")}
    assert {part: one and one.path for part, one in found.items()} == {
        "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer,
    }  # fmt: skip
    assert found["tokenizer"] is None or found["tokenizer"].kind == "tokenizer"
    moved = [f"sub/{name}" for name in names]
    assert places(moved, path="sub/") == [f"sub/{path}".replace("sub//", "sub/") for path in transformers]


def test_a_part_that_is_asked_for_by_a_repository_or_a_folder():
    assert places(DIFFUSERS, "vae") == ["vae/"] and places(DIFFUSERS, path="transformer/") == ["transformer/"]
    assert places(DIFFUSERS, "tokenizer", "tokenizer/") == ["tokenizer/"]
    assert places(["spiece.model"], "tokenizer") == ["/"] and places(["x.safetensors"], "LoRA") == ["x.safetensors"]
    assert places(["vae_x.safetensors"], "vae") == ["vae_x.safetensors"]
    assert find(HubFile("o/r", "x.pth"), [], "vae") == (HubFile("o/r", "x.pth"),)
    assert places(DIFFUSERS, path=DIFFUSERS[-11]) == [DIFFUSERS[-11].rpartition("/")[0] + "/"]  # a shard means all


@pytest.mark.parametrize("names", [[], ["README.md"], ["a.py"], ["sub/a.pth"], ["vae/model.safetensors"]])
def test_a_repository_without_a_model_shows_what_it_has(names):
    with pytest.raises(CheckpointError, match=r"o/r has .*Expected a transformer.*Give owner/repo") as caught:
        places(names)
    assert all(name in str(caught.value) for name in names)


def test_several_weight_files_are_listed_with_an_example():
    names = [f"wan-{number}.gguf" for number in range(10)]
    with pytest.raises(CheckpointError, match=r"o/r has 10 weight files: wan-0.gguf, .* 2 more.*Give 'o/r/wan-0.gguf'"):
        places(names)


@pytest.mark.parametrize(
    ("names", "index", "files"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], None, ["model.safetensors"]),
        (["model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], None, ["model.fp16.safetensors"]),
        (["diffusion_pytorch_model.bin"], None, ["diffusion_pytorch_model.bin"]),
        (["m.safetensors.index.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"],
         "model.safetensors.index.json", ["model-00001-of-00001.safetensors"]),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
         "model.safetensors.index.fp16.json", ["model.fp16-00001-of-00001.safetensors"]),
        (["model.safetensors.index.fp16.json", "model.safetensors"], None, ["model.safetensors"]),
        (["b.gguf", "a.pth", "c.safetensors", "d.py", "e.txt"], None, ["c.safetensors"]),
        (["x.py", "config.json", "sub/model.safetensors"], None, []),
    ],
)  # fmt: skip
def test_the_weights_of_a_folder(names, index, files):
    assert weights(names, "") == (index, files)
    inside = [f"a/{name}" for name in names] + ["model.safetensors", "ab/model.safetensors"]
    assert weights(inside, "a/") == (index and f"a/{index}", [f"a/{name}" for name in files])
