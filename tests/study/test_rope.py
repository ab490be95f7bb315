"""The measurements of notebook 02: they agree with a right rotation, and a wrong one turns the verdict, and it, red."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN

from turbo_nb import rope
from turbo_nb.errors import InputError, TurboNbError
from turbo_nb.machine import probe
from turbo_nb.ops.norms import reference
from turbo_nb.rope import VideoSize
from turbo_nb.study import plots
from turbo_nb.study import rope as rope_study
from turbo_nb.study.rope import Check, Verdict

ROOT = Path(__file__).parents[2]
SIZES = [VideoSize(1, 7, 9), VideoSize(5, 8, 25)]


def verdict(rotate=rope.apply_rotary_emb_torch, recorded=True):
    found = {"it": rotate}
    checks = rope_study.rotation_errors(found, SIZES, head_dim=64)
    if recorded:
        checks += rope_study.recorded_checks(GOLDEN / "ops.safetensors", found)
    return Verdict(machine="here", checks=tuple(checks))


def test_every_implementation_here_is_right():
    found, passed_over = rope_study.implementations("cpu")
    assert list(found) == ["turbo_nb", "four products"]
    assert len(passed_over) == 1 and passed_over[0].startswith("flash_attn: ")
    for rotate in found.values():
        checked = verdict(rotate)
        assert checked.passed and len(checked.checks) == 2 * 3 * 2 + 2, checked.failed


def test_the_yardstick_is_a_rotation_of_pairs():
    angles = rope_study.exact_angles(VideoSize(2, 3, 4), 64)
    assert angles.shape == (24, 32) and angles.dtype == torch.float64
    last = angles[-1]  # token (1, 2, 3); of 64 channels 24 are t's and 20 each h's and w's
    assert (last[0], last[12], last[22]) == (1, 2, 3)
    assert last[31] == pytest.approx(3 / 10000 ** (18 / 20))
    x = torch.zeros(1, 24, 1, 64)
    x[..., 0] = 1
    turned = rope_study.exact_rotation(x, angles)[0, -1, 0]
    assert turned[:2].tolist() == pytest.approx([math.cos(1), math.sin(1)]) and turned[2:].abs().max() == 0
    turned = rope_study.exact_rotation(x, angles, interleaved=False)[0, -1, 0]
    assert turned[[0, 32]].tolist() == pytest.approx([math.cos(1), math.sin(1)])


MUTANTS = {
    "sign": lambda x, cos, sin, interleaved: rope.apply_rotary_emb_torch(x, cos, -sin, interleaved),
    "pairing": lambda x, cos, sin, interleaved: rope.apply_rotary_emb_torch(x, cos, sin, not interleaved),
    "swapped": lambda x, cos, sin, interleaved: rope.apply_rotary_emb_torch(x, sin, cos, interleaved),
    "nan": lambda x, cos, sin, interleaved: x * math.nan,
    "a token late": lambda x, cos, sin, interleaved: rope.apply_rotary_emb_torch(
        x, cos.roll(1, 0), sin.roll(1, 0), interleaved
    ),
    "tables in bf16": lambda x, cos, sin, interleaved: rope.apply_rotary_emb_torch(
        x, cos.bfloat16(), sin.bfloat16(), interleaved
    ),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_rotation_fails(mutant, recorded):
    checked = verdict(mutant, recorded)
    assert not checked.passed
    with pytest.raises(TurboNbError, match="RoPE is wrong here"):
        checked.require()


def test_a_grid_one_too_far_fails(monkeypatch):
    right = rope.rope_freqs
    monkeypatch.setattr(rope, "rope_freqs", lambda size, dim: right((size[0] + 1, *size[1:]), dim)[-math.prod(size) :])
    assert {c.name.split(",")[0] for c in verdict().failed} == {"it", "angles"}


def test_a_verdict_is_data(tmp_path):
    checks = (Check(name="<b>", error=math.nan, bound=1e-3), Check(name="fine", error=1e-4, bound=1e-3))
    checked = Verdict(machine="CPU", checks=checks, not_checked=("flash_attn: not installed",))
    data = json.loads(checked.save(tmp_path / "a" / "verdict.json").read_text())
    assert data == {
        "passed": False,
        "machine": "CPU",
        "checks": [
            {"name": "<b>", "error": None, "bound": 1e-3, "passed": False},
            {"name": "fine", "error": 1e-4, "bound": 1e-3, "passed": True},
        ],
        "not_checked": ["flash_attn: not installed"],
    }
    page = checked._repr_html_()
    assert "FAILED" in page and "&lt;b&gt;" in page and "<b>:" not in page and "not checked: flash_attn" in page
    assert "passed" in Verdict(machine="CPU", checks=checks[1:])._repr_html_()
    Verdict(machine="CPU", checks=checks[1:]).require()


def test_nothing_checked_is_no_pass():
    with pytest.raises(TurboNbError, match="0 checks"):
        Verdict(machine="CPU", checks=()).require()


def test_a_verdict_without_the_recording_names_what_it_lacks():
    found, rejected = rope_study.implementations("cpu")
    rotations = rope_study.rotation_errors(found, SIZES[:1], head_dim=64)
    assert rope_study.recorded_checks("no/such/file", found) == []
    judged = rope_study.judge("cpu", rotations, [], rejected)
    assert judged.passed and judged.machine == probe.device_name("cpu") and len(judged.checks) == len(rotations)
    assert [line.split(":")[0] for line in judged.not_checked] == ["flash_attn", "flash_attn's recorded output"]
    assert json.loads(judged.summary())["checks"] == len(rotations)


def test_only_right_implementations_are_timed():
    found = {"right": rope.apply_rotary_emb_torch, "wrong": MUTANTS["sign"]}
    checks = rope_study.rotation_errors(found, SIZES[:1], head_dim=64)
    assert list(rope_study.correct(found, checks)) == ["right"]


def test_speeds_are_of_every_implementation():
    found, _ = rope_study.implementations("cpu")
    speeds = rope_study.rotation_speeds(found, (2, 4, 4), heads=2, repeats=2)
    assert [(s.implementation, s.dtype) for s in speeds] == [
        (name, dtype) for dtype in ("float32", "bfloat16") for name in found
    ]
    for speed in speeds:
        moved = 2 * 32 * 2 * 128 * (4 if speed.dtype == "float32" else 2)
        assert speed.gigabytes_per_second == pytest.approx(moved / speed.milliseconds / 1e6)


WRONG = {
    "sizes": lambda: rope_study.rotation_errors({}, 7),
    "no sizes": lambda: rope_study.rotation_errors({}, None),
    "a size": lambda: rope_study.rotation_errors({}, [7, 16, 16]),
    "text": lambda: rope_study.rotation_errors({}, "[[1, 7, 9]]"),
    "sides": lambda: rope_study.rotation_speeds({}, ["1", "7", "9"]),
    "head_dim": lambda: rope.rope_freqs(SIZES[0], "128"),
    "a large head_dim": lambda: rope.rope_freqs(SIZES[0], 10**9),
    "a large head_dim of a picture": lambda: plots.score_decay(10**9),
    "a large head_dim of checks": lambda: rope_study.rotation_errors({}, SIZES, head_dim=10**9),
    "a large head_dim of timings": lambda: rope_study.rotation_speeds({}, SIZES[0], head_dim=10**9),
    "large sizes": lambda: rope_study.rotation_errors({}, [SIZES[0], [1024] * 3]),
    "a large size": lambda: rope_study.rotation_speeds({}, [1024] * 3),
    "a recording": lambda: rope_study.recorded_checks(__file__, {}),
    "no recording": lambda: rope_study.recorded_checks(None, {}),
    "a verdict's path": lambda: verdict(recorded=False).save("."),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_parameter_that_cannot_be_used_is_an_error_of_its_own(call):
    with pytest.raises(TurboNbError, match=r" is .*Expected |cannot write '\.'.*Expected "):
        call()


def test_a_size_takes_as_much_memory_as_is_free(monkeypatch):
    monkeypatch.setattr(probe, "free_memory", lambda device: 1e7)
    assert rope_study.rotation_errors({}, SIZES[:1]) == []
    with pytest.raises(
        InputError, match=r"sizes is \[5, 8, 25\], which takes 0\.02 GB with head_dim 128.* 0\.01 GB.*free"
    ):
        rope_study.rotation_errors({}, SIZES)


def test_the_device_of_a_timing_has_a_name():
    assert probe.device_name("cpu").startswith("CPU with ") and torch.__version__ in probe.device_name("cpu")


SABOTAGE = {
    "sign": "reference.apply_rotary_emb = "
    "lambda x, c, s, i=True, inplace=False, right=reference.apply_rotary_emb: right(x, c, -s, i)",
    "pairing": "reference.apply_rotary_emb = "
    "lambda x, c, s, i=True, inplace=False, right=reference.apply_rotary_emb: right(x, c, s, not i)",
    "grid": "rope.rope_freqs = lambda size, dim, right=rope.rope_freqs: right(size, dim).roll(-1, 0)",
}
NOTEBOOK = ROOT / "notebooks" / "02_rope_validation.ipynb"
FEW = {"device": "cpu", "sizes": [[1, 7, 9]], "speed_size": [1, 7, 9]}


def assert_failed(verdict_path):
    data = json.loads(verdict_path.read_text())
    assert data["passed"] is False
    assert {c["name"].split(",")[0] for c in data["checks"] if not c["passed"]} >= {"turbo_nb"}


def test_the_notebook_fails_where_rope_is_wrong(tmp_path, monkeypatch):
    """The notebook's kernel takes up a sitecustomize.py that breaks the package."""
    papermill = pytest.importorskip("papermill")
    pytest.importorskip("matplotlib")
    (tmp_path / "sitecustomize.py").write_text(
        f"from turbo_nb import rope\nfrom turbo_nb.ops.norms import reference\n{SABOTAGE['sign']}\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(papermill.PapermillExecutionError, match="RoPE is wrong here"):
        papermill.execute_notebook(
            NOTEBOOK, tmp_path / "out.ipynb", FEW | {"verdict_path": str(tmp_path / "verdict.json")},
            cwd=ROOT / "notebooks", progress_bar=False, kernel_name="python3",
        )  # fmt: skip
    assert_failed(tmp_path / "verdict.json")
    assert "FAILED" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize("name", [name for name in SABOTAGE if name != "sign"])
def test_the_notebook_s_code_fails_where_rope_is_wrong(name, tmp_path, monkeypatch):
    """The same cells, without a kernel of their own because it takes 8 s to start and to import."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(reference, "apply_rotary_emb", reference.apply_rotary_emb)  # so that both come back
    monkeypatch.setattr(rope, "rope_freqs", rope.rope_freqs)
    exec(SABOTAGE[name], {"reference": reference, "rope": rope})
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    with pytest.raises(TurboNbError, match="RoPE is wrong here"):
        for cell in cells[1:]:  # the first one installs the package in Colab
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= FEW | {"verdict_path": str(tmp_path / "verdict.json")}
    assert_failed(tmp_path / "verdict.json")
    assert "FAILED" in names["verdict"]._repr_html_()  # which `display` shows in a notebook
