"""Facts that are kept: believed only under the circumstances that they were found in."""

import json

import pytest

from turbo_nb.machine import environment, recall

HERE = {"gpu": "H100", "driver": ["580", 13000], "compiler": None}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "facts"


def test_a_fact_is_known_again_under_the_same_circumstances_only(folder):
    assert recall.recall("triton", HERE) is None
    recall.remember("triton", HERE, "works")
    assert recall.recall("triton", dict(reversed(HERE.items()))) == "works"
    assert recall.recall("other", HERE) is None
    for changed in ({"driver": ["581", 13000]}, {"compiler": "/usr/bin/gcc"}, {"more": 1}):
        assert recall.recall("triton", HERE | changed) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b'{"fact": "works"}',
        b'{"circumstances": {}, "fact": "works"}',
        b"[" * 9999,
    ],
)
def test_a_damaged_file_is_not_believed_and_is_replaced(folder, damage):
    recall.remember("triton", HERE, "works")
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert recall.recall("triton", HERE) is None
    recall.remember("triton", HERE, "works")
    assert recall.recall("triton", HERE) == "works"


def test_a_file_of_other_circumstances_under_the_same_name_is_not_believed(folder):
    recall.remember("triton", HERE, "works")
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text())
    kept["circumstances"]["gpu"] = "L4"
    file.write_text(json.dumps(kept))
    assert recall.recall("triton", HERE) is None


def test_a_folder_that_cannot_be_used_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(environment, "cache", lambda: tmp_path / "file")
    recall.remember("triton", HERE, "works")
    assert recall.recall("triton", HERE) is None


def test_a_stamp_changes_with_the_file_and_follows_links(tmp_path):
    file, link = tmp_path / "gcc", tmp_path / "cc"
    assert recall.stamp(None) is None and recall.stamp(file) is None
    file.write_text("one")
    link.symlink_to(file)
    first = recall.stamp(link)
    assert first == recall.stamp(file)
    file.write_text("three")
    assert recall.stamp(link) != first
