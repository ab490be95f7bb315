"""LoRAs of a loaded model: merged in every number format, changed without another load, and recorded."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import choose_triton, command_line, interpret_kernels, to_upstream, upstream_names
from safetensors.torch import load_file, save_file
from weight_files import linears, tile_int8

import turbo_nb
from turbo_nb import batch, catalog, checkpoint, records
from turbo_nb.checkpoint import load_transformer
from turbo_nb.errors import CheckpointError, InputError, collect_warnings
from turbo_nb.files import hub, lora
from turbo_nb.files.convert import convert
from turbo_nb.files.resolve import resolve
from turbo_nb.fused import transformer as fused_transformer
from turbo_nb.linear import Int8Linear, int8_dequantize, is_quantized, row_quantize
from turbo_nb.ops.compare import relative_error
from turbo_nb.settings import LoadOptions
from turbo_nb.values import LoRAFile
from turbo_nb.video import mp4

NANO = catalog.NANO.folder / "transformer"
PROMPT = "a small green square growing on a gray background"
RANK = 4
SHORT = {"num_frames": 1, "num_steps": 1}
PARTS = {name: catalog.NANO.folder / name for name in ("vae", "text_encoder", "tokenizer")} | {"device": "cpu"}


@pytest.fixture(scope="module")
def state():
    """nano's tensors in float32"""
    return {name: tensor.float() for name, tensor in load_file(next(NANO.glob("*.safetensors"))).items()}


@pytest.fixture(scope="module")
def style(state, tmp_path_factory):
    """A LoRA of all linears in nano's blocks, a norm and a bias; and what it adds to each tensor"""
    return make(state, tmp_path_factory.mktemp("style") / "style.safetensors")


def make(state, path, seed=0, blocks=range(7)):
    generator, tensors, added = torch.Generator().manual_seed(seed), {}, {}
    for name in linears(state):
        if int(name.split(".")[1]) not in blocks:
            continue
        out, columns = state[f"{name}weight"].shape
        down = torch.randn(RANK, columns, generator=generator) * 0.5
        up = torch.randn(out, RANK, generator=generator) * 0.02
        tensors |= {f"transformer.{name}lora_A.weight": down, f"transformer.{name}lora_B.weight": up}
        added[f"{name}weight"] = up @ down
    for key, name in (("attn1.norm_k.diff", "attn1.norm_k.weight"), ("attn1.to_q.diff_b", "attn1.to_q.bias")):
        key, name = f"blocks.{blocks[0]}.{key}", f"blocks.{blocks[0]}.{name}"
        tensors[f"transformer.{key}"] = added[name] = torch.randn(state[name].shape, generator=generator) * 0.1
    save_file(tensors, path)
    return path, added


def bits(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, expected) -> bool:
    found = module.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def forward(module, seed=1) -> torch.Tensor:
    generator, dtype = torch.Generator().manual_seed(seed), module.patch_embedding.weight.dtype
    x = torch.randn(1, 16, 3, 16, 16, generator=generator)
    text = torch.randn(1, 64, module.config.text_dim, generator=generator)
    with torch.no_grad():
        return module(x.to(dtype), torch.tensor([500.0]), text.to(dtype), return_dict=False)[0].float()


def applied(path, strength=1.0):
    return [lora.Applied(lora=lora.read(path), strength=strength)]


@pytest.fixture(scope="module")
def exact(state, style):
    """The results of nano, and of nano with the LoRA, merged by hand in float32"""
    model = load_transformer(NANO, dtype=torch.float32)
    before = forward(model)
    model.load_state_dict({name: tensor + style[1].get(name, 0) for name, tensor in state.items()})
    return before, forward(model)


def test_float32_merge_is_the_sum_itself(style, exact):
    ours = forward(load_transformer(NANO, dtype=torch.float32, loras=applied(style[0])))
    assert relative_error(ours, exact[1]) < 1e-5 < 0.1 < relative_error(exact[0], exact[1])


def test_bf16_weights_with_a_lora_stay_within_a_hundredth_of_the_float32_merge(style, exact):
    model = load_transformer(NANO, loras=applied(style[0]))
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert relative_error(forward(model.float()), exact[1]) < 1e-2


@pytest.mark.parametrize("source", ["plain file", "int8 tiles"])
def test_8_bit_linears_with_a_lora_are_as_exact_as_without(source, state, style, exact, tmp_path):
    path = NANO
    if source == "int8 tiles":
        path = tmp_path / "int8.safetensors"
        save_file(tile_int8(state), path)
    options = {"dtype": torch.float32, "quant_linear": True}
    alone = relative_error(forward(load_transformer(path, **options)), exact[0])
    model = load_transformer(path, **options, loras=applied(style[0]))
    assert is_quantized(model)
    assert relative_error(forward(model), exact[1]) < 1.2 * alone


def test_int8_bytes_that_no_lora_touches_are_those_of_the_file(state, tmp_path):
    path, int8 = tmp_path / "int8.safetensors", tile_int8(state)
    save_file(int8, path)
    first, added = make(state, tmp_path / "first.safetensors", blocks=range(1))
    model = load_transformer(path, loras=applied(first))
    for name in linears(state):
        linear = model.get_submodule(name[:-1])
        assert isinstance(linear, Int8Linear)
        if f"{name}weight" in added:
            weight = int8_dequantize(int8[f"{name}int8_weight"], int8[f"{name}scale"])
            q, scale, _ = row_quantize(weight + added[f"{name}weight"])
            assert torch.equal(linear.int8_weight, q) and torch.allclose(linear.scale, scale)
        else:
            assert torch.equal(linear.int8_weight, int8[f"{name}int8_weight"])
            assert torch.equal(linear.scale, int8[f"{name}scale"])


@pytest.mark.parametrize("linears_", ["float32 file", "bf16", "int8"])
def test_changing_strengths_there_and_back_gives_identical_bits(linears_, state, style, tmp_path):
    path = NANO
    if linears_ != "bf16":  # float32 on a CPU is the file's memory itself, which must not be written
        path = tmp_path / "model.safetensors"
        save_file(tile_int8(state) if linears_ == "int8" else state, path)
    pipeline = turbo_nb.load_pipeline(path, **PARTS)
    base, identity = bits(pipeline.transformer), pipeline.turbo_nb.identity
    turbo_nb.set_loras(pipeline, [(style[0], 0.5)])
    half, at_half = bits(pipeline.transformer), pipeline.turbo_nb.identity
    assert not same(pipeline.transformer, base) and at_half != identity
    fresh = turbo_nb.load_pipeline(path, **PARTS, loras=f"{style[0]}:0.5")
    assert same(fresh.transformer, half) and fresh.turbo_nb.identity == at_half
    with torch.inference_mode():
        turbo_nb.set_loras(pipeline, str(style[0]))
    assert not same(pipeline.transformer, half)
    assert not any(parameter.is_inference() for parameter in pipeline.transformer.parameters())
    turbo_nb.set_loras(pipeline, [(style[0], 0.5)])
    assert same(pipeline.transformer, half) and pipeline.turbo_nb.identity == at_half
    turbo_nb.set_loras(pipeline, [(style[0], 0)])
    assert same(pipeline.transformer, base) and pipeline.turbo_nb.identity == identity
    turbo_nb.set_loras(fresh)
    assert same(fresh.transformer, base) and fresh.turbo_nb.identity == identity
    assert not load_transformer(path).state_dict().keys() ^ base.keys()


@pytest.fixture
def pipeline(nano):
    """The shared pipeline, which gets its weights back"""
    yield nano
    turbo_nb.set_loras(nano)


def test_only_tensors_that_a_changed_lora_touches_are_read_again(pipeline, state, style, tmp_path, monkeypatch):
    first, added = make(state, tmp_path / "first.safetensors", blocks=range(1))
    last, _ = make(state, tmp_path / "last.safetensors", seed=1, blocks=range(6, 7))
    turbo_nb.set_loras(pipeline, [first, last])
    read, load = [], checkpoint._load_tensor

    def load_tensor(model, key, *rest):
        read.append(key)
        return load(model, key, *rest)

    monkeypatch.setattr(checkpoint, "_load_tensor", load_tensor)
    monkeypatch.setattr(lora, "read", lambda path: pytest.fail("read again"))
    turbo_nb.set_loras(pipeline, [(first, 0.5), last])
    assert set(read) == added.keys()
    read.clear()
    turbo_nb.set_loras(pipeline, [(first, 0.5), (last, 1.0)])
    assert not read


def test_failed_change_keeps_the_loras_that_the_model_has(pipeline, style, tmp_path):
    turbo_nb.set_loras(pipeline, [(style[0], 0.5)])
    before, identity = bits(pipeline.transformer), pipeline.turbo_nb.identity
    wide = tmp_path / "wide.safetensors"
    q = "blocks.0.attn1.to_q.lora_"
    save_file({f"{q}A.weight": torch.ones(4, 5120), f"{q}B.weight": torch.ones(5120, 4)}, wide)
    faint = tmp_path / "faint.safetensors"
    save_file({f"{q}A.weight": torch.full((4, 256), 1e-15), f"{q}B.weight": torch.full((256, 4), 1e-15)}, faint)
    huge = tmp_path / "huge.safetensors"
    save_file({f"{q}A.weight": torch.full((4, 256), 1e18), f"{q}B.weight": torch.full((256, 4), 1e18)}, huge)
    for loras, words in [
        (wide, r"\(5120, 5120\). Expected \(256, 256\)"), ([style[0], faint], "changed 0 tensors"),
        ([style[0], (huge, 100)], "NaN or Inf"), ("nothing.safetensors", "no LoRA"),
        ([(style[0], float("nan"))], "nan"),
        (f"high={style[0]}", "one expert"), ([7], "FILE:STRENGTH"),
    ]:  # fmt: skip
        with pytest.raises((CheckpointError, InputError), match=words):
            turbo_nb.set_loras(pipeline, loras)
        assert same(pipeline.transformer, before) and pipeline.turbo_nb.identity == identity, words


def test_keys_without_a_tensor_are_one_warning_when_loaded_and_when_set(style, tmp_path):
    tensors = load_file(style[0]) | {"transformer.blocks.9.attn1.to_q.diff": torch.ones(256, 256)}
    deeper = tmp_path / "deeper.safetensors"
    save_file(tensors, deeper)
    with collect_warnings() as warned:
        loaded = turbo_nb.load_pipeline("nano", device="cpu", loras=[deeper])
        turbo_nb.set_loras(loaded, [(deeper, 0.5)])
    assert [f"1 of the {len(tensors)} keys" in one and "blocks.9" in one for one in warned] == [True]
    turbo_nb.set_loras(loaded)
    with collect_warnings() as warned:
        turbo_nb.set_loras(loaded, [deeper])
    assert len(warned) == 1


def test_weights_that_were_changed_by_hand_stay_known(style):
    loaded = turbo_nb.load_pipeline("nano", device="cpu")
    loaded.transformer.proj_out.weight.data.mul_(2)
    changed = loaded.turbo_nb.identity
    turbo_nb.set_loras(loaded, style[0])
    turbo_nb.set_loras(loaded)
    assert "weights" in changed and loaded.turbo_nb.identity == changed


@pytest.mark.parametrize("fused", [True, False])
def test_lora_that_diffusers_has_attached_is_taken_off_first(style, tmp_path, fused):
    loaded, part = turbo_nb.load_pipeline("nano", device="cpu"), tmp_path / "part.safetensors"
    q = "transformer.blocks.0.attn1.to_q."
    save_file({name: tensor for name, tensor in load_file(style[0]).items() if name.startswith(f"{q}lora")}, part)
    loaded.load_lora_weights(str(part))
    if fused:
        loaded.fuse_lora()
    with pytest.raises(InputError, match=r"a LoRA that diffusers has attached.*unload_lora_weights"):
        turbo_nb.set_loras(loaded, style[0])  # its change of to_q would be lost
    if fused:
        loaded.unfuse_lora()
    loaded.unload_lora_weights()
    turbo_nb.set_loras(loaded, style[0])
    expected = turbo_nb.load_pipeline("nano", device="cpu", loras=[style[0]])
    assert same(loaded.transformer, bits(expected.transformer))


# --- Plans and fused modules ---


@pytest.mark.parametrize("name", ["offload", "group", "resident"])
def test_every_plan_takes_other_loras_and_runs_with_them(name, pipeline, style, monkeypatch):
    model, before = pipeline.turbo_nb, pipeline.turbo_nb.plan
    turbo_nb.set_loras(pipeline, style[0])
    expected = turbo_nb.generate(pipeline, PROMPT, **SHORT).frames
    turbo_nb.set_loras(pipeline)
    base = turbo_nb.generate(pipeline, PROMPT, **SHORT).frames
    offload = {"offload": "model", "group": "group", "resident": "none"}[name]
    try:
        model.follow(replace(before, name=name, offload=offload, keep=3, blocks=6))
        assert np.array_equal(turbo_nb.generate(pipeline, PROMPT, **SHORT).frames, base)
        turbo_nb.set_loras(pipeline, style[0])
        assert np.array_equal(turbo_nb.generate(pipeline, PROMPT, **SHORT).frames, expected)
        turbo_nb.set_loras(pipeline)
        assert np.array_equal(turbo_nb.generate(pipeline, PROMPT, **SHORT).frames, base)
    finally:
        model.follow(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("linears_", ["bf16", "quantised", "int8 tiles"])
@pytest.mark.parametrize("memory_plan", ["resident", "offload", "group"])
def test_every_plan_of_a_gpu_gives_the_bits_back(memory_plan, linears_, state, style, tmp_path):
    path = NANO
    if linears_ == "int8 tiles":
        path = tmp_path / "int8.safetensors"
        save_file(tile_int8(state), path)
    options = PARTS | {"device": "cuda", "memory_plan": memory_plan, "quant_linear": linears_ != "bf16"}
    load = lambda *loras: turbo_nb.load_pipeline(path, **options, loras=loras)  # noqa: E731
    clip = lambda pipeline: turbo_nb.generate(pipeline, PROMPT, num_frames=5, num_steps=2).frames  # noqa: E731

    def weights(pipeline):
        pipeline.maybe_free_model_hooks()
        return {name: tensor.cpu().clone() for name, tensor in pipeline.transformer.state_dict().items()}

    def equal(ours, theirs):
        return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    pipeline, merged = load(), load((style[0], 0.5))
    base, base_clip, merged_clip = weights(pipeline), clip(pipeline), clip(merged)
    turbo_nb.set_loras(pipeline, [(style[0], 0.5)])
    assert equal(weights(pipeline), weights(merged)) and not equal(weights(pipeline), base)
    assert np.array_equal(clip(pipeline), merged_clip) and not np.array_equal(merged_clip, base_clip)
    for each in (pipeline, merged):
        turbo_nb.set_loras(each, [])
        assert equal(weights(each), base) and np.array_equal(clip(each), base_clip)


def test_fused_modules_see_other_weights_for_the_same_prompt(state, tmp_path, monkeypatch):
    path = tmp_path / "norm.safetensors"
    save_file({"transformer.blocks.3.attn2.norm_k.diff": torch.ones(256)}, path)
    choose_triton(monkeypatch)
    contents = resolve(LoadOptions(model="nano", device="cpu")).transformers[0]
    model = load_transformer(contents, dtype=torch.float16, device="cpu")
    fused_transformer.fuse(model)
    interpret_kernels(monkeypatch)
    text = torch.randn(1, 8, model.config.text_dim).half()
    step = lambda: model(torch.ones(1, 16, 1, 4, 4).half(), torch.tensor([932.0]), text, return_dict=False)[0]  # noqa: E731
    with torch.no_grad():
        before = step()
        loras = applied(path)
        checkpoint.reload_tensors(model, contents, loras[0].lora.changes, loras, device="cpu", run_device="cpu")
        assert not torch.equal(step(), before)
        checkpoint.reload_tensors(model, contents, loras[0].lora.changes, (), device="cpu", run_device="cpu")
        assert torch.equal(step(), before)


# --- Two experts ---

Q = "diffusion_model.blocks.1.self_attn.q.lora_"
TINY_I2V = catalog.Arch(dim=128, num_heads=2, num_layers=2, ffn_dim=256, in_channels=36)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(("high", "low")):
        torch.manual_seed(seed)
        torch.save(upstream_names(TINY_I2V, sla=True, int8=False, text_dim=128), folder / f"{name}.pth")
    generator = torch.Generator().manual_seed(3)
    for name in ("one", "two"):
        shapes = {f"{Q}A.weight": (4, 128), f"{Q}B.weight": (128, 4)}
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def test_each_lora_goes_to_its_expert(experts):
    one, two = experts / "one.safetensors", experts / "two.safetensors"

    def load(*loras):
        return turbo_nb.load_pipeline((experts / "high.pth", experts / "low.pth"), loras=loras, **PARTS)

    plain = load()
    base = bits(plain.transformer), bits(plain.transformer_2)
    name = "blocks.1.attn1.to_q.weight"

    def change(pipeline):
        return [pipeline.get_parameter(name) - old[name] for pipeline, old in
                zip((plain.transformer, plain.transformer_2), base, strict=True)]  # fmt: skip

    def product(path):
        tensors = load_file(path)
        return tensors[f"{Q}B.weight"] @ tensors[f"{Q}A.weight"]

    for loras, high, low in [
        ([f"high={one}:0.5"], 0.5 * product(one), torch.zeros(128, 128)),
        ([f"low={one}", f"high={two}:-1"], -product(two), product(one)),
        ([one, f"low={two}"], product(one), product(one) + product(two)),
    ]:
        turbo_nb.set_loras(plain, loras)
        fresh = load(*loras)
        assert same(fresh.transformer, bits(plain.transformer)) and same(fresh.transformer_2, bits(plain.transformer_2))
        for ours, wanted in zip(change(plain), (high, low), strict=True):
            assert torch.allclose(ours, wanted, atol=1e-5)
    ids = {json.dumps(load(*loras).turbo_nb.identity) for loras in ((), (f"high={one}",), (f"low={one}",), (one,))}
    assert len(ids) == 4


def test_lora_of_both_experts_can_be_left_to_one(experts):
    one = experts / "one.safetensors"
    pipeline = turbo_nb.load_pipeline((experts / "high.pth", experts / "low.pth"), loras=[one], **PARTS)
    base = turbo_nb.load_pipeline((experts / "high.pth", experts / "low.pth"), loras=[f"high={one}"], **PARTS)
    turbo_nb.set_loras(pipeline, [f"high={one}"])
    assert same(pipeline.transformer, bits(base.transformer))
    assert same(pipeline.transformer_2, bits(base.transformer_2))


def test_lora_that_is_named_for_another_expert_is_one_warning(experts, tmp_path):
    pipeline = turbo_nb.load_pipeline((experts / "high.pth", experts / "low.pth"), **PARTS)
    path = tmp_path / "style_low_noise.safetensors"
    path.write_bytes((experts / "one.safetensors").read_bytes())
    for asked, words in ((path, "goes to both experts; write low=FILE"), (f"high={path}", "to the high-noise expert")):
        with collect_warnings() as warned:
            turbo_nb.set_loras(pipeline, [asked])
            turbo_nb.set_loras(pipeline, [asked])
        assert len(warned) == 1 and words in warned[0]
    with collect_warnings() as warned:
        turbo_nb.set_loras(pipeline, [f"low={path}", experts / "two.safetensors"])
    assert not warned


@pytest.mark.parametrize("expert", ["high", "low"])
def test_lora_of_one_expert_is_refused_for_a_model_with_one(expert, style, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("downloaded"))
    for model in ("nano", "TurboWan2.1-T2V-1.3B-480P"):
        with pytest.raises(InputError, match=f"lora is '{expert}=.*one expert"):
            turbo_nb.load_pipeline(model, device="cpu", loras=f"{expert}={style[0]}")


def test_lora_of_another_width_is_refused_before_a_download(style, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match=r"of shape \(256,\). Expected \(1536,\)"):
        turbo_nb.load_pipeline("TurboWan2.1-T2V-1.3B-480P", device="cpu", loras=style[0])


# --- The command line, convert, batch and records ---


def test_command_line_takes_several_loras_and_the_clip_carries_them(style, state, tmp_path):
    (tmp_path / "loras").mkdir()
    named, _ = make(state, tmp_path / "loras" / "named.safetensors", seed=1)
    arguments = ["t2v", "--prompt", PROMPT, "--device", "cpu", "--num_frames", 1, "--num-steps", 1]
    arguments += ["--save_path", "x.mp4"]
    result = command_line(*arguments, "--lora", f"{style[0]}:0.5", "--lora", "named", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    record = mp4.read_record(tmp_path / "x.mp4")
    assert [(one.name, one.strength, one.expert) for one in record.loras] == [
        ("style.safetensors", 0.5, None), ("named.safetensors", 1.0, None)
    ]  # fmt: skip
    assert record.loras[1].hash == lora.read(named).hash != record.loras[0].hash
    shown = command_line("info", "x.mp4", cwd=tmp_path).stdout
    assert "name style.safetensors, hash " in shown and "strength 0.5; name named.safetensors" in shown
    shown = command_line("info", named, cwd=tmp_path).stdout
    assert "a LoRA, rank 4, 70 modules, 2 differences" in shown
    faults = {"nothing": "no LoRA 'nothing'", f"{named}:nan": "strength of", f"low={named}": "one expert"}
    for text, words in faults.items():
        result = command_line(*arguments, "--lora", text, cwd=tmp_path)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_convert_reports_how_many_tensors_changed(style, state, tmp_path):
    source, added = tmp_path / "nano.safetensors", style[1]
    save_file(to_upstream(state), source)
    first, _ = make(state, tmp_path / "first.safetensors", blocks=range(1))
    told = convert(source, tmp_path / "out", loras=[f"{style[0]}:0.5", first])
    assert told.endswith("with 2 LoRAs merged: 72 tensors changed")
    merged = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    for name, tensor in state.items():
        if not name.startswith("blocks.0"):
            assert torch.allclose(merged[name], tensor + 0.5 * added.get(name, torch.zeros(())), atol=1e-6)
    result = command_line("convert", source, "more", "--lora", style[0], cwd=tmp_path)
    assert result.returncode == 0 and "with 1 LoRA merged: 72 tensors changed" in result.stdout
    for text, words in [(f"{style[0]}:0", "0 changes nothing"), (f"high={style[0]}", "one expert")]:
        with pytest.raises(InputError, match=words):
            convert(source, tmp_path / "no", loras=[text])
    assert not (tmp_path / "no").exists()


def test_convert_merges_into_int8_linears(style, state, exact, tmp_path):
    save_file(tile_int8(state), tmp_path / "int8.safetensors")
    convert(tmp_path / "int8.safetensors", tmp_path / "out", loras=style[0])
    options = {"dtype": torch.float32}
    alone = relative_error(forward(load_transformer(tmp_path / "int8.safetensors", **options)), exact[0])
    model = load_transformer(tmp_path / "out/transformer", **options)
    assert is_quantized(model) and relative_error(forward(model), exact[1]) < 1.2 * alone


def test_ids_of_a_batch_depend_on_loras_and_strengths_and_not_on_their_folder(style, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(style[0].read_bytes())

    def identity(*loras):
        model = batch.runner.model_of({"model": "nano", "device": "cpu", "loras": loras})
        return next(iter(batch.jobs.Tasks([PROMPT], model, tmp_path, {}))).id

    none, half, whole = identity(), identity((style[0], 0.5)), identity(style[0])
    assert len({none, half, whole}) == 3
    assert identity((moved, 0.5)) == half and identity((style[0], 0)) == none


def test_batch_makes_clips_with_a_lora(style, tmp_path):
    options = {"model": "nano", "device": "cpu", "loras": [(style[0], 0.5)]}
    summary = batch.run([PROMPT], options, tmp_path, **SHORT)
    assert [one.status for one in summary.records] == ["done"]
    (record,) = batch.read_manifest(tmp_path)
    digest = lora.read(style[0]).hash
    assert record.settings.loras == [records.LoRARecord(name="style.safetensors", hash=digest, strength=0.5)]
    assert batch.run([PROMPT], options, tmp_path, **SHORT).made == 0


def test_loras_are_given_in_many_forms():
    one, half = LoRAFile(file="a"), LoRAFile(file="a", strength=0.5)
    forms = {
        "a": [one], "a:0.5": [half], ("a", 0.5): [half], ("a", "b:2"): [one, LoRAFile(file="b", strength=2.0)],
        (("a", 0.5), "high=b"): [half, LoRAFile(file="b", expert="high")],
        ("low=a", -1): [LoRAFile(file="a", strength=-1.0, expert="low")],
        "my style: v2": [LoRAFile(file="my style: v2")],
        "https://x:80/a.safetensors:0.7": [LoRAFile(file="https://x:80/a.safetensors", strength=0.7)],
        (): [], None: [],
    }  # fmt: skip
    for form, expected in forms.items():
        loras = LoadOptions(loras=form).loras
        assert loras == tuple(expected), form
        assert LoadOptions(loras=loras) == LoadOptions(loras=[str(one) for one in loras])
        hash(LoadOptions(loras=form))
    for form in (3, "", "a:inf", [3], ("a", True), ("a", float("nan")), {"a": 1}, ["a\0"], [None], [("a", 1, 2)]):
        with pytest.raises(InputError, match="lora"):
            LoadOptions(loras=form)
