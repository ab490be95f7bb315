"""The recipe of nano: what it draws, what the detector reads, and that the whole-clip pass is diffusers' VAE."""

import random
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import assert_close

from recipes.nano import evaluate, latents, models, train_fewstep, train_lora, training, world
from recipes.nano.detector import background, detect, place
from turbo_nb import checkpoint
from turbo_nb.files import lora
from turbo_nb.scheduler import RCMScheduler


def clips_of(scenes, seed=0):
    return world.draw(world.indices(scenes), torch.Generator().manual_seed(seed))


def as_frames(clips):
    return clips.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def test_the_detector_reads_what_was_drawn():
    scenes = random.Random(0).sample(world.SCENES, 60)
    for scene, frames in zip(scenes, as_frames(clips_of(scenes)), strict=True):
        assert detect(frames) == asdict(scene)


def test_the_detector_sees_nothing_in_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (25, 128, 128, 3), dtype=np.uint8)
    plain = np.full_like(noise, 128)
    assert detect(plain) == dict.fromkeys(("size", "colour", "shape", "motion")) | {"background": "gray"}
    assert detect(noise)["shape"] is None


def test_the_place_of_a_shape_is_its_centre():
    frames = np.full((2, 128, 128, 3), 128, np.uint8)
    frames[:, 20:31, 70:91] = (255, 0, 0)
    assert place(frames).tolist() == [80, 25]


def test_the_background_is_what_does_not_show_the_shape():
    frames = as_frames(clips_of([world.Scene(size="large", colour="yellow", shape="square", motion="growing",
                                             background="black")]))[0]  # fmt: skip
    black = world.BACKGROUNDS["black"]
    shape = (np.linalg.norm(frames - np.array(world.COLOURS["yellow"]), axis=-1) < 10).sum()
    pixels = background(frames)
    assert np.linalg.norm(pixels - black, axis=1).mean() < 2
    assert 0.95 < len(pixels) / (frames[..., 0].size - shape) <= 1
    frames[:, :64][np.linalg.norm(frames[:, :64] - np.array(black), axis=-1) < 10] = world.COLOURS["blue"]
    near = np.linalg.norm(background(frames) - world.COLOURS["blue"], axis=1) < 10
    assert 0.4 < near.mean() < 0.6  # a background of two colours counts with both


def test_wrong_clips_score_as_wrong():
    scenes = random.Random(1).sample(world.SCENES, 30)
    frames = as_frames(clips_of(scenes))
    assert set(evaluate.score(frames, scenes).values()) == {1.0}
    rotated = evaluate.score(np.roll(frames, 1, axis=0), scenes)
    assert rotated["all"] < 0.1 and rotated["colour"] < 0.5
    backwards = evaluate.score(frames[:, ::-1], list(scenes))
    assert backwards["motion"] < 0.5 and backwards["shape"] == 1.0


def test_held_out_scenes_and_phrasing_stay_out_of_training():
    assert len(world.SCENES) == 1302 and len(world.HELD_OUT_SCENES) == 217
    assert not set(world.HELD_OUT_SCENES) & set(world.TRAINING_SCENES)
    rng = random.Random(0)
    captions = [world.caption(scene, rng)[0].lower() for scene in rng.choices(world.TRAINING_SCENES, k=2000)]
    assert not [text for text in captions if text.startswith("there is a")]
    assert max(len(text) for text in captions) < training.CAPTION_LENGTH
    pairs = evaluate.prompts(210)
    assert sum(scene.held_out for scene, _ in pairs) == 70
    assert all(text.startswith("there is a") == scene.held_out for scene, text in pairs)


def test_a_caption_says_which_attributes_it_names():
    rng = random.Random(0)
    for scene in rng.choices(world.TRAINING_SCENES, k=300):
        text, named = world.caption(scene, rng)
        for name, is_named in zip(world.ATTRIBUTES, named, strict=True):
            words = world.VOCABULARY["attributes"][name][getattr(scene, name)]
            assert not is_named or any(word in text.lower() for word in words), (text, name)


def test_tokens_are_byt5s():
    from transformers import ByT5Tokenizer

    texts = ["a red circle", "ein Stück Café"]
    expected = ByT5Tokenizer()(texts, padding="max_length", max_length=training.CAPTION_LENGTH, return_tensors="pt")
    assert torch.equal(training.tokens(texts).long(), expected.input_ids)


def test_training_embeds_a_prompt_as_the_pipeline_does(nano):
    text = "a small green square growing on a gray background"
    expected, _ = nano.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
    with torch.no_grad():
        torch.testing.assert_close(
            training.embed(nano.text_encoder, training.tokens([text])), expected, rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_the_whole_clip_pass_is_diffusers_vae(frames):
    torch.manual_seed(0)
    vae, clip = models.new_vae().eval(), torch.randn(1, 3, frames, 32, 48)
    with torch.no_grad():
        moments = vae.encode(clip).latent_dist.parameters
        z = torch.randn(1, 16, (frames + 3) // 4, 4, 6)
        rebuilt = vae.decode(z).sample
        with latents.whole_clip():
            torch.testing.assert_close(latents.encode(vae, clip), moments, rtol=0, atol=1e-5)
            torch.testing.assert_close(latents.decode(vae, z).clamp(-1, 1), rebuilt, rtol=0, atol=1e-5)


def test_the_shipped_vae_rebuilds_unseen_clips(nano):
    """The target of the recipe: 32 dB, the last frame included."""
    clips = clips_of(random.Random(5).sample(world.HELD_OUT_SCENES, 2), seed=5)
    with torch.no_grad():
        rebuilt = nano.vae.decode(nano.vae.encode(clips).latent_dist.mode()).sample
    for name, part in {"whole": slice(None), "first": slice(0, 1), "last": slice(-1, None)}.items():
        error = (rebuilt[:, :, part] - clips[:, :, part]).square().mean()
        assert 10 * torch.log10(4 / error) >= 32, name


def test_latents_of_the_shipped_vae_have_the_stored_mean_and_std(nano):
    clips = clips_of(random.Random(6).choices(world.TRAINING_SCENES, k=6), seed=6)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (nano.vae.config.latents_mean, nano.vae.config.latents_std)
    )
    with torch.no_grad():
        normalised = (nano.vae.encode(clips).latent_dist.mode() - mean) / std
    assert normalised.mean().abs() < 0.1 and 0.8 < normalised.std() < 1.2


def test_the_shipped_folder_names_no_folder_of_the_machine_that_made_it():
    for path in world.ASSET.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_the_shipped_folder_is_small_enough():
    size = sum(path.stat().st_size for path in world.ASSET.rglob("*") if path.is_file())
    assert size <= 24e6
    count = sum(p.numel() for p in models.new_transformer().parameters()) + 7 * (64 * 64 + 64)
    assert count <= 8e6


def test_measuring_is_the_inverse_of_painting():
    attributes, free = world.indices(random.Random(2).sample(world.SCENES, 16)), torch.rand(16, 5)
    clips = world.paint(attributes, free)
    again = world.paint(attributes, world.measure(clips, attributes))
    blank = world.colours(attributes)[1]
    assert (again - clips).square().sum() < 0.05 * (clips - blank).square().sum()
    faint = blank + 0.2 * (clips - blank)  # what a few-step student is unsure of has its place too
    again = world.paint(attributes, world.measure(faint, attributes))
    assert (again - clips).square().sum() < 0.05 * (clips - blank).square().sum()


def test_a_start_noise_means_one_clip_and_all_of_them_the_training_clips():
    rng = random.Random(3)
    scenes = rng.choices(world.TRAINING_SCENES, k=400)
    attributes, named = world.indices(scenes), torch.rand(400, 5) < 0.5
    noise = torch.randn(400, *evaluate.LATENT_SHAPE, generator=torch.Generator().manual_seed(3))
    shown, free = train_fewstep.meaning(noise, attributes, named)
    assert torch.equal(shown[named], attributes[named])
    training = {tuple(row) for row in world.indices(world.TRAINING_SCENES).tolist()}
    assert {tuple(row) for row in shown.tolist()} <= training and (shown != attributes).any()
    spread = torch.linspace(0, 1, 400)[:, None]
    assert (free.sort(0).values - spread).abs().max() < 0.1  # uniform: Kolmogorov–Smirnov at p near 0.001
    assert torch.corrcoef(free.T).fill_diagonal_(0).abs().max() < 0.2


def test_training_samples_as_the_scheduler_does(nano):
    torch.manual_seed(0)
    text, noise = torch.randn(1, training.CAPTION_LENGTH, 128), torch.randn(1, 16, 2, 8, 8)
    scheduler = RCMScheduler()
    scheduler.generator = torch.default_generator  # as the training draws its noise
    scheduler.set_timesteps(3)
    with torch.random.fork_rng(), torch.no_grad():
        _, jumps = train_fewstep.sample(nano.transformer, text, noise, 3)
    x = noise.double() * scheduler.sigmas[0]
    padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - training.CAPTION_LENGTH))
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = nano.transformer(x.bfloat16().float(), t[None], padded, return_dict=False)[0]
            x = scheduler.step(v, t, x).prev_sample
    assert_close("clip", x, jumps[:, -1], 2e-2)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_recolouring_changes_black_backgrounds_alone(strength, monkeypatch):
    scenes = random.Random(8).sample(world.SCENES, 12)
    clips, attributes = clips_of(scenes), world.indices(scenes)
    monkeypatch.setitem(world.BACKGROUNDS, "black", train_lora.SHADES[strength])
    expected = clips_of(scenes)
    monkeypatch.undo()
    assert_close("clips", expected, train_lora.recolour(clips, attributes, strength), 1e-6)
    assert (expected != clips).any() == (strength > 0)


def test_the_lora_recipe_writes_what_it_trains(tmp_path):
    """One step of two clips: the file is as the recipe says, and merging it computes what training computed."""
    path = tmp_path / "lora.safetensors"
    train_lora.main([str(path), "--device", "cpu", "--steps", "1", "--batch", "2", "--clips", "4", "--count", "0"])
    assert path.stat().st_size <= 1e6
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert {"title", "description", "base", "base_sha256", "recipe", "seed", "commit"} <= set(metadata)
    parts = [f"{attn}.{part}" for attn in ("self_attn", "cross_attn") for part in "qkvo"] + ["ffn.0", "ffn.2"]
    leaves = {"lora_down.weight": torch.bfloat16, "lora_up.weight": torch.bfloat16, "alpha": torch.float32}
    assert {key: tensor.dtype for key, tensor in tensors.items()} == {
        f"diffusion_model.blocks.{n}.{part}.{leaf}": kind
        for n in range(7) for part in parts for leaf, kind in leaves.items()
    }  # fmt: skip

    layered = models.load_transformer("sla")
    layers = train_lora.add_low_rank(layered, rank=8, alpha=16.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, layer in layers.items():
            assert tensors[f"diffusion_model.{name}.lora_up.weight"].any(), name
            for matrix in (layer.down.weight, layer.up.weight):
                matrix.copy_(torch.randn_like(matrix).mul(0.05).bfloat16())  # because one step changes little
    train_lora.save_lora(layers, path)
    applied = lora.Applied(lora=lora.read(path), strength=0.5)
    merged = checkpoint.load_transformer(
        world.ASSET / "transformer", attention_type="sla", sla_topk=0.15, dtype=torch.float32, loras=[applied]
    )
    state, text = torch.randn(1, *evaluate.LATENT_SHAPE), torch.randn(1, training.CAPTION_LENGTH, models.TEXT_DIM)
    sigma = train_fewstep.rcm_sigmas("cpu")[0]
    with torch.no_grad():
        base = train_fewstep.velocity(layered, state, sigma, text)
        train_lora.set_strength(layers, 0.5)
        ours, theirs = (train_fewstep.velocity(model, state, sigma, text) for model in (layered, merged))
    assert_close("merged", theirs, ours, 1e-3)
    assert (base - ours).norm() > 0.02 * base.norm()


def test_nano_paints_what_the_prompt_says(nano):
    scenes, texts = zip(*evaluate.prompts(210)[::60], strict=True)
    right = evaluate.score(evaluate.sample(nano, list(texts), steps=4, seed=7), scenes)
    assert right["background"] == 1 and min(right.values()) >= 6 / 7, right
