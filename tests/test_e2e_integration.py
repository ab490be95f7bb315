"""From upstream's files to an mp4, through the command line and in Python; tiny models, the real path."""

import subprocess
import textwrap
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from helpers import command_line, golden, to_upstream, upstream_names
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import turbo_nb
from turbo_nb import catalog, cli, preparation, settings
from turbo_nb.checkpoint import load_transformer
from turbo_nb.errors import CheckpointError, InputError, TurboNbError, collect_warnings
from turbo_nb.files.convert import convert
from turbo_nb.fused import vae
from turbo_nb.runtime import expert_swap, plan
from turbo_nb.video import mp4

NANO = catalog.NANO.folder
TINY = catalog.Arch(dim=128, num_heads=2, num_layers=2, ffn_dim=256)
TINY_I2V = catalog.Arch(dim=128, num_heads=2, num_layers=2, ffn_dim=256, in_channels=36)
CLIP = {"num_frames": 5, "num_steps": 2, "resolution": "64x48"}
PROMPT = "a large red circle moving from left to right on a black background"


def linears_in_8_bits(state):
    from turbo_nb.linear import int8_quantize

    quantised = {}
    for key, tensor in state.items():
        if key.startswith("blocks.") and key.endswith(".weight") and tensor.ndim == 2 and "proj_l" not in key:
            quantised[key.replace(".weight", ".int8_weight")], quantised[key.replace(".weight", ".scale")] = (
                int8_quantize(tensor)
            )
        else:
            quantised[key] = tensor
    return quantised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that a user of upstream has, of tiny models"""
    folder = tmp_path_factory.mktemp("upstream")
    torch.manual_seed(0)

    def state(arch, seed):
        torch.manual_seed(seed)
        return {k: t.bfloat16() for k, t in upstream_names(arch, sla=True, int8=False, text_dim=128).items()}

    torch.save(state(TINY, 0), folder / "tiny.pth")
    torch.save(linears_in_8_bits(state(TINY, 0)), folder / "tiny-quant.pth")
    for name, seed in (("high", 1), ("low", 2)):
        torch.save(state(TINY_I2V, seed), folder / f"{name}.pth")
        torch.save(linears_in_8_bits(state(TINY_I2V, seed)), folder / f"{name}-quant.pth")
    torch.save(
        to_upstream(load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")), folder / "nano.pth"
    )
    torch.save(golden("vae_state"), folder / "Wan2.1_VAE.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8)).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    return {"text_encoder": NANO / "text_encoder", "tokenizer": NANO / "tokenizer", "device": "cpu"}


# --- Through the command line ---

SHELL_PARTS = ["--text_encoder_path", NANO / "text_encoder", "--tokenizer_path", NANO / "tokenizer"]


def test_upstreams_text_to_video_line_on_tiny_files(folder, tmp_path):
    result = command_line(
        "t2v", "--dit_path", folder / "tiny-quant.pth", "--resolution", "64x48", "--num_frames", 5,
        "--prompt", "A street", "--num_samples", 2, "--num_steps", 4, "--quant_linear", "--attention_type", "sla",
        "--sla_topk", 0.1, "--default_norm", "--save_path", "out/video.mp4", *SHELL_PARTS, cwd=tmp_path,
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["video-0.mp4", "video-1.mp4"]
    assert "video-1.mp4: 5 frames of 64x48 at 16 fps, seed 1" in result.stdout
    told = [turbo_nb.read_metadata(tmp_path / "out" / f"video-{seed}.mp4") for seed in (0, 1)]
    assert [t["seed"] for t in told] == [0, 1] and told[0]["quant_linear"] and told[0]["model"] == "tiny-quant"


def test_upstreams_image_to_video_line_on_tiny_files(folder, tmp_path):
    result = command_line(
        "i2v", "--model", "auto", "--low_noise_model_path", folder / "low-quant.pth", "--high_noise_model_path",
        folder / "high-quant.pth", "--resolution", "64x48", "--adaptive_resolution", "--image_path",
        folder / "picture.png", "--prompt", "POV selfie", "--num_samples", 2, "--grid", "--num_steps", 4,
        "--quant_linear", "--attention_type", "sla", "--sla_topk", 0.1, "--ode", "--num_frames", 5, "--save_path",
        "video.mp4", *SHELL_PARTS, cwd=tmp_path,
    )  # fmt: skip
    assert "video.mp4: 5 frames of 128x48 at 16 fps" in result.stdout  # two of 64x48, side by side
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]


def test_info_says_what_a_checkpoint_is(folder):
    told = CliRunner().invoke(cli.app, ["info", str(folder / "high-quant.pth")]).output
    assert "a Wan image-to-video transformer with dim 128, 2 layers, ffn 256, SLA, int8 linears" in told
    assert "a vae" in CliRunner().invoke(cli.app, ["info", str(folder / "Wan2.1_VAE.pth")]).output


def test_a_file_that_is_another_model_than_the_name_says_is_one_line_and_2(folder, tmp_path):
    line = ["t2v", "--prompt", "x", "--model", "Wan2.1-14B", "--dit_path", folder / "tiny.pth"]
    result = command_line(*line, cwd=tmp_path)
    (line,) = result.stderr.strip().splitlines()
    assert result.returncode == 2 and "dim 128" in line and ", which has dim 5120" in line


# --- In Python ---


def test_nano_as_upstreams_file_is_nano_to_the_bit(folder, nano):
    pipeline = turbo_nb.load_pipeline(folder / "nano.pth", device="cpu")
    assert pipeline.turbo_nb.spec is catalog.NANO
    ours, theirs = (turbo_nb.generate(p, PROMPT, num_frames=5, num_steps=2).frames for p in (nano, pipeline))
    assert np.array_equal(ours, theirs)


@pytest.fixture(scope="module")
def i2v(folder, parts):
    return turbo_nb.load_pipeline((folder / "high.pth", folder / "low.pth"), **parts)


class Heard(list):
    """Which expert worked at which timestep"""

    def __init__(self, pipeline):
        self.hooks = [
            getattr(pipeline, name).register_forward_pre_hook(
                lambda module, args, kwargs, name=name: self.append((name, kwargs["timestep"].item())), with_kwargs=True
            )
            for name in ("transformer", "transformer_2")
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("steps", "boundary", "experts"),
    [
        (4, None, [("transformer", 996), ("transformer", 932), ("transformer_2", 852), ("transformer_2", 608)]),
        (2, None, [("transformer", 996), ("transformer", 932)]),
        (2, 0.95, [("transformer", 996), ("transformer_2", 932)]),
        (1, None, [("transformer", 996)]),
    ],
)
def test_the_right_expert_works(i2v, folder, steps, boundary, experts):
    assert isinstance(i2v, WanImageToVideoPipeline)
    for expert, name in ((i2v.transformer, "high"), (i2v.transformer_2, "low")):
        state = torch.load(folder / f"{name}.pth", mmap=True)
        assert torch.equal(expert.blocks[0].attn1.to_q.weight, state["blocks.0.self_attn.q.weight"].float())
    with Heard(i2v) as heard, pytest.warns(UserWarning, match="cropped to 64x48"):
        video = turbo_nb.generate(
            i2v, "x", image=folder / "picture.png", boundary=boundary, **CLIP | {"num_steps": steps}
        )
    assert list(heard) == experts
    assert video.settings["sigma_max"] == 200 and video.settings["boundary"] == (boundary or 0.9)


def test_the_picture_counts_and_may_be_given_in_any_form(i2v, folder):
    picture = Image.open(folder / "picture.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = [turbo_nb.generate(i2v, "x", image=i, **CLIP).frames for i in (picture, np.array(picture))]
        other = turbo_nb.generate(i2v, "x", image=np.zeros((60, 100, 3), np.uint8), **CLIP).frames
    assert np.array_equal(*same) and not np.array_equal(same[0], other)


def test_an_extended_clip_goes_on_from_its_last_frame(i2v, folder, tmp_path):
    clip = CLIP | {"image": folder / "picture.png", "seed": 5}
    given, stages = [], []
    with pytest.warns(UserWarning, match="was not trained to extend"):
        video = turbo_nb.generate(i2v, "x", extend=2, on_frames=given.append, on_stage=stages.append, **clip)
    parts = [turbo_nb.generate(i2v, "x", **clip)]
    for seed in (6, 7):  # each part has a seed of its own
        parts.append(turbo_nb.generate(i2v, "x", **clip | {"image": parts[-1].frames[-1], "seed": seed}))
    expected = np.concatenate([parts[0].frames, *(part.frames[1:] for part in parts[1:])])  # no frame is there twice
    assert np.array_equal(video.frames, expected) and len(expected) == 1 + 3 * (len(parts[0].frames) - 1)
    assert np.array_equal(np.concatenate(given), expected)
    assert stages == ["text", "denoise", "decode"] * 3 and len(video.steps) == 3 * CLIP["num_steps"]
    saved = turbo_nb.read_metadata(video.save(tmp_path / "long.mp4"))
    assert saved["more"] == {"extend": 2} and saved["seed"] == 5 and saved["num_frames"] == len(parts[0].frames)


def test_only_an_image_to_video_model_extends_a_clip(nano, i2v, folder):
    with pytest.raises(InputError, match="only an image-to-video model can go on"):
        turbo_nb.generate(nano, PROMPT, extend=1, num_frames=5)
    with pytest.raises(InputError, match="parts share a frame"):
        turbo_nb.generate(i2v, "x", image=folder / "picture.png", extend=1, **CLIP | {"num_frames": 1})
    with pytest.raises(InputError, match="samples or parts"):
        turbo_nb.generate(i2v, "x", image=folder / "picture.png", extend=2, seed=2**63 - 2)


def theirs(i2v, folder, *, seed=0, **pictures):
    """Frames (T, H, W, 3) uint8 of diffusers' own pipeline, called as its documentation says"""
    from turbo_nb.scheduler import RCMScheduler

    scheduler = RCMScheduler(200.0, False)
    scheduler.seed(seed, "cpu")
    with torch.inference_mode():
        pipeline = WanImageToVideoPipeline(
            vae=i2v.vae, transformer=i2v.transformer, transformer_2=i2v.transformer_2, scheduler=scheduler,
            text_encoder=None, tokenizer=None, boundary_ratio=0.9,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        frames = pipeline(
            **{name: ImageOps.fit(picture, (64, 48), Image.Resampling.LANCZOS) for name, picture in pictures.items()},
            prompt_embeds=i2v.turbo_nb.prompt_encoder("x"), latents=scheduler.start_latents((1, 16, 2, 6, 8)),
            height=48, width=64, num_frames=5, num_inference_steps=2, guidance_scale=1.0, output_type="np",
        ).frames  # fmt: skip
    return (frames[0] * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(folder):
    """The first frame, and a last frame of another aspect"""
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (90, 60, 3), np.uint8)).save(folder / "last.png")
    return {"image": folder / "picture.png", "last_image": folder / "last.png"}


def test_a_last_image_is_that_of_diffusers_own_pipeline(i2v, folder, pictures):
    seen = []
    hook = i2v.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][0, 16:20, :, 0, 0]), with_kwargs=True
    )
    with collect_warnings() as warned:
        video = turbo_nb.generate(i2v, "x", **pictures, **CLIP, seed=3)
    hook.remove()
    assert seen[0].T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]  # the first frame, and the last of the next four
    opened = {name: Image.open(path) for name, path in pictures.items()}
    expected = theirs(i2v, folder, seed=3, **opened)
    assert np.abs(video.frames.astype(int) - expected).max() <= 1
    plain = theirs(i2v, folder, seed=3, image=opened["image"])
    assert np.abs(plain.astype(int) - expected).max() > 10
    assert [words for words in warned if "not trained for a given last frame" in words]
    assert [words for words in warned if words.startswith("the last image of 60x90 was cropped to 64x48: 50% cut at")]


def test_a_last_image_ends_the_last_part_of_a_clip_that_is_extended(i2v, folder, pictures, tmp_path):
    with collect_warnings():
        video = turbo_nb.generate(i2v, "x", **pictures, **CLIP, extend=1, seed=5)
        first = turbo_nb.generate(i2v, "x", image=pictures["image"], **CLIP, seed=5).frames
    last = Image.open(pictures["last_image"])
    second = theirs(i2v, folder, seed=6, image=Image.fromarray(first[-1]), last_image=last)
    assert np.abs(video.frames.astype(int) - np.concatenate([first, second[1:]])).max() <= 1
    saved = turbo_nb.read_metadata(video.save(tmp_path / "v.mp4"))
    assert saved["image"] == str(pictures["image"]) and saved["last_image"] == str(pictures["last_image"])
    with collect_warnings():
        kept = turbo_nb.generate(i2v, "x", **pictures | {"last_image": last}, **CLIP).record.last_image
    assert kept == "a picture in memory"


@pytest.fixture(scope="module")
def finished(i2v, folder, tmp_path_factory):
    """A finished mp4, and its frames as they are decoded"""
    with collect_warnings():
        video = turbo_nb.generate(i2v, "x", image=folder / "picture.png", **CLIP, seed=2)
    path = video.save(tmp_path_factory.mktemp("finished") / "clip.mp4")
    return path, mp4.read_frames(path, 64, 48)


def test_a_finished_clip_is_extended(i2v, finished, pictures, tmp_path):
    path, before = finished
    given, options = [], {"num_frames": 5, "num_steps": 2}
    with collect_warnings():
        video = turbo_nb.generate(
            i2v, "on", extend_clip=path, extend=2, seed=8, last_image=pictures["last_image"], on_frames=given.append,
            **options,
        )  # fmt: skip
        expected, size = before, {"resolution": "64x48"}
        for seed, last in ((8, {}), (9, {"last_image": pictures["last_image"]})):
            part = turbo_nb.generate(i2v, "on", image=expected[-1], seed=seed, **options, **size, **last)
            expected = np.concatenate([expected, part.frames[1:]])
    assert len(expected) == 5 + 2 * 4 and np.array_equal(video.frames, expected)
    assert np.array_equal(np.concatenate(given), expected)
    longer = video.save(tmp_path / "longer.mp4")
    saved = turbo_nb.read_metadata(longer)
    assert (saved["seed"], saved["prompt"]) == (8, "on") and saved["more"] == {"extend": 2, "extend_clip": str(path)}
    assert [(part["seed"], part["prompt"]) for part in saved["parts"]] == [(2, "x")]
    assert mp4.count_frames(longer) == 13
    with collect_warnings():  # a second time, and once where extend is left out
        again = turbo_nb.generate(i2v, "then", extend_clip=str(longer), **options)
    assert len(again.frames) == 17 and [part["prompt"] for part in again.settings["parts"]] == ["x", "on"]
    assert np.abs(again.frames[:5].astype(int) - before).mean() < 4  # the clip's own frames, encoded twice


WRONG = {
    "no i2v": ({"model": "nano"}, "extend_clip is given. Expected none, because nano"),
    "an image": ({"image": "picture.png"}, "image is given. Expected none beside extend_clip"),
    "another size": ({"resolution": "80x48"}, "resolution is '80x48'. Expected 64x48, the size of"),
    "one frame": ({"num_frames": 1}, "num_frames is 1"),
    "missing": ({"extend_clip": "none.mp4"}, "extend_clip is 'none.mp4', which is not a file"),
    "an address": ({"extend_clip": "https://example.org/a.mp4"}, "extend_clip is .* Expected a path on this machine"),
    "a device": ({"extend_clip": "/dev/zero"}, "extend_clip is '/dev/zero', which is not a file"),
    "not ours": ({"extend_clip": "foreign.mp4"}, "extend_clip is .*says nothing of how it was made"),
    "damaged": ({"extend_clip": "damaged.mp4"}, "extend_clip is .*cannot be read as a video"),
    "another rate": ({"extend_clip": "fast.mp4"}, "extend_clip is .* of 30 frames a second. Expected 16"),
    "another rate than it says": (
        {"extend_clip": "faster.mp4"},
        "extend_clip is .* of 30 frames a second. Expected 16",
    ),
    "a grid": ({"extend_clip": "grid.mp4"}, "extend_clip is 'grid.mp4', a grid of 2 clips. Expected one clip"),
    "an odd size": ({"extend_clip": "odd.mp4"}, "resolution is '36x20'.*cannot be extended"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_clip_that_cannot_be_extended_is_refused_before_the_model_works(finished, folder, monkeypatch, fault):
    monkeypatch.chdir(folder)
    path, frames = finished
    record = turbo_nb.read_metadata(path)
    mp4.write_mp4("foreign.mp4", frames, 16)
    mp4.write_mp4("fast.mp4", frames, 30, record | {"fps": 30})
    mp4.write_mp4("faster.mp4", frames, 30, record)
    mp4.write_mp4("grid.mp4", frames, 16, record | {"seed": [1, 2]})
    mp4.write_mp4("odd.mp4", frames[:, :20, :36], 16, record)
    data = path.read_bytes()
    (folder / "damaged.mp4").write_bytes(data[: data.index(b"mdat")] + bytes(len(data) - data.index(b"mdat")))
    more, words = WRONG[fault]
    more = {"prompt": "x", "extend_clip": path} | more
    spec = catalog.NANO if more.pop("model", None) else catalog.find("Wan2.2-A14B")
    with pytest.raises(InputError, match=words):
        preparation.prepare(settings.build(settings.ClipSettings, more), spec)


def test_the_shell_extends_a_finished_clip(folder, finished, tmp_path):
    line = [
        "i2v",
        "--model",
        "auto",
        "--prompt",
        "on",
        "--num_frames",
        5,
        "--num_steps",
        1,
        "--device",
        "cpu",
        *SHELL_PARTS,
    ]
    line += ["--high_noise_model_path", folder / "high.pth", "--low_noise_model_path", folder / "low.pth"]
    line += ["--vae_path", folder / "Wan2.1_VAE.pth", "--save_path", tmp_path / "v.mp4"]
    neither = CliRunner().invoke(cli.app, list(map(str, line)))
    assert str(neither.exception).startswith("--image_path is missing. Expected a picture, or an mp4 to continue")
    result = CliRunner().invoke(cli.app, list(map(str, [*line, "--extend_clip", finished[0]])))
    assert "v.mp4: 9 frames of 64x48 at 16 fps" in result.output, result.exception
    (tmp_path / "link.mp4").symlink_to(finished[0])
    before = finished[0].read_bytes()
    for place in (finished[0], tmp_path / "link.mp4"):  # the last of an option counts
        over = [*line, "--extend_clip", finished[0], "--save_path", place]
        result = CliRunner().invoke(cli.app, list(map(str, over)))
        assert "the clip to extend. Expected another file" in str(result.exception)
    assert finished[0].read_bytes() == before
    assert "extend 1, extend_clip " in CliRunner().invoke(cli.app, ["info", str(tmp_path / "v.mp4")]).output


def test_sde_and_ode_differ_and_a_seed_is_a_clip(i2v, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = lambda **more: turbo_nb.generate(i2v, "x", image=folder / "picture.png", **CLIP | more).frames  # noqa: E731
        assert np.array_equal(make(), make()) and not np.array_equal(make(), make(ode=True))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "image is None"),
        ("no.png", "is not a file"),
        (NANO / "vocabulary.json", "cannot be read as an image"),
        (np.zeros((4, 4, 7)), r"float64 \(4, 4, 7\)"),
    ],
    ids=["none", "missing", "not an image", "array"],
)
def test_a_picture_that_cannot_be_used(i2v, image, words):
    with pytest.raises(InputError, match=words):
        turbo_nb.generate(i2v, "x", image=image, **CLIP)


def test_a_boundary_is_refused_where_there_is_no_second_expert(nano):
    with pytest.raises(InputError, match="one expert"):
        turbo_nb.generate(nano, PROMPT, boundary=0.9, num_frames=5, num_steps=1)
    assert turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=1).frames.shape[0] == 5


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_wrong_path_is_found_before_anything_large_is_loaded(folder, parts, monkeypatch, part):
    monkeypatch.setattr("turbo_nb.checkpoint.load_transformer", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="nope"):
        turbo_nb.load_pipeline(folder / "tiny.pth", **parts | {part: folder / "nope"})


def test_one_checkpoint_for_a_model_of_two_experts(folder, parts):
    with pytest.raises(InputError, match=r"Expected 2 files \(high-noise, low-noise\)"):
        turbo_nb.load_pipeline(folder / "high.pth", **parts)


# --- Memory ---


def test_a_freed_text_encoder_is_loaded_once_a_prompt_and_makes_the_same_clip(folder, parts):
    parts = parts | {"text_cache": False}
    whole = turbo_nb.load_pipeline(folder / "tiny.pth", **parts)
    freed = turbo_nb.load_pipeline(folder / "tiny.pth", **parts, memory_plan="free-text", on_plan=lambda chosen: None)
    loads, load = [], freed.turbo_nb.prompt_encoder._load
    freed.turbo_nb.prompt_encoder._load = lambda where: loads.append(where) or load(where)
    clips = [turbo_nb.generate(p, text, **CLIP).frames for text in ("one", "two", "one") for p in (whole, freed)]
    assert all(np.array_equal(a, b) for a, b in zip(clips[::2], clips[1::2], strict=True))
    assert loads == ["cpu", "cpu"] and freed.text_encoder is None and whole.text_encoder is not None


def test_experts_that_take_turns_make_the_same_clip_and_their_switch_is_timed(folder, i2v, monkeypatch):
    before, make = (
        i2v.turbo_nb.plan,
        lambda: turbo_nb.generate(i2v, "x", image=folder / "picture.png", **CLIP | {"num_steps": 4}),
    )
    expected, parts = make(), (i2v.transformer, i2v.transformer_2, i2v.vae)
    assert "switch" not in expected.timings
    slowly = _slowly(expert_swap.ExpertSwapHook._onload)
    monkeypatch.setattr(expert_swap.ExpertSwapHook, "_onload", slowly)
    try:
        i2v.turbo_nb.follow(replace(before, name="offload", offload="model", text_encoder="freed"))
        for _ in range(2):
            video = make()
            assert np.array_equal(video.frames, expected.frames) and not any(part._hf_hook.onloaded for part in parts)
            assert list(video.timings) == ["text", "denoise", "switch", "decode"]
            assert video.timings["switch"] >= 0.4 and len(video.steps) == 4
            assert sum(video.steps) <= video.timings["denoise"]
        assert slowly.calls == 2 * 4  # VAE, expert, expert, VAE
        monkeypatch.setattr(i2v.scheduler.__class__, "step", lambda *_, **__: pytest.fail("broken"))
        with pytest.raises(pytest.fail.Exception):
            make()
        assert not any(part._hf_hook.onloaded for part in parts)
    finally:
        i2v.turbo_nb.follow(before)
    assert not any(hasattr(part, "_hf_hook") for part in parts)


@pytest.mark.parametrize("keep", [0, 1])
def test_experts_whose_blocks_are_streamed_make_the_same_clip(folder, i2v, keep):
    before = i2v.turbo_nb.plan
    make = lambda: turbo_nb.generate(i2v, "x", image=folder / "picture.png", **CLIP | {"num_steps": 4})  # noqa: E731
    expected = make()
    try:
        i2v.turbo_nb.follow(replace(before, name="group", offload="group", text_encoder="cpu", keep=keep, blocks=2))
        for _ in range(2):
            assert np.array_equal(make().frames, expected.frames)
            for expert in (i2v.transformer, i2v.transformer_2):
                assert expert._hf_hook._block_stream.loaded == []
    finally:
        i2v.turbo_nb.follow(before)


def _slowly(function):
    def slow(self, *args):
        slow.calls += 1
        time.sleep(0.2)
        return function(self, *args)

    slow.calls = 0
    return slow


def test_the_plan_is_told_before_anything_is_loaded(folder, parts, monkeypatch):
    told = []
    monkeypatch.setattr("turbo_nb.checkpoint.load_transformer", lambda *a, **k: pytest.fail("loaded"))

    class Stop(Exception):
        pass

    def stop(chosen):
        told.append(str(chosen))
        raise Stop

    with pytest.raises(Stop):
        turbo_nb.load_pipeline(folder / "tiny.pth", **parts, on_plan=stop, memory=4e9, clip=(64, 48, 5))
    assert told[0].startswith("plan resident: needs ") and "of 4.0 GB" in told[0]


def test_out_of_memory_goes_on_with_the_next_plan_once_and_says_so(nano, monkeypatch):
    frugal = plan.Plan(name="free-text", text_encoder="freed", offload="none", vae_tiling=False, device="cpu")
    before, chunks, failures = nano.turbo_nb.plan, vae.chunks, [torch.OutOfMemoryError("full")]
    nano.turbo_nb.plan = replace(before, next=frugal)

    def full(*args, **kwargs):
        if failures:
            raise failures.pop()
        return chunks(*args, **kwargs)

    monkeypatch.setattr(vae, "chunks", full)
    try:
        with pytest.warns(UserWarning, match="out of memory while at decode; going on with plan free-text"):
            frames = turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=2).frames
        assert nano.turbo_nb.plan is frugal
        nano.turbo_nb.plan = replace(before, next=frugal)
        failures += [torch.OutOfMemoryError("full"), torch.OutOfMemoryError("full")]
        with pytest.warns(UserWarning), pytest.raises(TurboNbError, match=r"with plan free-text\. Take fewer frames"):
            turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=2)
        failures[:] = [torch.OutOfMemoryError("full")]
        with pytest.raises(TurboNbError, match=r"out of memory while at decode.*Take fewer frames"):
            turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=2)
    finally:
        nano.turbo_nb.plan = before
        nano.turbo_nb.prompt_encoder.place(before.text_encoder, before.device)
    assert np.array_equal(turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=2).frames, frames)


def test_loading_holds_the_file_once(tmp_path, forked):
    arch = catalog.Arch(dim=1024, num_heads=8, num_layers=8, ffn_dim=4096)
    state = {k: t.bfloat16() for k, t in upstream_names(arch, sla=True, int8=False, text_dim=512).items()}
    torch.save(state, tmp_path / "model.pth")
    del state
    code = f"""
        import resource
        import turbo_nb.checkpoint
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        model = turbo_nb.checkpoint.load_transformer({str(tmp_path / "model.pth")!r})
        print(peak() - before)
    """
    result = subprocess.run(forked.command("-c", textwrap.dedent(code)), capture_output=True, text=True)
    assert int(result.stdout) <= 1.15 * (tmp_path / "model.pth").stat().st_size, result.stderr


# --- LoRA and conversion ---


def lora_for(state, rank=4):
    """A LoRA with the original Wan names, and what it adds to a weight"""
    torch.manual_seed(3)
    lora, added = {}, {}
    for key, tensor in state.items():
        if key.endswith(("attn.q.weight", "ffn.0.weight")):
            down, up = torch.randn(rank, tensor.shape[1]) * 0.1, torch.randn(tensor.shape[0], rank) * 0.1
            stem = "diffusion_model." + key.removesuffix(".weight")
            lora[f"{stem}.lora_A.weight"], lora[f"{stem}.lora_B.weight"] = down, up
            added[key] = up @ down
    return lora, added


def test_a_lora_works_on_a_plain_pipeline_and_is_refused_on_int8(folder, parts, tmp_path):
    lora, _ = lora_for(torch.load(folder / "tiny.pth"))
    save_file(lora, tmp_path / "lora.safetensors")
    pipeline = turbo_nb.load_pipeline(folder / "tiny.pth", **parts)
    before = turbo_nb.generate(pipeline, "x", **CLIP).frames
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert not np.array_equal(turbo_nb.generate(pipeline, "x", **CLIP).frames, before)
    pipeline.unload_lora_weights()
    assert np.array_equal(turbo_nb.generate(pipeline, "x", **CLIP).frames, before)
    quantised = turbo_nb.load_pipeline(folder / "tiny-quant.pth", **parts)
    with pytest.raises(ValueError, match="Int8Linear"):
        quantised.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")


def test_a_lora_is_merged_by_its_scale(folder, tmp_path):
    state = torch.load(folder / "tiny.pth")
    lora, added = lora_for(state)
    save_file(lora, tmp_path / "lora.safetensors")
    told = convert(folder / "tiny.pth", tmp_path / "out", loras=[f"{tmp_path / 'lora.safetensors'}:0.5"])
    assert "with 1 LoRA merged" in told
    merged = load_transformer(tmp_path / "out" / "transformer").state_dict()
    key = "blocks.1.self_attn.q.weight"
    ours, exact = merged["blocks.1.attn1.to_q.weight"].float(), state[key].float() + 0.5 * added[key]
    assert (ours - exact).abs().max() < 2e-3 < (ours - state[key].float()).abs().max()
    assert not any("lora" in key for key in merged)
    told = convert(folder / "tiny-quant.pth", tmp_path / "int8", loras=[str(tmp_path / "lora.safetensors")])
    assert "with 1 LoRA merged" in told
    with pytest.raises(CheckpointError, match="no LoRA"):
        convert(folder / "tiny.pth", tmp_path / "no", loras=["nothing.safetensors"])
    with pytest.raises(InputError, match=r"strength .* is nan"):
        convert(folder / "tiny.pth", tmp_path / "no", loras=[f"{tmp_path / 'lora.safetensors'}:nan"])


def test_a_converted_folder_loads_to_the_bit_and_makes_the_same_clip(folder, parts, tmp_path):
    for name in ("tiny", "tiny-quant"):
        out = tmp_path / name
        for source in (folder / f"{name}.pth", folder / "Wan2.1_VAE.pth", NANO / "text_encoder"):
            convert(source, out)
        ours, theirs = load_transformer(folder / f"{name}.pth"), load_transformer(out / "transformer")
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in ours.state_dict().items())
        a = turbo_nb.load_pipeline(folder / f"{name}.pth", **parts)
        b = turbo_nb.load_pipeline(out, tokenizer=parts["tokenizer"], device="cpu")
        clips = [turbo_nb.generate(p, "x", **CLIP).frames.astype(float) for p in (a, b)]
        assert np.abs(clips[0] - clips[1]).mean() < 0.5  # a tensor's place in memory can change the last bit of a sum


def test_two_experts_convert_into_one_folder(folder, i2v, parts, tmp_path):
    for line in ([folder / "high.pth", tmp_path / "a14b"], [folder / "low.pth", tmp_path / "a14b", "--low-noise"]):
        assert CliRunner().invoke(cli.app, ["convert", *map(str, line)]).exit_code == 0
    pipeline = turbo_nb.load_pipeline(tmp_path / "a14b", vae=folder / "Wan2.1_VAE.pth", **parts)
    for name in ("transformer", "transformer_2"):
        ours, theirs = (getattr(p, name).state_dict() for p in (i2v, pipeline))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
