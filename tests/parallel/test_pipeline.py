"""load_pipeline(gpus=2): the same seed gives the same clip, and the ranks outlive what ends a clip."""

import gc
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import DEVICE, GPUS
from diffusers import AutoencoderKLWan
from helpers import upstream_names

import turbo_nb
from turbo_nb import catalog, sla
from turbo_nb import pipeline as loading
from turbo_nb.batch import engines
from turbo_nb.errors import InputError, TurboNbError, TurboNbWarning
from turbo_nb.files import decide
from turbo_nb.files.resolve import resolve
from turbo_nb.fused import vae as fused_vae
from turbo_nb.machine import probe
from turbo_nb.ops import launch
from turbo_nb.parallel import ranks
from turbo_nb.runtime import estimate, plan, warm_up
from turbo_nb.settings import LoadOptions

PROMPT = "a small cyan triangle growing on a navy background"
CLIP = {"seed": 7, "num_frames": 5, "resolution": "80x64", "num_steps": 2}
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
PSNR = 45


@pytest.fixture(scope="module")
def one():
    return turbo_nb.load_pipeline("nano", device=DEVICE)


@pytest.fixture(scope="module")
def two():
    pipeline = turbo_nb.load_pipeline("nano", device=DEVICE, gpus=2)
    yield pipeline
    pipeline.turbo_nb.team.close()


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    """A tiny image-to-video model of two experts on one rank, and on two"""
    folder = tmp_path_factory.mktemp("i2v")
    arch = catalog.Arch(dim=128, num_heads=2, num_layers=2, ffn_dim=256, in_channels=36)
    for seed, name in enumerate(("high", "low")):
        torch.manual_seed(seed)
        torch.save(upstream_names(arch, sla=True, int8=False, text_dim=128), folder / f"{name}.pth")
    torch.manual_seed(2)
    torch.save(AutoencoderKLWan(base_dim=16).state_dict(), folder / "Wan2.1_VAE.pth")  # kernels take 16 channels
    parts = {name: catalog.NANO.folder / name for name in ("text_encoder", "tokenizer")}
    pair = [
        turbo_nb.load_pipeline((folder / "high.pth", folder / "low.pth"), device=DEVICE, gpus=gpus, **parts)
        for gpus in (1, 2)
    ]
    yield pair
    pair[1].turbo_nb.team.close()


def psnr(a, b):
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def assert_same(one, two, **clip):
    before = two.turbo_nb.team.group.exchanges
    videos = [turbo_nb.generate(pipeline, PROMPT, **CLIP | clip) for pipeline in (one, two)]
    assert psnr(*(video.frames for video in videos)) >= PSNR
    assert two.turbo_nb.team.group.exchanges > before
    return videos


@pytest.mark.parametrize(
    "clip",
    [{}, {"resolution": "48x112", "num_frames": 9}, {"resolution": "16x176"}, {"num_frames": 1, "ode": True}],
    ids=str,
)
def test_the_same_seed_gives_the_same_clip(one, two, clip):
    first, second = assert_same(one, two, **clip)
    assert second.settings == first.settings | {"gpus": 2}


def test_a_cancelled_clip_leaves_the_ranks_at_work(one, two):
    class Cancelled(Exception):
        pass

    def cancel(*_):
        raise Cancelled

    for callback in ("on_step", "on_frames"):
        with pytest.raises(Cancelled):
            turbo_nb.generate(two, PROMPT, **CLIP, **{callback: cancel})
    assert_same(one, two)


def test_a_clip_that_is_made_between_two_chunks_of_another_leaves_both_whole(one, two, monkeypatch):
    def another(pipeline):
        made = []
        return lambda _: made or made.append(turbo_nb.generate(pipeline, PROMPT, **CLIP).frames)

    monkeypatch.setattr(fused_vae, "chunk_length", lambda *_: 1)
    clip = CLIP | {"num_frames": 9}
    frames = [turbo_nb.generate(own, PROMPT, **clip, on_frames=another(own)).frames for own in (one, two)]
    assert psnr(*frames) >= PSNR


def test_the_other_rank_follows_topk_and_loras(one, two):
    for pipeline in (one, two):
        sla.set_topk(pipeline.transformer, 0.9)
    assert_same(one, two)
    for pipeline in (one, two):
        turbo_nb.set_loras(pipeline, ["tests/files/nano_lora.safetensors:0.8"])
    with_lora = assert_same(one, two)[0]
    for pipeline in (one, two):
        turbo_nb.set_loras(pipeline)
        sla.set_topk(pipeline.transformer, one.turbo_nb.resolved.sla_topk)
    assert psnr(with_lora.frames, assert_same(one, two)[0].frames) < PSNR


def test_all_ranks_compile_before_they_run_for_the_first_time(one, two, monkeypatch):
    told, tell = [], two.turbo_nb.team.tell
    note = lambda *told_: (told.append((told_[0], launch.only_compiles())), tell(*told_))  # noqa: E731
    monkeypatch.setattr(two.turbo_nb.team, "tell", note)
    warm_up.together(two, (80, 64, 5))
    end = told.index(("compiled", False))
    assert told[0] == ("compile", True) and told[1:3] == [("step", True), ("strips", True)]
    assert {only for _, only in told[:end]} == {True} and {only for _, only in told[end:]} == {False}
    assert [name for name, _ in told[1:end]] == [name for name, _ in told[end + 1 :]]
    assert_same(one, two)


@pytest.mark.parametrize(("needs", "warms_up"), [(1e9, 1), (99e9, 0)], ids=["fits", "too large"])
def test_a_clip_that_may_not_fit_is_not_tried_while_loading(monkeypatch, needs, warms_up):
    own = replace(plan.PLANS[0], needs=needs, budget=80e9, device="cuda:0", gpus=2)
    resolved, loaded, team, together = Mock(gpus=2, plan=Mock(return_value=own)), Mock(), Mock(), Mock()
    resolved.fetch.return_value = resolved
    monkeypatch.setattr(loading, "_load", lambda *_: loaded)
    monkeypatch.setattr(loading, "current_device", lambda device: nullcontext())
    monkeypatch.setattr(ranks, "start", lambda *_: team)
    monkeypatch.setattr(warm_up, "together", together)
    assert loading.load(resolved, clip=(1280, 720, 81)) is loaded
    assert together.call_count == warms_up and not team.close.called  # where memory runs out, all ranks would end


@pytest.mark.skipif(not GPUS, reason="compiles for GPUs")
def test_a_clip_compiles_nothing_after_loading(tmp_path):
    code = """
import turbo_nb
from turbo_nb.runtime.compilations import compilations

pipeline = turbo_nb.load_pipeline("nano", gpus=2, text_cache=False)
with compilations("cuda") as names:
    turbo_nb.generate(pipeline, "a large red circle")
assert names == [], names
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}, check=True)


def test_diffusers_own_call_runs_on_all_ranks(one, two):
    before = two.turbo_nb.team.group.exchanges
    frames = [
        pipeline(PROMPT, height=64, width=80, num_frames=5, num_inference_steps=2, output_type="np",
                 generator=torch.Generator().manual_seed(3)).frames
        for pipeline in (one, two)
    ]  # fmt: skip
    assert psnr(*(255 * one for one in frames)) >= PSNR and two.turbo_nb.team.group.exchanges > before


@pytest.mark.filterwarnings("ignore:high was not trained")
@pytest.mark.parametrize("length", [None, 1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(
    "clip", [{"num_frames": 9}, {"last_image": PICTURE[:, ::-1]}, {"extend": 1}], ids=["image", "two", "extended"]
)
def test_all_ranks_encode_the_image(i2v, monkeypatch, clip, length):
    told, tell = [], i2v[1].turbo_nb.team.tell
    monkeypatch.setattr(i2v[1].turbo_nb.team, "tell", lambda *told_: (told.append(told_[:2]), tell(*told_)))
    if length:
        monkeypatch.setattr(fused_vae, "chunk_length", lambda *_: length)
    assert_same(*i2v, image=PICTURE, **clip)
    assert told.count(("strips", "encoder")) == 1 + ("extend" in clip)


def test_the_encoder_of_images_is_compiled_with_the_rest(i2v, monkeypatch):
    told, tell = [], i2v[1].turbo_nb.team.tell
    note = lambda *told_: (told.append((*told_[:2], launch.only_compiles())), tell(*told_))  # noqa: E731
    monkeypatch.setattr(i2v[1].turbo_nb.team, "tell", note)
    warm_up.together(i2v[1], (80, 64, 9))
    assert [told.count(("strips", "encoder", only)) for only in (True, False)] == [1, 1]
    assert_same(*i2v, image=PICTURE)


def test_a_clip_that_is_cancelled_after_its_image_was_encoded_leaves_the_ranks_at_work(i2v):
    def cancel(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        turbo_nb.generate(i2v[1], PROMPT, image=PICTURE, **CLIP, on_step=cancel)
    assert_same(*i2v, image=PICTURE)


def test_a_rank_that_is_lost_while_the_image_is_encoded_ends_the_clip(i2v, monkeypatch):
    pipeline = i2v[1]
    strips, process = pipeline.vae.strips, pipeline.turbo_nb.team._others[0].process
    coded = strips.coded
    monkeypatch.setattr(strips, "coded", lambda *told: (process.kill(), *coded(*told))[1:])
    with pytest.raises(TurboNbError, match=r"^rank 1 ended by SIGKILL.*Load the model again"):
        turbo_nb.generate(pipeline, PROMPT, image=PICTURE, **CLIP)


@pytest.mark.skipif(not GPUS, reason="CUDA graphs need GPUs")
def test_steps_of_the_second_clip_are_cuda_graphs(two):
    clip = CLIP | {"resolution": "128x128", "num_frames": 25}
    first, second, third = (turbo_nb.generate(two, PROMPT, **clip) for _ in range(3))
    assert second.graph.captured == 1 and third.graph.replayed == 2
    assert psnr(first.frames, third.frames) >= PSNR


def test_a_lost_rank_ends_the_clip_and_a_new_load_works(two):
    process = two.turbo_nb.team._others[0].process
    for _ in range(2):  # the second clip does not begin
        with pytest.raises(TurboNbError, match=r"^rank 1 ended by SIGKILL.*Load the model again"):
            turbo_nb.generate(two, PROMPT, **CLIP, on_step=lambda *_: process.kill())
    again = turbo_nb.load_pipeline("nano", device=DEVICE, gpus="all")
    process = again.turbo_nb.team._others[0].process
    turbo_nb.generate(again, PROMPT, **CLIP)
    del again
    gc.collect()
    assert process.poll() == 0  # because a pipeline that is dropped ends its ranks


# Which numbers of GPUs can be asked for


@pytest.mark.parametrize(
    ("heads", "takes"),
    [(12, {2: 2, 3: 3, 4: 4, 5: 4, 6: 6, 7: 6, 8: 6}), (40, {2: 2, 3: 2, 4: 4, 5: 5, 6: 5, 8: 8, 9: 8, 10: 10})],
)
def test_the_heads_decide_how_many_gpus_are_used(heads, takes):
    for gpus, count in takes.items():
        if gpus == count:
            assert decide.ranks_for(gpus, heads) == count
        else:
            with pytest.warns(
                TurboNbWarning, match=f"gpus is {gpus}, and {count} of them make the clip.* {heads} heads"
            ):
                assert decide.ranks_for(gpus, heads) == count


def test_the_warning_names_the_line_that_loads():
    with pytest.warns(TurboNbWarning, match="gpus is 3") as warned, pytest.raises(InputError, match="memory_plan"):
        turbo_nb.load_pipeline("nano", device="cpu", gpus=3, memory_plan="offload")
    assert warned[0].filename == __file__


def test_a_number_of_gpus_that_the_machine_does_not_have(monkeypatch):
    monkeypatch.delenv("TURBO_NB_RANKS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with (
        monkeypatch.context() as without,
        pytest.raises(InputError, match=r"^gpus is 2. Expected 1, because this torch"),
    ):
        without.setattr(torch.distributed, "is_nccl_available", lambda: False)
        probe.gpus_of(2, "cuda")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(InputError, match=r"^gpus is 5. Expected at most 4, the number of GPUs"):
        probe.gpus_of(5, "cuda")
    assert [probe.gpus_of(gpus, "cuda") for gpus in (1, 3, "all")] == [1, 3, 4]
    with pytest.raises(InputError, match=r"^device is 'cuda:1'. Expected cuda beside gpus 2"):
        probe.gpus_of(2, "cuda:1")
    assert probe.gpus_of("all", "cpu") == 1
    with pytest.raises(InputError, match=r"^gpus is 2. Expected 1, because the device is the CPU"):
        turbo_nb.load_pipeline("nano", device="cpu", gpus=2)
    monkeypatch.setenv("TURBO_NB_RANKS", "CPU")
    with pytest.raises(InputError, match=r"^TURBO_NB_RANKS is 'CPU'. Expected cpu. Unset it for GPUs."):
        turbo_nb.load_pipeline("nano", device="cpu", gpus=2)


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True, "٢2", ""])
def test_a_value_that_is_no_number_of_gpus(value):
    with pytest.raises(InputError, match=r'^gpus is .*Expected a whole number from 1 .*Or take "all"'):
        LoadOptions(gpus=value)


def test_the_plan_counts_a_ranks_share():
    def needs(gpus, name="resident"):
        given = {"budget": 80e9, "host_budget": 500e9, "name": name, "gpus": gpus}
        return plan.for_model(catalog.MODELS["TurboWan2.1-T2V-14B-720P"], quantized=True, **given)

    assert needs(4).needs < needs(2).needs < needs(1).needs and "on each of 2 GPUs" in str(needs(2))
    # Half of the decoding at once, and the windows of q, k, v and the result: 75,600 tokens of 5120 channels in bf16
    sizes, one = plan.sizes(catalog.MODELS["TurboWan2.1-T2V-14B-720P"], quantized=True), 2 * 75_600 * 5120
    decode = plan.ALLOCATED * plan.DECODE_FUSED * 1280 * 720 / 2
    models = sizes.transformer + sizes.vae
    assert needs(2).needs == pytest.approx(models + sizes.text_encoder + decode + 4 * one / 2)
    assert needs(2, "free-text").needs == pytest.approx(models + sizes.text_encoder + 4 * one / 2)
    assert needs(2, "offload").host == 2 * needs(1, "offload").host


def test_times_of_two_gpus_are_those_of_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path))
    clip = {"model": "m", "attention_type": "sla", "quant_linear": False, "memory_plan": "resident", "device": "cpu"}
    clip |= {"width": 64, "height": 64, "num_frames": 5, "num_steps": 2, "sla_topk": 0.1}
    for gpus, seconds in ((None, 8.0), (2, 4.0)):
        estimate.remember(clip | {"gpus": gpus}, {"denoise": seconds}, steps=[seconds / 2] * 2, work=1e9)
    found = {gpus: estimate.estimate(clip | {"gpus": gpus}, None, device="cpu") for gpus in (1, 2, 3)}
    assert found[1].seconds == 2 * found[2].seconds > 0 and found[3] is None


def test_a_batch_on_several_gpus_runs_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_RANKS", "cpu")
    resolved = resolve(LoadOptions(model="nano", device="cpu", gpus=2))
    assert resolved.gpus == 2 and isinstance(engines.engine_for(resolved, (64, 64, 5), tmp_path), engines.InProcess)
    for given in ({"workers": 2}, {"ray_address": "auto"}):
        with pytest.raises(InputError, match=r"^gpus is 2. Expected 1 beside (workers|ray), because each actor"):
            engines.engine_for(resolved, (64, 64, 5), tmp_path, **given)


def test_a_batch_ends_with_its_ranks(one, monkeypatch):
    monkeypatch.setattr(one.turbo_nb, "team", SimpleNamespace(failure="rank 1 hangs."))
    monkeypatch.setattr(engines, "make", lambda *_: SimpleNamespace(error="rank 1 hangs."))
    records = engines.InProcess(one.turbo_nb).make(engines.Work(count=2, size=(80, 64, 5), tasks=iter("ab")))
    assert next(records).error == "rank 1 hangs."
    with pytest.raises(TurboNbError, match=r"^rank 1 hangs. Start again: finished videos are kept.$"):
        next(records)  # and not one failure for each job
