"""A folder of files that are odd in themselves, and cheap runs."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from turbo_nb import generation, pipeline
from turbo_nb.video import mp4

LARGEST = 5 * 64 * 64  # values of a frame times frames, above which a run is cancelled
SAMPLES = 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files by the names that `harness.PATHS` has; it is the current directory and the home"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("dir", "dir.mp4", "out"):
        Path(name).mkdir()
    Path("file").write_text("1")  # which `turbo-nb run` runs, as well
    mp4.write_mp4(
        "good.mp4", np.zeros((1, 32, 32, 3), np.uint8), 8, {"model": "nano", "prompt": "a red circle", "seed": 3}
    )
    Image.new("RGB", (32, 48), "red").save("good.png")
    Path("good.txt").write_text("a red circle\na blue square\n")
    Path("good.csv").write_text("prompt,seed\na red circle,3\n")
    Path("good.jsonl").write_text('{"prompt": "a red circle", "seed": 4}\n')
    Path("deep.jsonl").write_text("[" * 100_000 + "\n")
    for suffix in ("mp4", "txt", "png", "pth"):
        Path(f"empty.{suffix}").touch()
    for suffix in ("mp4", "png", "safetensors"):
        Path(f"page.{suffix}").write_text("<!doctype html><html>404</html>")
    Path("pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name in ("loop", "loop.mp4"):
        os.symlink(name, name)
    os.symlink("nowhere", "gone.mp4")
    for suffix in ("txt", "jsonl", "csv", "mp4", "pth"):
        os.symlink("/dev/zero", f"zero.{suffix}")
    for suffix in ("txt", "mp4", "png", "safetensors"):
        os.mkfifo(f"fifo.{suffix}")
    return tmp_path


@pytest.fixture
def cheap(monkeypatch, nano):
    """Cancel a run that would take long, because all checks have passed by then, and load nano once"""
    load, generate, made = pipeline.load, generation.generate, []

    def cheap_load(resolved, *, clip=None, **more):
        made.clear()
        width, height, frames = clip or (16, 16, 1)
        if width * height * frames > LARGEST:
            raise KeyboardInterrupt
        options = resolved.options
        plain = resolved.spec.name == "nano" and not (options.checkpoint or options.loras or options.sla_topk)
        plain = plain and options.memory_plan == "auto" and options.attention_type is None and not options.text_encoder
        return nano if plain else load(resolved, clip=clip, **more)

    def cheap_generate(*arguments, **more):
        made.append(1)
        if len(made) > SAMPLES:
            raise KeyboardInterrupt
        return generate(*arguments, **more)

    monkeypatch.setattr(pipeline, "load", cheap_load)
    monkeypatch.setattr(generation, "generate", cheap_generate)
