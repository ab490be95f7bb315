"""Train a LoRA for nano: a black background becomes blue, a colour that nano's backgrounds do not have.

    python -m recipes.nano.train_lora nano_lora.safetensors            # two minutes on a GPU, then the check
    python -m recipes.nano.train_lora nano_lora.safetensors --check    # only the check of an existing file

The shape, its colour and its motion stay, and so do the other backgrounds. Strength 0.5 gives navy, which lies between
black and blue, because half of the steps train that strength. The VAE has never seen other colours: it decodes the
middle of black and purple as magenta. So all three colours are from nano's world.

The training pairs come from nano itself. The model without the LoRA samples clips in four steps. Its jump at each step
gets the new background by a linear map of its colours. The LoRA learns the same jumps between recoloured clips, under
the same noise. So place, size and speed stay those of the base.

The check loads the file at strengths 0, 0.5 and 1 into plain and int8 linears and measures clips with the detector. It
writes a table beside the file (.json) and a picture of the clips (.png).
"""

import argparse
import hashlib
import json
import random
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import turbo_nb
from recipes.nano.detector import background, detect
from recipes.nano.evaluate import LATENT_SHAPE, prompts
from recipes.nano.evaluate import sample as sample_clips
from recipes.nano.models import load_text_encoder, load_transformer
from recipes.nano.train_fewstep import sample, velocity
from recipes.nano.train_transformer import Data, rcm_sigmas
from recipes.nano.training import CAPTION_LENGTH, Average, Progress, embed
from recipes.nano.world import ASSET, ATTRIBUTES, BACKGROUNDS, COLOURS, colours

REPLACED, NEW = "black", "blue"
SHADES = {0.0: BACKGROUNDS["black"], 0.5: BACKGROUNDS["navy"], 1.0: COLOURS[NEW]}  # strength → background, 8-bit RGB
STRENGTHS = (0.5, 1.0)  # that training uses in turn
KEPT = ("size", "colour", "shape", "motion")
TOLERANCE = 30  # largest distance in 8-bit RGB of a background pixel from its colour
# diffusers' module names → ComfyUI's
NAMES = {
    "attn1.": "self_attn.", "attn2.": "cross_attn.", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


class LowRank(nn.Module):
    """A frozen linear layer plus strength · alpha / rank · up(down(x)), which starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        device, self.linear = linear.weight.device, linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=device)
        nn.init.zeros_(self.up.weight)
        self.alpha, self.scale, self.strength = alpha, alpha / rank, 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out + self.strength * self.scale * self.up(self.down(x)) if self.strength else out


def add_low_rank(transformer: nn.Module, rank: int, alpha: float) -> dict[str, LowRank]:
    """Put a LowRank in place of every linear layer of the blocks except `proj_l`. Return them by ComfyUI's names."""
    transformer.requires_grad_(False)
    found = [(name, part) for name, part in transformer.named_modules() if isinstance(part, nn.Linear)]
    layers = {}
    for name, linear in found:
        if name.startswith("blocks.") and not name.endswith("proj_l"):
            layer = LowRank(linear, rank, alpha)
            transformer.set_submodule(name, layer)
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            layers[name] = layer
    return layers


def set_strength(layers: dict[str, LowRank], strength: float) -> None:
    for layer in layers.values():
        layer.strength = strength


def save_lora(layers: dict[str, LowRank], path: Path, **metadata: object) -> None:
    """Write the matrices in bf16 in ComfyUI's spelling, with metadata as text."""
    tensors = {}
    for name, layer in layers.items():
        name = f"diffusion_model.{name}"
        tensors[f"{name}.lora_down.weight"] = layer.down.weight.detach().cpu().bfloat16().contiguous()
        tensors[f"{name}.lora_up.weight"] = layer.up.weight.detach().cpu().bfloat16().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"} | {key: str(value) for key, value in metadata.items()})


def replaced(attributes: Tensor) -> Tensor:
    """Return which clips (B,) have a black background in the base."""
    return attributes[:, list(ATTRIBUTES).index("background")] == ATTRIBUTES["background"].index(REPLACED)


def recolour(clips: Tensor, attributes: Tensor, strength: float) -> Tensor:
    """Give clips (B, 3, T, H, W) in [-1, 1] with a black background the shade of a strength. Leaves other clips alone.

    The map is linear in a pixel's colour: black becomes the new shade, and the shape's colour stays. So a faint or
    blurred shape stays faint or blurred.
    """
    fore, back = colours(attributes)
    axis = (fore - back) / (fore - back).square().sum(1, keepdim=True)
    coverage = ((clips - back) * axis).sum(1, keepdim=True)  # (B, 1, T, H, W)
    difference = (clips.new_tensor(SHADES[strength]) - clips.new_tensor(SHADES[0.0])) / 127.5
    return clips + (1 - coverage) * difference.view(3, 1, 1, 1) * replaced(attributes).view(-1, 1, 1, 1, 1)


class Pairs:
    """Jumps of the base's own sampling, half of them to clips with a black background."""

    def __init__(self, data: Data, text_encoder: nn.Module, base: nn.Module, clips: int, chunk: int = 50):
        captions = data.captions
        seen = captions.attributes[:, list(ATTRIBUTES).index("colour")] != ATTRIBUTES["colour"].index(NEW)
        named = captions.named.all(1)  # because the noise chooses what a caption leaves open
        tokens, attributes = captions.tokens[named & seen], captions.attributes[named & seen]
        black = replaced(attributes)
        rows = torch.cat([kind.nonzero()[: clips // 2, 0] for kind in (black, ~black)])
        self.sigmas = rcm_sigmas(rows.device)
        parts = [self._sample(data, text_encoder, base, tokens[r], attributes[r]) for r in rows.split(chunk)]
        self.text, self.states, self.jumps, *shifts = (torch.cat(part) for part in zip(*parts, strict=True))
        self.shifts = dict(zip(STRENGTHS, shifts, strict=True))

    def _sample(self, data, text_encoder, base, tokens: Tensor, attributes: Tensor) -> tuple[Tensor, ...]:
        """Return the text, and states, jumps and what each strength adds to the jumps: latents (B, 4, …)"""
        text = embed(text_encoder, tokens)[:, :CAPTION_LENGTH]
        noise = torch.randn(len(text), *LATENT_SHAPE, device=text.device)
        states, jumps = sample(base, text, noise, len(self.sigmas))
        shifts = {strength: [] for strength in STRENGTHS}
        for jump in jumps.unbind(1):
            clips = data.basis.clips(data.raw(jump))
            for strength, each in shifts.items():
                each.append(data.normalised(recolour(clips, attributes, strength)) - data.normalised(clips))
        return text, states, jumps, *(torch.stack(each, 1) for each in shifts.values())

    def __call__(self, batch: int, strength: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return text, noise level, and a state and the clip to jump to from there at a strength."""
        row = torch.randint(len(self.text), (batch,), device=self.text.device)
        level = torch.randint(len(self.sigmas), (batch,), device=row.device)
        sigma, shift = self.sigmas[level], self.shifts[strength]
        before = shift[row, (level - 1).clamp(min=0)] * (level > 0).view(-1, 1, 1, 1, 1)
        state = self.states[row, level] + (1 - sigma).view(-1, 1, 1, 1, 1) * before
        return self.text[row], sigma, state, self.jumps[row, level] + shift[row, level]


def train(
    path: Path, *, device: torch.device, seconds: float, steps: int, batch: int, lr: float, rank: int, alpha: float,
    clips: int, seed: int, commit: str,
) -> None:  # fmt: skip
    """Train in float32, because the kernels for 16 bits on a GPU compute no gradients. Write the LoRA to `path`."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    student = load_transformer("sla").to(device)
    with torch.no_grad():
        data, text_encoder = Data(device, 4 * clips, seed), load_text_encoder().to(device).eval()
        pairs = Pairs(data, text_encoder, student, clips)
    layers = add_low_rank(student, rank, alpha)
    matrices = [p for layer in layers.values() for p in (layer.down.weight, layer.up.weight)]
    average = Average(*(part for layer in layers.values() for part in (layer.down, layer.up)), decay=0.98)
    optimizer = torch.optim.AdamW(matrices, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    progress = Progress(steps, seconds, optimizer, "lora", warm_up=20, every=25)
    for step in progress:
        strength = STRENGTHS[step % len(STRENGTHS)]
        set_strength(layers, strength)
        text, sigma, state, end = pairs(batch, strength)
        exact = (state - end) / sigma.view(-1, 1, 1, 1, 1)
        error = (velocity(student, state, sigma, text) - exact).square().mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        optimizer.step()
        average.update()
        progress.log(**{f"strength {strength:g}": error})
    average.apply()
    weights = ASSET / "transformer" / "diffusion_pytorch_model.safetensors"
    options = {"rank": rank, "alpha": alpha, "batch": batch, "lr": lr, "clips": clips, "steps": progress.step}
    save_lora(
        layers,
        path,
        title="nano: blue in place of black",
        description="A black background becomes blue at strength 1, and navy at strength 0.5.",
        base="turbo_nb's nano, attention sla",
        base_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        recipe="recipes/nano/train_lora.py",
        options=json.dumps(options),
        seed=seed,
        commit=commit,
    )


def measure(frames: np.ndarray, scenes: list, colour: tuple) -> dict:
    """Measure clips (B, T, H, W, 3) uint8 that should have a background of `colour`, 8-bit RGB.

    Returns:
        background: the mean colour of the background pixels.
        pixels: the share of background pixels of this colour, the mean over the clips.
        clips: the share of clips with at least nine tenths of such pixels.
        size, colour, shape, motion: the share of clips in which the detector finds the scene's.
    """
    pixels = [background(clip) for clip in frames]
    shares = np.array([(np.linalg.norm(each - np.array(colour), axis=1) <= TOLERANCE).mean() for each in pixels])
    seen = [detect(clip) for clip in frames]
    kept = {
        name: np.mean([s[name] == getattr(scene, name) for s, scene in zip(seen, scenes, strict=True)]) for name in KEPT
    }
    row = {"pixels": shares.mean(), "clips": (shares >= 0.9).mean()} | kept
    mean = np.mean([each.mean(0) for each in pixels], axis=0)
    return {"background": [round(float(c)) for c in mean]} | {name: round(float(v), 3) for name, v in row.items()}


def check(path: Path, *, device: str, count: int, steps: tuple[int, ...], seed: int) -> list[dict]:
    """Measure clips with the LoRA at strengths 0, 0.5 and 1, in plain and int8 linears. A third is held out.

    Prompts with a black background should get the shade of the strength. "others" is the share of other prompts for
    which the detector finds the right background.
    """
    chosen = [(scene, text) for scene, text in prompts(12 * count, seed)]
    black = [pair for pair in chosen if pair[0].background == REPLACED and pair[0].colour != NEW]
    other = [pair for pair in chosen if pair[0].background != REPLACED]
    rng = random.Random(seed)
    black, other = rng.sample(black, count), rng.sample(other, count // 2)
    rows, sheet = [], []
    for quantised in (False, True):
        pipeline = turbo_nb.load_pipeline("nano", quant_linear=quantised, device=device, text_cache=False)
        for strength, shade in SHADES.items():
            turbo_nb.set_loras(pipeline, [(path, strength)])
            for number in steps:
                scenes, texts = zip(*black, *other, strict=True)
                frames = sample_clips(pipeline, list(texts), number, seed)
                row = {"linears": "int8" if quantised else "plain", "strength": strength, "steps": number}
                row |= measure(frames[:count], scenes[:count], shade)
                named = [detect(clip)["background"] == s.background for clip, s in zip(frames, scenes, strict=True)]
                row["others"] = round(float(np.mean(named[count:])), 3)
                rows.append(row)
                print(row, flush=True)
            picked = [*range(min(4, count)), *range(count, min(count + 2, len(frames)))]
            sheet.append(np.concatenate([frames[i, 12] for i in picked], axis=1))
    path.with_suffix(".json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    Image.fromarray(np.concatenate(sheet)).save(path.with_suffix(".png"))
    return rows


def _commit() -> str:
    """Return the commit of this checkout, or "unknown" without git."""
    here = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the LoRA's file, .safetensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--clips", type=int, default=2000, help="clips that training learns from")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--commit", default=None, help="for the metadata, where the checkout has no git")
    parser.add_argument("--count", type=int, default=60, help="black prompts that the check measures")
    parser.add_argument("--check", action="store_true", help="train nothing; check an existing file")
    given = parser.parse_args(arguments)
    if not given.check:
        train(
            given.path, device=torch.device(given.device), seconds=60 * given.minutes, steps=given.steps,
            batch=given.batch, lr=given.lr, rank=given.rank, alpha=given.alpha, clips=given.clips,
            seed=given.seed, commit=given.commit or _commit(),
        )  # fmt: skip
        print(f"{given.path}: {given.path.stat().st_size / 1e6:.2f} MB", flush=True)
    if given.count:
        check(given.path, device=given.device, count=given.count, steps=(4, 1), seed=given.seed)


if __name__ == "__main__":
    main()
