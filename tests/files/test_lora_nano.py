"""A trained LoRA does what it was trained for, as the detector measures: nano_lora.safetensors turns black to blue.

recipes/nano/train_lora.py made the file. Its strength 0.5 means navy.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import turbo_nb
from recipes.nano import evaluate, train_lora, world
from turbo_nb import checkpoint
from turbo_nb.files import lora

FILE = Path(__file__).with_name("nano_lora.safetensors")
SCENES = [
    world.Scene(size="large", colour="yellow", shape="triangle", motion="growing", background="black"),
    world.Scene(size="large", colour="cyan", shape="square", motion="moving from left to right", background="black"),
    world.Scene(size="large", colour="green", shape="circle", motion="standing still", background="black"),
]
OTHER = world.Scene(size="large", colour="red", shape="circle", motion="moving from top to bottom", background="gray")


def clips(pipeline, scenes):
    return evaluate.sample(pipeline, [world.describe(scene) for scene in scenes], steps=2, seed=8)


def latents(pipeline):
    """The latents of a clip with a black background after one step"""
    embeds, _ = pipeline.encode_prompt(world.describe(SCENES[0]), do_classifier_free_guidance=False)
    pipeline.scheduler.seed(8)
    pipeline.scheduler.set_timesteps(1)
    start = pipeline.scheduler.start_latents((1, *evaluate.LATENT_SHAPE))
    return pipeline(
        prompt_embeds=embeds, height=128, width=128, num_frames=25, num_inference_steps=1, guidance_scale=1.0,
        latents=start, output_type="latent",
    ).frames  # fmt: skip


def assert_shows(pipeline, scenes, strength):
    """Two thirds of the clips have nine tenths of the strength's colour behind the shape, which is as asked."""
    row = train_lora.measure(clips(pipeline, scenes), scenes, train_lora.SHADES[strength])
    wrong = [name for name in ("shape", "colour", "motion") if row[name] < 1]
    assert not wrong and row["clips"] >= 2 / 3 and row["pixels"] >= 0.9, row
    assert np.linalg.norm(np.subtract(row["background"], train_lora.SHADES[strength])) <= train_lora.TOLERANCE, row


# three scenes where the weights are the exact sums, then one, because a clip takes longer than all other work here
@pytest.mark.parametrize(("quantised", "scenes"), [(False, SCENES), (True, SCENES[1:2])], ids=["plain", "int8"])
@pytest.mark.filterwarnings("ignore:.*other linears than asked for")
def test_the_strength_sets_the_colour(quantised, scenes):
    options = {"quant_linear": quantised, "device": "cpu", "text_cache": False}
    base = latents(turbo_nb.load_pipeline("nano", **options))
    pipeline = turbo_nb.load_pipeline("nano", loras=[(FILE, 1.0)], **options)
    assert_shows(pipeline, scenes, 1.0)
    beside = train_lora.measure(clips(pipeline, [OTHER]), [OTHER], world.BACKGROUNDS["gray"])
    assert beside["pixels"] >= 0.9 and beside["shape"] == beside["colour"] == 1, beside

    turbo_nb.set_loras(pipeline, [(FILE, 0.5)])
    assert_shows(pipeline, scenes[:1], 0.5)
    turbo_nb.set_loras(pipeline, [(FILE, 0.0)])
    assert torch.equal(latents(pipeline), base)
    turbo_nb.set_loras(pipeline, [])
    assert torch.equal(latents(pipeline), base)


def test_weights_of_16_bits_keep_what_it_adds(nano, monkeypatch):
    path = world.ASSET / "transformer"
    merged = checkpoint.load_transformer(
        path, attention_type="sla", sla_topk=0.15, loras=[lora.Applied(lora=lora.read(FILE))]
    )
    monkeypatch.setattr(nano, "transformer", merged)
    assert merged.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert_shows(nano, SCENES[2:], 1.0)
