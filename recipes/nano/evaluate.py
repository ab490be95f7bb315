"""Measure with the detector how often a clip of nano shows its prompt.

A third of the prompts are held out: training saw neither their combinations nor their phrasing. The others are training
combinations in the canonical sentence. Two controls (transformer zeroed, text zeroed) must fall to chance.
"""

import argparse
import random
from dataclasses import asdict

import numpy as np
import torch

import turbo_nb
from turbo_nb.ops.compare import psnr

from .detector import detect, place
from .world import (
    ATTRIBUTES,
    DIRECTION,
    HELD_OUT_SCENES,
    TRAINING_SCENES,
    VOCABULARY,
    Scene,
    describe,
    draw,
    indices,
)

LATENT_SHAPE = (16, 7, 16, 16)


def prompts(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Return pairs of scene and prompt, the first third held out."""
    rng = random.Random(seed)
    third = rng.choices(HELD_OUT_SCENES, k=count // 3)
    rest = rng.choices(TRAINING_SCENES, k=count - len(third))
    return [(s, describe(s, VOCABULARY["held_out_phrasing"], rng)) for s in third] + [(s, describe(s)) for s in rest]


def score(frames: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Return the share of clips (B, T, H, W, 3) uint8 that show each attribute of their scene, and all of them."""
    right = np.array(
        [[seen[name] == value for name, value in asdict(scene).items()]
         for seen, scene in zip(map(detect, frames), scenes, strict=True)]
    )  # fmt: skip
    return dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True)) | {"all": float(right.all(1).mean())}


def sample(pipeline, texts: list[str], steps: int, seed: int, batch: int = 30, zero_text: bool = False) -> np.ndarray:
    """Return clips of the prompts (B, T, H, W, 3) uint8. The same seed draws the same noise for every mode."""
    clips = []
    pipeline.set_progress_bar_config(disable=True)
    for number, begin in enumerate(range(0, len(texts), batch)):
        part = texts[begin : begin + batch]
        embeds, _ = pipeline.encode_prompt(part, do_classifier_free_guidance=False, max_sequence_length=512)
        pipeline.scheduler.seed(seed + number)
        pipeline.scheduler.set_timesteps(steps)
        clips.append(
            pipeline(
                prompt_embeds=embeds * (0 if zero_text else 1),
                height=128,
                width=128,
                num_frames=25,
                num_inference_steps=steps,
                guidance_scale=1.0,
                latents=pipeline.scheduler.start_latents((len(part), *LATENT_SHAPE)),
                output_type="pt",
            ).frames
        )
    frames = torch.cat(clips).mul(255).round().to(torch.uint8)  # (B, T, 3, H, W)
    return frames.permute(0, 1, 3, 4, 2).cpu().numpy()


def mean_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean over clips of the PSNR in dB of uint8 frames; equal clips count as 78 dB."""
    return float(np.mean([min(psnr(ours, theirs), 78.0) for ours, theirs in zip(a, b, strict=True)]))


def spread(frames: np.ndarray, scenes: list[Scene]) -> float:
    """Return how far the places of unmoving shapes spread: their standard deviation by that of training clips."""
    stays = [number for number, scene in enumerate(scenes) if not any(DIRECTION[scene.motion])]
    drawn = draw(indices([scenes[number] for number in stays]), torch.Generator().manual_seed(0))
    drawn = drawn.add(1).mul(127.5).permute(0, 2, 3, 4, 1).numpy()
    ours, theirs = (np.std([place(clip) for clip in clips], axis=0) for clips in (frames[stays], drawn))
    return float((ours / theirs).mean())


def main(count: int, topk: float, device: str, seed: int) -> None:
    scenes, texts = zip(*prompts(count), strict=True)
    third = count // 3
    print(f"{count} prompts, {third} of them held out; SLA topk {topk}\n")
    print("| mode | steps | " + " | ".join([*ATTRIBUTES, "all", "all, held out", "PSNR to dense (dB)"]) + " |")
    print("|" + "---|" * (len(ATTRIBUTES) + 5))

    def report(mode: str, steps: int, clips: np.ndarray, against: np.ndarray | None = None) -> None:
        shares = score(clips, scenes)
        held_out = score(clips[:third], scenes[:third])["all"]
        cells = [f"{100 * share:.1f}" for share in [*shares.values(), held_out]]
        cells.append("" if against is None else f"{mean_psnr(clips, against):.1f}")
        print(f"| {mode} | {steps} | {' | '.join(cells)} |", flush=True)

    dense = {}
    pipeline = turbo_nb.load_pipeline("nano", attention_type="original", device=device)
    for steps in (4, 2, 1):
        dense[steps] = sample(pipeline, texts, steps, seed)
        report("dense", steps, dense[steps])
    spreads = []
    pipeline = turbo_nb.load_pipeline("nano", attention_type="sla", sla_topk=topk, device=device)
    for steps in (4, 2, 1):
        clips = sample(pipeline, texts, steps, seed)
        report("SLA", steps, clips, dense[steps])
        spreads.append(f"{steps} steps {spread(clips, scenes):.2f}")
    report("SLA, text zeroed", 4, sample(pipeline, texts, 4, seed, zero_text=True))
    for parameter in pipeline.transformer.parameters():
        parameter.data.zero_()
    report("SLA, transformer zeroed", 4, sample(pipeline, texts, 4, seed))
    print(f"\nSpread of the shapes' places with SLA, 1.0 as in training: {', '.join(spreads)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--topk", type=float, default=0.15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
