"""LoRAs: every spelling of their keys changes a weight by the same sum; other kinds and misfits are refused by name."""

import json
import os
import random

import pytest
import torch
from helpers import golden
from safetensors.torch import save_file

from turbo_nb.errors import CheckpointError, collect_warnings
from turbo_nb.files import lora

RANK, ALPHA = 4, 2.0
# upstream's and diffusers' names of modules of a block, and of the modules around the blocks
NAMES = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k", "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
OUTER = {
    "patch_embedding": "patch_embedding", "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
}  # fmt: skip
UPSTREAM = {f"blocks.{i}.{old}": f"blocks.{i}.{new}" for i in range(2) for old, new in NAMES.items()} | OUTER
DIFFUSERS = {new: new for new in UPSTREAM.values()}
FASTVIDEO = {
    "blocks.0.to_q": "blocks.0.attn1.to_q", "blocks.0.to_out": "blocks.0.attn1.to_out.0",
    "blocks.1.attn2.to_out": "blocks.1.attn2.to_out.0", "blocks.1.ffn.fc_in": "blocks.1.ffn.net.0.proj",
}  # fmt: skip
AB, UP_DOWN = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


SHAPES = {"ffn.net.0.proj": (96, 48), "ffn.net.2": (48, 96), "time_proj": (288, 48), "proj_out": (64, 48)}


def shape_of(name: str) -> tuple[int, ...]:
    if name == "patch_embedding":
        return 48, 16, 1, 2, 2
    return next((shape for end, shape in SHAPES.items() if name.endswith(end)), (48, 48))


def base(names) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"{name}.weight": torch.randn(shape_of(name), generator=generator) for name in names}


def factors(names) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module"""
    generator = torch.Generator().manual_seed(2)
    pairs = {}
    for name in names:
        out, *rest = shape_of(name)
        columns = torch.Size(rest).numel()
        pairs[name] = (torch.randn(RANK, columns, generator=generator), torch.randn(out, RANK, generator=generator))
    return pairs


def save(path, tensors, metadata=None):
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata)
    return path


def merged(path, weights, strength=1.0):
    """The weights with the LoRA, after the checks that loading makes"""
    found = lora.read(path)
    lora.fit(found, {name: weight.shape for name, weight in weights.items()})
    applied = [lora.Applied(lora=found, strength=strength)]
    return {name: lora.apply(name, weight, applied) for name, weight in weights.items()}, applied[0]


def keys_of(table, prefix, ends, alpha=False, separator="."):
    """The keys of a file, with the tensors of `factors`"""
    pairs, tensors = factors(table.values()), {}
    for old, new in table.items():
        stem = prefix + old.replace(".", separator)
        tensors |= {f"{stem}.{end}": tensor for end, tensor in zip(ends, pairs[new], strict=True)}
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


FORMS = {
    "ComfyUI": (UPSTREAM, "diffusion_model.", AB, False, "."),
    "ComfyUI with alpha": (UPSTREAM, "diffusion_model.", AB, True, "."),
    "kijai": (UPSTREAM, "diffusion_model.", UP_DOWN, True, "."),
    "kohya": (UPSTREAM, "lora_unet_", UP_DOWN, True, "_"),
    "kohya with two underscores": (UPSTREAM, "lora_unet__", UP_DOWN, True, "_"),
    "OneTrainer": (DIFFUSERS, "lora_transformer_", UP_DOWN, True, "_"),
    "LyCORIS": (UPSTREAM, "lycoris_", UP_DOWN, True, "_"),
    "diffusers": (DIFFUSERS, "transformer.", AB, False, "."),
    "diffusers without prefix": (DIFFUSERS, "", AB, False, "."),
    "diffusers' old ends": (DIFFUSERS, "transformer.", ("lora.down.weight", "lora.up.weight"), False, "."),
    "PEFT": (DIFFUSERS, "base_model.model.", AB, False, "."),
    "PEFT with an adapter's name": (UPSTREAM, "", ("lora_A.default.weight", "lora_B.default.weight"), False, "."),
    "PEFT in PEFT": (UPSTREAM, "base_model.model.transformer.", ("lora_A.style", "lora_B.style"), False, "."),
    "DiffSynth": (UPSTREAM, "pipe.dit.", ("lora_A.default.weight", "lora_B.default.weight"), False, "."),
    "a whole ComfyUI model": (UPSTREAM, "model.diffusion_model.", AB, False, "."),
    "a prefix that no list has": (UPSTREAM, "my.own.wrapper_7.net_ema.", UP_DOWN, True, "."),
    "compiled": (UPSTREAM, "module._orig_mod.", AB, False, "."),
    "FastVideo": (FASTVIDEO, "transformer.", AB, False, "."),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_keys_adds_the_same_sum(form, tmp_path):
    table, prefix, ends, alpha, separator = FORMS[form]
    path = save(tmp_path / "lora.safetensors", keys_of(table, prefix, ends, alpha, separator))
    weights, pairs = base(table.values()), factors(table.values())
    with collect_warnings() as warned:
        ours, applied = merged(path, weights, 0.5)
    assert not warned and applied.changed == weights.keys()
    for name, weight in weights.items():
        down, up = pairs[name.removesuffix(".weight")]
        wanted = weight + 0.5 * (ALPHA / RANK if alpha else 1) * (up @ down).reshape(weight.shape)
        assert (ours[name] - wanted).abs().max() < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_of_a_lora_may_be_of_any_float_format(dtype, tmp_path):
    tensors = {key: tensor.to(dtype) for key, tensor in keys_of(UPSTREAM, "diffusion_model.", AB).items()}
    ours, _ = merged(save(tmp_path / "lora.safetensors", tensors), weights := base(UPSTREAM.values()))
    down, up = (tensors[f"diffusion_model.blocks.1.ffn.2.{end}"].float() for end in AB)
    name = "blocks.1.ffn.net.2.weight"
    assert (ours[name] - weights[name] - up @ down).abs().max() < 1e-5


@pytest.mark.parametrize("kernel", [(), (1, 1, 1)], ids=["matrix", "kernel of 1"])
def test_patch_embedding_takes_factors_of_a_convolution_and_of_a_linear(kernel, tmp_path):
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(RANK, 16, 1, 2, 2, generator=generator), torch.randn(48, RANK, *kernel, generator=generator)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
    }
    ours, _ = merged(save(tmp_path / "lora.safetensors", tensors), weights := base(["patch_embedding"]))
    wanted = weights["patch_embedding.weight"] + torch.einsum("or,ritkl->oitkl", up.flatten(1), down)
    assert (ours["patch_embedding.weight"] - wanted).abs().max() < 1e-5


def dora(weight, down, up, scale, magnitude, axis):
    """Equation 5 of arXiv:2402.09353, row by row (axis 0) or column by column (axis 1)"""
    changed = weight + scale * up @ down
    rows = changed if axis == 0 else changed.T
    rows = torch.stack([m * row / (row**2).sum().sqrt() for m, row in zip(magnitude.flatten(), rows, strict=True)])
    return rows if axis == 0 else rows.T


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["rows", "columns", "PEFT"])
def test_dora_gives_rows_or_columns_their_trained_length(kind, strength, tmp_path):
    (name,) = names = ["blocks.0.ffn.net.0.proj"]
    weights, (down, up) = base(names), factors(names)[name]
    weight = weights[f"{name}.weight"]
    axis = 1 if kind == "columns" else 0
    magnitude = torch.rand(weight.shape[axis], generator=torch.Generator().manual_seed(4)) + 0.5
    if kind == "PEFT":
        tensors = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
        scale = 1.0
    else:
        stem = "lora_unet_blocks_0_ffn_0"
        tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
        tensors[f"{stem}.dora_scale"] = magnitude[:, None] if axis == 0 else magnitude[None]
        scale = ALPHA / RANK
    ours, _ = merged(save(tmp_path / "lora.safetensors", tensors), weights, strength)
    wanted = weight + strength * (dora(weight, down, up, scale, magnitude, axis) - weight)
    assert (ours[f"{name}.weight"] - wanted).abs().max() < 1e-5


def test_differences_are_added_to_weights_biases_norms_and_modulations(tmp_path):
    shapes = {
        "blocks.0.attn1.to_q.weight": (48, 48), "blocks.0.attn1.to_q.bias": (48,),
        "blocks.0.attn1.norm_q.weight": (48,), "blocks.0.norm2.weight": (48,), "blocks.0.norm2.bias": (48,),
        "blocks.0.scale_shift_table": (1, 6, 48),
        "scale_shift_table": (1, 2, 48), "proj_out.weight": (64, 48), "patch_embedding.weight": (48, 16, 1, 2, 2),
    }  # fmt: skip
    keys = {
        "blocks.0.self_attn.q.diff": "blocks.0.attn1.to_q.weight",
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.0.norm3.w_norm": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "head.modulation.diff": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    diffs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {f"diffusion_model.{key}": diffs[name] for key, name in keys.items()}
    tensors["diffusion_model.patch_embedding.diff"] = diffs["patch_embedding.weight"].flatten(1)  # upstream's linear
    ours, applied = merged(save(tmp_path / "lora.safetensors", tensors), weights, -0.5)
    assert applied.changed == weights.keys()
    for name, weight in weights.items():
        assert (ours[name] - (weight - 0.5 * diffs[name])).abs().max() < 1e-6, name


def test_low_rank_factors_and_a_difference_of_one_weight_add_up(tmp_path):
    name = "blocks.0.attn1.to_q"
    down, up = factors([name])[name]
    diff, bias, b = torch.randn(48, 48), torch.randn(48), torch.randn(48)
    stem = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.lora_B.bias": bias}
    tensors |= {f"{stem}.diff": diff, f"{stem}.alpha": torch.tensor(ALPHA)}
    weights = base([name]) | {f"{name}.bias": b}
    ours, _ = merged(save(tmp_path / "lora.safetensors", tensors), weights)
    assert (ours[f"{name}.weight"] - weights[f"{name}.weight"] - ALPHA / RANK * up @ down - diff).abs().max() < 1e-5
    assert (ours[f"{name}.bias"] - b - ALPHA / RANK * bias).abs().max() < 1e-6


def test_several_loras_add_up_and_strength_zero_keeps_every_bit(tmp_path):
    names = ["blocks.0.attn1.to_q", "blocks.1.ffn.net.2"]
    weights, loras = base(names), []
    for number, name in enumerate([*names, names[0]]):
        down, up = (tensor * (number + 1) for tensor in factors([name])[name])
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        found = lora.read(save(tmp_path / f"{number}.safetensors", tensors))
        loras.append(lora.Applied(lora=found, strength=(0.5, 0.0, -2.0)[number]))
    down, up = factors(names[:1])[names[0]]
    ours = lora.apply(f"{names[0]}.weight", weights[f"{names[0]}.weight"], loras)
    assert (ours - weights[f"{names[0]}.weight"] - (0.5 - 2 * 9) * up @ down).abs().max() < 1e-4
    ours = lora.apply(f"{names[1]}.weight", weights[f"{names[1]}.weight"], loras)
    assert ours is weights[f"{names[1]}.weight"]
    assert [len(one.changed) for one in loras] == [1, 0, 1]


def test_alpha_of_peft_stands_beside_its_file_and_in_the_header_of_diffusers_files(tmp_path):
    name = "blocks.0.attn1.to_q"
    weights, (down, up) = base([name]), factors([name])[name]
    tensors = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    change = lambda path: merged(path, weights)[0][f"{name}.weight"] - weights[f"{name}.weight"]  # noqa: E731
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})}
    assert torch.allclose(change(save(tmp_path / "style.safetensors", tensors, header)), 2 * up @ down, atol=1e-5)
    path, config = save(tmp_path / "adapter_model.safetensors", tensors), tmp_path / "adapter_config.json"
    for settings, factor in [
        ({"lora_alpha": 2}, 0.5), ({"lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 12}}, 3.0), ({}, 1.0),
        ({"lora_alpha": 10**400}, 1.0),
    ]:  # fmt: skip
        config.write_text(json.dumps({"r": RANK} | settings))
        assert torch.allclose(change(path), factor * up @ down, atol=1e-5), settings
    config.write_text("not json")
    with collect_warnings() as warned:
        assert torch.allclose(change(path), up @ down, atol=1e-5)
    assert "cannot be read" in warned[0]


Q = "diffusion_model.blocks.0.self_attn.q."
PAIR = {f"{Q}lora_down.weight": torch.ones(RANK, 48), f"{Q}lora_up.weight": torch.ones(48, RANK)}
MISFITS = {
    "down without up": ({f"{Q}lora_down.weight": torch.ones(RANK, 48)}, "is without lora_up"),
    "up without down": ({f"{Q}lora_up.weight": torch.ones(48, RANK)}, "is without lora_down"),
    "length without factors": ({f"{Q}dora_scale": torch.ones(48, 1)}, "dora_scale.* is without lora_down"),
    "NaN": (PAIR | {f"{Q}lora_up.weight": torch.full((48, RANK), float("nan"))}, "holds NaN or Inf"),
    "Inf": (PAIR | {f"{Q}lora_up.weight": torch.full((48, RANK), float("inf"))}, "holds NaN or Inf"),
    "NaN in alpha": (PAIR | {f"{Q}alpha": torch.tensor(float("nan"))}, "alpha.* holds NaN"),
    "NaN for another model": (PAIR | {"vace_blocks.0.x.diff": torch.tensor([float("nan")])}, "vace.* holds NaN"),
    "two ranks": (PAIR | {f"{Q}lora_up.weight": torch.ones(48, 3)}, r"has shape \(48, 3\)"),
    "vectors": ({f"{Q}lora_down.weight": torch.ones(RANK), f"{Q}lora_up.weight": torch.ones(RANK)}, "has shape"),
    "no rank": ({f"{Q}lora_down.weight": torch.ones(0, 48), f"{Q}lora_up.weight": torch.ones(48, 0)}, "has shape"),
    "alpha of many numbers": (PAIR | {f"{Q}alpha": torch.ones(3)}, "Expected one number"),
    "integers": (PAIR | {f"{Q}lora_up.weight": torch.ones(48, RANK, dtype=torch.int8)}, "is int8"),
    "another width": (
        {f"{Q}lora_down.weight": torch.ones(RANK, 80), f"{Q}lora_up.weight": torch.ones(80, RANK)},
        r"made for a tensor of shape \(80, 80\). Expected \(48, 48\)",
    ),
    "another task": (
        {"patch_embedding.lora_A.weight": torch.ones(RANK, 36, 1, 2, 2),
         "patch_embedding.lora_B.weight": torch.ones(48, RANK)},
        r"shape \(48, 36, 1, 2, 2\)\. Expected \(48, 16, 1, 2, 2\).* and task \(text-to-video or image-to-video\)",
    ),
    "transposed difference": ({"blocks.0.ffn.0.diff": torch.ones(48, 96)}, r"\(48, 96\). Expected \(96, 48\)"),
    "lengths of a kernel": (PAIR | {f"{Q}dora_scale": torch.ones(48, 1, 3)}, r"shape \(48, 1, 3\)"),
    "lengths for a vector": (
        {"blocks.0.norm3.lora_A.weight": torch.ones(RANK, 1), "blocks.0.norm3.lora_B.weight": torch.ones(48, RANK),
         "blocks.0.norm3.dora_scale": torch.ones(1, 48)}, r"shape \(1, 48\)"),
    "difference of one number": (PAIR | {f"{Q}diff": torch.ones(())}, r"shape \(\). Expected \(48, 48\)"),
    "lengths of another width": (PAIR | {f"{Q}dora_scale": torch.ones(80, 1)}, r"shape \(80, 1\)"),
    "zeros": (PAIR | {f"{Q}lora_up.weight": torch.zeros(48, RANK)}, "is zero in all 1 tensors"),
    "blocks of another model": (
        {key.replace("blocks.0", "blocks.999999"): tensor for key, tensor in PAIR.items()}, "match no tensor"
    ),
    "another model": (
        {f"model.layers.0.q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, "match no tensor of this model"
    ),
    "two adapters": (PAIR | {f"{Q}lora_A.style.weight": torch.ones(RANK, 48)}, "for one module"),
    "two copies": (PAIR | {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(RANK, 48)}, "for one module"),
    "LoKr": ({f"{Q}lokr_w1": torch.ones(4, 4), f"{Q}lokr_w2": torch.ones(12, 12)}, "is a LoKr"),
    "LoHa": ({f"{Q}hada_w1_a": torch.ones(4, 4)}, "is a LoHa"),
    "OFT": ({f"{Q}oft_blocks": torch.ones(4, 4)}, "is an OFT"),
    "LoCon": (PAIR | {f"{Q}lora_mid.weight": torch.ones(4, 4, 1, 1, 1)}, "LoCon with a core tensor"),
    "a checkpoint": (golden("dit_state"), r"Expected a LoRA\. Give the path"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_file_that_cannot_be_merged_raises_checkpoint_error(case, tmp_path):
    tensors, words = MISFITS[case]
    path = save(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(CheckpointError, match=words) as error:
        merged(path, base(UPSTREAM.values()) | {"blocks.0.norm2.weight": torch.ones(48)})
    assert "Expected" in str(error.value) and "lora.safetensors" in str(error.value)


def mutate(tensors, chance):
    """Rename, drop, add or replace one tensor"""
    key = chance.choice(sorted(tensors))
    tensor, shape = tensors[key], chance.choice([(), (0,), (1,), (5, 0), (2, 3, 4), (48, 1, 3), (1, 1, 1, 1, 1, 1)])
    dtype = chance.choice([torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e5m2])
    match chance.randrange(8):
        case 0:
            del tensors[key]
        case 1:
            tensors[key] = tensor.to(dtype)
        case 2:
            tensors[key] = torch.ones(shape)
        case 3:
            tensors[key] = tensor.float() * chance.choice([float("nan"), 1e30])
        case 4:
            tensors[chance.choice(["x.", "..", "lora_", "_"]) + key] = tensors.pop(key)
        case 5:
            tensors[key.replace("blocks.0", "blocks.999999")] = tensors.pop(key)
        case 6:
            tensors[key + chance.choice([".weight", "_scale", ".lora_A", ".alpha", ".diff"])] = torch.ones(shape)
        case 7:
            tensors[chance.choice([".lora_A.weight", "alpha", "head.diff_m", "blocks..lora_A.weight"])] = torch.ones(
                shape
            )


def test_mutated_file_is_merged_or_raises_checkpoint_error(tmp_path):
    weights, outcomes = base(UPSTREAM.values()), set()
    for seed in range(500):
        chance = random.Random(seed)
        tensors = keys_of(*FORMS[chance.choice(sorted(FORMS))])
        if chance.random() < 0.5:
            part = chance.choice(["dora_scale", "diff", "diff_b", "diff_m", "w_norm", "alpha"])
            extra = torch.ones(chance.choice([(48, 1), (1, 48), (48,), (48, 48), (1, 6, 48), (), (0,)]))
            tensors |= {f"{chance.choice(sorted(tensors)).partition('.lora_')[0]}.{part}": extra}
        for _ in range(chance.randint(0, 2)):
            mutate(tensors, chance)
        path = save(tmp_path / chance.choice(["lora.pt", "lora.safetensors"]), tensors)
        try:
            with collect_warnings():
                results, applied = merged(path, weights, chance.choice([1, -3, 1e20]))
            assert all(result.isfinite().all() for result in results.values()) and str(applied.lora)
            outcomes.add("merged")
        except CheckpointError as error:
            outcomes.add(str(error).partition("Expected")[2])
    assert "merged" in outcomes and len(outcomes) > 6


@pytest.mark.parametrize("kind", ["web page", "cut short", "pickle", "empty"])
def test_damaged_file_raises_checkpoint_error(kind, tmp_path):
    path = save(tmp_path / "lora.safetensors", PAIR)
    data = {"web page": b"<!DOCTYPE html><html>", "cut short": path.read_bytes()[:-50], "empty": b""}
    if kind == "pickle":
        torch.save(PAIR | {"x": pytest.raises}, path)
    else:
        path.write_bytes(data[kind])
    with pytest.raises(CheckpointError):
        lora.read(path)


def test_keys_that_match_nothing_are_counted_and_named_once(tmp_path):
    image = {f"diffusion_model.blocks.0.cross_attn.{x}_img.lora_{y}.weight": torch.ones(shape)
             for x in "kv" for y, shape in (("down", (RANK, 48)), ("up", (48, RANK)))}  # fmt: skip
    text = {"lora_te1_encoder_block_0.lora_down.weight": torch.ones(2, 2)}
    found = lora.read(save(tmp_path / "lora.safetensors", PAIR | image | text))
    shapes = {name: weight.shape for name, weight in base(UPSTREAM.values()).items()}
    with collect_warnings() as warned:
        lora.fit(found, shapes)
        lora.fit(found, shapes)
    assert len(warned) == 1
    assert "5 of the 7 keys" in warned[0] and "k_img" in warned[0] and "and 2 more" in warned[0]


def test_change_below_the_rounding_of_a_weight_counts_as_none(tmp_path):
    tiny = {key: tensor * 1e-12 for key, tensor in PAIR.items()}
    _, applied = merged(save(tmp_path / "lora.safetensors", tiny), base(UPSTREAM.values()))
    assert not applied.changed
    with pytest.raises(CheckpointError, match="changed 0 tensors"):
        lora.require_changed([applied])


def test_result_that_overflows_raises_checkpoint_error(tmp_path):
    huge = {key: tensor * 1e18 for key, tensor in PAIR.items()}
    with pytest.raises(CheckpointError, match=r"is NaN or Inf with .*strength 1e\+30"):
        merged(save(tmp_path / "lora.safetensors", huge), base(UPSTREAM.values()), 1e30)


def test_name_is_looked_up_in_the_folder_of_loras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    style = save(tmp_path / "loras" / "my style: v2.safetensors", PAIR)
    assert lora.find("my style: v2").samefile(style) and lora.find("my style: v2.safetensors").samefile(style)
    (tmp_path / "other" / "peft").mkdir(parents=True)
    monkeypatch.setenv("TURBO_NB_LORAS", str(tmp_path / "other"))
    adapter = save(tmp_path / "other" / "peft" / "adapter_model.safetensors", PAIR)
    assert lora.find("peft").samefile(adapter)
    for name in ("my style: v2", "other/style", "", "x" * 5000):
        with pytest.raises(CheckpointError, match="no LoRA"):
            lora.find(name)


def test_folder_lists_its_loras_and_says_what_else_lies_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lora.available() == lora.Listing(folder=tmp_path / "loras")
    place = tmp_path / "loras"
    (place / "peft").mkdir(parents=True)
    (place / "others").mkdir()
    (place / "folder.safetensors").mkdir()
    for name in ("b.safetensors", "A.safetensors", "c.PT", ".hidden.safetensors", "peft/adapter_model.safetensors"):
        save(place / name, PAIR)
    save(place / "model.safetensors", base(UPSTREAM))
    save(place / "kron.safetensors", {"lora_unet_blocks_0_ffn_0.lokr_w1": torch.ones(2, 2)})
    save(place / "image.safetensors", {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 2)})
    (place / "page.safetensors").write_text("<!doctype html>")
    (place / "empty.bin").touch()
    (place / "notes.txt").write_text("x")
    (place / "gone.safetensors").symlink_to("nowhere")
    (place / os.fsdecode(b"caf\xe9.safetensors")).write_bytes((place / "b.safetensors").read_bytes())
    found = lora.available()
    assert list(found.files) == ["A.safetensors", "b.safetensors", "c.PT", "peft"] and found.error == ""
    assert found.files["peft"] == place / "peft" / "adapter_model.safetensors"
    assert found.left_out == {
        "caf\ufffd.safetensors": "has a name that is not UTF-8",
        "empty.bin": "is empty",
        "image.safetensors": "is a LoRA of another kind of model",
        "kron.safetensors": "is a LoKr",
        "model.safetensors": "is not a LoRA",
        "page.safetensors": "is a web page",
    }
    assert all(lora.find(name).samefile(path) for name, path in found.files.items())


def test_file_is_examined_again_only_after_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_LORAS", str(tmp_path))
    for number in range(300):
        (tmp_path / f"{number:03}.safetensors").hardlink_to(save(tmp_path / "x.safetensors", PAIR))
    assert len(lora.available().files) == 301
    keys = lora._keys
    monkeypatch.setattr(lora, "_keys", lambda path: read.append(path.name) or keys(path))
    read = []
    assert len(lora.available().files) == 301 and read == []
    (tmp_path / "007.safetensors").unlink()
    (tmp_path / "007.safetensors").write_text("<html>")
    found = lora.available()
    assert read == ["007.safetensors"] and found.left_out == {"007.safetensors": "is a web page"}


def test_folder_that_cannot_be_listed_is_an_error_in_words(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place, words in (("file", "Not a directory"), ("x" * 300, "File name too long")):
        monkeypatch.setenv("TURBO_NB_LORAS", str(tmp_path / place))
        assert lora.available().error == words

    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    assert lora.available().error == "Permission denied"


def test_pickle_of_tensors_is_read(tmp_path):
    ours, _ = merged(save(tmp_path / "style.pt", PAIR), weights := base(UPSTREAM.values()))
    name = "blocks.0.attn1.to_q.weight"
    assert (ours[name] - weights[name] - RANK).abs().max() < 1e-5


def test_description_names_rank_alpha_modules_and_keys(tmp_path):
    text = str(lora.read(save(tmp_path / "a.safetensors", keys_of(UPSTREAM, "lora_unet_", UP_DOWN, True, "_"))))
    for words in ("a LoRA", "rank 4", "alpha 2", "27 modules", "lora_unet_"):
        assert words in text
    more = PAIR | {f"{Q}dora_scale": torch.ones(48, 1), f"{Q}diff_b": torch.ones(48)}
    text = str(lora.read(save(tmp_path / "b.safetensors", more)))
    assert "a DoRA" in text and "1 differences" in text
