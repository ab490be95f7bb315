"""The clips of a folder: found again, deleted, packed, and asked how long the next one takes."""

import os
import zipfile

import numpy as np
import pytest

from turbo_nb.errors import InputError
from turbo_nb.generation import Video
from turbo_nb.video import mp4
from turbo_nb.video.gallery import History

WANTED = {
    "model": "nano", "attention_type": "sla", "width": 128, "height": 128, "num_frames": 25, "num_steps": 4,
}  # fmt: skip


def video(prompt: str = "a red circle", seed: int = 1) -> Video:
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    return Video(
        frames=frames, fps=8, timings={"text": 1.0, "denoise": 4.0}, steps=(1.5, 2.0),
        settings=WANTED | {"prompt": prompt, "seed": seed},
    )  # fmt: skip


def test_runs_are_found_again_the_latest_first(tmp_path):
    history = History(tmp_path / "new")
    assert history.runs() == []
    made = [history.save(video(seed=seed), "A", {"load": 9.0}) for seed in (1, 2, 3)]
    for age, one in enumerate(reversed(made)):
        os.utime(one.path, (1e9 - age, 1e9 - age))
    found = History(tmp_path / "new").runs()
    assert all(one.timings.pop("write") > 0 for one in made)  # which the file cannot know
    assert found == made[::-1] and found[0].seconds == 5.0 and found[0].steps == [1.5, 2.0]
    assert history.runs(2) == found[:2]
    assert "timings" not in found[0].settings and found[0].timings["load"] == 9.0


def test_a_clip_keeps_what_it_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "3.60")
    assert video().cost == pytest.approx(0.005)
    made = History(tmp_path).save(video(), "A", {"load": 9.0})
    monkeypatch.setenv("TURBO_NB_PRICE_PER_HOUR", "100")
    (found,) = History(tmp_path).runs()
    assert found.cost == made.cost == pytest.approx(0.014)


def test_foreign_and_unfinished_files_are_left_alone(tmp_path):
    history = History(tmp_path)
    kept = history.save(video(), "A")
    (tmp_path / "page.mp4").write_text("<html>")
    os.link(kept.path, tmp_path / ".half.mp4")
    assert [one.path for one in history.runs()] == [kept.path]


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    history = History(tmp_path)
    one = history.save(video(), "A")
    history.runs()
    read = mp4.read_metadata
    calls = []
    monkeypatch.setattr(mp4, "read_metadata", lambda path: calls.append(path) or read(path))
    history.runs()
    assert calls == []
    mp4.write_mp4(one.path, video().frames, 8, one.settings | {"seed": 5})
    assert history.runs()[0].settings["seed"] == 5 and calls == [one.path]


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "<img src=x>\n\0'\"", "赤い円", "x" * 500])
def test_a_prompt_makes_a_harmless_name_that_is_new(tmp_path, prompt):
    history = History(tmp_path)
    paths = {history.save(video(prompt.replace("\0", ""))).path for _ in range(2)}
    assert len(paths) == 2
    assert all(
        p.parent == tmp_path and p.name.isascii() and len(p.name) < 80 and set("<>'\" ").isdisjoint(p.name)
        for p in paths
    )


def test_delete_takes_only_what_is_in_the_folder(tmp_path):
    history, other = History(tmp_path / "a"), History(tmp_path / "b")
    mine, theirs = history.save(video()), other.save(video())
    with pytest.raises(InputError, match="is not in"):
        history.delete(theirs)
    history.delete(mine)
    history.delete(mine)  # gone already
    assert history.runs() == [] and theirs.path.exists()


def test_a_zip_holds_the_clips_and_takes_the_place_of_the_last(tmp_path):
    history = History(tmp_path)
    with pytest.raises(InputError, match="no clip"):
        history.archive([])
    runs = [history.save(video(seed=seed)) for seed in (1, 2)]
    history.archive(runs[:1])
    path = history.archive(runs)
    assert sorted(zipfile.ZipFile(path).namelist()) == sorted(one.path.name for one in runs)
    assert zipfile.ZipFile(path).read(runs[0].path.name) == runs[0].path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3
