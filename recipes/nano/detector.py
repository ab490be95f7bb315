"""A detector without training: it reads the five attributes from a finished clip.

It takes the background colour from the border, and the shape's colour from the pixels that differ most from the border.
Every pixel then has a coverage between the two colours. The area gives the size, the centroid the motion, and the
filled share of the bounding box the shape.
"""

import numpy as np

from .world import BACKGROUNDS, COLOURS, RADIUS

SIZE_LIMIT = (RADIUS["small"][1] + RADIUS["large"][0]) / 2  # equal-area radius in pixels, between small and large
GROWTH_LIMIT = 1.35  # ratio of last to first radius: a larger one counts as growing
STILL_LIMIT = 8.0  # pixels: a shape that travels less stands still
FILL = {
    "triangle": (0.38, 0.64),
    "circle": (0.64, 0.89),
    "square": (0.89, 1.10),
}  # area / bounding box. The exact values are 1/2, π/4 and 1.


def nearest(colour: np.ndarray, table: dict[str, tuple]) -> str:
    return min(table, key=lambda name: float(((colour - np.array(table[name])) ** 2).sum()))


def detect(frames: np.ndarray) -> dict[str, str | None]:
    """Return size, colour, shape, motion and background of frames (T, H, W, 3) uint8; None for what does not fit."""
    x = frames.astype(np.float32)
    back = _border(x)
    seen = dict.fromkeys(("size", "colour", "shape", "motion"), None) | {"background": nearest(back, BACKGROUNDS)}

    fore = _foreground(x, back)
    if fore is None:
        return seen
    seen["colour"] = nearest(fore, COLOURS)

    axis = (fore - back) / ((fore - back) ** 2).sum()
    coverage = ((x - back) @ axis).clip(0, 1)
    coverage[coverage < 0.25] = 0
    area = coverage.sum((1, 2))
    if area.min() < 10:
        return seen
    radius = np.sqrt(area / np.pi)
    largest = np.sort(radius)[-3:].mean()
    if 0.7 * RADIUS["small"][0] < largest < 1.3 * RADIUS["large"][1]:
        seen["size"] = "small" if largest < SIZE_LIMIT else "large"

    seen["motion"] = _motion(coverage, area, radius)
    fill = np.median([_fill(c) for c, r in zip(coverage, radius, strict=True) if r > 0.8 * largest])
    seen["shape"] = next((name for name, (low, high) in FILL.items() if low <= fill < high), None)
    return seen


def background(frames: np.ndarray) -> np.ndarray:
    """Return the colours (N, 3) of the pixels of a clip (T, H, W, 3) that do not show the shape.

    A pixel shows the shape if its colour is nearer to the shape's than half way to the border's. So a background of
    two colours counts with both.
    """
    x = frames.astype(np.float32)
    back = _border(x)
    fore = _foreground(x, back)
    if fore is None:
        return x.reshape(-1, 3)
    return x[np.linalg.norm(x - fore, axis=-1) > 0.5 * np.linalg.norm(fore - back)]


def place(frames: np.ndarray) -> np.ndarray:
    """Return the centre (x, y) in pixels of what differs from the border of a clip (T, H, W, 3), over all frames."""
    x = frames.astype(np.float32)
    difference = np.sqrt(((x - _border(x)) ** 2).sum(-1))
    seen = (difference > 0.5 * difference.max()).sum(0)  # (H, W)
    height, width = seen.shape
    return np.array([seen.sum(0) @ np.arange(width), seen.sum(1) @ np.arange(height)]) / seen.sum()


def _border(x: np.ndarray) -> np.ndarray:
    border = np.concatenate([x[:, :2].reshape(-1, 3), x[:, -2:].reshape(-1, 3), x[:, :, :2].reshape(-1, 3)])
    return np.median(border, axis=0)


def _foreground(x: np.ndarray, back: np.ndarray) -> np.ndarray | None:
    """Return the colour of the pixels that differ most from the border's. None: all pixels are like the border"""
    difference = np.sqrt(((x - back) ** 2).sum(-1))  # (T, H, W)
    strongest = np.quantile(difference, 0.998)
    return None if strongest < 40 else np.median(x[difference > 0.8 * strongest], axis=0)


def _motion(coverage: np.ndarray, area: np.ndarray, radius: np.ndarray) -> str | None:
    growth = radius[-3:].mean() / radius[:3].mean()
    if growth > GROWTH_LIMIT:
        return "growing"
    if growth < 1 / GROWTH_LIMIT:
        return "shrinking"
    height, width = coverage.shape[1:]
    cx = (coverage.sum(1) @ np.arange(width)) / area  # (T,)
    cy = (coverage.sum(2) @ np.arange(height)) / area
    dx, dy = cx[-3:].mean() - cx[:3].mean(), cy[-3:].mean() - cy[:3].mean()
    if max(abs(dx), abs(dy)) < STILL_LIMIT:
        return "standing still"
    if abs(dx) > 2 * abs(dy):
        return "moving from left to right" if dx > 0 else "moving from right to left"
    if abs(dy) > 2 * abs(dx):
        return "moving from top to bottom" if dy > 0 else "moving from bottom to top"
    return None


def _fill(coverage: np.ndarray) -> float:
    """Return the covered share of the bounding box, whose sides are the longest row and column, in parts of pixels"""
    width, height = coverage.sum(1).max(), coverage.sum(0).max()
    return float(coverage.sum() / (width * height))
