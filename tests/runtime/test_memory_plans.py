"""Memory plans carried out: each gives the clip of a resident model, and each stage goes on where memory runs out."""

import numpy as np
import pytest
import torch

import turbo_nb
from turbo_nb import errors, generation
from turbo_nb.errors import TurboNbError
from turbo_nb.fused import vae as fused_vae
from turbo_nb.machine import probe
from turbo_nb.runtime.block_stream import BlockStream
from turbo_nb.runtime.plan import Plan
from turbo_nb.settings import PLAN_NAMES

PROMPT = "a large red circle moving from left to right on a black background"
CLIP = {"num_frames": 5, "num_steps": 2, "resolution": "64x64"}


def of_gpu(name: str, text: str, offload: str, next: Plan | None = None, **more) -> Plan:
    """A plan of a GPU, which the CPU carries out"""
    tiling = name in ("offload-tiled", "group")
    return Plan(name=name, text_encoder=text, offload=offload, vae_tiling=tiling, device="cpu", next=next, **more)


STREAMED = of_gpu("group", "cpu", "group", keep=0, blocks=6)
KEPT = of_gpu("group", "cpu", "group", STREAMED, keep=3, blocks=6)
TILED = of_gpu("offload-tiled", "cpu", "model", KEPT)
RESIDENT = of_gpu("resident", "resident", "none", TILED)
PLANS = [of_gpu("cpu-text", "cpu", "none"), of_gpu("offload", "freed", "model"), TILED, KEPT, STREAMED]


@pytest.fixture(scope="module")
def nano():
    return turbo_nb.load_pipeline("nano", device="cpu", text_cache=False, on_plan=lambda chosen: None)


@pytest.fixture(scope="module")
def resident(nano):
    return turbo_nb.generate(nano, PROMPT, **CLIP).frames


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Save seconds, because a test's process has many objects"""
    monkeypatch.setattr(probe.gc, "collect", lambda: None)


@pytest.fixture
def follow(nano):
    def begin(plan: Plan) -> None:
        nano.turbo_nb.follow(plan)
        nano.turbo_nb.prompt_encoder._known.clear()

    yield begin
    begin(RESIDENT)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.name} {plan.keep}")
def test_every_plan_makes_the_clip_of_a_resident_model(nano, resident, follow, plan, monkeypatch):
    copied, fetch = [], BlockStream._fetch
    monkeypatch.setattr(BlockStream, "_fetch", lambda self, index: copied.append(self) or fetch(self, index))
    identity = nano.turbo_nb.identity
    follow(plan)
    for text in (PROMPT, PROMPT + " "):
        assert np.array_equal(turbo_nb.generate(nano, text, **CLIP).frames, resident)
    assert len(set(copied)) == (plan.text_encoder == "cpu") + (plan.offload == "group")
    assert all(stream.loaded == [] for stream in copied)  # nothing stays on the device
    assert nano.turbo_nb.identity == identity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory", [1e6, 1e9])
@pytest.mark.parametrize("name", PLAN_NAMES[2:])
def test_every_plan_of_a_gpu_makes_the_clip_of_a_resident_model(name, memory):
    options = {"device": "cuda", "text_cache": False, "on_plan": lambda chosen: None, "memory": memory}
    resident, other = (turbo_nb.load_pipeline("nano", memory_plan=plan, **options) for plan in ("resident", name))
    for text in (PROMPT, PROMPT + " "):
        frames = [turbo_nb.generate(pipeline, text, **CLIP).frames for pipeline in (resident, other)]
        assert np.array_equal(*frames) and other.turbo_nb.plan.name == name
    if other.turbo_nb.plan.offload != "none":
        assert next(other.transformer.parameters()).device.type == "cpu"


class Full:
    """Work that runs out of memory so many times"""

    def __init__(self, work, failures: int):
        self.work, self.failures, self.calls = work, failures, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls <= self.failures:
            raise torch.OutOfMemoryError("full")
        return self.work(*args, **kwargs)


SEAMS = {"text": "encode", "denoise": "denoise", "decode": "decode"}


@pytest.mark.parametrize("stage", SEAMS)
@pytest.mark.parametrize("failures", [1, 3])
def test_each_stage_goes_on_with_the_next_plan_until_one_suffices(nano, resident, follow, stage, failures, monkeypatch):
    follow(RESIDENT)
    full = Full(getattr(generation, SEAMS[stage]), failures)
    monkeypatch.setattr(generation, SEAMS[stage], full)
    with errors.collect_warnings() as told:
        video = turbo_nb.generate(nano, PROMPT, **CLIP)
    assert np.array_equal(video.frames, resident)
    assert full.calls == failures + 1 and nano.turbo_nb.plan == (TILED, KEPT, STREAMED)[failures - 1]
    assert [f"out of memory while at {stage}" in line for line in told] == [True] * failures
    assert video.settings["memory_plan"] == nano.turbo_nb.plan.name


@pytest.mark.parametrize("stage", SEAMS)
def test_a_stage_that_no_plan_helps_is_an_error_with_the_smallest_plan(nano, follow, stage, monkeypatch):
    follow(RESIDENT)
    monkeypatch.setattr(generation, SEAMS[stage], full := Full(None, 99))
    with errors.collect_warnings(), pytest.raises(TurboNbError, match=f"while at {stage}, with plan group"):
        turbo_nb.generate(nano, PROMPT, **CLIP)
    assert full.calls == 4


@pytest.mark.parametrize("stage", ["text", "transformer", "decode"])
@pytest.mark.parametrize("plan", [KEPT, TILED], ids=lambda plan: plan.name)
def test_memory_that_runs_out_inside_a_module_leaves_nothing_on_the_device(
    nano, resident, follow, stage, plan, monkeypatch
):  # fmt: skip
    follow(plan)
    if stage == "text":
        model = turbo_nb.checkpoint.load_text_encoder(nano.turbo_nb.resolved.text_encoder)
        monkeypatch.setattr(nano.turbo_nb.prompt_encoder, "_load", lambda device: model)
    module = {
        "text": lambda: model.encoder.block[1].layer[1],
        "transformer": lambda: nano.transformer.blocks[2].ffn,
        "decode": lambda: nano.vae.decoder.mid_block,
    }[stage]()
    if stage == "decode":
        monkeypatch.setattr(fused_vae, "_middle", Full(fused_vae._middle, 2))
    else:
        monkeypatch.setattr(module, "forward", Full(module.forward, 1))
    with errors.collect_warnings() as told:
        assert np.array_equal(turbo_nb.generate(nano, PROMPT, **CLIP).frames, resident)
    assert len(told) == 1 and nano.turbo_nb.plan == plan.next


def test_a_vae_that_may_decode_in_tiles_does_so_where_memory_runs_out(nano, resident, follow, monkeypatch):
    lengths, chunks = [], fused_vae.chunks

    def full(vae, z, length=None):
        lengths.append(length)
        for number, frames in enumerate(chunks(vae, z, length)):
            if length is None and number == 1:
                raise torch.OutOfMemoryError("full")
            yield frames

    follow(STREAMED)
    monkeypatch.setattr(fused_vae, "chunks", full)
    delivered = []
    video = turbo_nb.generate(nano, PROMPT, **CLIP, on_frames=delivered.append)
    assert lengths == [None, 0] and np.array_equal(np.concatenate(delivered), video.frames)
    assert np.array_equal(video.frames, resident)  # nano's picture is a single tile
