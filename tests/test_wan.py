"""What a user of diffusers relies on holds for our pipelines, called directly and saved."""

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import export_to_video

import turbo_nb
from turbo_nb.errors import InputError, TurboNbError, TurboNbWarning
from turbo_nb.pipeline import LoadedModel

PROMPT = "a small green square growing on a gray background"
LORA = Path(__file__).with_name("files") / "nano_lora.safetensors"
SHORT = {"num_frames": 5, "num_inference_steps": 2, "height": 64, "width": 64}


def seeded(*seeds: int):
    each = [torch.Generator().manual_seed(seed) for seed in seeds]
    return each if len(each) > 1 else each[0]


def clips(pipeline, prompt=PROMPT, **more) -> np.ndarray:
    return pipeline(prompt, **SHORT | more).frames


@pytest.fixture(scope="module")
def plain(nano, tmp_path_factory):
    """What diffusers makes of the saved pipeline"""
    folder = tmp_path_factory.mktemp("saved")
    nano.save_pretrained(folder)
    return diffusers.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("which", ["ours", "diffusers' own"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["a generator", "a list of generators"])
def test_a_generator_gives_the_same_clip_twice(nano, plain, which, seeds):
    pipeline = nano if which == "ours" else plain
    more = {"guidance_scale": 1.0, "num_videos_per_prompt": len(seeds)}
    torch.manual_seed(1)
    first = clips(pipeline, generator=seeded(*seeds), **more)
    torch.manual_seed(2)  # the global generator has no part in it
    assert np.array_equal(first, clips(pipeline, generator=seeded(*seeds), **more))
    assert not np.array_equal(first, clips(pipeline, generator=seeded(*(seed + 5 for seed in seeds)), **more))


def test_the_plainest_call_is_the_clip_of_that_seed(nano):
    frames = nano(PROMPT, generator=seeded(3), num_frames=5).frames[0]
    assert np.abs(frames * 255 - turbo_nb.generate(nano, PROMPT, num_frames=5, seed=3).frames).max() <= 0.51


def test_each_clip_of_a_list_has_its_own_generator(nano):
    both = clips(nano, num_videos_per_prompt=2, generator=seeded(4, 5))
    alone = [clips(nano, generator=seeded(seed))[0] for seed in (4, 5)]
    assert [np.abs(one - other).max() < 1e-2 for one, other in zip(both, alone, strict=True)] == [True, True]
    with pytest.raises(InputError, match=r"generator is a list of 2\. Expected 1"):
        clips(nano, generator=seeded(4, 5))


def test_without_a_generator_clips_differ(nano):
    turbo_nb.generate(nano, PROMPT, num_frames=1, num_steps=1, seed=0)
    assert not np.array_equal(clips(nano), clips(nano))


def test_a_clip_of_generate_leaves_the_pipeline_as_it_was(nano):
    before = nano.scheduler, dict(nano.scheduler.config), nano.config.boundary_ratio
    turbo_nb.generate(nano, PROMPT, num_frames=1, num_steps=1, ode=True, sigma_max=200)
    assert (nano.scheduler, dict(nano.scheduler.config), nano.config.boundary_ratio) == before


def test_a_text_encoder_that_is_not_loaded_is_loaded_for_a_call_and_for_saving(tmp_path):
    turbo_nb.generate(turbo_nb.load_pipeline("nano", device="cpu", text_cache=True), PROMPT, num_frames=1, num_steps=1)
    for options in ({"prompts": [PROMPT], "text_cache": True}, {"text_cache": False}):
        pipeline = turbo_nb.load_pipeline("nano", device="cpu", **options)
        if "prompts" not in options:
            LoadedModel.of(pipeline).prompt_encoder.place("freed", "cpu")
        assert pipeline.text_encoder is None
        assert clips(pipeline, "a large red circle").shape == (1, 5, 64, 64, 3)
        pipeline.save_pretrained(tmp_path)
        assert (pipeline.text_encoder is None) == ("prompts" not in options)
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
        assert type(loaded) is diffusers.WanPipeline and loaded.text_encoder is not None


@pytest.mark.parametrize(
    "options",
    [{}, {"quant_linear": True}, {"attention_type": "original"}, {"loras": LORA}],
    ids=["sla", "int8", "dense", "lora"],
)
def test_a_saved_pipeline_makes_the_same_clip_in_all_that_read_it(tmp_path, options):
    pipeline = turbo_nb.load_pipeline("nano", device="cpu", **options)
    expected = clips(pipeline, generator=seeded(0), output_type="latent")
    pipeline.save_pretrained(tmp_path)
    ours = turbo_nb.load_pipeline(tmp_path, device="cpu")
    assert LoadedModel.of(ours).attention == LoadedModel.of(pipeline).attention
    assert torch.equal(clips(ours, generator=seeded(0), output_type="latent"), expected)
    start = pipeline.scheduler
    with start.drawing_from(seeded(0)):
        latents = start.start_latents((1, 16, 2, 8, 8))
    for cls in (diffusers.DiffusionPipeline, diffusers.WanPipeline, type(pipeline)):
        theirs = cls.from_pretrained(tmp_path)
        out = [
            clips(one, latents=latents.clone(), guidance_scale=1.0, num_inference_steps=1, output_type="latent")
            for one in (theirs, pipeline)
        ]
        torch.testing.assert_close(*out, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", ["1MB", "2MB", "10GB"])
def test_a_pipeline_is_saved_over_the_shards_that_it_has_mapped(nano, tmp_path, size):
    def tensors(pipeline):
        parts = ("transformer", "vae")
        return {(part, name): one for part in parts for name, one in getattr(pipeline, part).state_dict().items()}

    nano.save_pretrained(tmp_path, max_shard_size="1MB")
    pipeline = turbo_nb.load_pipeline(tmp_path, device="cpu")
    before = {name: one.clone() for name, one in tensors(pipeline).items()}
    pipeline.save_pretrained(tmp_path, max_shard_size=size)
    for again in (pipeline, turbo_nb.load_pipeline(tmp_path, device="cpu")):
        after = tensors(again)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_torch_files_that_weights_are_mapped_from_are_replaced(nano, tmp_path):
    nano.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="1MB")
    other = tmp_path / "transformer" / "diffusion_pytorch_model.fp16.bin"
    other.write_bytes(b"kept")
    (tmp_path / "elsewhere.bin").write_bytes(b"kept")
    code = """if True:
        import sys, torch, turbo_nb
        pipeline = turbo_nb.load_pipeline(sys.argv[1], device="cpu")
        for size in ("1MB", "2MB", "10GB"):
            pipeline.save_pretrained(sys.argv[1], False, max_shard_size=size)
            again = turbo_nb.load_pipeline(sys.argv[1], device="cpu")
            for part in ("transformer", "vae"):
                saved = getattr(again, part).state_dict()
                assert all(torch.equal(one, saved[name]) for name, one in getattr(pipeline, part).state_dict().items())
    """
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)  # may get SIGBUS
    assert result.returncode == 0, result.stderr
    assert other.read_bytes() == (tmp_path / "elsewhere.bin").read_bytes() == b"kept"


@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps, lambda pipeline: torch.save(pipeline, io.BytesIO())])
def test_a_placed_pipeline_is_not_copied_or_pickled_with_its_weights(nano, make):
    with pytest.raises(InputError, match=r"pipeline is placed by memory plan 'resident'.*save_pretrained"):
        make(nano)
    other = copy.copy(nano)  # shares the weights, as a copy of diffusers' own pipelines does
    assert other.transformer is nano.transformer and other.turbo_nb is nano.turbo_nb and type(other) is type(nano)


def test_a_pipeline_without_a_memory_plan_is_copied_and_pickled_as_diffusers_own():
    # its own, because a plan of another test may have packed the shared one's weights into one piece of memory, which
    # pickle writes for each of them
    nano = turbo_nb.load_pipeline("nano", device="cpu")
    plain = type(nano)(**nano.components)
    assert clips(plain, guidance_scale=1.0).shape == (1, 5, 64, 64, 3)
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert type(other) is type(nano) and other.transformer is not nano.transformer
        assert clips(other, guidance_scale=1.0).shape == (1, 5, 64, 64, 3)


@pytest.mark.parametrize("work", ["generate", "call"])
def test_two_threads_take_turns(nano, work):
    def make(seed):
        if work == "generate":
            return turbo_nb.generate(nano, PROMPT, num_frames=5, num_steps=2, seed=seed).frames
        return clips(nano, generator=seeded(seed))

    alone = [make(seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        assert all(map(np.array_equal, alone, pool.map(make, (1, 2, 3))))


def test_output_types_callbacks_and_export(nano, tmp_path):
    seen = []

    def after_step(pipeline, index, timestep, tensors):
        seen.append((index, tensors["latents"].shape))
        return {}

    make = lambda **more: clips(nano, generator=seeded(0), **more)  # noqa: E731
    frames = make(callback_on_step_end=after_step)
    assert seen == [(0, (1, 16, 2, 8, 8)), (1, (1, 16, 2, 8, 8))]
    assert make(output_type="pt").shape == (1, 5, 3, 64, 64) and make(output_type="latent").shape == (1, 16, 2, 8, 8)
    assert make(output_type="pil")[0][0].size == (64, 64) and make(return_dict=True).shape == frames.shape
    assert clips(nano, [PROMPT, PROMPT], num_videos_per_prompt=2).shape[0] == 4
    export_to_video(list(frames[0]), str(tmp_path / "x.mp4"), fps=8)
    assert (tmp_path / "x.mp4").stat().st_size


def test_an_interrupted_call_ends_early_and_generate_raises(nano):
    def interrupt(pipeline, *_):
        pipeline._interrupt = True
        return {}

    seen = []
    clips(nano, callback_on_step_end=lambda *given: seen.append(1) or interrupt(*given))
    assert seen == [1]
    with pytest.raises(TurboNbError, match="interrupted"):
        turbo_nb.generate(nano, PROMPT, num_frames=1, num_steps=2, on_step=lambda *_: interrupt(nano))
    turbo_nb.generate(nano, PROMPT, num_frames=1, num_steps=1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"guidance_scale": 5.0}, "guidance_scale is above 1"),
        ({"negative_prompt": "ugly"}, "negative_prompt has no"),
        ({"prompt": f"{PROMPT} " * 80}, r"the prompt has \d+ tokens, and the text encoder reads 512"),
        ({"prompt": [PROMPT, f"{PROMPT} " * 80]}, r"the prompt has \d+ tokens, and the text encoder reads 512"),
    ],
    ids=["guidance", "negative prompt", "512 tokens", "512 tokens of one of two"],
)
def test_guidance_and_what_has_no_effect_warn(nano, more, words):
    with pytest.warns(TurboNbWarning, match=words):
        clips(nano, **more)


def test_moves_that_the_memory_plan_does_not_know_are_refused(nano):
    assert nano.to("cpu") is nano
    with pytest.raises(InputError, match=r"device is 'cuda:1'\. Expected 'cpu'.*device='cuda:1'"):
        nano.to("cuda:1")
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
        with pytest.raises(InputError, match=r"memory plan is 'resident'.*memory_plan='"):
            getattr(nano, name)()


def test_a_schedulers_number_of_steps_is_an_error_that_names_it(nano):
    with pytest.raises(InputError, match="num_steps is 50"):
        nano(PROMPT, num_inference_steps=50)


def test_another_scheduler_is_diffusers_own_matter(nano):
    before = nano.scheduler
    try:
        nano.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        assert clips(nano, guidance_scale=1.0).shape == (1, 5, 64, 64, 3)
    finally:
        nano.scheduler = before
