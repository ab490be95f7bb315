"""Presets: built in, and files of the user that may hold anything."""

import json
import os
from pathlib import Path

import pytest

from turbo_nb import catalog, presets
from turbo_nb.errors import InputError, OutputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CONFIG", str(tmp_path))
    return tmp_path


def test_the_built_in_ones_suit_the_model():
    topk = {name: presets.built_in("best", spec)["sla_topk"] for name, spec in catalog.MODELS.items()}
    assert topk["nano"] == 0.225 and topk["TurboWan2.1-T2V-14B-720P"] == 0.15
    assert [presets.built_in(name, catalog.NANO)["num_steps"] for name in presets.BUILT_IN] == [2, 4, 4]


def test_a_preset_is_kept_and_deleted():
    presets.save(" my café 2 ", {"num_steps": 3, "sla_topk": 0.2})
    assert presets.own() == {"my café 2": {"num_steps": 3, "sla_topk": 0.2}}
    presets.save("my café 2", {"num_steps": 1})
    assert presets.own() == {"my café 2": {"num_steps": 1}}
    presets.delete("my café 2")
    presets.delete("my café 2")
    assert presets.own() == {}


@pytest.mark.parametrize("name", ["", "  ", "fast", "a/b", "../x", ".hidden", "x" * 61, "a\0b"])
def test_a_name_that_cannot_be_a_file(name, folder):
    with pytest.raises(InputError, match="name is"):
        presets.save(name, {"num_steps": 3})
    assert list(folder.rglob("*.json")) == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        *((text, "Expecting|no setting|nesting|decode|recursion") for text in (
            "", "{", "[]", "5", "null", '{"colour": 1}', "[" * 100_000, "\udcff")),
        (json.dumps({"prompt": "x" * presets.MOST}), "bytes"),
        (Path.mkdir, "not a file"),
        (os.mkfifo, "not a file"),  # nobody writes into it
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=lambda one: str(one)[:12],
)  # fmt: skip
def test_files_that_hold_something_else_are_left_out(folder, make, reason):
    (folder / presets.FOLDER).mkdir()
    for path in (folder / presets.FOLDER / "odd.json", folder / presets.LATEST):
        path.write_bytes(make.encode(errors="surrogateescape")) if isinstance(make, str) else make(path)
    presets.save("good", {"num_steps": 3})
    assert presets.own() == {"good": {"num_steps": 3}}
    with pytest.raises(InputError, match=rf"latest.json' cannot be used \(.*({reason}).*\)\. Expected .*Delete it"):
        presets.latest()


def test_settings_that_a_text_editor_saved_with_a_byte_order_mark(folder):
    (folder / presets.LATEST).write_bytes(b"\xef\xbb\xbf" + b'{"num_steps": 3}')
    assert presets.latest() == {"num_steps": 3}


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("TURBO_NB_CONFIG", str(folder / "file"))
    presets.remember({"num_steps": 3})
    assert presets.latest() == {} and presets.own() == {}
    with pytest.raises(OutputError, match="TURBO_NB_CONFIG"):
        presets.save("x", {})


def test_the_latest_settings_come_back():
    presets.remember({"num_steps": 3, "random_seed": False, "prompt": "x"})
    presets.remember({"image": "\udcff.png"})  # a name that JSON in UTF-8 cannot hold
    assert presets.latest() == {"num_steps": 3, "random_seed": False, "prompt": "x"}
