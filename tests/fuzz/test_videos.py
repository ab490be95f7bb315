"""Damaged and foreign mp4s: `turbo-nb info`, the gallery and the generator's form read them, or refuse them shortly."""

import warnings

import numpy as np
import pytest
from fuzz.harness import bent, fuzz, odd, require_documented, require_short, value
from helpers import command_line

from turbo_nb import catalog, preparation, settings
from turbo_nb.errors import InputError
from turbo_nb.records import VideoRecord
from turbo_nb.video import mp4, sheet
from turbo_nb.video.gallery import Gallery

FIELDS = [*VideoRecord.__dataclass_fields__, "of another"]
WHOLE = {
    "model": "nano", "prompt": "a red circle", "seed": 3, "num_steps": 2, "num_frames": 5, "width": 32, "height": 32,
    "fps": 8, "sigma_max": 90.0, "ode": True, "attention_type": "sla", "sla_topk": 0.2, "quant_linear": True,
    "loras": [{"name": "a.safetensors", "hash": "00", "strength": 0.5}], "timings": {"text": 1.0}, "steps": [0.5],
    "more": {"a": 1}, "versions": {"torch": "2"}, "machine": "CPU", "cost": 0.1, "image": "good.png",
    "peaks": {"text": 1},
}  # fmt: skip
CLOSE = {
    "model": ["nano", "TurboWan2.2-I2V-A14B-720P", "Wan2.1-1.3B"], "seed": [[1, 2], [], 2**63, -1, 10**30],
    "width": [480, 17, 0], "num_frames": [4093, 2, 0], "num_steps": [9, 0], "sigma_max": [1.0, 1e200],
    "boundary": [2.0, 0.9], "noise_device": ["cuda", "tpu"],
    "image": ["good.png", "dir", "loop", "a" * 300, "\0", "~", "fifo.png", "empty.png"],
    "attention_type": ["original", "odd"],
    "loras": [[{}], [{"name": "\x1b[31m", "hash": "", "strength": 1e300}],
              [{"name": "a" * 300, "hash": "0", "strength": -1}] * 50],
    "prompt": ["赤い円 " * 40_000, "\x1b]0;x\x07", "\n" * 500], "timings": [{"a" * 300: 1e200}, {"load": -5}],
}  # fmt: skip


def metadata(chance) -> object:
    """Return metadata of a clip, with odd fields"""
    record = dict(WHOLE) if chance.random() < 0.8 else {}
    for _ in range(chance.choice([1, 1, 2, 5])):
        name = chance.choice(FIELDS)
        if chance.random() < 0.2:
            record.pop(name, None)
        else:
            record[name] = chance.choice(CLOSE[name]) if name in CLOSE and chance.random() < 0.5 else value(chance)
    return record


@pytest.fixture
def read(folder, nano, monkeypatch):
    """Read an mp4 as the product's readers do"""
    widgets = pytest.importorskip("turbo_nb.generator.widgets")
    from turbo_nb.generator.jobs import JobRunner

    made = widgets.Generator(JobRunner(folder / "clips", load=lambda *_, **__: nano))
    (folder / "clips").mkdir(exist_ok=True)
    path = folder / "clips" / "x.mp4"

    def read(data: bytes, chance) -> None:
        path.write_bytes(data)
        require_documented(command_line("info", path, cwd=folder))
        for clip in Gallery(path.parent).clips():
            assert clip.seconds is not None and clip.settings
        if chance.random() < 0.3:
            options = {"prompt": "on", "extend_clip": path, "extend": chance.choice([None, 1, 20])}
            extended = settings.ClipSettings(**options)
            for reader in (
                lambda: mp4.read_frames(path, 64, 64),
                lambda: mp4.last_frame(path),
                lambda: preparation.prepare(extended, catalog.find("Wan2.2-A14B")),
                lambda: preparation.count_frames(extended, catalog.find("Wan2.2-A14B")),
            ):
                try:
                    reader()
                except InputError as error:
                    require_short(str(error))
        if chance.random() < 0.5:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.clips.show()
                for text in ("Use these settings", "Vary seed"):
                    for one in widgets.family(made.root):
                        if getattr(one, "description", "") == text:
                            one.click()
                            assert len(made.clips.message.value) < 10_000
                            break
            made.runner.cancel()
            made.runner.wait(60)

    yield read
    made.close()


def test_mutated_records_of_a_clip(folder, read):
    frames = np.zeros((1, 32, 32, 3), np.uint8)

    def attempt(chance):
        mp4.write_mp4("x.mp4", frames, 8, metadata(chance))
        read((folder / "x.mp4").read_bytes(), chance)

    fuzz("metadata", 30, attempt)


def test_mutated_bytes_of_a_clip(folder, read):
    mp4.write_mp4("x.mp4", np.zeros((2, 32, 48, 3), np.uint8), 8, WHOLE)
    whole = (folder / "x.mp4").read_bytes()
    text = whole.index(b'{"model"')

    def attempt(chance):
        if chance.random() < 0.5:  # within the metadata
            read(whole[:text] + bent(whole[text:], chance, 500), chance)
        else:
            read(bent(whole, chance, chance.choice([None, 100])), chance)

    fuzz("bytes of videos", 40, attempt)


def test_captions_of_a_contact_sheet_take_any_text():
    clip = np.zeros((1, 16, 64, 3), np.uint8)

    def attempt(chance):
        unicode = "".join(map(chr, chance.sample(range(32, 0xD7FF), 300)))
        captions = [chance.choice([odd(chance), "".join(odd(chance) for _ in range(9)), unicode]) for _ in range(2)]
        made = sheet.contact_sheet([clip] * 2, captions)
        assert max(made.size) < 2000

    fuzz("captions", 60, attempt)
