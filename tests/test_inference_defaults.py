"""What the commands do when little is said, and that upstream's own command lines are understood to the letter."""

import inspect
import shlex
from pathlib import Path

import pytest
import torch
import typer
from helpers import command_line
from typer.testing import CliRunner

import turbo_nb
from turbo_nb import catalog, cli
from turbo_nb.files.resolve import resolve
from turbo_nb.settings import ClipSettings, LoadOptions, RunOptions, resolve_clip

# From upstream's README, but for the length of the prompts
UPSTREAM_T2V = """python turbodiffusion/inference/wan2.1_t2v_infer.py \\
    --model Wan2.1-1.3B \\
    --dit_path checkpoints/TurboWan2.1-T2V-1.3B-480P-quant.pth \\
    --resolution 480p \\
    --prompt "A stylish woman walks down a Tokyo street." \\
    --num_samples 1 \\
    --num_steps 4 \\
    --quant_linear \\
    --attention_type sagesla \\
    --sla_topk 0.1"""
UPSTREAM_I2V = """python turbodiffusion/inference/wan2.2_i2v_infer.py \\
    --model Wan2.2-A14B \\
    --low_noise_model_path checkpoints/TurboWan2.2-I2V-A14B-low-720P-quant.pth \\
    --high_noise_model_path checkpoints/TurboWan2.2-I2V-A14B-high-720P-quant.pth \\
    --resolution 720p \\
    --adaptive_resolution \\
    --image_path assets/i2v_inputs/i2v_input_0.jpg \\
    --prompt "POV selfie video, ultra-messy and extremely fast." \\
    --num_samples 1 \\
    --num_steps 4 \\
    --quant_linear \\
    --attention_type sagesla \\
    --sla_topk 0.1 \\
    --ode"""
FLAGS = """
    --model --vae_path --text_encoder_path --num_samples --num_steps --sigma_max --num_frames --prompt --resolution
    --aspect_ratio --seed --save_path --attention_type --sla_topk --quant_linear --default_norm --ode --tokenizer_path
"""
ONLY_T2V = {"--dit_path"}
ONLY_I2V = {
    "--high_noise_model_path", "--low_noise_model_path", "--image_path", "--adaptive_resolution", "--boundary"
}  # fmt: skip


def arguments(command):
    return shlex.split(command.replace("\\\n", " "))[2:]


@pytest.fixture
def asked(monkeypatch):
    """What a command line asks of the package"""
    calls = []
    monkeypatch.setattr(cli, "_make", lambda clip, load, run, *_: calls.append((clip, load, run)))

    def ask(command, line):
        result = CliRunner().invoke(cli.app, [command, *line])
        assert result.exit_code == 0, result.output
        return calls[-1]

    return ask


def test_sla_is_the_default_attention_everywhere(asked):
    assert inspect.signature(turbo_nb.load_pipeline).parameters["attention_type"].default is None
    for command, line in (("t2v", ["--prompt", "x"]), ("i2v", ["--prompt", "x", "--image_path", "x.png"])):
        _, load, _ = asked(command, line)
        assert load.attention_type is None and load.sla_topk is None and load.quant_linear == "auto"
    assert resolve(LoadOptions(model="nano", device="cpu")).attention_type == "sla"


def test_defaults_are_the_models_own(asked):
    clip, load, run = asked("t2v", ["--prompt", "x"])
    assert (clip, load, run) == (ClipSettings(prompt="x"), LoadOptions(), RunOptions(save_path="video.mp4"))
    assert RunOptions().save_path == Path(run.save_path)
    clip = resolve_clip(ClipSettings(prompt="x"), catalog.find("Wan2.2-A14B"))
    assert (clip.sigma_max, clip.boundary, clip.width, clip.num_frames) == (200.0, 0.9, 1280, 81)
    clip = resolve_clip(ClipSettings(prompt="x"), catalog.find("Wan2.1-1.3B"))
    assert (clip.sigma_max, clip.boundary, clip.width, clip.num_steps) == (80.0, None, 832, 4)


def test_memory_is_given_in_gigabytes(asked):
    _, load, _ = asked("t2v", ["--prompt", "x", "--memory", "12", "--plan", "offload"])
    assert (load.memory, load.memory_plan) == (12e9, "offload")


def test_upstreams_text_to_video_line_is_understood(asked):
    clip, load, run = asked("t2v", arguments(UPSTREAM_T2V))
    assert clip.prompt.startswith("A stylish woman") and run.num_samples == 1
    assert (clip.resolution, clip.num_steps, clip.ode) == ("480p", 4, False)
    assert load.model == "Wan2.1-1.3B" and str(load.checkpoint).endswith("1.3B-480P-quant.pth")
    assert (load.quant_linear, load.attention_type, load.sla_topk) == (True, "sagesla", 0.1)


def test_upstreams_image_to_video_line_is_understood(asked):
    clip, load, _ = asked("i2v", arguments(UPSTREAM_I2V))
    assert [Path(path).stem for path in load.checkpoint] == [
        "TurboWan2.2-I2V-A14B-high-720P-quant",
        "TurboWan2.2-I2V-A14B-low-720P-quant",
    ]
    assert clip.adaptive_resolution and clip.ode and clip.resolution == "720p"
    assert str(clip.image) == "assets/i2v_inputs/i2v_input_0.jpg" and load.attention_type == "sagesla"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run SageSLA")
@pytest.mark.parametrize(("command", "line"), [("t2v", UPSTREAM_T2V), ("i2v", UPSTREAM_I2V)])
def test_upstreams_sagesla_lines_end_with_2_and_the_way_out_on_a_cpu(tmp_path, command, line):
    image = tmp_path / "assets" / "i2v_inputs" / "i2v_input_0.jpg"
    image.parent.mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (64, 48)).save(image)
    result = command_line(command, *arguments(line), cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: attention_type 'sagesla'")
    for words in ("--attention_type sla", "build SpargeAttn: pip install git+https"):
        assert words in line


def test_every_flag_of_upstream_exists():
    commands = typer.main.get_command(cli.app).commands
    options = {name: {opt for p in command.params for opt in p.opts} for name, command in commands.items()}
    both = set(FLAGS.split())
    for command, flags in (("t2v", both | ONLY_T2V), ("i2v", both | ONLY_I2V)):
        assert {flag.replace("_", "-") for flag in flags} <= options[command]


def test_dashes_and_underscores_are_the_same(asked):
    assert asked("t2v", ["--prompt", "x", "--num_steps", "2"]) == asked("t2v", ["--prompt", "x", "--num-steps", "2"])


def test_upstreams_model_names_are_aliases():
    for name in ("Wan2.1-1.3B", "Wan2.1-14B", "Wan2.2-A14B"):
        assert name.partition("-")[2] in catalog.find(name).name
