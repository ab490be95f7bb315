"""The measurements of notebook 03, on the embedded model."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import turbo_nb
from turbo_nb.backends import Choice
from turbo_nb.errors import InputError
from turbo_nb.machine import probe
from turbo_nb.rope import VideoSize
from turbo_nb.sla import attention_type, topk_of
from turbo_nb.study import sla

ROOT = Path(__file__).parents[2]
PROMPT = "a large red circle moving from left to right on a black background"
SHORT = {"num_frames": 5, "num_steps": 2}


@pytest.fixture(scope="module")
def inside():
    pipe = turbo_nb.load_pipeline("nano", device="cpu")
    return pipe, *sla.look_inside(pipe, PROMPT, layers=[0, 6], steps=[1], num_frames=9, num_steps=2, seed=3)


def test_looking_changes_nothing_and_leaves_nothing(inside):
    pipe, video, views = inside
    plain = turbo_nb.generate(pipe, PROMPT, num_frames=9, num_steps=2, seed=3)
    assert np.array_equal(plain.frames, video.frames)
    assert set(views) == {(0, 1), (6, 1)}
    assert not any(block.attn1.processor.sla._forward_hooks for block in pipe.transformer.blocks)


def test_a_view_is_the_layers_own_attention(inside):
    pipe, video, views = inside
    assert sla.grid_of(pipe, video) == (3, 8, 8)
    for view in views.values():
        assert view.error < 1e-5  # the two branches add up to what the layer gave
        assert view.kept.shape == (2, 3) and torch.allclose(view.kept.sum(1), torch.ones(2))  # one of three blocks
        assert view.fine.shape == (48, 48) and torch.allclose(view.fine.sum(1), torch.full((48,), 7.0))  # 15 % of 48
        assert view.sparse.shape == view.linear.shape == (3, 8, 8)
        assert 0 < view.linear_share < 1


def test_a_view_without_the_linear_branch_has_none_of_it(inside):
    pipe, _, _ = inside
    layer = pipe.transformer.blocks[2].attn1.processor.sla
    kept = {name: tensor.clone() for name, tensor in layer.proj_l.state_dict().items()}
    torch.nn.init.zeros_(layer.proj_l.weight)
    torch.nn.init.zeros_(layer.proj_l.bias)
    _, views = sla.look_inside(pipe, PROMPT, layers=[2], steps=[0], **SHORT)
    layer.proj_l.load_state_dict(kept)
    assert views[2, 0].linear_share == 0 and views[2, 0].error < 1e-6


@pytest.mark.parametrize(
    ("layers", "steps", "words"),
    [([7], [0], "0 to 6"), (7, 0, "0 to 6"), ("0", 0, "0 to 6"), ([0], [2], "0 to 1"), ([], [0], "one or more")],
)
def test_a_layer_or_step_that_is_not_there_is_an_error(nano, layers, steps, words):
    with pytest.raises(InputError, match=words):
        sla.look_inside(nano, PROMPT, layers=layers, steps=steps, **SHORT)


@pytest.mark.parametrize("value", ["2", 0, None, 1.5, 10**9])
def test_a_block_that_is_not_a_number_of_tokens_is_an_error(nano, value):
    with pytest.raises(InputError, match=r"fine_block is .*\. Expected a whole number from 1 to 4096"):
        sla.look_inside(nano, PROMPT, layers=[0], steps=[0], fine_block=value, **SHORT)


def test_a_block_is_as_small_as_the_memory_allows(nano, monkeypatch):
    monkeypatch.setattr(probe, "free_memory", lambda device: 1e5)
    stages = []
    more = {"layers": [0], "steps": [0], "on_stage": stages.append, **SHORT}
    with pytest.raises(InputError, match=r"fine_block is 1\. Expected at least 2, because .* free on cpu") as caught:
        sla.look_inside(nano, PROMPT, fine_block=1, **more)
    assert stages == [] and "for 128 tokens" in str(caught.value)
    sla.look_inside(nano, PROMPT, fine_block=2, **more)


def test_dense_attention_has_no_blocks_to_see(nano):
    with sla.attention(nano, "original"), pytest.raises(InputError, match="Expected 'sla'"):
        sla.look_inside(nano, PROMPT, layers=[0], steps=[0], **SHORT)


def test_another_attention_lasts_for_a_while(nano):
    before = {name: tensor.clone() for name, tensor in nano.transformer.state_dict().items()}
    with sla.attention(nano, "original"):
        assert attention_type(nano.transformer) == "original"
    with pytest.raises(InputError), sla.attention(nano, "sla", 2.0):
        pass
    with sla.attention(nano, "sagesla", 0.5):
        assert (attention_type(nano.transformer), topk_of(nano.transformer)) == ("sagesla", 0.5)
    assert (attention_type(nano.transformer), topk_of(nano.transformer)) == ("sla", 0.15)
    after = nano.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_sweep_compares_every_clip_with_its_own_baseline(nano, monkeypatch):
    dense = sla.run(nano, PROMPT, "original", **SHORT)
    assert (dense.label, dense.topk, dense.kept) == ("dense", None, 1.0)
    assert dense.video.settings["attention_type"] == "original"
    made, run = [], sla.run
    monkeypatch.setattr(sla, "run", lambda *args, **more: made.append((*args[2:], more["seed"])) or run(*args, **more))
    clips = [(PROMPT, 0), (PROMPT, 1)]
    points = sla.sweep(nano, clips, [0.3, 0.5, 1.0], kinds=["sla"], done=[dense], **SHORT)
    # The clip has two blocks, so 0.3 and 0.5 keep the same one. The first baseline exists already.
    assert made == [("sla", 0.3, 0), ("sla", 1.0, 0), ("original", 1), ("sla", 0.3, 1), ("sla", 1.0, 1)]
    assert [(p.seed, p.topk, p.kept) for p in points] == [
        (seed, topk, kept) for seed in (0, 1) for topk, kept in ((0.3, 0.5), (0.5, 0.5), (1.0, 1.0))
    ]
    assert points[1] == replace(points[0], topk=0.5)
    for point in points:
        assert 0 < point.psnr < math.inf and 0 < point.ssim < 1 and point.step_seconds > 0
        assert point.prompt == PROMPT and point.peak_bytes is None
    same = sla.compare(dense, run(nano, PROMPT, "original", **SHORT))
    assert same.psnr == math.inf and same.ssim == 1


def test_a_sweep_takes_sagesla_too(nano):
    (point,) = sla.sweep(nano, [(PROMPT, 0)], [1.0], kinds=["sagesla"], **SHORT)
    assert (point.label, point.kept) == ("SageSLA (reference)", 1.0)
    assert sla.swept_kinds(nano) == ("sla",)  # because the reference of SageSLA is slow


def points_of(*values, topks=(0.1, 1.0)):
    """Points whose PSNR at the first topk is 30 dB, and at the others 30 + value."""
    more = {"label": "SLA", "kind": "sla", "kept": 1.0, "step_seconds": 1.0, "ssim": 1.0, "peak_bytes": None}
    return [
        sla.Point(prompt=PROMPT, seed=seed, topk=topk, psnr=30.0 + (value if topk != topks[0] else 0), **more)
        for seed, value in enumerate(values)
        for topk in topks
    ]


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ((-4.0, -5.0, -6.0), "falls", "lead away from dense attention"),
        ((4.0, 5.0, 6.0), "rises", "lead towards dense attention"),
        ((-4.0, 5.0, 6.0), "unclear", "do not decide"),
        ((-4.0, -4.0), "unclear", "do not decide"),  # too few clips
        ((math.inf, 60.0, 70.0), "rises", "towards"),  # the same frames
    ],
)
def test_the_conclusion_follows_from_the_clips(changes, verdict, words):
    (trend,) = found = sla.trends(points_of(*changes), 0.1)
    assert trend.verdict == verdict and len(trend.changes) == len(changes)
    assert words in sla.conclusion(found) and f"of {len(changes)} clips: {verdict}" in str(trend)
    assert all(math.isfinite(change) for change in trend.changes)


def test_only_a_larger_topk_leads_to_a_conclusion():
    found = sla.trends(points_of(-9.0, -9.0, -9.0, topks=(0.5, 0.1)), 0.5)
    assert [trend.end for trend in found] == [0.1] and "No larger" in sla.conclusion(found)
    (same,) = sla.trends(points_of(0.0, 0.0, 0.0), 0.1)
    assert "the same clips" in str(same)


def test_sagesla_on_a_cpu_is_the_reference_whatever_the_machine_has(nano, monkeypatch):
    monkeypatch.setattr(sla.backends, "choose", lambda operation, device=None: Choice(operation, "spargeattn"))
    assert sla.label(nano, "sagesla") == "SageSLA (reference)"
    monkeypatch.setattr(nano.turbo_nb, "plan", replace(nano.turbo_nb.plan, device="cuda:1"))
    assert sla.label(nano, "sagesla") == "SageSLA (spargeattn)"


def test_ssim_is_the_formula():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert sla.ssim(a, a) == pytest.approx(1)
    # without structure only the term of the means is left
    assert sla.ssim(a, a + 50) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    assert sla.ssim(noise, 255 - noise) < -0.8  # turned round, structure is opposite
    # one window: sums over it by hand
    one, two = noise[:, :11, :11], noise[:, 11:22, 11:22]
    bell = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(bell, bell) / bell.sum() ** 2
    x, y = (clip[0] @ np.array([0.299, 0.587, 0.114]) for clip in (one, two))
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    cov, c2 = (window * (x - mx) * (y - my)).sum(), (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert sla.ssim(one, two) == pytest.approx(expected)


def test_bytes_are_those_of_the_shapes():
    sizes = sla.attention_bytes(32760, 12, 128, 0.1)
    assert sizes["scores, dense"] == 12 * 32760**2 * 2
    assert sizes["scores, kept blocks"] == 12 * 32760 * 51 * 64 * 2
    assert sizes["block map"] == 12 * 256 * 512
    assert sizes["linear branch"] == 12 * 128 * 129 * 2
    assert sla.attention_bytes(63, 1, 64, 1.0)["scores, kept blocks"] == 63 * 63 * 2


def test_what_a_patch_looks_at():
    frames = np.zeros((9, 32, 64, 3), np.uint8)
    frames[4, 16:24, 32:48] = np.random.default_rng(0).integers(0, 256, (8, 16, 3))
    size = VideoSize(3, 2, 4)
    assert sla.busiest_patch(frames, size) == (1, 1, 2)
    fine = torch.zeros(6, 6)
    fine[3, 5] = 1  # the query's block, of tokens 12 to 15, keeps the last, of tokens 20 to 23
    view = sla.LayerView(
        layer=0, step=0, kept=fine, fine=fine, fine_block=4, sparse=torch.zeros(size), linear=torch.zeros(size), error=0
    )
    seen = sla.seen_from(view, (1, 1, 2))
    assert seen.shape == size and seen[2, 1].tolist() == [1, 1, 1, 1] and seen.sum() == 4


def test_the_notebook_takes_other_parameters(tmp_path, monkeypatch):
    papermill = pytest.importorskip("papermill")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    parameters = {
        "prompt": "a small cyan square growing on a navy background", "resolution": "96x64", "num_frames": 5,
        "num_steps": 1, "layers": [1], "steps": [0], "topks": [1.0], "model": "nano", "seeds": [0],
    }  # fmt: skip
    notebook = papermill.execute_notebook(
        ROOT / "notebooks" / "03_sla_vs_sagesla.ipynb", tmp_path / "out.ipynb", parameters,
        cwd=ROOT / "notebooks", progress_bar=False, kernel_name="python3",
    )  # fmt: skip
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 7
    text = (tmp_path / "out.ipynb").read_text()
    assert "SageSLA (" in text and "so the same clips" in text  # the clip has one block
