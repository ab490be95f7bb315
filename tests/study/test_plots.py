"""The figures of the notebooks: readable on a light and on a dark page, and shown once."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.text import Text

from turbo_nb.rope import VideoSize
from turbo_nb.study import plots, sla
from turbo_nb.study import rope as rope_study

SIZES = [VideoSize(1, 7, 9), VideoSize(3, 5, 7)]
PAGES = ("#ffffff", "#111111")  # of JupyterLab's light and dark themes


def rope_figures():
    found, _ = rope_study.implementations("cpu")
    yield plots.angle_table(VideoSize(1, 3, 5), 64)
    yield plots.score_decay(128)
    yield plots.rotation_errors(rope_study.rotation_errors(found, SIZES, head_dim=64), "a machine")
    yield plots.rotation_speeds(rope_study.rotation_speeds(found, SIZES[0], heads=1, repeats=1), "x on a machine")
    yield plots.rotation_speeds([], "nothing is right")


def sla_figures(pipe):
    short = {"num_frames": 5, "num_steps": 1, "resolution": "96x64"}
    video, views = sla.look_inside(pipe, "a red circle", layers=[1], steps=[0], **short)
    size = sla.grid_of(pipe, video)
    dense, sparse = (sla.run(pipe, "a red circle", kind, **short) for kind in ("original", "sla"))
    points = sla.sweep(pipe, [("a red circle", 0), ("a cyan square", 1)], [0.15, 1.0], **short)
    yield plots.kept_blocks(views, 1)
    yield plots.attention_over_clip(video.frames, views, sla.busiest_patch(video.frames, size))
    yield plots.branches(views[1, 0], 1)
    yield plots.clips_side_by_side([dense, sparse])
    yield plots.quality_and_time(points, dense, 0.15, "a machine")
    yield plots.quality_and_time([point for point in points if point.seed == 0], dense, 0.15, "a machine")
    yield plots.attention_memory(size, 4, 64, 0.15)


def contrast(colour, page):
    """WCAG 2.1's contrast ratio"""
    levels = torch.tensor([to_rgb(colour), to_rgb(page)], dtype=torch.float64)
    linear = torch.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    low, high = sorted((linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)).tolist())
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("figures", ["rope", "sla"])
def test_figures_are_readable_on_a_light_and_a_dark_page(figures, nano):
    before = plt.rcParams["text.color"]
    made = list(rope_figures() if figures == "rope" else sla_figures(nano))
    for figure in made:
        assert to_rgba(figure.get_facecolor())[3] == 0
        assert all(to_rgba(axes.get_facecolor())[3] == 0 for axes in figure.axes)
        texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
        assert texts
        for text in texts:
            assert min(contrast(text.get_color(), page) for page in PAGES) > 4, text
    assert plt.get_fignums() == [] and plt.rcParams["text.color"] == before


def test_lines_have_contrast_on_both_pages():
    for colour in (*plots.COLOURS, plots.INK):
        assert min(contrast(colour, page) for page in PAGES) > 2.7, colour


def test_without_matplotlib_it_says_what_to_install():
    code = "import sys; sys.modules['matplotlib'] = None\nfrom turbo_nb.study import plots"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError: matplotlib is not installed. Run: pip install 'turbo-nb[notebook]'" in result.stderr
