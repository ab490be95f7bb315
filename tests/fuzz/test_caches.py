"""Damaged caches: an embedding is the right one or made again, and times of earlier clips never end a run."""

import json
import math
from pathlib import Path

import torch
from fuzz.harness import NUMBERS, as_json, bent, deep, fuzz, odd, value

from turbo_nb.errors import collect_warnings
from turbo_nb.runtime import estimate
from turbo_nb.text.embedding_cache import EmbeddingCache

FIELDS = [*estimate.Row.__dataclass_fields__, "of another"]
SETTINGS = {
    "model": "nano", "attention_type": "sla", "width": 128, "height": 128, "num_frames": 5, "num_steps": 4,
    "quant_linear": False, "memory_plan": "resident", "device": "cpu",
}  # fmt: skip
HEADERS = (b'"__metadata__":null', b'"__metadata__":{}', b'"__metadata__":{"sha256":1}', b'"__metadata__":[]')


def test_a_damaged_embedding_is_made_again(tmp_path):
    cache = EmbeddingCache(tmp_path, "a", torch.float32)
    wanted = torch.zeros(1, 512, 8)
    wanted[0, :5] = torch.arange(1.0, 41).reshape(5, 8)
    cache.put("x", wanted)
    path = cache.path("x")
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length].strip(), whole[8 + length :]

    def attempt(chance):
        made = bent(whole, chance, chance.choice([None, length]))
        if chance.random() < 0.3:  # another header that is whole
            text = chance.choice([header.replace(b"[5,8]", b"[8,5]"), header.replace(b"embedding", b"other")])
            start, end = header.index(b'"__metadata__"'), header.index(b"}") + 1
            text = chance.choice([text, header[:start] + chance.choice(HEADERS) + header[end:], deep(chance).encode()])
            made = len(text).to_bytes(8, "little") + text + data
        path.write_bytes(made)
        with collect_warnings() as warned:
            found = cache.get("x")
        assert torch.equal(found, wanted) if found is not None else len(warned) == 1

    fuzz("embeddings", 200, attempt)


def test_odd_times_of_earlier_clips_give_an_estimate(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path))
    path = Path(tmp_path, estimate.ROWS)
    estimate.remember(SETTINGS, {"text": 1.0, "denoise": 4.0}, steps=[1.0] * 4, work=1e9)
    whole = path.read_bytes()
    row = json.loads(whole)
    numbers = [json.loads(text) for text in ("0", "-1", "1e308", "1e-300", "NaN", "Infinity", "1" * 400)]

    def line(chance) -> bytes:
        made = dict(row)
        for name in chance.sample(FIELDS, chance.choice([1, 1, 3])):
            made[name] = chance.choice(
                [value(chance), chance.choice(numbers), [chance.choice(numbers)] * 3, {"text": 1e8}]
            )
        text = chance.choice([as_json(made, chance)] * 6 + [deep(chance), odd(chance), chance.choice(NUMBERS)])
        data = text.encode("utf-8", "replace")
        return bent(data, chance) if chance.random() < 0.2 else data

    def attempt(chance):
        path.write_bytes(b"\n".join([whole.strip(), *(line(chance) for _ in range(chance.choice([1, 5, 30])))]))
        found = estimate.estimate(SETTINGS | {"sla_topk": 0.1}, None, device="cpu")
        assert found is not None and math.isfinite(found.seconds) and found.seconds >= 0 and len(str(found)) < 200
        estimate.remember(SETTINGS, {"text": 1.0}, steps=[1.0], work=1e9)

    fuzz("times", 200, attempt)
