"""The clips of a folder: found again, deleted, and packed."""

import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from turbo_nb.errors import InputError, OutputError
from turbo_nb.generation import Video
from turbo_nb.records import VideoRecord
from turbo_nb.video import mp4
from turbo_nb.video.gallery import Gallery

WANTED = {
    "model": "nano", "attention_type": "sla", "width": 128, "height": 128, "num_frames": 25, "num_steps": 4,
}  # fmt: skip


def video(prompt: str = "a red circle", seed: int = 1) -> Video:
    timings = {"text": 1.0, "denoise": 4.0}
    record = VideoRecord(prompt=prompt, seed=seed, fps=8, timings=timings, steps=[1.5, 2.0], **WANTED)
    return Video(frames=np.zeros((5, 32, 32, 3), np.uint8), record=record)


def test_clips_are_found_again_the_latest_first(tmp_path):
    gallery = Gallery(tmp_path / "new")
    assert gallery.clips() == []
    made = [gallery.save(video(seed=seed), "A", {"load": 9.0}) for seed in (1, 2, 3)]
    for age, one in enumerate(reversed(made)):
        os.utime(one.path, (1e9 - age, 1e9 - age))
    found = Gallery(tmp_path / "new").clips()
    assert all(one.record.timings.pop("write") > 0 for one in made)  # which the file cannot know
    assert found == made[::-1] and found[0].seconds == 5.0 and found[0].record.steps == [1.5, 2.0]
    assert gallery.clips(2) == found[:2]
    assert "timings" not in found[0].settings and found[0].record.timings["load"] == 9.0


def test_a_clip_keeps_what_it_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "3.60")
    assert video().cost == pytest.approx(0.005)
    made = Gallery(tmp_path).save(video(), "A", {"load": 9.0})
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "100")
    (found,) = Gallery(tmp_path).clips()
    assert found.record.cost == made.record.cost == pytest.approx(0.014)


def test_foreign_and_unfinished_files_are_left_alone(tmp_path):
    gallery, left = Gallery(tmp_path), tmp_path / ".turbo_nb-0.mp4"
    left.touch()
    os.utime(left, (1e9, 1e9))  # of a process that was killed long ago
    kept = gallery.save(video(), "A")
    assert not left.exists()
    (tmp_path / "page.mp4").write_text("<html>")
    os.link(kept.path, tmp_path / ".half.mp4")
    assert [one.path for one in gallery.clips()] == [kept.path]


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    gallery = Gallery(tmp_path)
    one = gallery.save(video(), "A")
    gallery.clips()
    read = mp4.read_metadata
    calls = []
    monkeypatch.setattr(mp4, "read_metadata", lambda path: calls.append(path) or read(path))
    gallery.clips()
    assert calls == []
    mp4.write_mp4(one.path, video().frames, 8, one.settings | {"seed": 5})
    assert gallery.clips()[0].settings["seed"] == 5 and calls == [one.path]


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "<img src=x>\n\0'\"", "赤い円", "x" * 500])
def test_a_prompt_makes_a_harmless_name_that_is_new(tmp_path, prompt):
    gallery = Gallery(tmp_path)
    paths = {gallery.save(video(prompt.replace("\0", ""))).path for _ in range(2)}
    assert len(paths) == 2
    assert all(
        p.parent == tmp_path and p.name.isascii() and len(p.name) < 80 and set("<>'\" ").isdisjoint(p.name)
        for p in paths
    )


def test_delete_takes_only_what_is_in_the_folder(tmp_path):
    gallery, other = Gallery(tmp_path / "a"), Gallery(tmp_path / "b")
    mine, theirs = gallery.save(video()), other.save(video())
    with pytest.raises(InputError, match="is not in"):
        gallery.delete(theirs)
    gallery.delete(mine)
    gallery.delete(mine)  # gone already
    assert gallery.clips() == [] and theirs.path.exists()


def test_a_zip_holds_the_clips_and_takes_the_place_of_the_last(tmp_path):
    gallery = Gallery(tmp_path)
    with pytest.raises(InputError, match="at least one clip"):
        gallery.archive([])
    clips = [gallery.save(video(seed=seed)) for seed in (1, 2)]
    gallery.archive(clips[:1])
    path = gallery.archive(clips)
    assert sorted(zipfile.ZipFile(path).namelist()) == sorted(one.path.name for one in clips)
    assert zipfile.ZipFile(path).read(clips[0].path.name) == clips[0].path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def odd(folder, settings: dict, name: str):
    return mp4.write_mp4(folder / name, video().frames, 8, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"other": "program"},
        {"prompt": None, "seed": None, "width": "wide", "timings": None, "steps": {}, "cost": "free"},
        {"prompt": ["a"], "seed": [1, 2], "timings": {"text": "fast", "decode": 2.0}},
    ],
    ids=["foreign", "null", "grid"],
)
def test_a_clip_with_odd_metadata_is_shown_and_packed(tmp_path, settings):
    gallery = Gallery(tmp_path)
    path = odd(tmp_path, settings, "odd.mp4")
    (clip,) = gallery.clips()
    assert clip.path == path and clip.seconds == (2.0 if settings.get("timings") else 0) and clip.record.cost is None
    assert clip.settings["prompt"] == "" and clip.settings["seed"] in (0, [1, 2]) and clip.settings["width"] is None
    assert zipfile.ZipFile(gallery.archive([clip])).namelist() == ["odd.mp4"]


def test_links_folders_and_old_dates_break_neither_page_nor_zip(tmp_path):
    gallery = Gallery(tmp_path)
    kept = gallery.save(video())
    os.utime(kept.path, (-1e9, -1e9))  # 1938
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert [clip.path for clip in gallery.clips()] == [kept.path]
    gone = gallery.save(video())
    gone.path.unlink()
    assert zipfile.ZipFile(gallery.archive([kept, gone])).namelist() == [kept.path.name]


@pytest.mark.parametrize("kind", ["file", "loop"])
def test_a_folder_that_cannot_be_one_has_no_clips_and_takes_none(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(mp4.tempfile, "tempdir", str(tmp_path))
    place = tmp_path / "clips"
    place.write_text("") if kind == "file" else place.symlink_to("clips")
    assert Gallery(place).clips() == []
    with pytest.raises(OutputError, match=r"cannot write .* The frames are kept in"):
        Gallery(place).save(video())


def test_capital_suffixes_are_seen(tmp_path):
    path = Gallery(tmp_path).save(video()).path
    path = path.rename(path.with_suffix(".MP4"))
    assert [clip.path for clip in Gallery(tmp_path).clips()] == [path]


def test_saves_in_the_same_second_keep_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    galleries = [Gallery(tmp_path), Gallery(tmp_path)]  # two notebooks
    with ThreadPoolExecutor(4) as pool:
        saved = list(pool.map(lambda number: galleries[number % 2].save(video()).path, range(4)))
    assert len(set(saved)) == 4 and len(galleries[0].clips()) == 4


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OutputError("the disk is full")

    monkeypatch.setattr(mp4, "write_mp4", full)
    with pytest.raises(OutputError, match="full"):
        Gallery(tmp_path).save(video())
    assert not list(tmp_path.iterdir())
