"""Presets: built in, and files of the user that may hold anything."""

import errno
import json
import os
import subprocess
import sys
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
            "", "{", "[]", "5", "null", "[" * 100_000, "\udcff")),
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
    assert presets.latest() == {} and presets.own() == {}
    for write in (presets.remember, lambda values: presets.save("x", values)):
        with pytest.raises(OutputError, match="TURBO_NB_CONFIG"):
            write({"num_steps": 3})


def test_the_latest_settings_come_back():
    presets.remember({"num_steps": 3, "random_seed": False, "prompt": "x"})
    with pytest.raises(OutputError):
        presets.remember({"image": "\udcff.png"})  # a name that JSON in UTF-8 cannot hold
    assert presets.latest() == {"num_steps": 3, "random_seed": False, "prompt": "x"}


def test_a_preset_of_unknown_options_is_left_out(folder):
    (folder / presets.FOLDER).mkdir()
    (folder / presets.FOLDER / "odd.json").write_text('{"colour": 1}')
    assert presets.own() == {}


def test_a_change_keeps_what_others_wrote(folder):
    (folder / presets.LATEST).write_text('{"colour": null, "num_steps": 99}')  # of another version
    presets.remember({"prompt": "x", "seed": 4})
    presets.remember({"seed": None, "ode": None})
    assert presets.latest() == {"colour": None, "num_steps": 99, "prompt": "x"}
    (folder / presets.LATEST).write_text('{"colour": 1}')
    presets.remember({"prompt": "x"})
    assert presets.latest() == {"colour": 1, "prompt": "x"}


def test_a_change_replaces_a_file_that_cannot_be_read(folder):
    (folder / presets.LATEST).write_text("{")
    presets.remember({"num_steps": 3})
    assert presets.latest() == {"num_steps": 3}


def test_changes_at_the_same_moment_are_all_kept(folder):
    code = """if 1:
        import sys
        from turbo_nb import presets
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(30):
            presets.remember({f"{sys.argv[1]}{number}": number})
    """
    names = ("a", "b", "c")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.close()
    while any(writer.poll() is None for writer in writers):
        presets.latest()  # raises where a file is not whole
    for writer in writers:
        writer.stdout.close()
        assert writer.wait(60) == 0
    assert presets.latest() == {f"{name}{number}": number for name in names for number in range(30)}


def test_settings_are_kept_on_a_file_system_without_locks(monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(presets.FileLock, "acquire", fail)
    presets.remember({"num_steps": 3})
    assert presets.latest() == {"num_steps": 3}
