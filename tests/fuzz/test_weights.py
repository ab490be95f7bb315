"""Damaged and odd weight files: a typed error or a correct load, never a traceback, a hang or code that runs."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from fuzz.harness import COUNT, ONLY, bent, fuzz, require_documented
from helpers import command_line, golden, tiny_transformer
from safetensors.torch import load_file, save_file
from weight_files import FORMATS, gguf_file, named

import turbo_nb
from turbo_nb import catalog
from turbo_nb.checkpoint import load_transformer
from turbo_nb.errors import CheckpointError
from turbo_nb.ops.compare import relative_error

ARCH = catalog.Arch(dim=256, num_heads=4, num_layers=2, ffn_dim=192)
KINDS = {
    "upstream bf16": ("upstream", "bf16", "pth"),
    "upstream int8": ("upstream", "TurboDiffusion int8", "pth"),
    "SGLang int8": ("SGLang", "SGLang int8", "safetensors"),
    "LightX2V int8": ("upstream", "LightX2V int8", "safetensors"),
    "LightX2V fp8": ("upstream", "LightX2V fp8", "safetensors"),
    "ComfyUI fp8": ("upstream", "ComfyUI fp8, scale_weight", "safetensors"),
    "ComfyUI note": ("upstream", "ComfyUI fp8, comfy_quant", "safetensors"),
    "FastVideo fp8": ("FastVideo", "fp8 e4m3", "safetensors"),
    "quanto": ("diffusers", "quanto int8", "safetensors"),
    "GGUF": ("upstream", "fp32", "gguf"),
}
WRONG_DTYPES = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e5m2, torch.float16, torch.complex64)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = tiny_transformer(ARCH, text_dim=64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rename(state, chance):
    name = chance.choice(list(state))
    others = [name[::-1], f"{name}.", name.replace("blocks.0", "blocks.7"), name.upper(), f"x{name}"]
    state[chance.choice(others)] = state.pop(name)


def drop(state, chance):
    del state[chance.choice(list(state))]


ADDED = ("extra.weight", "blocks.999999.norm3.bias", "blocks.-1.a", "net.blocks.0.x", "optimizer.step", "a" * 3000)


def add(state, chance):
    state[chance.choice(ADDED)] = torch.ones(chance.choice([(), (0,), (3,), (2, 2)]))


def cast(state, chance):
    name = chance.choice(list(state))
    state[name] = state[name].to(torch.float32).to(chance.choice(WRONG_DTYPES))


def reshape(state, chance):
    name = chance.choice(list(state))
    tensor = state[name]
    shapes = [tensor.flatten(), tensor[None], tensor.new_zeros(0)]
    if tensor.numel() and tensor.ndim:
        shapes += [tensor[:1], tensor.reshape(-1)[0], torch.cat([tensor, tensor])]
    state[name] = chance.choice(shapes)


def spoil(state, chance):
    name = chance.choice([name for name in state if "scale" in name and state[name].is_floating_point()] or list(state))
    if state[name].is_floating_point() and state[name].numel():
        state[name] = state[name].clone()
        state[name].view(-1)[:1] = chance.choice([float("nan"), float("inf"), float("-inf")])


def integer_key(state, chance):
    state[chance.choice([7, None, (1, 2), b"a"])] = torch.zeros(1)


def code(state, chance, folder):
    state["step"] = Marker(folder / "ran")


MUTATIONS = (rename, drop, add, cast, reshape, spoil)


def written(path, state, kind):
    if kind == "gguf":
        gguf_file(path, {name: tensor.float() for name, tensor in state.items()}, "Q8_0")
    elif kind == "pth":
        torch.save(state, path)
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_a_typed_error_or_a_correct_load(tmp_path, state, kind):
    if kind == "GGUF":
        pytest.importorskip("gguf")
    convention, number_format, suffix = KINDS[kind]
    whole = FORMATS[number_format]({named(name, convention): tensor for name, tensor in state.items()})
    seen, path = {"loaded": 0, "refused": 0}, tmp_path / f"model.{suffix}"

    def attempt(chance):
        how = chance.choice([*MUTATIONS, *MUTATIONS, bent] + [integer_key, code] * (suffix == "pth"))
        if not mutate(path, whole, how, chance):
            return
        exact = how not in (reshape, cast, bent)  # a scale cut to one number is another format
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = load_transformer(path, attention_type="sla", dtype=torch.float32, quant_linear=False)
            except CheckpointError as error:
                seen["refused"] += 1
                assert ". Expected " in str(error) or "refused" in str(error), str(error)
                raise
            finally:
                assert not (tmp_path / "ran").exists()
        seen["loaded"] += 1
        weights = model.state_dict()
        assert all(tensor.isfinite().all() for tensor in weights.values()), how.__name__
        if exact:
            worst = max((relative_error(weights[name], wanted), name) for name, wanted in state.items() if wanted.any())
            assert worst[0] < 0.07 or "proj_l" in worst[1], (how.__name__, worst)

    fuzz(f"weights, {kind}", 8, attempt)
    assert ONLY or (seen["refused"] and (seen["loaded"] or COUNT < 100)), seen


def mutate(path: Path, whole: dict, how, chance) -> bool:
    """Write a state dict with a mutation. Return False where the format cannot hold it"""
    mutated = dict(whole)
    if how is code:
        code(mutated, chance, path.parent)
    elif how is not bent:
        for _ in range(chance.choice([1, 1, 2])):
            how(mutated, chance)
    try:
        written(path, mutated, path.suffix[1:])
    except (ValueError, TypeError, RuntimeError, KeyError, pickle.PicklingError):
        return False
    if how is bent:
        path.write_bytes(bent(path.read_bytes(), chance, 4000))
    return True


PARTS = {
    "vae": lambda: golden("vae_state"),
    "lora": lambda: load_file(Path(__file__).parents[1] / "files" / "nano_lora.safetensors"),
    "nano": lambda: load_file(nano_file()),
}


def nano_file() -> Path:
    return Path(turbo_nb.__file__).parent / "assets" / "nano" / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("part", PARTS)
def test_commands_take_a_mutated_file_of_any_part(folder, part):
    whole = PARTS[part]()

    def attempt(chance):
        suffix = chance.choice(["safetensors", "pth"])
        path = folder / f"model.{suffix}"
        if not mutate(
            path, whole, chance.choice([*MUTATIONS, bent, bent] + [integer_key, code] * (suffix == "pth")), chance
        ):
            return
        if chance.random() < 0.1:
            (folder / "config.json").write_bytes(
                bent(b'{"_class_name": "WanTransformer3DModel", "num_layers": 2}', chance)
            )
        run = [
            "t2v",
            "--prompt",
            "a red circle",
            "--num_frames",
            "1",
            "--num_steps",
            "1",
            "--resolution",
            "16x16",
            "--save_path",
            "out/v.mp4",
        ]
        line = chance.choice(
            [
                ["info", path],
                ["convert", path, "made"],
                [*run, "--model", "nano", "--device", "cpu", "--vae_path" if part == "vae" else "--lora", path],
                [*run, "--model", path if part == "nano" else "nano", "--device", "cpu", "--text_encoder_path", path],
                ["convert", nano_file(), "made", "--lora", path],
            ]
        )
        result = command_line(*line, cwd=folder)
        assert not (folder / "ran").exists()
        require_documented(result)

    fuzz(f"files, {part}", 12, attempt)
