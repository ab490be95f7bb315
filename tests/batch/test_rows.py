"""Rows of all kinds: one bad row is recorded or named, and the others are made."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from turbo_nb import batch, generation, pipeline, settings
from turbo_nb.batch import jobs, manifest, prompts, runner
from turbo_nb.errors import InputError, OutputError, TurboNbWarning, collect_warnings
from turbo_nb.pipeline import LoadedModel
from turbo_nb.video import images, mp4

sys.path.insert(0, str(Path(__file__).parent))  # for many_scripts and stand_in

TINY = {"num_frames": 1, "resolution": "16x16"}


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# What a file may hold


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "prompt;seed\nred;7\n", r"p.csv:1: .*'prompt;seed', with semicolons between .* Expected commas"),
        ("p.csv", '"prompt";"seed"\n"red";7\n', "p.csv:1: .*with semicolons"),
        ("p.csv", "sep=;\r\nprompt;seed\r\nred;7\r\n", "p.csv:1: .*with semicolons"),
        ("p.csv", "seed\tPrompt\n7\tred\n", "p.csv:1: .*with tabs"),
        ("p.csv", ",prompt\n0,red\n", r"p.csv:1: column 1 is without a name.*to_csv\(…, index=False\)"),
        ("p.csv", "prompt,Unnamed: 1\nred,0\n", "p.csv:1: column 2 is without a name"),
        ("p.csv", "prompt," + "x" * 9000 + "\n", "p.csv:1: a column is 'xxx"),
        ("p.csv", "y" * 9000 + "\nred\n", "p.csv:1: the header row is 'yyy"),
        ("p.csv", "prompt\nred\n".encode("utf-16"), "p.csv', which is in UTF-16. Expected UTF-8"),
        ("p.txt", "red\nblue\n".encode("utf-16-le"), r"p.txt:1: the line has a zero byte, as UTF-16 has many"),
        ("p.csv", "prompt\na\0b\n", "p.csv:2: the line has a zero byte"),
        ("p.jsonl", '{"prompt": "red", "image": ""}\n', "p.jsonl:1: image is ''. Expected the path of a picture"),
        ("p.txt", "a\nb\n€\n".encode("cp1252"), r"p.txt:3: the line is not in UTF-8"),
        ("p.txt", "#a\n", r"holds no prompt beside comments \(#\)"),
        ("p.txt", "\n{'Prompt': 'red', 'seed': 1}\n".replace("'", '"'), "p.txt:2: .* Rename the file to .jsonl"),
        ("p.txt", "Prompt,num-steps\nred,1\n", "p.txt:1: .*a csv begins.* Rename the file to .csv"),
        ("p.txt", "seed;prompt\n1;red\n", "p.txt:1: .*a csv begins.* Rename the file to .csv"),
        ("p.txt", '[{"prompt": "red"}]', "p.txt:1: .*JSON.* one object a line into a .jsonl"),
        ("p.txt", '[\n  "red"\n]', "p.txt:1: .*JSON.* one object a line into a .jsonl"),
        ("p.txt", "<!DOCTYPE html>\n<title>404</title>\n", "p.txt:1: .*a web page begins.* Download the file itself"),
        ("p.jsonl", '{"prompt": "red", "seed": 1, "seed": null}\n', "p.jsonl:1: the row names 'seed' twice"),
        ("p.jsonl", '{"prompt": "red", "Prompt": "blue"}\n', "p.jsonl:1: the row names 'prompt' twice"),
        ("p.jsonl", '{"prompt": "red", "seed": 1' + "0" * 5000 + "}\n", "p.jsonl:1: the line is not JSON"),
        ("p.jsonl", '{"prompt": "red", "sigma_max": 1' + "0" * 400 + "}\n", "p.jsonl:1: sigma_max is 1000"),
        ("p.jsonl", '{"prompt": ' + "[" * 700 + "]" * 700 + "}\n", "p.jsonl:1: prompt is "),
        ("p.jsonl", '{"prompt": {"a": 1, "a": 2}}\n', "p.jsonl:1: prompt is {'a': 2}"),
        ("p.jsonl", '{"prompt": "red", "ode": 0}\n', "p.jsonl:1: ode is 0. Expected True or False"),
    ],
)
def test_a_wrong_row_is_named_in_one_short_line(tmp_path, name, text, words):
    with pytest.raises(InputError, match=words) as caught:
        prompts.read_prompts(write(tmp_path / name, text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_cell_may_be_longer_than_pythons_limit(tmp_path):
    import csv

    before, long = csv.field_size_limit(), "red circle " * 15_000
    (job,) = prompts.read_prompts(write(tmp_path / "p.csv", f'prompt\n"{long}"\n'))
    assert job.prompt == long.strip() and csv.field_size_limit() == before


@pytest.mark.parametrize(
    "prompt", ["prompt, a stage word", '{"shot": "close-up"}', "[red] circle", "{red} circle", "1", "a, seed", "[red]"]
)
def test_a_prompt_that_resembles_another_format_is_a_prompt(tmp_path, prompt):
    (job,) = prompts.read_prompts(write(tmp_path / "p.txt", prompt))
    assert job.prompt == prompt


def test_a_prompt_after_a_hash_is_a_warning(tmp_path):
    path = write(tmp_path / "p.txt", "# my prompts\n#1 a red circle\na blue square\n#2 green\n")
    with pytest.warns(TurboNbWarning, match=r"p.txt:2 and 1 more: '#1 a red circle' is left out, because # begins"):
        assert [job.prompt for job in prompts.read_prompts(path)] == ["a blue square"]
    with collect_warnings() as said:
        prompts.read_prompts(write(path, "# my prompts\n#\n## more\na blue square\n"))
    assert said == []


def test_the_path_of_a_list_may_be_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.txt", "red\n")
    assert [job.prompt for job in prompts.read_prompts("~/p.txt")] == ["red"]


# What Python may give


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("red circle", r"prompts is 'red circle'. Expected a .txt, .csv or .jsonl. A prompt goes into a list"),
        ("红圆", "A prompt goes into a list"),
        ("a\0.txt", "Expected a path"),
        (b"red", "prompts is a bytes. Expected a list of prompts"),
        (3, "prompts is a int. Expected a list of prompts"),
        (None, "prompts is a NoneType. Expected a list"),
        (SimpleNamespace(columns=["prompt"]), r'Give its to_dict\("records"\)'),
        ([None], "prompt 1: prompt is None"),
        ([["red"]], r"prompt 1: prompt is \['red'\]"),
        ([{"prompt": "red", "ode": "false"}], "prompt 1: ode is 'false'. Expected True or False"),
        ([{"prompt": "red", "PROMPT": "blue"}], "prompt 1: the row names 'prompt' twice"),
        ([{3: "red"}], "prompt 1: an option is 3"),
        ([{"caption": "red"}], "prompt 1: an option is 'caption'. Expected one of .*prompt"),
        ([{"seed": 3}], "prompt 1: prompt is None"),
        ([{"prompt": "red", 3: 4}], "prompt 1: an option is 3"),
        ({"prompt": "red", "steps": 4}, "prompt 1: an option is 'steps'.*num_steps"),
        ([batch.Job(prompt="red", settings=None)], "settings is None. Expected a dictionary"),
    ],
)
def test_what_is_not_a_list_of_prompts_is_an_error(nano, tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        runner.run(given, nano, tmp_path / "out", **TINY)
    assert not list(tmp_path.iterdir())


def test_rows_of_python_are_jobs(nano, made, tmp_path):
    row = {"Prompt": np.str_("red"), "seed": np.int64(7), "num-steps": np.uint8(2), "ode": np.True_, "boundary": None}
    summary = runner.run([row, "blue", batch.Job(prompt="green")], nano, tmp_path, **TINY)
    first = summary.records[0].settings
    assert (first.prompt, first.seed, first.num_steps, first.ode) == ("red", 7, 2, True)
    assert [record.prompt for record in summary.records] == ["red", "blue", "green"]
    assert runner.run({"prompt": "blue"}, nano, tmp_path, **TINY).made == 0  # a single row needs no list
    assert manifest.read_manifest(tmp_path) == summary.records  # numpy's numbers are JSON's


# What fails


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("out of memory"),
        RuntimeError("CUDA out of memory"),
        InputError("image is cut short"),
        KeyError("x"),
        OSError(errno.EFBIG, "File too large"),
        OutputError("cannot write 'a.mp4': ffmpeg ended with 1"),
        RecursionError("too deep"),
    ],
)
def test_a_job_that_fails_in_any_way_is_recorded_and_the_others_go_on(nano, made, tmp_path, monkeypatch, error):
    make = generation.generate

    def generate(loaded, prompt, **options):
        if prompt == "blue":
            raise error
        return make(loaded, prompt, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", generate)
        first = runner.run(["red", "blue", "green"], nano, tmp_path, **TINY)
    assert [record.status for record in first.records] == ["done", "failed", "done"] and first.made == 2
    assert str(error.args[-1]) in first.failed[0].error and "1 failed" in first.line()
    assert manifest.read_manifest(tmp_path)[1] == first.failed[0]
    made.clear()
    assert runner.run(["red", "blue", "green"], nano, tmp_path, **TINY).made == 1 and made == ["blue"]


def test_a_folder_in_a_videos_place_fails_that_job_alone(nano, made, tmp_path):
    task = next(iter(jobs.Tasks(["red"], LoadedModel.of(nano), tmp_path, TINY)))
    task.path.mkdir()
    summary = runner.run(["red", "blue"], nano, tmp_path, **TINY)
    assert made == ["blue"] and "which is a folder" in summary.failed[0].error
    task.path.rmdir()
    assert runner.run(["red", "blue"], nano, tmp_path, **TINY).made == 1 and made == ["blue", "red"]


def test_a_full_disk_ends_the_run_and_loses_nothing(nano, made, tmp_path, monkeypatch):
    save = mp4.Encoder.save

    def full(self, metadata=None):
        if metadata["prompt"] == "blue":
            with self._as_output_error():
                raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(mp4.Encoder, "save", full)
        with pytest.raises(OutputError, match=r"No space left.*Free some space.*frames are kept in"):
            runner.run(["red", "blue", "green"], nano, tmp_path, **TINY)
    assert [record.prompt for record in manifest.read_manifest(tmp_path)] == ["red"]
    assert runner.run(["red", "blue", "green"], nano, tmp_path, **TINY).made == 2


def test_a_folder_that_is_gone_for_good_ends_the_run(nano, made, tmp_path, monkeypatch):
    def fails(self, metadata=None):
        monkeypatch.setattr(mp4, "check_output", refuse)
        raise OutputError("cannot write: Input/output error")

    def refuse(path):
        raise OutputError("cannot write: the drive is gone")

    monkeypatch.setattr(mp4.Encoder, "save", fails)
    with pytest.raises(OutputError, match="the drive is gone"):
        runner.run(["red", "blue"], nano, tmp_path, **TINY)
    assert made == ["red"]


def test_an_error_of_the_folder_advises_what_helps(tmp_path):
    for number, words in (
        (errno.EACCES, r"\. Choose another output_dir"),
        (errno.ENOSPC, "Free some space, or choose"),
    ):
        with pytest.raises(OutputError, match=words), manifest.as_output_error(tmp_path):
            raise OSError(number, "x")


def test_a_failure_is_one_short_line(nano, made, tmp_path, monkeypatch):
    def generate(*args, **kwargs):
        raise RuntimeError("\x1b[31mline\nline " * 9000)

    monkeypatch.setattr(generation, "generate", generate)
    summary = runner.run(["red\x1b[2J"], nano, tmp_path, **TINY)
    lines = str(summary).splitlines()
    assert len(lines) == 4 and all(len(line) < 1000 for line in lines) and "\x1b" not in str(summary)


def test_the_exit_code_and_the_last_line_count_the_failed(tmp_path):
    # In a process, because its output and exit code are what is tested; with an image that a text model cannot take
    rows = [{"prompt": "a quick circle"}, {"prompt": "a quick square", "seed": 1}]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    tasks = [*jobs.Tasks(path, runner.model_of({"model": "nano", "device": "cpu"}), tmp_path / "out", TINY)]
    tasks[1].path.mkdir(parents=True)
    command = [sys.executable, Path(__file__).with_name("stand_in.py"), "batch", path, "--output-dir", tmp_path / "out"]
    options = ["--num-frames", "1", "--resolution", "16x16", "--device", "cpu", "--model", "nano"]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result
    assert "1 made, 0 there before, 1 failed" in result.stdout.splitlines()[-1]


# The manifest


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b'{"id": "abc', "line 2 cannot be read as a job's record"),
        (b"[]\n{}\nnull\n", "line 2 and 2 more cannot"),
        (b"[" * 100_000 + b"\n", "line 2 cannot"),
        (b'{"id": 3, "status": "done"}\n', "line 2 cannot"),
        (b"\xff\xfe\n\n", "line 2 cannot"),
    ],
)
def test_foreign_lines_are_skipped_with_one_warning(nano, made, tmp_path, lines, words):
    first = runner.run(["red"], nano, tmp_path, **TINY)
    path = tmp_path / manifest.MANIFEST
    path.write_bytes(path.read_bytes() + lines)
    with collect_warnings() as said:
        again = runner.run(["red"], nano, tmp_path, **TINY)
    assert (again.made, again.records) == (0, first.records)
    assert len(said) == 1 and words in said[0]


def test_a_manifest_that_cannot_be_written_is_found_before_the_work(nano, made, tmp_path, monkeypatch):
    path, opened = tmp_path / manifest.MANIFEST, Path.open

    def refuse(self, *args, **kwargs):
        if self == path and args[:1] == ("ab",):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match=r"Permission denied.*another output_dir"):
        runner.run(["red"], nano, tmp_path, **TINY)
    assert made == []


# Images


@pytest.fixture
def i2v(monkeypatch):
    """Image-to-video without weights: the sizes of the pictures of its clips, and the names of the opened files"""
    import stand_in

    begun, opened, load_image = [], [], images.load_image

    def generate(loaded, prompt, *, image, last_image, **options):
        begun.extend(load_image(one).size for one in (image, last_image) if one is not None)
        return stand_in.generate(loaded, prompt, **options)

    opens = lambda image, name: opened.append(Path(image).name) or load_image(image, name)  # noqa: E731
    monkeypatch.setattr(images, "load_image", opens)
    monkeypatch.setattr(pipeline, "load", stand_in.load)
    monkeypatch.setattr(generation, "generate", generate)
    return begun, opened


def picture(path, size=(64, 48)):
    from PIL import Image

    Image.new("RGB", size, "red").save(path)
    return path


MODEL = {"model": "Wan2.2-A14B", "device": "cpu"}
PAIR = TINY | {"num_frames": 5}  # because a clip of one frame has no last one


def test_an_image_is_decoded_once_in_a_run(i2v, tmp_path):
    begun, opened = i2v
    files = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (32, 32))]
    rows = [{"prompt": f"it moves {n}", "image": files[n % 2], "last_image": files[0]} for n in range(10)]
    summary = runner.run(rows, MODEL, tmp_path / "out", **PAIR)
    assert (summary.made, opened) == (10, ["a.png", "b.png"]) and sorted(begun) == [(32, 32)] * 5 + [(64, 48)] * 15
    record = mp4.read_record(tmp_path / "out" / summary.records[1].file)
    assert record.image == summary.records[1].image == str(files[1])
    assert record.last_image == summary.records[1].last_image == str(files[0])


def test_many_images_are_not_held_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "KEPT_BYTES", 3 * 64 * 48 * 3)  # three
    files, pictures = [picture(tmp_path / f"{n}.png") for n in range(9)], images.Pictures()
    for file in files:
        pictures.open(file, evict=False)
    assert [Path(one).name for one in pictures._kept] == ["0.png", "1.png", "2.png"]  # what the run begins with
    for file in files:
        pictures.open(file)
        assert len(pictures._kept) <= 3
    assert [Path(one).name for one in pictures._kept] == ["6.png", "7.png", "8.png"]


@pytest.mark.parametrize("name", settings.PICTURES)
def test_a_bad_image_fails_its_own_row(i2v, tmp_path, name):
    begun, _ = i2v
    write(tmp_path / "torn.png", picture(tmp_path / "a.png").read_bytes()[:60])
    picture(tmp_path / "wide.png", (3000, 2))
    rows = [{"prompt": file, "image": "a.png", name: file} for file in ("a.png", "torn.png", "missing.png")]
    if name == "image":
        rows.append({"prompt": "wide", "image": "wide.png", "adaptive_resolution": True, "resolution": "1024x1024"})
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    summary = runner.run(path, MODEL, tmp_path / "out", **PAIR)
    assert [record.status for record in summary.records] == ["done", *["failed"] * (len(rows) - 1)]
    assert len(begun) == len(rows[0]) - 1  # the pictures of the first row
    assert [getattr(record, name) for record in summary.failed] == [str(tmp_path / row[name]) for row in rows[1:]]
    reasons = ["cannot be read as an image", "is not a file", "resolution"][: len(rows) - 1]
    for record, words in zip(summary.failed, reasons, strict=True):
        assert words in record.error and record.error.startswith(("resolution", f"{name} is"))
    picture(tmp_path / "missing.png")
    again = runner.run(path, MODEL, tmp_path / "out", **PAIR)
    assert (again.made, len(again.failed)) == (1, len(rows) - 2)


def test_a_batch_of_bad_images_loads_nothing(i2v, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load", None)
    summary = runner.run([{"prompt": "red", "image": "none.png"}], MODEL, tmp_path, **TINY)
    assert len(summary.failed) == 1 and summary.sheet is None


@pytest.mark.parametrize("name", settings.PICTURES)
def test_an_image_that_changes_during_the_run_fails_its_row(i2v, tmp_path, monkeypatch, name):
    monkeypatch.setattr(images, "KEPT_BYTES", 0)
    file, first = picture(tmp_path / "a.png"), picture(tmp_path / "first.png")
    rows = [{"prompt": prompt, "image": first, name: file} for prompt in ("red", "blue")]
    change = lambda record, done, total: picture(file, (80, 80))  # noqa: E731
    summary = runner.run(rows, MODEL, tmp_path / "out", **PAIR, on_record=change)
    assert summary.made == 1 and f"{name} is {str(file)!r}, which changed during the run" in summary.failed[0].error


@pytest.mark.parametrize("name", settings.PICTURES)
@pytest.mark.parametrize("address", ["https://a.org/b.png", "file:///a/b.png", "data:image/png;base64,AA"])
def test_an_address_is_an_error_of_the_list(i2v, tmp_path, address, name):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "p.jsonl", json.dumps({"prompt": "red", "image": "a.png"} | {name: address}))
    with pytest.raises(InputError, match=rf"p.jsonl:1: {name} is .*Expected"):
        runner.run(path, MODEL, tmp_path / "out", **PAIR)
    assert not (tmp_path / "out").exists()


# Long prompts in many scripts


def test_long_prompts_in_ten_scripts_at_extreme_sizes(nano, made, tmp_path):
    from many_scripts import SCRIPTS, SIZES, rows

    asked = rows(len(SCRIPTS))
    summary = runner.run(asked, nano, tmp_path, num_frames=1)
    assert (summary.made, summary.failed, len(made)) == (2 * len(SCRIPTS), [], len(asked))
    assert {len(prompt) for prompt in made} >= {50, 100_000} and {row["resolution"] for row in asked} == {*SIZES}
    from PIL import Image

    with Image.open(summary.sheet) as sheet:
        assert sheet.width > 2 * 3 * 200 and sheet.height > len(SCRIPTS) * 200
    again = runner.run(asked, nano, tmp_path, num_frames=1)
    assert (again.made, again.records, again.sheet) == (0, summary.records, summary.sheet)


def test_callbacks_of_a_notebook_work_outside_one():
    shown = batch.live(None)
    shown["on_record"](manifest.JobRecord(id="a", status="failed", error="it cannot be made"), 1, 1)
    shown["on_status"](batch.summary.Progress())
