"""RCMScheduler against upstream's noise levels and whole sampling runs, inside diffusers' unchanged pipeline."""

import json

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from helpers import assert_close, golden

from turbo_nb.errors import InputError
from turbo_nb.scheduler import RCMScheduler
from turbo_nb.sla import set_attention_type


@pytest.fixture(scope="module")
def io():
    return golden("dit_io")


def small_transformer(attention_type: str) -> WanTransformer3DModel:
    """Upstream's small T2V transformer as a diffusers module in bf16 (fp32 where upstream keeps it)."""
    state = golden("dit_state")
    state = convert_wan_transformer_to_diffusers({k.removeprefix("net."): v for k, v in state.items()})
    state["patch_embedding.weight"] = state["patch_embedding.weight"].view(256, -1, 1, 2, 2)
    proj = {k.replace("attn_op.local_attn", "processor.sla"): state.pop(k) for k in list(state) if "proj_l" in k}
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64, ffn_dim=512,
        num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    set_attention_type(model, attention_type, topk=0.4)
    model.load_state_dict(state | (proj if attention_type == "sla" else {}))
    keep = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in name for part in (*keep, "proj_l")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


class Recorded(RCMScheduler):
    """Takes recorded noise instead of drawing it."""

    noises: list

    def _noise(self, shape, device):
        return self.noises.pop(0).to(device, torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_noise_levels_are_upstreams(io, steps):
    scheduler = RCMScheduler()
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas, io[f"sigmas.{steps}"], rtol=0, atol=1e-12)
    assert scheduler.timesteps.tolist() == [988.0, 932.0, 852.0, 608.0][:steps]


def test_image_to_video_timesteps():
    scheduler = RCMScheduler(sigma_max=200)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [996.0, 932.0, 852.0, 608.0]


@pytest.mark.parametrize("attention_type", ["sla", "original"])
def test_forward_is_upstreams(io, attention_type):
    model = small_transformer(attention_type)
    with torch.no_grad():
        out = model(io["x"], io["t"].flatten(), io["ctx"], return_dict=False)[0]
    assert_close(attention_type, io[f"out.{attention_type}.bf16"], out, 1e-2)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_sampling_in_the_unchanged_pipeline_is_upstreams(io, kind, steps):
    model = small_transformer("sla")
    scheduler = Recorded(ode=kind == "ode")
    scheduler.noises = [io[f"noise.{i}"] for i in range(5)]
    pipeline = WanPipeline(None, None, None, scheduler, transformer=model)
    pipeline.set_progress_bar_config(disable=True)
    start = scheduler.start_latents(())
    frames, height, width = start.shape[2:]
    dtypes = []
    out = pipeline(
        prompt_embeds=io["ctx"], latents=start, num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
        num_frames=4 * (frames - 1) + 1, height=8 * height, width=8 * width,
        callback_on_step_end=lambda pipeline, i, t, kept: dtypes.append(kept["latents"].dtype) or {},
    ).frames  # fmt: skip
    assert dtypes == [torch.float64] * steps
    # Near 5e-3; sde 2 meets two key blocks whose bf16 scores almost tie, and keeping the other one makes it 2e-2.
    assert_close(f"{kind} {steps}", io[f"sample.{kind}.{steps}"], out, 3e-2)


@pytest.mark.parametrize("ode", [False, True])
def test_a_step_is_the_formula_in_float64(ode):
    torch.manual_seed(0)
    x, noise = torch.randn(2, 1, 2, 3, 4, 4, dtype=torch.float64)
    velocity = torch.randn(1, 2, 3, 4, 4, dtype=torch.bfloat16)
    scheduler = Recorded(ode=ode)
    scheduler.noises = [noise]
    scheduler.set_timesteps(4)
    now, following = scheduler.sigmas[:2]
    v = velocity.double()
    expected = x - (now - following) * v if ode else (1 - following) * (x - now * v) + following * noise
    out = scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_a_seed_repeats_and_every_step_draws():
    def run(seed):
        scheduler = RCMScheduler()
        scheduler.seed(seed)
        x = scheduler.start_latents((1, 2, 3, 4, 4))
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.ones_like(x), t, x).prev_sample
        return x, scheduler.generator.get_state()

    (a, state_a), (b, state_b), (c, _) = run(3), run(3), run(4)
    assert a.dtype == torch.float64
    assert torch.equal(a, b) and torch.equal(state_a, state_b) and not torch.equal(a, c)
    reference = torch.Generator().manual_seed(3)
    for _ in range(3):  # the start, and one a step: the last draw counts though it is multiplied by 0
        torch.randn(1, 2, 3, 4, 4, generator=reference)
    assert torch.equal(reference.get_state(), state_a)


@pytest.mark.parametrize("steps", [0, 5, -1, 2.5, 2.0])
def test_number_of_steps_is_checked(steps):
    with pytest.raises(InputError, match=r"1 to 4"):
        RCMScheduler().set_timesteps(steps)


@pytest.mark.parametrize("sigma_max", [0, -1, 10, float("nan"), float("inf")])
def test_sigma_max_is_checked(sigma_max):
    with pytest.raises(InputError, match="sigma_max"):
        RCMScheduler(sigma_max=sigma_max)


def test_config_round_trip(tmp_path):
    RCMScheduler(sigma_max=1600, ode=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "RCMScheduler"
    loaded = RCMScheduler.from_pretrained(tmp_path)
    assert loaded.config.sigma_max == 1600 and loaded.config.ode is True


def test_noise_has_the_bits_of_randn():
    scheduler = RCMScheduler(80.0)
    for shape in ((1, 3), (1, 16, 7, 16, 16)):  # short and long, because torch draws them in two ways
        scheduler.seed(3)
        expected = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
        assert torch.equal(scheduler._noise(shape, torch.device("cpu")), expected)
