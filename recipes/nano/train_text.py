"""Stage 1: train the text encoder on the five attributes, each with a classification head that is not shipped."""

import argparse
import random

import torch
import torch.nn.functional as F

from .models import TEXT_DIM, new_text_encoder, save
from .training import Captions, Progress, tokens
from .world import ATTRIBUTES, HELD_OUT_SCENES, VOCABULARY, describe, indices


def pooled(encoder: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean state (B, TEXT_DIM) of the tokens (B, N) of a prompt."""
    mask = rows > 0
    states = encoder(rows.int(), attention_mask=mask.int()).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def main(steps: int, batch: int, captions: int, device: torch.device, seconds: float) -> None:
    torch.manual_seed(0)
    pool = Captions(captions, device)
    encoder = new_text_encoder().to(device)
    heads = torch.nn.ModuleList(torch.nn.Linear(TEXT_DIM, len(values)) for values in ATTRIBUTES.values()).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    progress = Progress(steps, seconds, optimizer, "text")
    for _ in progress:
        rows = pool.sample(batch)
        labels = torch.where(pool.named[rows], pool.attributes[rows], -100)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states = pooled(encoder, pool.tokens[rows])
        loss = sum(F.cross_entropy(head(states.float()), labels[:, i]) for i, head in enumerate(heads))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        progress.log(loss=loss)

    rng = random.Random(1)
    scenes = rng.choices(HELD_OUT_SCENES, k=1000)
    rows = tokens([describe(s, VOCABULARY["held_out_phrasing"], rng) for s in scenes]).to(device)
    with torch.no_grad():
        states = pooled(encoder, rows)
        right = torch.stack([head(states).argmax(1) for head in heads], 1) == indices(scenes).to(device)
    shares = zip(ATTRIBUTES, right.float().mean(0).tolist(), strict=True)
    print("held-out scenes, held-out phrasing:", {name: round(share, 4) for name, share in shares})
    save(encoder, "text_encoder")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--device", type=torch.device, default="cuda")
    main(**vars(parser.parse_args()))
