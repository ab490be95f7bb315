"""turbo-nb verify: green on a sound machine, red with exit code 2 for every fault that is planted."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import command_line
from safetensors.torch import load_file, save_file

from turbo_nb import backends, catalog, linear, pipeline, rope
from turbo_nb.checkup import selftest
from turbo_nb.errors import InputError, UnknownModelError
from turbo_nb.ops.attention import reference as attention_reference
from turbo_nb.ops.linear8 import reference as linear8_reference

OPERATIONS = [
    "rope: reference, float64",
    "sla at topk 1: dense attention, float64",
    "sla's linear branch: float64",
    "int8 linear: float64",
]
MODEL = ["load", "clip", "transformer: a step with sla at topk 1: dense"]


def command(*arguments, cwd, **variables):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), **variables}
    line = [sys.executable, "-m", "turbo_nb.cli", "verify", *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=environment)


def test_a_sound_machine_passes_and_reports_what_it_is(tmp_path):
    result = command("--json", "--device", "cpu", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads(result.stdout)
    assert told["passed"] and told["model"] == "nano"
    assert [check["name"] for check in told["checks"]] == [*OPERATIONS, "mp4", "files", *MODEL]
    assert all(check["passed"] and check["detail"] and check["seconds"] > 0 for check in told["checks"])
    assert told["doctor"]["backends"]["torch"] == torch.__version__
    assert not list(tmp_path.iterdir())


def test_json_stays_json_when_loading_logs(tmp_path, monkeypatch):
    def load_pipeline(*arguments, load=pipeline.load_pipeline, **options):
        logging.getLogger("turbo_nb").info("compiled the kernels for this GPU in 140 s")
        return load(*arguments, **options)

    monkeypatch.setattr(pipeline, "load_pipeline", load_pipeline)
    result = command_line("verify", "--json", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout)["passed"]
    assert "note: compiled the kernels" in result.stderr


def test_the_text_encoder_is_tried_even_for_a_prompt_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_NB_CACHE", str(tmp_path))
    selftest.load(catalog.NANO, False, "cpu", loaded := [])
    loaded[0].turbo_nb.prompt_encoder("a red circle")
    assert [path.name for path in tmp_path.iterdir()] == ["facts"]  # no embedding


def red(checks):
    return [check.name for check in checks if not check.passed]


def operations():
    return [*selftest.check_operations(backends.detect(), "cpu")]


def test_the_operations_pass():
    checks = operations()
    assert [check.name for check in checks] == OPERATIONS and red(checks) == []


def turned_back(x, cos, sin, interleaved=True, inplace=False):
    return rope.apply_rotary_emb_torch(x, cos, -sin, interleaved, inplace)


def unscaled(q, k, v, block_map, block_q, block_k):
    return attention_reference.sparse_attention(q * 2, k, v, block_map, block_q, block_k)


def without_the_last_block(q, k, topk, block_q, block_k):
    kept = torch.ones(1, q.shape[2], -(-q.shape[1] // block_q), -(-k.shape[1] // block_k), dtype=torch.bool)
    kept[..., -1] = False
    return kept


def not_normalised(q, k, v):
    return torch.einsum("blhd,bmhd,bmhe->blhe", q.softmax(-1), k.softmax(-1), v)


def without_bias(x, w_q, w_scale, bias=None):
    return linear8_reference._int8_product(x, w_q, w_scale)


def not_finite(q, k, v, block_map, block_q, block_k):
    return torch.full_like(q, torch.nan)


@pytest.mark.parametrize(
    ("module", "name", "fault", "caught"),
    [
        (rope, "apply_rotary_emb", turned_back, OPERATIONS[0]),
        (attention_reference, "sparse_attention", unscaled, OPERATIONS[1]),
        (attention_reference, "sparse_attention", not_finite, OPERATIONS[1]),
        (attention_reference, "block_map", without_the_last_block, OPERATIONS[1]),
        (attention_reference, "linear_attention", not_normalised, OPERATIONS[2]),
        (linear8_reference, "int8_linear", without_bias, OPERATIONS[3]),
        (linear, "int8_quantize", lambda x: linear8_reference.int8_quantize(x * 1.03), OPERATIONS[3]),
    ],
)
def test_a_wrong_operation_is_caught(monkeypatch, module, name, fault, caught):
    monkeypatch.setattr(module, name, fault)
    assert red(operations()) == [caught]


def test_an_encoder_that_cannot_write_is_a_failed_check(monkeypatch):
    check = selftest.run("mp4", selftest.encoder)
    assert check.passed and "libx264" in check.detail
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/opt/missing/ffmpeg")
    check = selftest.run("mp4", selftest.encoder)
    assert not check.passed and "IMAGEIO_FFMPEG_EXE is '/opt/missing/ffmpeg'" in check.detail


def test_the_verdict_counts_the_checks_and_names_those_that_failed():
    checks = [selftest.Check(name=name, passed=True, seconds=1.0, detail="right") for name in ("rope", "mp4")]
    result = selftest.Result(model="nano", report=None, checks=tuple(checks))
    assert result.verdict == "Verdict: all 2 checks passed. nano runs here."
    checks[1] = replace(checks[1], passed=False)
    result = selftest.Result(model="nano", report=None, checks=tuple(checks))
    assert result.verdict == "Verdict: 1 of 2 checks FAILED: mp4."


def test_a_check_that_raises_has_failed():
    def broken():
        raise RuntimeError("CUDA error: no kernel image\nmore of it")

    check = selftest.run("x", broken)
    assert (check.passed, check.detail) == (False, "RuntimeError: CUDA error: no kernel image")
    assert selftest.run("x", lambda: 1 / 0).detail == "ZeroDivisionError: division by zero"


def test_a_wrong_turn_in_the_model_is_caught_by_a_step(monkeypatch, nano_alone):
    passed, detail = selftest.step(nano_alone, nano_alone.transformer, "sla")
    assert passed, detail
    monkeypatch.setattr(rope, "apply_rotary_emb", turned_back)
    passed, detail = selftest.step(nano_alone, nano_alone.transformer, "sla")
    assert not passed, detail


@pytest.fixture
def nano_alone():
    """The embedded model, to be changed"""
    import turbo_nb

    return turbo_nb.load_pipeline("nano", device="cpu")


def test_a_picture_of_something_else_is_caught(nano_alone):
    passed, detail = selftest.clip(nano_alone)
    assert passed, detail
    with torch.no_grad():
        nano_alone.transformer.proj_out.weight.neg_()
    passed, detail = selftest.clip(nano_alone)
    assert not passed and ("flat" in detail or "red circle" in detail), detail


@pytest.fixture
def bent(tmp_path, monkeypatch):
    """nano in a folder of its own, of which one weight is bent"""
    folder = tmp_path / "nano"
    shutil.copytree(catalog.NANO.folder, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.attn1.to_q.weight"][0, 0] += 0.5
    save_file(tensors, path)
    monkeypatch.setitem(catalog.MODELS, "nano", replace(catalog.NANO, folder=folder))
    return folder


def test_one_bent_weight_turns_it_red(bent):
    result = selftest.verify("nano", device="cpu")
    assert result.exit_code == 2 and red(result.checks) == ["files"]
    (detail,) = [check.detail for check in result.checks if not check.passed]
    assert "transformer/diffusion_pytorch_model.safetensors. Install turbo_nb again" in detail
    text = repr(result)
    assert "FAILED" in text and "passed" in text and "Machine" in text and "FAILED" in result._repr_html_()
    assert json.loads(json.dumps(result.to_dict()))["passed"] is False


def test_a_file_that_is_gone_or_new_turns_it_red(bent):
    (bent / selftest.SUMS).write_text(selftest.sums(bent))
    spec = catalog.MODELS["nano"]
    assert selftest.run("files", selftest.files, spec, False).passed
    (bent / "vae" / "config.json").rename(bent / "vae" / "other.json")
    assert "vae/config.json, vae/other.json." in selftest.run("files", selftest.files, spec, False).detail


def test_a_released_model_that_is_not_here_is_not_fetched(monkeypatch):
    from turbo_nb.files import hub

    monkeypatch.setattr(hub, "cached", lambda files: None)
    check = selftest.run("files", selftest.files, catalog.find("Wan2.1-1.3B"), True)
    assert not check.passed and check.detail.endswith("turbo-nb download TurboWan2.1-T2V-1.3B-480P --quant")


def test_a_released_models_files_are_recognised(monkeypatch):
    from turbo_nb.files import hub

    folder = catalog.NANO.folder
    here = [folder / name for name in ("vae", "vae", "text_encoder", "tokenizer")]
    spec = replace(catalog.find("Wan2.1-1.3B"), arch=catalog.NANO.arch)
    monkeypatch.setattr(hub, "cached", lambda files: here)
    assert "Expected a transformer" in selftest.run("files", selftest.files, spec, False).detail
    here[0] = folder / "transformer"
    assert selftest.run("files", selftest.files, spec, False).passed


def test_the_shipped_sums_are_those_of_the_shipped_files():
    assert (catalog.NANO.folder / selftest.SUMS).read_text() == selftest.sums(catalog.NANO.folder), (
        "nano has changed: write selftest.sums() of its folder to SHA256SUMS, as recipes/nano does"
    )


def test_the_command_ends_with_2_when_something_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(rope, "apply_rotary_emb", turned_back)
    monkeypatch.setattr(selftest, "files", lambda *_: (False, "left out of this test"))
    monkeypatch.setenv("COLUMNS", "200")
    result = command_line("verify", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if "│ FAILED" in line]
    assert len(lines) == 2 and "rope: reference" in lines[0] and "files" in lines[1]


def test_the_attentions_of_a_cpu_do_not_depend_on_the_gpu_of_the_machine(monkeypatch, nano):
    monkeypatch.setattr(selftest, "load", lambda spec, quantized, device, into: (into.append(nano) or True, ""))
    monkeypatch.setattr(selftest, "clip", lambda pipeline: (True, ""))
    monkeypatch.setattr(selftest, "step", lambda *arguments: (True, ""))
    monkeypatch.setattr(selftest, "fast", lambda *arguments: (True, ""))
    monkeypatch.setattr(backends, "choose", lambda operation, device=None: backends.Choice(operation, "triton"))
    names = {
        device: [check.name for check in selftest.check_model(catalog.NANO, False, device, [])]
        for device in ("cpu", "cuda")
    }
    steps = [*MODEL[2:], "transformer: a step with sagesla at topk 1: dense"]
    assert names == {"cpu": MODEL, "cuda": [*MODEL[:2], "speed", *steps]}


def test_an_unknown_model():
    with pytest.raises(UnknownModelError):
        selftest.verify("gigantic")


@pytest.mark.parametrize("device", ["cpu:0", "gpu", "", 0])
def test_a_device_is_checked_as_every_option(device):
    with pytest.raises(InputError, match=f"^device is {device!r}. Expected auto, cpu, cuda"):
        selftest.verify("nano", device=device)
