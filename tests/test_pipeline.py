"""generate(): the same seed, the same clip; the same as diffusers' own call; clear errors."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import turbo_nb
from turbo_nb.errors import BackendError, CheckpointError, InputError, TurboNbError, UnknownModelError
from turbo_nb.files.resolve import resolve
from turbo_nb.fused import vae
from turbo_nb.machine import environment
from turbo_nb.pipeline import LoadedModel
from turbo_nb.runtime import estimate
from turbo_nb.scheduler import RCMScheduler
from turbo_nb.settings import LoadOptions
from turbo_nb.sla import attention_type, set_topk
from turbo_nb.video import mp4, sheet

PROMPT = "a small green square growing on a gray background"
SHORT = {"num_frames": 5, "num_steps": 2}


class Clock:
    """A clock that stands still but for `pass_by`, and a tick at every look"""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", self.look)

    def look(self):
        self.now += 1e-3
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_a_seed_is_a_clip(nano):
    a, b, c = (turbo_nb.generate(nano, PROMPT, seed=seed, **SHORT) for seed in (3, 3, 4))
    assert a.frames.shape == (5, 128, 128, 3) and a.frames.dtype == np.uint8
    assert np.array_equal(a.frames, b.frames) and not np.array_equal(a.frames, c.frames)
    assert set(a.timings) == {"text", "denoise", "decode"} and min(a.timings.values()) > 0


def test_each_step_is_timed_without_what_is_done_between_them(nano, monkeypatch):
    clock = Clock(monkeypatch)
    video = turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=3, on_step=lambda *_: clock.pass_by(100))
    assert len(video.steps) == 3 and max(video.steps) < 100  # a preview after a step is not the step's work
    assert sum(video.steps) <= video.timings["denoise"] - 300
    onload = nano.transformer.register_forward_pre_hook(lambda *_: clock.pass_by(1000))  # as a plan onloads weights
    try:
        (step,) = turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=1).steps
        assert step < 1000
    finally:
        onload.remove()
    assert not nano.transformer._forward_pre_hooks


def test_a_step_that_did_not_end_is_not_counted(nano, monkeypatch):
    step, failures = RCMScheduler.step, [torch.OutOfMemoryError("full")]
    frugal = replace(nano.turbo_nb.plan, next=None)
    monkeypatch.setattr(nano.turbo_nb, "plan", replace(nano.turbo_nb.plan, next=frugal))

    def full(*args, **kwargs):
        if failures:
            raise failures.pop()
        return step(*args, **kwargs)

    monkeypatch.setattr(RCMScheduler, "step", full)
    with pytest.warns(UserWarning, match="out of memory while at denoise"):
        assert len(turbo_nb.generate(nano, PROMPT, **SHORT).steps) == 2


def test_the_time_of_writing_is_remembered_with_what_was_written(nano, tmp_path):
    video = turbo_nb.generate(nano, PROMPT, **SHORT)
    replace(video, frames=sheet.grid([video.frames, video.frames])).save(tmp_path / "grid.mp4")
    row = estimate.rows()[0]
    assert list(row.timings) == ["write"] and (row.width, row.height, row.num_frames) == (256, 128, 5)


def test_a_clip_is_made_with_its_own_gpu_as_the_current_one(nano, monkeypatch):
    class Entered(Exception):
        pass

    def enter(device):
        raise Entered(device)

    monkeypatch.setattr(torch.cuda, "device", enter)
    turbo_nb.generate(nano, PROMPT, **SHORT)  # on a CPU there is none
    monkeypatch.setattr(nano.turbo_nb, "plan", replace(nano.turbo_nb.plan, device="cuda:1"))
    with pytest.raises(Entered, match="cuda:1"):  # Triton launches on the current one
        turbo_nb.generate(nano, PROMPT, **SHORT)


def test_it_is_diffusers_own_call(nano):
    video = turbo_nb.generate(nano, PROMPT, seed=5, **SHORT)
    nano.scheduler = RCMScheduler()
    nano.scheduler.seed(5)
    latents = nano.scheduler.start_latents((1, 16, 2, 16, 16))
    frames = nano(
        PROMPT, latents=latents, num_frames=5, height=128, width=128, num_inference_steps=2, guidance_scale=1.0
    ).frames[0]
    assert np.abs(frames * 255 - video.frames).max() <= 0.51


def test_settings_tell_how_it_was_made(nano, tmp_path):
    video = turbo_nb.generate(nano, PROMPT, seed=9, ode=True, **SHORT)
    settings = turbo_nb.read_metadata(video.save(tmp_path / "clip.mp4"))
    assert settings == json.loads(json.dumps(video.settings))
    assert settings["prompt"] == PROMPT and settings["seed"] == 9 and settings["ode"] is True
    assert settings["attention_type"] == "sla" and settings["sla_topk"] == 0.15
    assert settings["versions"]["torch"] == environment.version("torch")


def test_a_checkout_that_is_not_installed_makes_videos_too(nano, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda name: None)
    assert turbo_nb.generate(nano, PROMPT, **SHORT).settings["versions"]["turbo-nb"] == "not installed"


def test_another_size_and_one_frame(nano):
    assert turbo_nb.generate(nano, PROMPT, num_frames=1, resolution="96x64", num_steps=1).frames.shape == (1, 64, 96, 3)


def test_progress_is_told_and_can_cancel(nano):
    told = []
    turbo_nb.generate(
        nano, PROMPT, num_frames=5, num_steps=3, on_stage=told.append,
        on_step=lambda done, total, latents: told.append((done, total, tuple(latents.shape))),
    )  # fmt: skip
    shape = (1, 16, 2, 16, 16)
    assert told == ["text", "denoise", (1, 3, shape), (2, 3, shape), (3, 3, shape), "decode"]

    class Cancelled(Exception):
        pass

    def cancel(done, total, latents):
        raise Cancelled

    with pytest.raises(Cancelled):
        turbo_nb.generate(nano, PROMPT, on_step=cancel, **SHORT)
    assert turbo_nb.generate(nano, PROMPT, **SHORT).frames.shape[0] == 5


@pytest.mark.parametrize("fails", [False, True], ids=["", "out of memory at the second chunk"])
def test_frames_are_given_once_and_in_turn_while_others_are_decoded(nano, monkeypatch, fails):
    chunks, events, failures = vae.chunks, [], [torch.OutOfMemoryError("full")] if fails else []

    def told(module, z, length):
        for number, sample in enumerate(chunks(module, z, length)):
            if number == 2 and failures:
                events.append("failed")
                raise failures.pop()
            events.append("decoded")
            yield sample

    monkeypatch.setattr(vae, "chunks", told)
    monkeypatch.setattr(nano.turbo_nb, "plan", replace(nano.turbo_nb.plan, next=replace(nano.turbo_nb.plan, next=None)))
    warned = pytest.warns(UserWarning, match="out of memory while at decode") if fails else nullcontext()
    with warned:
        video = turbo_nb.generate(nano, PROMPT, num_frames=25, num_steps=1, on_frames=events.append)
    parts = [event for event in events if not isinstance(event, str)]
    assert [len(part) for part in parts] == [1, 16, 8] and np.array_equal(np.concatenate(parts), video.frames)
    order = [event if isinstance(event, str) else len(event) for event in events]
    again = ["decoded", "decoded", 1, "failed"] + ["decoded"] * 3 if fails else ["decoded", "decoded", 1, "decoded"]
    assert order == [*again, 16, 8]


def test_an_encoder_takes_frames_while_they_are_decoded(nano, tmp_path):
    with mp4.Encoder(tmp_path / "clip.mp4", nano.turbo_nb.spec.fps) as encoder:
        video = turbo_nb.generate(nano, PROMPT, on_frames=encoder.add, **SHORT)
        path = video.save(encoder)
    assert path == tmp_path / "clip.mp4" and turbo_nb.read_metadata(path)["prompt"] == PROMPT
    assert video.save(tmp_path / "again.mp4").read_bytes() == path.read_bytes()


def test_a_prompt_outside_the_vocabulary_is_made_and_said(nano, recwarn):
    turbo_nb.generate(nano, PROMPT, **SHORT)
    assert not [w for w in recwarn if "moving shapes" in str(w.message)]
    with pytest.warns(UserWarning, match="nano only knows moving shapes"):
        video = turbo_nb.generate(nano, "a cat on a bicycle", **SHORT)
    assert video.frames.shape[0] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_frames": 24}, r"4n \+ 1 .* Take 25"),
        ({"num_frames": 0}, "from 1 to 4093"),
        ({"num_frames": 4097}, "from 1 to 4093"),
        ({"num_steps": 5}, "from 1 to 4"),
        ({"num_steps": 0}, "from 1 to 4"),
        ({"resolution": "100x100"}, "multiples of 16, .* Take 96x96"),
        ({"seed": -1}, "from 0"),
        ({"seed": 1.0}, "whole number"),
        ({"seed": 2**64}, "from 0"),
        ({"sigma_max": float("nan")}, "sigma_max"),
        ({"noise_device": "tpu"}, "cpu"),
        ({"image": "cat.png"}, "nano makes videos from text alone"),
        ({"prompt": "  "}, "Write a prompt"),
        ({"prompt": 3}, "Write a prompt"),
        ({"ode": "false"}, "True or False"),
        ({"boundary": 0.5}, "one expert"),
        ({"negative_prompt": "ugly"}, "an argument of generate is 'negative_prompt'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(nano, arguments, words):
    with pytest.raises(InputError, match=words):
        turbo_nb.generate(nano, **{"prompt": PROMPT} | arguments)


def test_output_that_is_not_finite_is_an_error(nano, monkeypatch):
    bias = nano.transformer.proj_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias.data, torch.nan))
    with pytest.raises(TurboNbError, match="not finite"):
        turbo_nb.generate(nano, PROMPT, **SHORT)


def test_load_pipeline_errors():
    with pytest.raises(UnknownModelError, match="Expected one of auto, nano"):
        turbo_nb.load_pipeline("gigantic")
    with pytest.raises(BackendError, match="SpargeAttn"):
        turbo_nb.load_pipeline(attention_type="sagesla", device="cpu")
    with pytest.raises(InputError, match="sla, sagesla, original"):
        turbo_nb.load_pipeline(attention_type="magic")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU"):
            turbo_nb.load_pipeline(device="cuda")
    for device in ("gpu", "mps", "meta"):
        with pytest.raises(InputError, match="auto, cpu, cuda"):
            turbo_nb.load_pipeline(device=device)


def test_attention_is_sla_by_default_and_dense_on_request(nano):
    assert attention_type(nano.transformer) == "sla"
    dense = turbo_nb.load_pipeline(attention_type="original", device="cpu")
    assert attention_type(dense.transformer) == "original"
    a, b = (turbo_nb.generate(p, PROMPT, num_frames=5).frames.astype(float) for p in (nano, dense))
    assert np.abs(a - b).mean() > 0


def test_a_folder_whose_weights_do_not_fit_is_an_error(tmp_path):
    import json
    import shutil

    from turbo_nb.catalog import NANO
    from turbo_nb.checkpoint import load_transformer

    shutil.copytree(NANO.folder / "transformer", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    (tmp_path / "t" / "config.json").write_text(json.dumps(config | {"num_layers": config["num_layers"] + 1}))
    with pytest.raises(CheckpointError, match=r"num_layers in .* is 8\. Expected 7, as in the weights"):
        load_transformer(tmp_path / "t")
    next((tmp_path / "t").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="no weights in"):
        load_transformer(tmp_path / "t")


def test_another_pipeline_is_refused():
    with pytest.raises(InputError, match="pipeline is a WanPipeline"):
        turbo_nb.generate(WanPipeline(None, None, None, RCMScheduler(), None), PROMPT)


def test_a_pipeline_has_one_attribute_of_ours(nano):
    assert isinstance(nano.turbo_nb, LoadedModel) and nano.turbo_nb.pipeline is nano
    assert not {"spec", "made_of", "encoder", "plan", "load_lora_weights"} & vars(nano).keys()


def test_the_identity_follows_the_weights_and_the_attention_that_a_pipeline_has_now():
    pipeline = turbo_nb.load_pipeline("nano", device="cpu")
    model = LoadedModel.of(pipeline)
    before = model.identity
    assert before == resolve(LoadOptions(model="nano", device="cpu")).identity
    set_topk(pipeline.transformer, 0.5)
    assert model.identity == before | {"sla_topk": 0.5}
    set_topk(pipeline.transformer, 0.15)
    assert model.identity == before
    weight = pipeline.transformer.blocks[3].attn1.to_q.weight
    weight.data += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))  # as a fused LoRA does
    changed = model.identity
    assert changed != before and model.identity == changed


def test_loading_logs_and_prints_nothing(capsys, caplog):
    with caplog.at_level("INFO", logger="turbo_nb"):
        turbo_nb.load_pipeline("nano", device="cpu")
    assert capsys.readouterr() == ("", "") and "plan resident" in caplog.text


def test_two_threads_take_turns_on_a_pipeline(nano):
    alone = [turbo_nb.generate(nano, PROMPT, seed=seed, **SHORT).frames for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: turbo_nb.generate(nano, PROMPT, seed=seed, **SHORT).frames, (1, 2)))
    assert all(map(np.array_equal, alone, together))
