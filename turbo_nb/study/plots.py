"""The figures of notebooks 02 and 03.

Each function draws what `study.rope` or `study.sla` measured, and returns a matplotlib figure. The background is
transparent and the ink is grey, because a notebook may be in a light or a dark theme.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps

import numpy as np
import torch

from ..errors import not_installed

try:
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    raise not_installed("matplotlib", "notebook") from error

from .. import rope, sla
from ..rope import VideoSize
from .rope import BOUNDS, RotationCheck, Speed
from .sla import LayerView, Point, Run, attention_bytes, seen_from

INK = "#7d7d7d"  # contrast above 4:1 on white and on JupyterLab's dark #111111
COLOURS = ("#1f83c4", "#d55e00", "#009e73", "#cc79a7")  # after Okabe and Ito: distinct with any colour vision
KIND_COLOURS = {"original": INK, "sla": COLOURS[0], "sagesla": COLOURS[1]}
STYLE = {
    "figure.dpi": 100, "figure.constrained_layout.use": True, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "axes.titlesize": "medium", "legend.frameon": False, "grid.alpha": 0.3,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color",
         "grid.color"), INK
    ),
}  # fmt: skip


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in our style. The figure is closed, because a notebook shows open figures a second time"""

    @wraps(draw)
    def drawn(*arguments, **options) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*arguments, **options)
        plt.close(figure)
        return figure

    return drawn


# Notebook 02


@_figure
def angle_table(size: VideoSize, head_dim: int) -> Figure:
    """Draw the rotary table of a clip, and the angle of each axis's fastest pair as pictures of the frames.

    Args:
        size: of the clip in latent patches.
        head_dim: channels of a head.
    """
    angles = rope.rope_freqs(size, head_dim)
    pairs = {axis: count // 2 for axis, count in rope.axis_channels(head_dim).items()}
    figure = plt.figure(figsize=(11, 5.6))
    table, side = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    axes, begin = table.subplots(), 0
    shown = axes.imshow(angles.cos().numpy(), aspect="auto", cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    for axis, count in pairs.items():
        axes.text(begin + count / 2 - 0.5, -4, f"turn with {axis}", ha="center", va="bottom")
        begin += count
        axes.axvline(begin - 0.5, color="black", linewidth=1)
    axes.set(xlabel="pair of channels", ylabel="token: columns, then rows, then frames")
    table.colorbar(shown, label="cosine of the angle", location="bottom", shrink=0.7, aspect=40)
    table.suptitle(f"The whole table, for a clip of {size.T} × {size.H} × {size.W} patches")

    panels = side.subplots(3, size.T, sharex=True, sharey=True, squeeze=False)
    first = {"t": 0, "h": pairs["t"], "w": pairs["t"] + pairs["h"]}
    for row, (axis, pair) in zip(panels, first.items(), strict=True):
        for t, axes in enumerate(row):
            frame = angles[:, pair].view(size)[t].numpy()
            shown = axes.imshow(frame, cmap="cividis", vmin=0, vmax=max(size) - 1, aspect="auto")
            axes.set(xticks=[], yticks=[], title=f"t = {t}" if axis == "t" else "")
        row[0].set_ylabel(f"first pair of {axis}")
    side.colorbar(shown, ax=panels, label="angle in radians", location="bottom", shrink=0.7, aspect=40)
    side.suptitle("The same angles as pictures of each frame")
    return figure


@_figure
def score_decay(head_dim: int) -> Figure:
    """Draw how the score of q = k = (1, 1, …) falls with the distance along each axis."""
    distance = torch.linspace(0, 30, 601)
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for (axis, count), colour, style in zip(
        rope.axis_channels(head_dim).items(), COLOURS, ["-", "--", ":"], strict=False
    ):
        rates = rope.THETA ** -(torch.arange(0, count, 2) / count)
        left = (distance[:, None] * rates).cos().mean(1).numpy()
        axes.plot(distance.numpy(), left, style, color=colour, linewidth=2, label=f"along {axis}")
    axes.set(
        xlabel="distance between the two tokens (patches or latent frames)", ylabel="share of the score that is left"
    )
    axes.set_title("Near tokens agree, far ones fall out of step")
    axes.legend()
    axes.grid()
    return figure


@_figure
def rotation_errors(checks: Sequence[RotationCheck], machine: str) -> Figure:
    """Draw the error of each implementation against the number of tokens, with the bounds dotted.

    Args:
        checks: what `study.rope.rotation_errors` returned.
        machine: name of the device.
    """
    dtypes, names = ("bfloat16", "float16", "float32"), list(dict.fromkeys(c.implementation for c in checks))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axes, interleaved in zip(panels, (True, False), strict=True):
        for dtype, colour in zip(dtypes, COLOURS, strict=False):
            axes.axhline(BOUNDS[getattr(torch, dtype)], color=colour, linestyle=":", linewidth=1.5)
            for name, marker, width in zip(names, "osD", (8, 5, 5), strict=False):
                of = [c for c in checks if (c.implementation, c.dtype, c.interleaved) == (name, dtype, interleaved)]
                line = axes.plot(*zip(*sorted((c.tokens, c.error) for c in of), strict=True), color=colour)[0]
                line.set(marker=marker, markersize=width, fillstyle="none" if name == names[0] else "full")
                line.set_label(f"{dtype}, {name}")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title="interleaved (Wan)" if interleaved else "halves")
        axes.grid()
    panels[0].set_ylabel("relative L2 error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Error against float64 (dotted: the bounds) · {machine}")
    return figure


@_figure
def rotation_speeds(speeds: Sequence[Speed], title: str) -> Figure:
    """Draw the time of one call of each implementation, with its bandwidth."""
    implementations = list(dict.fromkeys(speed.implementation for speed in speeds))
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.55 * max(1, len(speeds))))
    names = [f"{speed.implementation}, {speed.dtype}" for speed in speeds]
    colours = [COLOURS[implementations.index(speed.implementation)] for speed in speeds]
    bars = axes.barh(names, [speed.milliseconds for speed in speeds], color=colours)
    axes.bar_label(bars, [f"{s.milliseconds:.3g} ms, {s.gigabytes_per_second:.3g} GB/s" for s in speeds], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set(xlabel="milliseconds a call, median", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# Notebook 03


@_figure
def kept_blocks(views: Mapping[tuple[int, int], LayerView], num_steps: int) -> Figure:
    """Draw which key blocks each query block keeps, a panel for each layer and step.

    Args:
        views: what `study.sla.look_inside` returned.
        num_steps: of the clip.
    """
    layers, steps = (sorted(set(numbers)) for numbers in zip(*views, strict=True))
    figure, panels = plt.subplots(
        len(layers), len(steps), squeeze=False, sharex=True, sharey=True, figsize=(10, 0.7 + 1.6 * len(layers))
    )
    for row, layer in zip(panels, layers, strict=True):
        for axes, step in zip(row, steps, strict=True):
            shown = axes.imshow(views[layer, step].kept.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"layer {layer}, step {step + 1} of {num_steps}")
    figure.supxlabel(f"key block, {sla.BLOCK_K} tokens")
    figure.supylabel(f"query block, {sla.BLOCK_Q} tokens")
    figure.colorbar(shown, ax=panels, label="share of heads that keep the block")
    kept = views[layers[0], steps[0]].kept
    figure.suptitle(f"{kept.sum(1)[0]:.0f} of {kept.shape[1]} key blocks for each query block")
    return figure


@_figure
def attention_over_clip(
    frames: np.ndarray, views: Mapping[tuple[int, int], LayerView], place: tuple[int, int, int]
) -> Figure:
    """Draw what one query patch attends to in the last recorded step, over the clip, a row for each layer.

    Args:
        frames: of the clip, (T, H, W, 3) uint8.
        views: what `study.sla.look_inside` returned.
        place: of the query patch: latent frame, row, column.
    """
    layers, step = sorted({layer for layer, _ in views}), max(step for _, step in views)
    of = [views[layer, step] for layer in layers]
    size, (height, width) = VideoSize._make(of[0].sparse.shape), frames.shape[1:3]
    figure, panels = plt.subplots(
        len(layers) + 1, size.T, squeeze=False, figsize=(max(6, 1.5 * size.T), 0.6 + 1.5 * (len(layers) + 1))
    )
    for t, column in enumerate(panels.T):
        frame = frames[min(4 * t, len(frames) - 1)]
        column[0].imshow(frame)
        column[0].set_title(f"latent frame {t}")
        for axes, view in zip(column[1:], of, strict=True):
            axes.imshow(frame.mean(-1), cmap="gray", vmin=0, vmax=255)
            shown = axes.imshow(
                seen_from(view, place)[t].numpy(),
                cmap="viridis",
                vmin=0,
                vmax=1,
                alpha=0.75,
                extent=(0, width, height, 0),
            )
        for axes in column:
            axes.set(xticks=[], yticks=[])
            if t == place[0]:
                corner = (place[2] * width / size.W, place[1] * height / size.H)
                axes.add_patch(Rectangle(corner, width / size.W, height / size.H, fill=False, color="white", lw=2))
    for axes, name in zip(panels[:, 0], ["the clip", *(f"layer {layer}" for layer in layers)], strict=True):
        axes.set_ylabel(name)
    bar = figure.colorbar(shown, ax=panels[1:], label="share of heads that keep the patch", shrink=0.8)
    bar.solids.set_alpha(1)  # else the page shines through
    figure.suptitle(f"What the marked patch attends to in step {step + 1} (blocks of {of[0].fine_block} tokens)")
    return figure


@_figure
def branches(view: LayerView, num_steps: int) -> Figure:
    """Draw how much the sparse and the linear branch add to each patch of the clip."""
    frames = view.sparse.shape[0]
    figure, panels = plt.subplots(2, frames, squeeze=False, figsize=(1.5 * frames, 3.7))
    top = max(view.sparse.max().item(), view.linear.max().item())
    for row, name, branch in zip(panels, ("sparse", "linear"), (view.sparse, view.linear), strict=True):
        for t, axes in enumerate(row):
            shown = axes.imshow(branch[t].numpy(), cmap="viridis", vmin=0, vmax=top)
            axes.set(xticks=[], yticks=[], title=f"latent frame {t}" if name == "sparse" else "")
        row[0].set_ylabel(f"{name} branch")
    figure.colorbar(shown, ax=panels, label="root mean square", shrink=0.9)
    figure.suptitle(f"Layer {view.layer}, step {view.step + 1} of {num_steps}")
    return figure


@_figure
def clips_side_by_side(runs: Sequence[Run], columns: int = 6) -> Figure:
    """Draw frames of each run, and below them the differences from the first run.

    Args:
        runs: of the same prompt and seed. The first is the baseline.
        columns: frames to draw, evenly spaced.
    """
    baseline = runs[0].video.frames
    numbers = np.linspace(0, len(baseline) - 1, min(columns, len(baseline))).round().astype(int)
    rows = [(f"{run.label}\n{run.kept:.0%} kept", run.video.frames) for run in runs]
    for run in runs[1:]:
        difference = np.abs(run.video.frames.astype(int) - baseline).max(-1)
        rows.append((f"|{run.label.split()[0]} − {runs[0].label}|", difference))
    figure, panels = plt.subplots(
        len(rows), len(numbers), squeeze=False, figsize=(1.75 * len(numbers), 1.65 * len(rows))
    )
    for row, (name, images) in zip(panels, rows, strict=True):
        for axes, number in zip(row, numbers, strict=True):
            shown = axes.imshow(images[number], cmap="magma", vmin=0, vmax=128)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    for axes, number in zip(panels[0], numbers, strict=True):
        axes.set_title(f"frame {number}")
    figure.colorbar(shown, ax=panels[len(runs) :], label="difference, 0 to 255", extend="max")
    return figure


@_figure
def quality_and_time(points: Sequence[Point], baseline: Run, own_topk: float, machine: str) -> Figure:
    """Draw PSNR, SSIM and the time of a step against topk: a thin line for each clip, a thick one for the mean.

    Args:
        points: what `study.sla.sweep` returned.
        baseline: a run with dense attention, for its time.
        own_topk: the model's own, marked by a dotted line.
        machine: name of the device.
    """
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.9))
    speed = panels[2]
    measures = (lambda point: point.psnr, lambda point: point.ssim, lambda point: point.step_seconds * 1e3)
    clips = list(dict.fromkeys((point.prompt, point.seed) for point in points))
    for kind, marker in (("sla", "o"), ("sagesla", "s")):
        of = [point for point in points if point.kind == kind]
        topks = sorted({point.topk for point in of})
        for axes, measure in zip(panels, measures, strict=True) if of else ():
            for clip in clips if len(clips) > 1 else ():
                line = sorted((point.topk, measure(point)) for point in of if (point.prompt, point.seed) == clip)
                axes.plot(*zip(*line, strict=True), color=KIND_COLOURS[kind], linewidth=0.8, alpha=0.45)
            means = [np.mean([measure(point) for point in of if point.topk == topk]) for topk in topks]
            axes.plot(topks, means, color=KIND_COLOURS[kind], marker=marker, linewidth=2.5, label=of[0].label)
    speed.axhline(baseline.step_seconds * 1e3, color=KIND_COLOURS["original"], linestyle="--", label=baseline.label)
    titles = ("PSNR against dense", "dB"), ("SSIM against dense", "1 is the same"), (f"Time\n{machine}", "ms a step")
    for axes, (title, unit) in zip(panels, titles, strict=True):
        axes.axvline(own_topk, color=INK, linewidth=1, linestyle=":", label="the model's own topk")
        axes.set(title=title, ylabel=unit, xlabel="topk, share of key blocks")
        axes.grid()
    speed.set_ylim(bottom=0)
    if len(clips) > 1:
        figure.suptitle(f"Mean of {len(clips)} clips; a thin line is one clip")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@_figure
def attention_memory(size: VideoSize, heads: int, head_dim: int, topk: float) -> Figure:
    """Draw what one layer's attention would hold, for a clip and for TurboWan 1.3B's clip of 480p and 81 frames.

    Args:
        size: of the clip in latent patches.
        heads: of the model.
        head_dim: channels of a head.
        topk: share of key blocks.
    """
    tokens = math.prod(size)
    clips = {
        f"this clip, {tokens:,} tokens": (tokens, heads, head_dim),
        "1.3B, 480p × 81 frames, 32,760 tokens": (32760, 12, 128),
    }
    figure, panels = plt.subplots(1, 2, figsize=(12, 3.4), sharey=True, sharex=True)
    for axes, (title, shape) in zip(panels, clips.items(), strict=True):
        held = attention_bytes(*shape, topk)
        bars = axes.barh(list(held), list(held.values()), color=KIND_COLOURS["sla"])
        axes.bar_label(bars, list(map(EngFormatter("B", places=1), held.values())), padding=4)
        axes.set(xscale="log", xlabel="bytes (logarithmic)", title=title)
        axes.xaxis.set_major_formatter(EngFormatter("B", places=0))
        axes.margins(x=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return figure
