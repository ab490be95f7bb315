"""turbo-nb as a shell runs it: in a process of its own, and where that proves no more, in a fork or in this one."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import command_line
from typer.main import get_command
from typer.testing import CliRunner

import turbo_nb
from turbo_nb import backends, cli, generation, terminal
from turbo_nb.errors import BackendError, InputError, TurboNbError
from turbo_nb.machine import atomic, environment
from turbo_nb.video import mp4
from turbo_nb.video.mp4 import read_metadata

PROMPT = "a large red circle moving from left to right on a black background"


def run(*arguments, cwd, python=(sys.executable,), **variables):
    if "--prompt" in arguments:
        arguments += ("--device", "cpu")
    command = [*python, "-m", "turbo_nb.cli", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
    )


def test_help_imports_nothing_heavy(tmp_path):
    code = "import sys, turbo_nb.cli; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0 and "t2v" in result.stdout and "info" in result.stdout


def test_a_prompt_becomes_a_video_and_the_video_says_how(tmp_path, forked):
    result = run("t2v", "--prompt", PROMPT, "--save_path", "out/red.mp4", "--num_frames", 5, "--seed", 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-2] == "out/red.mp4: 5 frames of 128x128 at 16 fps, seed 3"
    assert [word for word in lines[-1].split() if word.isalpha() and len(word) > 1] == [
        "text",
        "denoise",
        "decode",
        "write",
    ]
    assert re.search(r"denoise \d+\.\d\d s \(steps( \d+\.\d\d){4}\)", lines[-1])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["red.mp4"]
    again = run(
        "t2v", "--prompt", PROMPT, "--save-path", "again.mp4", "--num-frames", 5, "--seed", 3, cwd=tmp_path,
        python=forked.command(), TURBO_NB_PRICE_PER_HOUR="3600",  # a dollar a second
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert re.search(r"a video takes (about|less than) \d+\.\d (s|min), from \d+ earlier videos? here", again.stderr)
    times = again.stdout.splitlines()[-1]
    seconds = sum(map(float, re.findall(r"(\d+\.\d+) s", times)))
    assert float(times.partition("$")[2]) == pytest.approx(seconds, abs=0.03) and "$" not in result.stdout
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "out" / "red.mp4").read_bytes()
    told = command_line("info", "again.mp4", cwd=tmp_path).stdout
    assert PROMPT in told and "nano" in told and read_metadata(tmp_path / "again.mp4")["seed"] == 3


@pytest.mark.parametrize(("grid", "made"), [(False, ["v-0.mp4", "v-1.mp4"]), (True, ["v.mp4"])], ids=["", "grid"])
def test_frames_are_encoded_while_others_are_decoded_but_of_a_grid(tmp_path, monkeypatch, grid, made):
    taken, add = [], mp4.Encoder.add
    monkeypatch.setattr(mp4.Encoder, "add", lambda self, frames: taken.append(frames.shape) or add(self, frames))
    result = command_line(
        "t2v", "--prompt", PROMPT, "--num_frames", 5, "--num_steps", 1, "--resolution", "64x48", "--num_samples", 2,
        "--save_path", "v.mp4", *["--grid"] * grid, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert taken == ([(5, 48, 128, 3)] if grid else [(1, 48, 64, 3), (4, 48, 64, 3)] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == made


@pytest.mark.parametrize(
    "line",
    [
        ("t2v", "--prompt", PROMPT, "--save_path", ""),
        ("t2v", "--prompt", PROMPT, "--vae_path", ""),
        ("t2v", "--prompt", PROMPT, "--decoder", "tiny", "--tiny_decoder_path", ""),
        ("i2v", "--prompt", PROMPT, "--extend_clip", ""),
        ("i2v", "--prompt", PROMPT, "--image_path", "a", "--low_noise_model_path", "b", "--high_noise_model_path", ""),
        ("batch", "p.txt", "--output_dir", ""),
        ("batch", ""),
        ("info", ""),
        ("convert", "", "folder"),
        ("convert", "vae", ""),
        ("notebooks", ""),
        ("ui", ""),
    ],
    ids=lambda line: f"{line[0]} {line[-2]}",
)
def test_an_empty_path_is_an_error_and_not_the_current_folder(tmp_path, line):
    result = command_line(*line, cwd=tmp_path)
    assert result.returncode == 2 and "''" in result.stderr and not list(tmp_path.iterdir()), result.stderr


def test_a_grid_that_no_encoder_takes_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "generate", None)
    result = command_line("t2v", *SHORT, "--num_samples", 257, "--grid", cwd=tmp_path)
    assert result.returncode == 2 and "16448x48 pixels. Expected sides of at most 16384" in result.stderr


SHORT = ("--prompt", PROMPT, "--num_frames", 5, "--num_steps", 1, "--resolution", "64x48", "--save_path", "v.mp4")


@pytest.mark.parametrize("failure", [TurboNbError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("grid", [False, True], ids=["", "grid"])
def test_a_failure_in_a_later_clip_keeps_and_reports_the_earlier_clips(tmp_path, monkeypatch, grid, failure):
    generate = generation.generate

    def fail_at_the_third(*given, **more):
        if more["seed"] == 2:
            raise failure
        return generate(*given, **more)

    monkeypatch.setattr(generation, "generate", fail_at_the_third)
    result = command_line("t2v", *SHORT, "--num_samples", 3, *["--grid"] * grid, cwd=tmp_path)
    assert result.returncode == (2 if isinstance(failure, TurboNbError) else 130)
    made = ["v.mp4"] if grid else ["v-0.mp4", "v-1.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    assert [line.partition(":")[0] for line in result.stdout.splitlines() if ".mp4" in line] == made
    if grid:
        assert "fps, seeds 0 to 1\n" in result.stdout
        assert read_metadata(tmp_path / "v.mp4")["seed"] == [0, 1]
        assert mp4.read_frames(tmp_path / "v.mp4", 128, 48).shape == (5, 48, 128, 3)


@pytest.mark.parametrize("kind", ["encoder dies", "encoder is gone", "disk full", "name taken"])
def test_a_failure_after_the_frames_keeps_them_and_names_their_file(tmp_path, monkeypatch, kind):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make(*given, **more):
        video = generate(*given, **more)
        if kind == "encoder dies":
            more["on_frames"].__self__._process.kill()
        if kind == "name taken":
            (tmp_path / "v.mp4").mkdir()
        return video

    generate = generation.generate
    monkeypatch.setattr(generation, "generate", make)
    if kind == "disk full":
        monkeypatch.setattr(mp4, "_add_metadata", full)
    if kind == "encoder is gone":
        monkeypatch.setattr(mp4.Encoder, "_start", full)
    result = command_line("t2v", *SHORT, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (kept,) = tmp_path.glob("v-frames*.npz")
    assert str(kept) in result.stderr
    with np.load(kept) as found:
        assert found["frames"].shape == (5, 48, 64, 3) and found["frames"].any() and found["fps"] == 16
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(atomic.PREFIX)]


def test_several_gpus_are_in_the_line_of_a_clip_and_in_its_metadata(tmp_path, monkeypatch):
    def make(*given, **more):
        video = generate(*given, **more)
        return replace(video, record=replace(video.record, gpus=4))

    generate = generation.generate
    monkeypatch.setattr(generation, "generate", make)
    result = command_line("t2v", *SHORT, "--num_samples", 2, "--grid", cwd=tmp_path)
    assert "v.mp4: 5 frames of 128x48 at 16 fps, seeds 0 to 1, 4 GPUs\n" in result.stdout, result.stderr
    assert read_metadata(tmp_path / "v.mp4")["gpus"] == 4
    assert re.search(r"^gpus +4$", command_line("info", "v.mp4", cwd=tmp_path).stdout, re.MULTILINE)


def test_times_that_cannot_be_remembered_cost_no_video(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path / "file"))
    result = command_line("t2v", *SHORT, cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "v.mp4").is_file(), result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_frames", "24"], "4n + 1"),
        (["--resolution", "100x100"], "multiples of 16"),
        (["--num_steps", "5"], "from 1 to 4"),
        (["--num_steps", "0"], "1 to 4"),
        (["--prompt", ""], "Write a prompt"),
        (["--save_path", "file/clip.mp4"], "is a file"),
        (["--model", "TurboWan9"], "Expected one of auto, nano"),
        (["--attention_type", "sagesla"], "--attention_type sla"),
        (["--sla_topk", "2"], "at most 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_no_file(tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    result = command_line("t2v", "--prompt", PROMPT, *arguments, cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], result.stderr
    assert [p.name for p in Path(tmp_path).iterdir()] == ["file"]


LONG = "long " * 30_000


@pytest.mark.parametrize(
    "arguments",
    [
        [LONG], ["info", "a.mp4", LONG], ["info", "a.mp4", *["x"] * 5000], ["t2v", f"--{LONG}", "x"],
        ["t2v", "--seed", LONG], ["t2v", "--num_frames", "\x1b[31m" * 500], ["doctor", LONG],
        ["t2v", "--prompt", "x", "--device", LONG],
        ["t2v", "--prompt", "x", "--save_path", f"{'a/' * 5000}x.mp4"], ["info", "9" * 5000], ["download", "/" * 5000],
        ["t2v", "--prompt", "x", "--model", "x/" * 9000], ["batch", f"{LONG}.txt"], ["info", "\x1b]0;x\x07"],
        ["notebooks", "\0"], ["download", f"{'o' * 200}/r"],
    ],
    ids=lambda line: " ".join(line)[:40].encode("unicode_escape").decode(),
)  # fmt: skip
def test_an_error_of_an_endless_argument_is_short(tmp_path, arguments):
    begin = time.perf_counter()
    result = command_line(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr) < 1300 and len(result.stderr.splitlines()) < 11, result.stderr
    assert "\x1b" not in result.stderr and time.perf_counter() - begin < 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["t2v", "batch", "notebooks", "doctor"])
def test_names_do_not_command_the_terminal(tmp_path, monkeypatch, command):
    (tmp_path / "p.txt").write_text(PROMPT)
    monkeypatch.setenv("HF_HUB_CACHE", f"{tmp_path}/\x1b[31mred")
    small = ["--num_frames", 1, "--num_steps", 1, "--resolution", "16x16", "--device", "cpu", "--model", "nano"]
    arguments = {
        "t2v": ["--prompt", PROMPT, *small, "--save_path", "\x1b[31mred.mp4"],
        "batch": ["p.txt", *small, "--output_dir", "\x1b[31mred"],
        "notebooks": ["\x1b[31mred"],
        "doctor": [],
    }
    result = command_line(command, *arguments[command], cwd=tmp_path)
    assert result.returncode == 0 and "\\x1b[31mred" in re.sub(r"\W*\n\W*", "", result.stdout), result
    assert "\x1b" not in result.stdout + result.stderr


def test_info_of_something_else(tmp_path):
    result = run("info", "missing.mp4", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith(
        "error: path is 'missing.mp4', which is not a file"
    )


def test_ctrl_c_is_one_line_and_130(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("turbo_nb.pipeline.load", interrupt)
    result = command_line("t2v", "--model", "nano", "--device", "cpu", "--prompt", PROMPT, cwd=tmp_path)
    assert (result.returncode, result.stderr.strip()) == (130, "cancelled; finished files are kept")


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(get_command(cli.app).commands))], ids=str)
def test_help_of_every_command_is_shown(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output and result.exception is None


@pytest.mark.parametrize("command", ["t2v", "i2v", "batch", "download", "verify"])
def test_help_fits_80_columns_with_whole_names(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(cli.app, [command, "--help"]).output
    assert max(map(len, shown.splitlines())) <= 80
    for parameter in get_command(cli.app).commands[command].params:
        if not parameter.hidden and parameter.param_type_name == "option":
            assert parameter.opts[0] in shown, parameter.opts
    assert "…" not in shown.replace("seed + 1, …", "")  # nothing is cut
    places = [shown.find(f"─ {panel} ─") for panel in cli.PANELS.values()]
    assert (shown_panels := [place for place in places if place >= 0]) == sorted(shown_panels)


@pytest.mark.parametrize(
    ("argument", "text"),
    [("red", "red"), ("é 红", "é 红"), ("\udcc3\udca9.mp4", "é.mp4"), ("\udcff.mp4", "\udcff.mp4")],
)
def test_an_argument_is_utf8_whatever_the_locale(argument, text):
    assert terminal.decoded(argument) == text


def test_version_is_that_of_the_installed_package():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and re.fullmatch(r"turbo-nb (\d+\.\d+\.\d+\S*|\(not installed.*\))\n", result.output)


def test_a_shell_can_complete_names():
    variables = {"_TURBO_NB_COMPLETE": "complete_bash", "COMP_WORDS": "turbo-nb do", "COMP_CWORD": "1"}
    result = CliRunner().invoke(cli.app, [], prog_name="turbo-nb", env=variables)
    assert result.output.split() == ["doctor", "download"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_signal_leaves_no_temporary_file(tmp_path, forked, name):
    code = (
        "import sys, time; from turbo_nb import cli, generation; from turbo_nb.video import mp4\n"
        "add = mp4.Encoder.add\n"
        "def slow(self, frames):\n    add(self, frames); print('encoding', flush=True); time.sleep(60)\n"
        "mp4.Encoder.add = slow\n"
        "sys.argv[1:] = ['t2v', '--device', 'cpu', '--prompt', 'a red circle', '--num_frames', '1', '--num_steps', '1',"
        " '--save_path', 'v.mp4']\ncli.main()"
    )
    python = [sys.executable] if name == "SIGTERM" else forked.command()
    process = subprocess.Popen(
        [*python, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "encoding\n"
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]  # the temporary one
    number, target = getattr(signal, name), process.pid if name == "SIGTERM" else forked.fork_of(process)
    os.kill(target, number)
    os.kill(target, number)  # a closing terminal sends it twice
    _, err = process.communicate(timeout=30)
    assert (process.returncode, list(tmp_path.iterdir())) == (128 + number, [])
    assert "cancelled" in err and "Traceback" not in err


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal.ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    old, new = (disk / f"{atomic.PREFIX}{name}.mp4" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("")
    (tmp_path / "v.mp4").symlink_to(disk / "v.mp4")
    os.utime(old, (time.time() - 2 * atomic.ABANDONED,) * 2)
    result = command_line("t2v", "--prompt", PROMPT, "--num_frames", 1, "--num_steps", 1, "--resolution", "64x48",
                          "--save_path", "v.mp4", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in disk.iterdir()) == [new.name, "v.mp4"]


CLIP = ("--device", "cpu", "--num_frames", "1", "--num_steps", "1", "--resolution", "64x48", "--save_path", "v.mp4")


@pytest.mark.parametrize("redirect", [">&-", ">/dev/full", "2>/dev/full", ">&- 2>&-", "| true", "<&-"])
def test_a_stream_that_fails_costs_no_video(tmp_path, forked, redirect):
    command = f'set -o pipefail; "$@" {redirect}'
    python = [sys.executable] if redirect == ">&- 2>&-" else forked.command()
    arguments = [*python, "-m", "turbo_nb.cli", "t2v", "--prompt", PROMPT, *CLIP, "--num_samples", "2"]
    result = subprocess.run(
        ["bash", "-c", command, "bash", *arguments], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert "Exception ignored" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v-0.mp4", "v-1.mp4"]
    assert ("standard output cannot be written" in result.stderr) == (redirect == ">/dev/full")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk"])
def test_a_stream_of_another_encoding_costs_no_video(tmp_path, forked, encoding):
    result = run(
        "t2v", "--prompt", "红圆 🔴 a red circle", *CLIP[2:-1], "猫.mp4", cwd=tmp_path, PYTHONIOENCODING=encoding,
        python=[sys.executable] if encoding == "ascii" else forked.command(),
    )  # fmt: skip
    assert result.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["猫.mp4"], result.stderr
    told = run("info", "猫.mp4", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert told.returncode == 0 and "a red circle" in told.stdout


@pytest.mark.parametrize("command", ["info", "doctor"])
def test_a_text_that_is_lost_is_exit_code_1(tmp_path, command):
    arguments = {"info": ["info", str(Path(__file__).parent / "golden/vae_state.safetensors")], "doctor": ["doctor"]}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "turbo_nb.cli", *arguments[command]], stdout=full, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("standard output cannot be written") == 1


@pytest.mark.parametrize("variable", sorted(set(backends.VARIABLES.values())))
@pytest.mark.parametrize("command", ["t2v", "batch", "download"])
def test_an_unknown_value_of_a_variable_is_an_error_of_every_command(tmp_path, monkeypatch, command, variable):
    (tmp_path / "prompts.txt").write_text(PROMPT)
    arguments = {
        "t2v": ["--prompt", PROMPT, *CLIP],
        "batch": ["prompts.txt", *CLIP[:-2], "--output_dir", "made"],
        "download": ["TurboWan2.1-T2V-1.3B-480P"],
    }
    monkeypatch.setenv(variable, "nonsense")
    result = command_line(command, *arguments[command], cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {variable}=nonsense is unknown"), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_an_unknown_value_of_a_variable_is_an_error_in_python(monkeypatch):
    monkeypatch.setenv("TURBO_NB_VAE", "nonsense")
    with pytest.raises(BackendError, match="TURBO_NB_VAE=nonsense is unknown; give one of auto"):
        turbo_nb.load_pipeline("nano", device="cpu")
    monkeypatch.delenv("TURBO_NB_VAE")
    monkeypatch.setenv("TURBO_NB_EXCHANGE", "NCCL")
    with pytest.raises(
        InputError, match=r"^TURBO_NB_EXCHANGE is 'NCCL'. Expected one of auto, nccl. Unset it for auto"
    ):
        turbo_nb.load_pipeline("nano", device="cpu")


@pytest.mark.parametrize("variable", environment.SWITCHES)
def test_a_switch_that_is_a_word_is_an_error(monkeypatch, variable):
    monkeypatch.setenv(variable, "no")
    with pytest.raises(InputError, match=f"^{variable} is 'no'. Expected 0 or 1"):
        turbo_nb.load_pipeline("nano", device="cpu")


def test_python_without_docstrings_is_an_error_before_the_imports(tmp_path):
    command = [sys.executable, "-OO", "-m", "turbo_nb.cli", "t2v", "--prompt", PROMPT]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: PYTHONOPTIMIZE is 2"), result.stderr


@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_info_shows_metadata_of_any_depth(opened):
    for depth in (1, 200, 900):
        value = json.loads(opened * depth + "1" + ("]" if opened == "[" else "}") * depth)
        assert len(cli._as_text(value)) > 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_in_the_place_of_a_notebook_is_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "01_setup.ipynb")
    result = CliRunner().invoke(cli.app, ["notebooks", str(tmp_path)])
    assert "01_setup.ipynb in " in str(result.exception) and "Expected no such file" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["01_setup.ipynb"]
