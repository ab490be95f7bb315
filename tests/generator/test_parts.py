"""The components with scripts, without a browser: what the page asks for, and what the kernel answers and does."""

import io
import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import ipywidgets as w
import numpy as np
import pytest
from PIL import Image

from turbo_nb.errors import InputError
from turbo_nb.generation import Video
from turbo_nb.generator import parts
from turbo_nb.generator.parts import clips
from turbo_nb.generator.parts.clips import GalleryView, ResultPlayer, describe, key
from turbo_nb.generator.parts.controls import ClipDrop, Keys
from turbo_nb.records import VideoRecord
from turbo_nb.video import atoms, mp4
from turbo_nb.video.gallery import Gallery

EVIL = '<img src=x onerror="alert(1)"> & \'"'


def saved(gallery: Gallery, prompt: str = "a red circle", seed: int = 1, age: int = 0):
    record = VideoRecord(prompt=prompt, seed=seed, width=32, height=32, num_frames=5, num_steps=1, model="nano", fps=8)
    clip = gallery.save(Video(frames=np.full((5, 32, 32, 3), 90, np.uint8), record=record))
    os.utime(clip.path, (1e9 - age, 1e9 - age))
    return clip


class Browser:
    """What a page does with a component: it asks, and gets answers"""

    def __init__(self, part: parts.Part):
        self.part, self.answers, self.arrived = part, {}, threading.Condition()
        part.send = self._take

    def _take(self, content, buffers=None):
        with self.arrived:
            self.answers[content["id"]] = content, list(buffers or ())
            self.arrived.notify_all()

    def tell(self, content, buffers=()):
        self.part._handle_custom_msg(content, [memoryview(data) for data in buffers])

    def ask(self, **content):
        number = len(self.answers)
        self.tell(content | {"id": number})
        with self.arrived:
            assert self.arrived.wait_for(lambda: number in self.answers, 30)
        return self.answers[number]

    def fetch(self, wanted: str) -> bytes:
        data, size = b"", 1
        while len(data) < size:
            answer, (piece,) = self.ask(kind="bytes", key=wanted, start=len(data))
            data, size = data + piece, answer["size"]
        return data


@pytest.fixture
def gallery(tmp_path):
    return Gallery(tmp_path / "clips")


@pytest.fixture
def called():
    return []


@pytest.fixture
def view(gallery, called):
    def note(name):
        return lambda *arguments: called.append((name, *arguments))

    made = GalleryView(
        gallery, on_act=note("act"), on_delete=note("delete"), on_zip=note("zip"), on_error=note("error")
    )
    yield made
    made.close()


def names(view: GalleryView) -> list[str]:
    return [item["words"] for item in view.items]


@pytest.mark.parametrize("piece", [1 << 20, 700])
def test_a_clips_bytes_come_in_pieces_when_the_page_asks(gallery, view, monkeypatch, piece):
    monkeypatch.setattr(clips, "PIECE", piece)
    clip = saved(gallery)
    view.show()
    browser = Browser(view)
    assert browser.answers == {}
    assert browser.fetch(view.items[0]["key"]) == clip.path.read_bytes()
    assert len(browser.answers) == -(-clip.path.stat().st_size // piece)


def test_the_result_gives_only_the_clip_that_it_shows(gallery):
    player, first, second = ResultPlayer(), saved(gallery, EVIL), saved(gallery, seed=2)
    browser = Browser(player)
    player.show(first)
    assert player.clip["words"] == EVIL and browser.fetch(player.clip["key"]) == first.path.read_bytes()
    assert "error" in browser.ask(kind="bytes", key=key(second), start=0)[0]
    player.show(None)
    assert player.clip == {} and "error" in browser.ask(kind="bytes", key=key(first), start=0)[0]
    player.close()


@pytest.mark.parametrize(
    "content",
    [
        {"key": "1/2/../secret.mp4"}, {"key": "/etc/passwd"}, {"key": None}, {"key": []}, {}, {"key": "//"},
        {"key": "real", "start": -1}, {"key": "real", "start": "0"}, {"key": "real", "start": True},
        {"key": "stale", "start": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_page_gets_no_other_files(gallery, view, content):
    clip = saved(gallery)
    shutil.copy(clip.path, gallery.folder.parent / "secret.mp4")
    view.show()
    right = view.items[0]["key"]
    content = {"start": 0} | content
    content["key"] = {"real": right, "stale": "1" + right}.get(str(content.get("key")), content.get("key"))
    answer, buffers = Browser(view).ask(kind="bytes", **content)
    assert "error" in answer and buffers == []


@pytest.mark.parametrize("content", [None, 7, "bytes", [], {"kind": "nothing"}, {"kind": []}, {"kind": None}, {}])
def test_foreign_messages_raise_nothing(view, content):
    view._on_message(view, content, [])


def test_posters_come_from_another_thread_and_only_for_the_page(gallery, view, monkeypatch):
    monkeypatch.setattr(clips, "PAGE", 1)
    new, old = saved(gallery), saved(gallery, age=9)
    view.show()
    _, (data,) = Browser(view).ask(kind="poster", key=key(new))
    assert Image.open(io.BytesIO(data)).size == (32, 32)
    assert "error" in Browser(view).ask(kind="poster", key=key(old))[0]
    view.page = 1
    new.path.unlink()
    browser = Browser(view)
    assert browser.ask(kind="poster", key=key(old))[1]
    view.items = [{"key": key(new)}]
    assert "error" in browser.ask(kind="poster", key=key(new))[0]


def test_a_clip_that_cannot_be_decoded_has_no_poster_and_stops_nothing(gallery, view):
    good, bad = saved(gallery), saved(gallery, "broken", age=1)
    data = bytearray(bad.path.read_bytes())
    at = data.index(b"mdat")
    data[at + 4 :] = bytes(len(data) - at - 4)
    bad.path.write_bytes(data)
    view.show()
    browser = Browser(view)
    assert "error" in browser.ask(kind="poster", key=key(bad))[0] and browser.ask(kind="poster", key=key(good))[1]


def test_pages_orders_words_and_stars(gallery, view, monkeypatch):
    monkeypatch.setattr(clips, "PAGE", 2)
    for age, prompt in enumerate(["a red cat", "a dog", "a red dog", "zebra", "bird"]):
        saved(gallery, prompt, age=age)
    view.show()
    assert (names(view), view.total, view.pages) == (["a red cat", "a dog"], 5, 3)
    view.page = 2
    assert names(view) == ["bird"]
    view.set_state({"page": 0, "order": "prompt"})
    assert names(view) == ["a dog", "a red cat"]
    view.words = "red"
    assert (names(view), view.total, view.pages) == (["a red cat", "a red dog"], 2, 1)
    view.words, view.page = "", 99
    assert (view.page, names(view)) == (2, ["zebra"])
    browser = Browser(view)
    browser.tell({"kind": "star", "name": view.items[0]["name"], "on": True})
    assert view.items[0]["star"]
    view.starred = True
    assert (view.page, view.total, names(view)) == (0, 1, ["zebra"])
    again = GalleryView(gallery, on_act=None, on_delete=None, on_zip=None, on_error=None)
    again.starred = True
    assert names(again) == ["zebra"]
    again.close()
    browser.tell({"kind": "star", "name": view.items[0]["name"], "on": False})
    assert (view.total, view.pages, view.page, view.items) == (0, 1, 0, [])


def test_a_new_clip_leaves_the_others_as_they_are(gallery, view):
    saved(gallery, "old", age=9)
    view.show()
    before = view.items
    saved(gallery, "new")
    view.show()
    assert view.items[1:] == before and names(view) == ["new", "old"]


def test_what_a_person_does_with_clips(gallery, view, called, monkeypatch):
    first, second = saved(gallery), saved(gallery, "b", age=1)
    view.show()
    browser = Browser(view)
    browser.tell({"kind": "act", "action": "use", "name": first.path.name})
    browser.tell({"kind": "delete", "names": [first.path.name, "gone.mp4", None, 7]})
    browser.tell({"kind": "delete", "names": None})
    browser.tell({"kind": "zip", "names": [second.path.name]})
    browser.tell({"kind": "zip", "names": []})
    one, two = gallery.clips()
    assert called == [("act", "use", one), ("delete", [one]), ("delete", []), ("zip", [two]), ("zip", [one, two])]
    view.words = "b"
    browser.tell({"kind": "zip"})
    assert called[-1] == ("zip", [two])
    second.path.unlink()
    browser.tell({"kind": "act", "action": "use", "name": second.path.name})
    assert view.message["alert"] and "gone" in view.message["text"] and view.items == []
    error = InputError("no")

    def fail(*_):
        raise error

    monkeypatch.setattr(view, "_on_act", fail)
    browser.tell({"kind": "act", "action": "use", "name": first.path.name})
    assert called[-1] == ("error", error)


def test_a_zip_is_offered_to_the_page(gallery, view):
    path = gallery.archive([saved(gallery)])
    view.offer(path)
    assert view.archive["path"] == str(path) and Browser(view).fetch(view.archive["key"]) == path.read_bytes()
    view.offer(None)
    assert view.archive == {}


def test_a_closed_gallery_answers_nothing(gallery, view):
    saved(gallery)
    view.show()
    view.close()
    view.reply({"id": 1}, {})
    assert view.comm is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"other": "program"},
        {"prompt": None, "seed": None, "width": "wide", "timings": None, "steps": {}, "cost": "free"},
        {"prompt": ["a"], "seed": [1, 2], "timings": {"text": "fast", "decode": 2.0}},
    ],
    ids=["foreign", "null", "grid"],
)
def test_one_odd_clip_disables_nothing(gallery, view, metadata):
    good = saved(gallery)
    path = mp4.write_mp4(gallery.folder / "odd.mp4", np.zeros((5, 32, 64, 3), np.uint8), 8, metadata)
    os.utime(path, (-1e9, -1e9))
    os.symlink("loop.mp4", gallery.folder / "loop.mp4")
    (gallery.folder / "page.mp4").write_text("<html>")
    for order in ("newest", "oldest", "prompt", "slowest"):
        view.order = order
        view.show()
        assert {item["name"] for item in view.items} == {good.path.name, "odd.mp4"}
        json.dumps(view.items)
    browser = Browser(view)
    (odd,) = (item for item in view.items if item["name"] == "odd.mp4")
    assert odd["label"] == "odd.mp4" and browser.fetch(odd["key"]) == path.read_bytes()
    assert browser.ask(kind="poster", key=odd["key"])[1]


def test_two_thousand_clips_open_within_two_seconds(gallery, view):
    first = saved(gallery).path
    for number in range(1999):
        os.link(first, gallery.folder / f"{number:04}.mp4")
    begin = time.process_time()
    view.show()
    opened = time.process_time() - begin
    assert view.total == 2000 and len(view.items) == clips.PAGE and opened < 2
    begin = time.process_time()
    view.words = "circle"
    assert view.total == 2000 and time.process_time() - begin < 4


def test_keys_call_what_the_page_gives_them():
    called, prompt = [], w.Textarea("half a pro")
    keys = Keys(lambda: called.append(prompt.value), lambda: called.append("cancel"), prompt)
    browser = Browser(keys)
    browser.tell({"kind": "generate", "prompt": "half a prompt"})
    browser.tell({"kind": "cancel"})
    browser.tell({"kind": "generate", "prompt": None})
    assert called == ["half a prompt", "cancel", "half a prompt"]
    keys.close()


def test_a_dropped_clip_gives_its_record(gallery):
    seen = []

    def on_record(name, record):
        seen.append((name, record))
        return "ok", False

    drop = ClipDrop(on_record)
    browser, clip = Browser(drop), saved(gallery, EVIL, seed=5)
    with clip.path.open("rb") as file:
        browser.tell({"kind": "dropped", "name": "x.mp4"}, [atoms.read_moov(file)])
    ((name, record),) = seen
    assert (
        name == "x.mp4" and (record.prompt, record.seed) == (EVIL, 5) and drop.message == {"text": "ok", "alert": False}
    )
    for name, buffers in (("a.png", [b""]), ("b.mp4", [b"\xff" * 99]), (None, [])):
        browser.tell({"kind": "dropped", "name": name}, buffers)
        assert drop.message["alert"] and str(name) in drop.message["text"] and len(seen) == 1
    drop.close()


SCRIPTS = {
    "result": ResultPlayer._esm, "gallery": GalleryView._esm, "keys": Keys._esm, "drop": ClipDrop._esm,
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_fetch_nothing_and_put_text_in_as_text(name):
    script = SCRIPTS[name]
    assert script.count("export default") == 1
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "http:",
        "https:",
        "import ",
        "eval(",
    ):
        assert word not in script, word


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_parsed(name, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (tmp_path / "a.mjs").write_text(SCRIPTS[name])
    subprocess.run(["node", "--check", tmp_path / "a.mjs"], check=True)


def test_a_page_shows_no_time_of_a_clip_whose_file_gives_none(gallery):
    clip = saved(gallery, "red")
    for timings, end in (({"decode": 2.0}, "nano, 2.0 s"), ({}, "nano")):  # the second as of `Video.save`
        assert describe(replace(clip, record=replace(clip.record, timings=timings)))["facts"].endswith(end)


def test_what_a_page_shows_of_a_clip_is_text(gallery):
    clip = saved(gallery, EVIL)
    shown = describe(clip)
    assert (
        shown["words"] == EVIL and shown["label"] == EVIL and "32x32, 5 frames, 1 steps, seed 1, nano" in shown["facts"]
    )
    assert "GPU" not in shown["facts"]
    assert "nano, 4 GPUs, " in describe(replace(clip, record=replace(clip.record, gpus=4)))["facts"]
