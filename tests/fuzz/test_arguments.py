"""Argument lists of every command, in one process: a documented exit code and a short reason."""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
from fuzz.harness import ONLY, PATHS, TEXTS, fuzz, odd, require_documented
from helpers import command_line
from typer.main import get_command

from turbo_nb import cli
from turbo_nb.shims import script

COMMANDS = get_command(cli.app).commands
CHEAP = ["--device", "cpu", "--num_frames", "1", "--num_steps", "1", "--resolution", "16x16"]
BASE = {
    "t2v": ["--prompt", "a red circle", "--save_path", "out/v.mp4", *CHEAP],
    "i2v": ["--prompt", "a red circle", "--image_path", "good.png", "--save_path", "out/v.mp4", *CHEAP],
    "batch": ["good.txt", "--output_dir", "out", *CHEAP],
    "info": [],
    "convert": [],
    "doctor": [],
    "download": [],
    "verify": ["nope"],  # a whole self-test takes seconds
    "ui": ["out", "--no-browser"],
    "notebooks": [],
    "run": [],
}
LIKELY = {  # values that pass the first check, so that later ones are reached
    "--model": ["nano", "auto", "TurboWan2.1-T2V-1.3B-480P", "Wan2.2-A14B", "nanoo", "dir", "good.mp4"],
    "--resolution": ["480p", "720p", "16x16", "0x0", "16x16384", "16384x16", "16×32", "999999x16", "-16x16", "32 x 32"],
    "--aspect-ratio": ["16:9", "1:1", "1:0"],
    "--num-frames": ["1", "5", "4093", "4097", "2"],
    "--num-samples": ["1", "2", "300", "10001", "1000000000"],
    "--device": ["cpu", "cpu:0", "cuda", "cuda:0", "cuda:999", "mps", "auto"],
    "--plan": ["auto", "resident", "group", "offload"],
    "--lora": ["x.safetensors:0.8", "high=x", "low=", "x:nan", "page.safetensors", ":", "dir:1", "fifo.safetensors:1"],
    "--attention-type": ["sla", "sagesla", "original"],
    "--noise-device": ["cpu", "cuda"],
    "--sigma-max": ["80", "14.1", "14", "1e300"],
    "--seed": ["0", str(2**63 - 1)],
    "--memory": ["12", "1e-9", "1e300"],
    "--workers": ["1", "2", "1024"],
    "--gpus": ["1", "2", "3", "all", "1024", "ALL"],
    "--decoder": ["full", "tiny"],
    "--tiny-decoder-path": ["page.safetensors", "pointer.safetensors", "good.png", "dir"],
    "--extend": ["1", "2", "20", "21"],
    "--extend-clip": ["good.mp4", "page.mp4", "empty.mp4", "out/v.mp4"],
    "--last-image": ["good.png", "page.png"],
    "--ray": ["auto", "local", "127.0.0.1:1", "ray://127.0.0.1:1"],
    "--host": ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost", "256.0.0.1", "a" * 64 + ".example"],
    "--port": ["1", "0", "65535", "65536"],
}
PLACES = {
    "batch": ["good.txt", "good.csv", "good.jsonl"], "convert": ["good.mp4", "out"], "info": ["good.mp4"],
    "ui": ["out"], "notebooks": ["out", "dir/new"], "run": ["dir", "file.py", "gone.py", "no_such_module", "a.b"],
}  # fmt: skip


def spelled(flag, chance):
    return chance.choice(
        [flag, flag, flag.replace("-", "_").replace("__", "--", 1), flag + "x", flag[:-1], flag.upper()]
    )


def within(text: str) -> str:
    """Return a path within the current folder, because the test must write nowhere else"""
    flag, equals, path = text.rpartition("=")
    leads_out = path.startswith(("/", "..", " /")) and not path.startswith(("/dev/", "/proc/"))
    return f"{flag}{equals}dir/{path.replace('..', 'dir')}" if leads_out else text


def arguments(chance) -> list[str]:
    """Return a command with options that are odd"""
    weights = {"t2v": 5, "i2v": 3, "batch": 4, "info": 2, "convert": 2, "download": 2, "verify": 1, "doctor": 0.2}
    weights |= {"ui": 1, "notebooks": 1, "run": 1}
    assert {*weights} == {*COMMANDS}
    name = chance.choices([*weights], [*weights.values()])[0]
    line = [*BASE[name]]
    flags = [(one.opts + one.secondary_opts, one) for one in COMMANDS[name].params]
    for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
        opts, one = chance.choice(flags)
        flag = chance.choice(opts)
        likely = LIKELY.get(flag, ())
        text = chance.choice(likely) if likely and chance.random() < 0.5 else odd(chance, *likely)
        if not flag.startswith("-"):
            text = chance.choice(PLACES.get(name, PATHS)) if chance.random() < 0.2 else chance.choice([*PATHS, *TEXTS])
            line.insert(chance.randrange(len(line) + 1), text)
        elif getattr(one, "is_flag", False):
            line.append(spelled(flag, chance))
        elif chance.random() < 0.1:
            line.append(f"{spelled(flag, chance)}={text}")
        else:
            line += [spelled(flag, chance), text]
    if name in ("t2v", "i2v", "batch", "convert", "ui", "notebooks"):  # which write
        line = [within(text) for text in line]
    if chance.random() < 0.05:
        line.append(chance.choice(["--bogus", "--help", "-h", "--json", "--", "-", "--=", "--prompt", *TEXTS]))
    if chance.random() < 0.03:
        line = [odd(chance) for _ in range(chance.choice([0, 1, 5, 2000]))]
    if chance.random() < 0.03:
        return [odd(chance), *line]
    return [name, *line]


@pytest.fixture
def alone(monkeypatch):
    """Start no server, because it would run until it is interrupted, and leave this process without the stand-ins"""
    application = pytest.importorskip("jupyter_server.serverapp").ServerApp
    monkeypatch.setattr(application, "launch_instance", lambda argv: None)
    monkeypatch.setattr(script, "install", lambda: None)
    monkeypatch.setattr(script, "cuda_on_cpu", contextlib.nullcontext)


@pytest.mark.usefixtures("cheap", "alone")
def test_argument_lists_have_a_documented_end(folder):
    def attempt(chance):
        line = arguments(chance)
        print(json.dumps(line)[:2000]) if ONLY else None
        pythons = (SyntaxError, ImportError) if line[0] == "run" else ()  # what Python raises of a script
        with mock.patch("sys.path", [*sys.path]), mock.patch("sys.excepthook"), contextlib.suppress(*pythons):
            require_documented(command_line(*line, cwd=folder))

    fuzz("arguments", 120, attempt)
    assert not list(Path(folder).rglob(".turbo_nb-*"))
