"""Every fault that can be seen beforehand ends a run before the Hub is asked for anything."""

import os
import shutil
from types import SimpleNamespace

import pytest
from helpers import command_line
from loopback_hub import MODEL, TURBO
from PIL import Image

from turbo_nb.batch import runner
from turbo_nb.errors import TurboNbError
from turbo_nb.generator.jobs import JobRunner, Request

I2V = "TurboWan2.2-I2V-A14B-720P"
REFERENCE = f"{TURBO}/{MODEL}.pth"

# of any model: arguments, and what the error names
SETTINGS = {
    "prompt is empty": (["--prompt", " "], "prompt is ' '"),
    "steps": (["--num_steps", 9], "num_steps is 9"),
    "frames": (["--num_frames", 6], "num_frames is 6"),
    "frames beyond RoPE": (["--num_frames", 4097], "num_frames is 4097"),
    "seed": (["--seed", 2**63], "seed is 9223372036854775808"),
    "last seed": (["--seed", 2**63 - 1, "--num_samples", 2], "for 2 samples"),
    "samples": (["--num_samples", 1_000_000_000], "num_samples is 1000000000"),
    "sides": (["--resolution", "100x100"], "resolution is '100x100'"),
    "sides beyond RoPE": (["--resolution", "16400x16"], "resolution is '16400x16'"),
    "huge sides": (["--resolution", "100000x100000"], "resolution is '100000x100000'"),
    "aspect without resolution": (["--aspect_ratio", "16:9"], "aspect_ratio is '16:9'"),
    "sigma_max": (["--sigma_max", 1], "sigma_max is 1"),
    "top-k": (["--sla_topk", 2], "sla_topk is 2"),
    "memory": (["--memory", -1], "memory is -1"),
    "device": (["--device", "cuda:77x"], "device is 'cuda:77x'"),
    "not an mp4": (["--save_path", "x.gif"], "save_path is 'x.gif'"),
    "a long name": (["--save_path", "红" * 98 + ".mp4"], "255 bytes"),
    "a folder": (["--save_path", "folder.mp4"], "which is a folder"),
    "below a file": (["--save_path", "file.txt/x.mp4"], "is a file"),
    "a read-only folder": (["--save_path", "closed/x.mp4"], "no permission"),
    "encoder": ([], "TURBO_NB_ENCODER is 'magic'"),
    "ffmpeg": ([], "IMAGEIO_FFMPEG_EXE is '/nowhere'"),
    "space": ([], "bytes, and 100 are free"),
}
IMAGES = {
    "missing": (["--image_path", "none.png"], "not a file"),
    "an address": (["--image_path", "https://example.org/x.png"], "which is an address"),
    "not a picture": (["--image_path", "file.txt"], "cannot be read as an image"),
    "too large": (["--image_path", "huge.png"], "million pixels"),
}


@pytest.fixture(scope="module")
def huge(tmp_path_factory) -> bytes:
    """A picture of 128 million pixels, compressed once because that takes 0.3 s"""
    path = tmp_path_factory.mktemp("huge") / "huge.png"
    Image.new("1", (16000, 8000)).save(path)
    return path.read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch, request, huge):
    """A folder with things that can be in the way, and the fault itself where it is one of the machine"""
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "closed").mkdir(mode=0o500)
    Image.new("RGB", (64, 48)).save(tmp_path / "x.png")
    (tmp_path / "huge.png").write_bytes(huge)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))  # as root
    fault = request.node.callspec.params.get("fault")
    if fault == "encoder":
        monkeypatch.setenv("TURBO_NB_ENCODER", "magic")
    if fault == "ffmpeg":
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere")
    if fault == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100, total=10**12))
    return tmp_path


def refused(hub, place, *arguments, words):
    result = command_line(*arguments, cwd=place)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert hub.log == [] and not list(place.rglob("video*.mp4"))


@pytest.mark.parametrize("model", [MODEL, REFERENCE], ids=["name", "reference"])
@pytest.mark.parametrize("fault", SETTINGS)
def test_text_to_video_asks_the_hub_for_nothing_before_its_checks(hub, cache, place, model, fault):
    more, words = SETTINGS[fault]
    if fault == "space" and model == REFERENCE:
        pytest.skip("the size of a clip is the model's, which its reference tells")
    prompt = [] if "--prompt" in more else ["--prompt", "x"]
    refused(hub, place, "t2v", "--model", model, *prompt, *more, words=words)


@pytest.mark.parametrize("fault", IMAGES)
@pytest.mark.parametrize("model", [I2V, REFERENCE], ids=["name", "reference"])
@pytest.mark.parametrize("flag", ["--image_path", "--last_image"])
def test_image_to_video_opens_the_image_first(hub, cache, place, model, fault, flag):
    more, words = IMAGES[fault]
    more = [*more, "--image_path", "x.png"] if flag == "--last_image" else more
    more = [flag if one == "--image_path" and at == 0 else one for at, one in enumerate(more)]
    refused(hub, place, "i2v", "--model", model, "--prompt", "x", *more, words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--boundary", 0.5, "--model", MODEL], "image is given"),
        (["--last_image", "x.png", "--num_frames", 1], "num_frames is 1"),
        (["--boundary", 2], "boundary is 2"),
        (["--noise_device", "cuda"], "noise_device is 'cuda'"),
        (["--adaptive_resolution", "--image_path", "strip.png"], "resolution is"),
        (["--plan", "group"], "memory_plan is 'group'"),
        (["--resolution", "16384x16384", "--num_frames", 5], "GB of main memory. Expected at most"),
    ],
    ids=["image of t2v", "one frame", "boundary", "noise device", "strip", "plan", "memory"],
)
def test_settings_that_the_model_decides_come_before_the_download(hub, cache, place, arguments, words):
    Image.new("RGB", (20000, 1)).save(place / "strip.png")
    refused(hub, place, "i2v", "--prompt", "x", "--image_path", "x.png", "--device", "cpu", *arguments, words=words)


@pytest.mark.parametrize("fault", ["encoder", "ffmpeg", "not a folder"])
def test_a_batch_and_the_generator_check_before_the_hub_is_asked(hub, cache, place, fault):
    folder = place / ("file.txt" if fault == "not a folder" else "out")
    with pytest.raises(TurboNbError):
        runner.run(["x"], {"model": REFERENCE, "device": "cpu"}, folder)
    with pytest.raises(TurboNbError):
        JobRunner(folder).submit(Request.of("x", model=REFERENCE, device="cpu"))
    assert hub.log == []
