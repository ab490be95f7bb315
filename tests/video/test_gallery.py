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
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match=r"Remove what is in its place\.$"):  # and not "Free some space"
        gallery.archive(clips)


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


@pytest.fixture
def five(tmp_path):
    """Five clips with prompts, and a file of another program between them, oldest first"""
    gallery = Gallery(tmp_path)
    prompts = ["A red cat", "a dog", "a Red dog", "Zebra", "a red cat, large"]
    for age, prompt in enumerate(prompts):
        made = video(prompt, seed=age)
        made.record.timings["denoise"] = (3.0, 9.0, 1.0, 2.0, 5.0)[age]
        os.utime(gallery.save(made).path, (1e9 + 2 * age, 1e9 + 2 * age))
    (tmp_path / "page.mp4").write_text("<html>")
    os.utime(tmp_path / "page.mp4", (1e9 + 7, 1e9 + 7))
    return gallery


def seeds(found) -> list[int]:
    return [clip.record.seed for clip in found[0]]


def test_clips_in_parts_in_each_order_and_by_words(five):
    assert seeds(five.find(count=2)) == [4, 3] and seeds(five.find(first=2, count=2)) == [2, 1]
    assert seeds(five.find(order="oldest", first=1, count=2)) == [1, 2]
    assert five.find(order="prompt") == (five.find(order="prompt", words="a")[0], 5)
    assert seeds(five.find(order="prompt")) == [1, 0, 4, 2, 3] and seeds(five.find(order="slowest")) == [1, 4, 0, 3, 2]
    assert seeds(five.find(words="red  CAT")) == [4, 0] and five.find(words="red", first=1, count=1)[1] == 3
    assert seeds(five.find(first=9, count=3)) == []


def test_a_part_by_time_reads_only_what_it_returns(five, monkeypatch):
    read, opened = mp4.read_record, []
    monkeypatch.setattr(mp4, "read_record", lambda path: opened.append(path.name) or read(path))
    assert five.find(count=1)[1] == 6 and len(opened) == 1  # page.mp4 counts until it is read
    assert five.find(count=4)[1] == 5 and "page.mp4" in opened and len(opened) == 5
    five.find(count=4)
    assert len(opened) == 5


def test_stars_stay_and_belong_to_clips(five):
    first, second = five.clips(2)
    five.star(first)
    five.star(second)
    assert Gallery(five.folder).find(starred=True) == ([first, second], 2)
    five.delete(second)
    five.star(first, False)
    assert Gallery(five.folder).stars() == set() and five.find(starred=True) == ([], 0)
    assert first in five.clips() and len(list(five.folder.glob(".*"))) == 1


@pytest.mark.parametrize("text", ["", "{", "7", "null", '{"a": 1}', "[1, null, []]", "[" * 5000, "\ud800"])
def test_a_damaged_file_of_stars_has_no_stars_and_is_replaced(five, text):
    (five.folder / ".stars.json").write_bytes(text.encode(errors="surrogatepass"))
    assert five.stars() == set() and five.find(starred=True) == ([], 0)
    five.star(five.clips(1)[0])
    assert len(five.stars()) == 1


def test_stars_that_cannot_be_written_are_an_error(five):
    (five.folder / ".stars.json").mkdir()
    with pytest.raises(OutputError, match=r"\.stars\.json"):
        five.star(five.clips(1)[0])


def test_a_poster_is_made_once_until_the_file_changes(five, monkeypatch):
    poster, made = mp4.poster, []
    monkeypatch.setattr(mp4, "poster", lambda path, width: made.append(path) or poster(path, width))
    clip = five.clips(1)[0]
    assert five.poster(clip) == five.poster(clip) and five.poster(clip).startswith(b"\xff\xd8") and len(made) == 1
    os.utime(clip.path, (2e9, 2e9))
    five.poster(clip)
    assert len(made) == 2
    monkeypatch.setattr("turbo_nb.video.gallery.POSTERS", 1)
    five.poster(five.clips(2)[1])
    assert len(five._posters) == 1
    clip.path.unlink()
    with pytest.raises(InputError, match="not a file"):
        five.poster(clip)


def test_clips_that_are_gone_are_forgotten(five):
    for clip in five.clips():
        five.delete(clip)
    assert five.clips() == [] and not any(five._known.values())


def test_a_clip_is_found_by_its_name_and_nothing_else_is(five, tmp_path):
    clip = five.clips(1)[0]
    assert five.named(clip.path.name) == clip
    outside = Gallery(tmp_path.parent).save(video()).path
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "folder.mp4").mkdir()
    names = ["", ".", "..", f"../{outside.name}", str(outside), str(clip.path), "page.mp4", ".stars.json", "a\0.mp4"]
    assert [five.named(name) for name in [*names, "loop.mp4", "folder.mp4", "gone.mp4", ".mp4"]] == [None] * 13
    outside.unlink()
