"""Files become raw tensors whatever writes them, and every other file gives a typed error with the real cause."""

import argparse
import json
import os
import pickle
import random
import shutil
import struct
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from turbo_nb import catalog
from turbo_nb.errors import CheckpointError
from turbo_nb.files.gguf_file import GGUFTensor
from turbo_nb.files.reading import read_raw, trusted_config

gguf = pytest.importorskip("gguf")


def state(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"blocks.{i}.ffn.0.weight": torch.randn(8, 4, generator=generator) for i in range(count)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def shards(folder, tensors, *, count=3, stem="diffusion_pytorch_model", suffix=".safetensors", index=True, skip=()):
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(tensors), {}
    for number in range(count):
        part = {key: tensors[key].clone() for key in names[number::count]}
        name = f"{stem}-{number + 1:05}-of-{count:05}{suffix}"
        weight_map |= dict.fromkeys(part, name)
        if number not in skip:
            (save_file if suffix == ".safetensors" else torch.save)(part, folder / name)
    if index:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# --- safetensors ---


def with_header(path, length: int) -> None:
    """A safetensors file whose header has this length: JSON may end in blanks."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + struct.pack("<2f", 1, 2))


LENGTHS = {"PK": b"PK", "zip": b"PK\x03", "web page": b" <", "html": b"<h", "pickle": b"\x80\x02", "GGUF": b"GGU"}


@pytest.mark.parametrize("spelled", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("more", [0, 1 << 16])
def test_every_length_of_a_safetensors_header_is_read(tmp_path, spelled, more):
    length = int.from_bytes(spelled, "little") + more * (len(spelled) < 3)
    with_header(tmp_path / "m.safetensors", length)
    assert read_raw(tmp_path / "m.safetensors").tensors["a"].tolist() == [1, 2]


def test_metadata_of_the_header_is_kept(tmp_path):
    save_file(state(), tmp_path / "m.safetensors", metadata={"_quantization_metadata": '{"layers": {}}'})
    raw = read_raw(tmp_path / "m.safetensors")
    same(raw.tensors, state())
    assert raw.metadata == {"_quantization_metadata": '{"layers": {}}'} and raw.files == (tmp_path / "m.safetensors",)
    assert raw.config is None


def header_of(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def entry(start: int, end: int, shape=(2,), dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]})


SAFETENSORS = {
    "huge length": b"\xff" * 7 + b"\x7f{" + b" " * 99,
    "length beyond the file": (1 << 20).to_bytes(8, "little") + b'{"a": 1}' + b" " * 99,
    "length that only a sparse file could have": None,
    "not JSON": header_of('{"a": '),
    "not UTF-8": (4).to_bytes(8, "little") + b'{"\xff\xff}',
    "deep nesting": header_of('{"a":' * 30_000),
    "duplicate key": header_of(f'{{"a":{entry(0, 8)},"a":{entry(0, 8)}}}', bytes(8)),
    "duplicate key within a tensor": header_of(
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "overlap": header_of(f'{{"a":{entry(0, 8)},"b":{entry(4, 12)}}}', bytes(12)),
    "hole": header_of(f'{{"a":{entry(0, 8)},"b":{entry(12, 20)}}}', bytes(20)),
    "cut short": header_of(f'{{"a":{entry(0, 8)}}}', bytes(4)),
    "too long": header_of(f'{{"a":{entry(0, 8)}}}', bytes(12)),
    "shape that does not fit": header_of(f'{{"a":{entry(0, 8, (3,))}}}', bytes(8)),
    "shape that overflows": header_of(f'{{"a":{entry(0, 8, (1 << 62, 4))}}}', bytes(8)),
    "negative shape": header_of(f'{{"a":{entry(0, 8, (-2,))}}}', bytes(8)),
    "huge integer": header_of(f'{{"a":{entry(0, 10**4000)}}}', bytes(8)),
    "unknown dtype": header_of(f'{{"a":{entry(0, 8, dtype="F999")}}}', bytes(8)),
    "metadata that is not text": header_of(f'{{"__metadata__":{{"a":1}},"a":{entry(0, 8)}}}', bytes(8)),
}


@pytest.mark.parametrize("data", SAFETENSORS.values(), ids=SAFETENSORS)
def test_damaged_safetensors_file_is_a_typed_error_at_once(tmp_path, data):
    path = tmp_path / "m.safetensors"
    if data is None:
        path.write_bytes((1 << 33).to_bytes(8, "little") + b"{")
        os.truncate(path, 1 << 34)
    else:
        path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"m\.safetensors' is damaged or cut short"):
        read_raw(path)
    assert time.monotonic() - start < 5


# --- torch ---


def nested() -> dict:
    return {
        "generator": {"model": state(2)},
        "critic": {"weight": torch.ones(2)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]},
        "step": 7,
        3: torch.ones(1),
    }


def test_nested_dictionaries_are_joined_with_dots_and_optimizer_states_left_out(tmp_path):
    torch.save(nested(), tmp_path / "m.pt")
    expected = {f"generator.model.{key}": tensor for key, tensor in state(2).items()}
    same(read_raw(tmp_path / "m.pt").tensors, expected | {"critic.weight": torch.ones(2)})


def cyclic() -> dict:
    found = {"model": state(2)}
    found["self"] = found["model"]["again"] = found
    return found


def braided(depth: int = 12, width: int = 12) -> dict:
    """A few dictionaries that are reached by width ** depth names"""
    level = {"weight": torch.ones(1)}
    for _ in range(depth):
        level = {f"k{i}": level for i in range(width)}
    return level


TORCH = {
    "cycle": (cyclic, {f"model.{key}": tensor for key, tensor in state(2).items()}),
    "braid": (braided, None),
    "parameters": (lambda: {key: torch.nn.Parameter(tensor) for key, tensor in state().items()}, state()),
    "module": (lambda: torch.nn.Linear(4, 8).state_dict(keep_vars=True), None),
}


@pytest.mark.parametrize(("make", "expected"), TORCH.values(), ids=TORCH)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ""])
def test_state_dict_of_any_nesting_is_read(tmp_path, make, expected, suffix):
    path = tmp_path / f"m{suffix}"
    torch.save(make(), path)
    tensors = read_raw(path).tensors
    assert tensors and not any(tensor.requires_grad for tensor in tensors.values())
    if expected:
        same(tensors, expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".txt", ""])
def test_a_torch_file_of_another_suffix_is_read(tmp_path, suffix):
    torch.save(state(), tmp_path / "model.pth")
    path = (tmp_path / "model.pth").rename(tmp_path / f"model{suffix}")
    same(read_raw(path).tensors, state())


def deep() -> dict:
    level = {"weight": torch.ones(1)}
    for _ in range(100):
        level = {"a": level}
    return level


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def zip_of_folder(path):
    folder = catalog.NANO.folder / "transformer"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)


def compressed(path):
    torch.save(state(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def saved(make):
    return lambda path: torch.save(make(), path)


def written(data: bytes):
    return lambda path: path.write_bytes(data)


def gguf_of(version: int = 3, tensors: int = 0, values: int = 0, rest: bytes = bytes(64)) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def record(name: str, dims, kind: int, offset: int) -> bytes:
    return key(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


DAMAGED, MISPLACED, TWICE = "damaged or cut short", "does not lie in its place", "is there twice"


def many_tensors(path) -> None:
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{number}": one for number in range(20_001)}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def part_of_a_tensor(path) -> None:
    torch.save(state(), path)
    with zipfile.ZipFile(path) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data[:-4] if name.endswith("data/3") else data)


REFUSED = {
    "argparse": (
        saved(lambda: {"state_dict": state(), "args": argparse.Namespace(lr=1)}),
        r"holds argparse\.Namespace.*Take a safetensors file",
    ),
    "numpy": (
        saved(lambda: {"state_dict": state(), "loss": np.float64(0.5)}),
        r"holds numpy\..*Take a safetensors file",
    ),
    "code": (lambda path: torch.save({"a": Marker(path.parent / "ran")}, path), "could run code: refused"),
    "pickled code": (
        lambda path: path.write_bytes(pickle.dumps({"a": Marker(path.parent / "ran")})),
        "neither a torch file.*Convert an old torch file",
    ),
    "old torch file": (
        lambda path: torch.save(state(), path, _use_new_zipfile_serialization=False),
        "Convert an old torch file",
    ),
    "compressed": (compressed, "compressed entries"),
    "folder in a zip": (
        zip_of_folder,
        r"is a zip archive of config\.json, diffusion_pytorch_model\.safetensors.*Unzip it",
    ),
    "integer keys": (saved(lambda: {0: torch.ones(1), 1: torch.ones(1)}), "has the key 0 for a tensor"),
    "no tensor": (saved(lambda: {"step": 3, "args": {"lr": 1}}), "holds dict with args, step"),
    "empty dict": (saved(dict), "holds dict with nothing"),
    "list": (saved(lambda: [torch.ones(1)]), "holds list"),
    "tensor": (saved(lambda: torch.ones(1)), "holds Tensor"),
    "deep": (saved(deep), "more than 16 deep"),
    "two of one name": (
        saved(lambda: {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}),
        r"two tensors with the name a\.b",
    ),
    "meta": (saved(lambda: {"a": torch.empty(1 << 40, device="meta")}), "refused. Expected a plain tensor"),
    "sparse": (saved(lambda: {"a": torch.eye(3).to_sparse()}), "refused. Expected a plain tensor"),
    "quantised by torch": (
        saved(lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}),
        "refused",
    ),
    "bomb": (saved(lambda: {"a": torch.zeros(1).expand(1 << 20, 1 << 20)}), "claims more bytes than the file holds"),
    "no tensors in safetensors": (lambda path: save_file({}, path), "has no tensors"),
    "many tensors": (many_tensors, "has 20,001 tensors. Expected at most 20,000"),
    "a part of a tensor": (part_of_a_tensor, "longer than its entry"),
    "zip without end": (written(b"PK\x03\x04" + bytes(99)), DAMAGED),
    "empty": (written(b""), "is empty"),
    "web page": (written(b"\xef\xbb\xbf\n <!DOCTYPE html><html>404</html>"), "is a web page"),
    "web page in lower case": (written(b"<html>404</html>"), "is a web page"),
    "store's error": (written(b'<?xml version="1.0"?><Error>AccessDenied</Error>'), "is a web page"),
    "LFS": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS pointer"),
    "text": (written(b"hello"), r"nor GGUF\. Expected one of these\. Check what it is"),
    "GGUF of version 1": (written(gguf_of(1)), "version 1. Expected version 2 or 3"),
    "GGUF of another byte order": (written(gguf_of(3 << 24)), "other byte order"),
    "GGUF, cut": (written(gguf_of()[:14]), DAMAGED),
    "GGUF, many tensors": (written(gguf_of(tensors=1 << 60)), DAMAGED),
    "GGUF, many values": (written(gguf_of(values=1 << 60)), DAMAGED),
    "GGUF, long array": (written(gguf_of(values=1, rest=key("a") + struct.pack("<IIQ", 9, 4, 1 << 62))), DAMAGED),
    "GGUF, long list": (written(gguf_of(values=1, rest=key("a") + struct.pack("<IIQ", 9, 8, 1 << 62))), DAMAGED),
    "GGUF, nested list": (written(gguf_of(values=1, rest=key("a") + struct.pack("<IIQ", 9, 9, 1))), DAMAGED),
    "GGUF, twice a key": (written(gguf_of(values=2, rest=(key("a") + struct.pack("<II", 4, 1)) * 2)), TWICE),
    "GGUF, twice a tensor": (written(gguf_of(tensors=2, rest=record("a", (4,), 0, 0) * 2 + bytes(99))), TWICE),
    "GGUF, beyond the end": (written(gguf_of(tensors=1, rest=record("a", (4,), 0, 1 << 40))), MISPLACED),
    "GGUF, overlap": (
        written(gguf_of(tensors=2, rest=record("a", (8,), 0, 0) + record("b", (8,), 0, 4) + bytes(99))),
        MISPLACED,
    ),
    "GGUF, part of a block": (written(gguf_of(tensors=1, rest=record("a", (33,), 8, 0) + bytes(99))), MISPLACED),
    "GGUF, huge dims": (written(gguf_of(tensors=1, rest=record("a", (1 << 63, 1 << 63), 0, 0))), MISPLACED),
    "GGUF, many dims": (written(gguf_of(tensors=1, rest=key("a") + struct.pack("<I", 1 << 31))), DAMAGED),
    "GGUF, unknown format": (
        written(gguf_of(tensors=1, rest=record("a", (32,), 999, 0) + bytes(99))),
        "number format 999.*pip install -U gguf",
    ),
    "GGUF, zeros": (written(gguf_of(tensors=1, values=1, rest=bytes(4000))), DAMAGED),
    "GGUF, alignment 0": (
        written(gguf_of(values=1, rest=key("general.alignment") + struct.pack("<II", 4, 0))),
        DAMAGED,
    ),
    "no file": (lambda path: None, "no file"),
    "folder without weights": (
        lambda path: path.mkdir(),
        r"no weights in .*Expected a folder with one set of \.safetensors",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about its own quantised tensors
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_other_file_is_a_typed_error_at_once_and_runs_no_code(tmp_path, make, words):
    path = tmp_path / "model.pth"
    make(path)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=words) as caught:
        read_raw(path)
    assert time.monotonic() - start < 5
    assert str(path) in str(caught.value) and "\x1b" not in str(caught.value)
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "x" * 5000 + "/y"])
def test_a_name_that_no_file_can_have_is_a_typed_error(name):
    with pytest.raises(CheckpointError, match="no file"):
        read_raw(name)


# --- GGUF ---


def write_gguf(path, tensors, shapes=None, arch="wan"):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(tensor: torch.Tensor, kind) -> tuple[np.ndarray, object]:
    return gguf.quantize(tensor.numpy(), kind), kind


def test_gguf_file_gives_plain_tensors_and_raw_quantised_ones(tmp_path):
    kinds = gguf.GGMLQuantizationType
    weight, odd = torch.randn(4, 64), torch.randn(2, 48)  # 48 numbers a row do not fill blocks of 32
    write_gguf(
        tmp_path / "m.gguf",
        {
            "q8": packed(weight, kinds.Q8_0),
            "f32": packed(weight, kinds.F32),
            "f16": packed(weight, kinds.F16),
            "bf16": packed(weight, kinds.BF16),
            "odd8": packed(odd.reshape(-1, 32), kinds.Q8_0),
            "odd16": packed(odd.reshape(-1, 32), kinds.F16),
        },
        {"odd8": (2, 48), "odd16": (2, 3, 16)},
    )
    raw = read_raw(tmp_path / "m.gguf")
    assert raw.metadata["general.architecture"] == "wan" and "tokenizer.ggml.tokens" not in raw.metadata
    plain = {key: tensor for key, tensor in raw.tensors.items() if isinstance(tensor, torch.Tensor)}
    expected = {"f32": weight, "f16": weight.half(), "bf16": weight.bfloat16(), "odd16": odd.half().reshape(2, 3, 16)}
    same(plain, expected)
    for name, ref in (("q8", weight), ("odd8", odd)):
        found = raw.tensors[name]
        assert isinstance(found, GGUFTensor) and found.type_name == "Q8_0"
        decoded = gguf.dequantize(found.data.numpy(), kinds[found.type_name]).reshape(found.shape)
        assert found.shape == ref.shape and abs(decoded - ref.numpy()).max() < 0.02


def test_a_shape_that_does_not_fit_the_reshaped_tensor_is_a_typed_error(tmp_path):
    weight = packed(torch.randn(4, 64), gguf.GGMLQuantizationType.F16)
    for shape in ((4, 63), (-4, -64)):
        write_gguf(tmp_path / "m.gguf", {"a": weight}, {"a": shape})
        with pytest.raises(CheckpointError, match="its original shape is"):
            read_raw(tmp_path / "m.gguf")


def test_without_the_package_a_gguf_file_names_it(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", {"a": packed(torch.randn(1, 32), gguf.GGMLQuantizationType.F32)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        read_raw(tmp_path / "m.gguf")


# --- Shards and folders ---


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "own"])
def test_shards_are_read_whole_from_folder_shard_or_index(tmp_path, suffix, index, stem):
    folder = shards(tmp_path / "m", state(), suffix=suffix, index=index, stem=stem)
    given = [folder, folder / f"{stem}-00002-of-00003{suffix}"]
    if index:
        given.append(folder / f"{stem}{suffix}.index.json")
    for path in given:
        raw = read_raw(path)
        same(raw.tensors, state())
        assert [file.name for file in raw.files] == [f"{stem}-0000{i}-of-00003{suffix}" for i in (1, 2, 3)]


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("given", ["", "diffusion_pytorch_model-00001-of-00003.safetensors"])
def test_missing_shard_is_named(tmp_path, index, given):
    folder = shards(tmp_path / "m", state(), index=index, skip=(1,))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model-00002-of-00003\.safetensors") as caught:
        read_raw(folder / given)
    assert ("which is not in the folder" in str(caught.value)) == index


def write_index(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(data if isinstance(data, str) else json.dumps(data))


NO_INDEX = "is not an index of shards"
FOLDERS = {
    "distributed": (
        lambda folder: ((folder / ".metadata").write_bytes(b"x"), (folder / "__0_0.distcp").write_bytes(b"x")),
        r"format_utils\.dcp_to_torch_save",
    ),
    "several files": (
        lambda folder: [save_file(state(), folder / f"{name}.safetensors") for name in "ab"],
        r"several files of weights: a\.safetensors, b\.safetensors",
    ),
    "shards of two sets": (
        lambda folder: [shards(folder, state(), count=n, index=False) for n in (2, 3)],
        "shards of several sets",
    ),
    "one tensor in two shards": (
        lambda folder: [save_file(state(2), folder / f"m-0000{n}-of-00002.safetensors") for n in (1, 2)],
        "which another shard of its set has",
    ),
    "index is not JSON": (lambda folder: write_index(folder, "{"), NO_INDEX),
    "index is a list": (lambda folder: write_index(folder, []), NO_INDEX),
    "index without map": (lambda folder: write_index(folder, {"metadata": {}}), NO_INDEX),
    "index, deep": (lambda folder: write_index(folder, "[" * 100_000), NO_INDEX),
    "index leads elsewhere": (
        lambda folder: write_index(folder, {"weight_map": {"a": "../other.safetensors"}}),
        r"names '\.\./other\.safetensors'",
    ),
    "index names a script": (lambda folder: write_index(folder, {"weight_map": {"a": "run.py"}}), r"names 'run\.py'"),
    "a diffusers folder": (
        lambda folder: shutil.copytree(catalog.NANO.folder, folder, dirs_exist_ok=True),
        "in its folders text_encoder, transformer, vae",
    ),
    "config.json is damaged": (
        lambda folder: (save_file(state(), folder / "m.safetensors"), (folder / "config.json").write_text("{")),
        r"config\.json' cannot be read",
    ),
}


@pytest.mark.parametrize(("make", "words"), FOLDERS.values(), ids=FOLDERS)
def test_folder_that_cannot_be_read_names_the_reason(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        read_raw(tmp_path)


def test_a_distributed_checkpoint_file_names_the_converter(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="dcp_to_torch_save"):
        read_raw(tmp_path / "__0_0.distcp")


@pytest.mark.parametrize(
    "name", ["m.safetensors", "m.pth", "m.pt", "m.bin", "m.ckpt", "m.gguf", "model.fp16.safetensors"]
)
def test_folder_with_one_file_is_that_file(tmp_path, name):
    if name.endswith("gguf"):
        kind = gguf.GGMLQuantizationType.F32
        write_gguf(tmp_path / name, {key: packed(tensor, kind) for key, tensor in state().items()})
    else:
        (save_file if name.endswith("safetensors") else torch.save)(state(), tmp_path / name)
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "._m.safetensors").write_bytes(b"macOS")
    raw = read_raw(tmp_path)
    same(raw.tensors, state())
    assert raw.files == (tmp_path / name,)


def test_the_usual_file_is_taken_from_a_folder_of_several(tmp_path):
    other = {key: tensor * 0 for key, tensor in state().items()}
    save_file(state(), tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(other, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(other, tmp_path / "diffusion_pytorch_model.bin")
    torch.save(other, tmp_path / "Wan2.1_VAE.pth")
    same(read_raw(tmp_path).tensors, state())
    shards(tmp_path, other)
    with pytest.warns(UserWarning, match="left out: diffusion_pytorch_model-00001-of-00003"):
        same(read_raw(tmp_path).tensors, state())


def test_link_to_a_blob_without_suffix_is_read(tmp_path):
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    save_file(state(), blob)
    link = tmp_path / "m.safetensors"
    link.symlink_to(blob)
    same(read_raw(link).tensors, state())
    same(read_raw(blob).tensors, state())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_name_that_is_not_utf8_is_not_called_damage(tmp_path, suffix):
    path = tmp_path / os.fsdecode(f"café.{suffix}".encode("latin-1"))
    path.write_bytes(b"")
    (save_file if suffix == "safetensors" else torch.save)(state(), tmp_path / "x")
    (tmp_path / "x").replace(path)
    with pytest.raises(CheckpointError, match=r"not UTF-8.*Rename"):
        read_raw(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder_is_a_typed_error(tmp_path):
    folder = shards(tmp_path / "m", state())
    folder.chmod(0)
    try:
        for path in (folder, folder / "diffusion_pytorch_model-00001-of-00003.safetensors"):
            with pytest.raises(CheckpointError, match=r"cannot be read .*Permission denied"):
                read_raw(path)
    finally:
        folder.chmod(0o700)


# --- config.json ---

WAN_MODEL = {"_class_name": "WanModel", "dim": 256, "num_heads": 4}


def test_config_beside_the_weights_is_kept_but_only_diffusers_is_trusted(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(state(), path)
    assert trusted_config(tmp_path, ["WanTransformer3DModel"]) is None
    (tmp_path / "config.json").write_text(json.dumps(WAN_MODEL))
    assert read_raw(path).config == read_raw(tmp_path).config == WAN_MODEL
    assert trusted_config(tmp_path, ["WanTransformer3DModel"]) is None
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert trusted_config(tmp_path, ["WanTransformer3DModel"])
    (tmp_path / "config.json").write_text('{"model_type": "umt5"}')
    assert trusted_config(tmp_path, ["umt5"])


def test_config_of_a_folder_of_several_files_belongs_to_none_of_them(tmp_path):
    for name in ("a", "b"):
        save_file(state(), tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(WAN_MODEL))
    assert read_raw(tmp_path / "a.safetensors").config is None


# --- Damage ---


@pytest.mark.parametrize("kind", ["safetensors", "pth", "gguf"])
def test_bent_bytes_are_typed_errors_or_do_not_matter(tmp_path, kind):
    whole, bent, rng, refused = tmp_path / f"whole.{kind}", tmp_path / f"bent.{kind}", random.Random(0), 0
    if kind == "gguf":
        write_gguf(whole, {key: packed(tensor, gguf.GGMLQuantizationType.F32) for key, tensor in state().items()})
    else:
        (save_file if kind == "safetensors" else torch.save)(state(), whole)
    data = whole.read_bytes()
    for _ in range(300):
        bytes_ = bytearray(data)
        for _ in range(3):
            bytes_[rng.randrange(700)] = rng.randrange(256)  # where the header is
        bent.write_bytes(bytes_[: len(data) - rng.choice((0, 0, 0, 100))])
        start = time.monotonic()
        try:
            read_raw(bent)
        except CheckpointError:
            refused += 1
        assert time.monotonic() - start < 5
    assert refused > 100


@pytest.mark.parametrize("kind", ["safetensors", "pth", "gguf"])
def test_tensors_are_mapped_not_copied(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    big = {"a": torch.zeros(1 << 20, 32)}
    if kind == "gguf":
        write_gguf(path, {"a": packed(big["a"], gguf.GGMLQuantizationType.F32)})
    else:
        (save_file if kind == "safetensors" else torch.save)(big, path)
    before = resident()
    raw = read_raw(path)
    assert raw.tensors["a"].shape == (1 << 20, 32)
    assert resident() - before < 64e6  # of 134 MB


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss
