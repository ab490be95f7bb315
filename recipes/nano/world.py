"""Draw the world that nano knows: one flat shape on a flat background, and the sentences that describe it.

A clip has five attributes, whose vocabulary ships beside the model. The prompt leaves a few numbers open: where the
shape starts, its exact size and its speed. Drawing is analytic (signed distance, one pixel of anti-aliasing) and
batched. A GPU draws thousands of clips a second, so they are not stored.
"""

import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch

ASSET = Path(__file__).resolve().parents[2] / "turbo_nb" / "assets" / "nano"
VOCABULARY = json.loads((ASSET / "vocabulary.json").read_text(encoding="utf-8"))
ATTRIBUTES = {name: list(values) for name, values in VOCABULARY["attributes"].items()}

FRAMES, SIZE = 25, 128
MARGIN = 4  # pixels that stay free around the shape
RADIUS = {
    "small": (12.0, 15.0),
    "large": (24.0, 29.0),
}  # pixels, of the circle of equal area, when the shape is largest
TRAVEL = (0.75, 1.0)  # share of the free way that a moving shape covers
START_SCALE = (0.40, 0.50)  # a growing shape starts at this share of its radius

# 8-bit RGB
COLOURS = {
    "red": (225, 35, 40),
    "green": (40, 175, 70),
    "blue": (45, 95, 235),
    "yellow": (245, 220, 50),
    "magenta": (215, 50, 200),
    "cyan": (50, 205, 225),
    "white": (245, 245, 245),
    "orange": (245, 135, 30),
}
BACKGROUNDS = {"black": (12, 12, 14), "white": (245, 245, 245), "gray": (128, 128, 128), "navy": (18, 28, 92)}

# Half width and half height of each shape's bounding box for an equal-area radius of 1.
HALF_EXTENT = {"circle": (1.0, 1.0), "square": (0.8862, 0.8862), "triangle": (1.3468, 1.1664)}

# The direction of x and y for each motion (y points down), and whether the shape grows (1) or shrinks (-1).
DIRECTION = {
    "moving from left to right": (1, 0),
    "moving from right to left": (-1, 0),
    "moving from top to bottom": (0, 1),
    "moving from bottom to top": (0, -1),
    "growing": (0, 0),
    "shrinking": (0, 0),
    "standing still": (0, 0),
}
GROWTH = {motion: {"growing": 1, "shrinking": -1}.get(motion, 0) for motion in DIRECTION}
SHORT_PHRASINGS = (
    "a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a {colour} {shape} {motion}",
    "a {size} {colour} {shape} {motion}",
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape} {motion} on a {background} background",
    "a {shape} {motion}",
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The five attributes of a clip, each a canonical word of the vocabulary."""

    size: str
    colour: str
    shape: str
    motion: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination, as one sixth of all combinations."""
        index = [ATTRIBUTES[name].index(getattr(self, name)) for name in ATTRIBUTES]
        return sum(i * p for i, p in zip(index, (1, 5, 2, 1, 3), strict=True)) % 6 == 0


SCENES = tuple(
    scene
    for values in itertools.product(*ATTRIBUTES.values())
    if (scene := Scene(**dict(zip(ATTRIBUTES, values, strict=True)))).colour != scene.background
)
TRAINING_SCENES = tuple(scene for scene in SCENES if not scene.held_out)
HELD_OUT_SCENES = tuple(scene for scene in SCENES if scene.held_out)


def describe(scene: Scene, phrasing: str = VOCABULARY["canonical"], rng: random.Random | None = None) -> str:
    """Return the sentence of `phrasing` for a scene. With `rng`, synonyms are drawn."""
    words = {}
    for name in ATTRIBUTES:
        value = getattr(scene, name)
        words[name] = rng.choice(VOCABULARY["attributes"][name][value]) if rng else value
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", phrasing.format(**words))


def caption(scene: Scene, rng: random.Random) -> tuple[str, list[bool]]:
    """Return a training caption, and which attributes it names.

    `rng` draws the phrasing (never the held-out one), synonyms, letter case and small talk. A tenth of the captions
    leave attributes open, because a short prompt must work too.
    """
    phrasing = rng.choice(SHORT_PHRASINGS if rng.random() < 0.1 else VOCABULARY["phrasings"])
    text = describe(scene, phrasing, rng)
    if rng.random() < 0.15:
        text = rng.choice(["a video of ", "please draw ", "animation, ", "simple 2d clip: "]) + text
    if rng.random() < 0.15:
        text += rng.choice([", high quality", ", flat colours", ", smooth motion", ", minimal style"])
    if rng.random() < 0.3:
        text += "."
    case = rng.choice([str, str, str.lower, str.capitalize, str.title, str.upper])
    return case(text), [f"{{{name}}}" in phrasing for name in ATTRIBUTES]


def indices(scenes: list[Scene]) -> torch.Tensor:
    """Return the attribute numbers of scenes in the order of ATTRIBUTES, (B, 5) int64."""
    return torch.tensor([[ATTRIBUTES[name].index(getattr(s, name)) for name in ATTRIBUTES] for s in scenes])


def _look_up(table: dict, name: str, attributes: torch.Tensor) -> torch.Tensor:
    """Return the values of `table` for the attribute `name` of each clip, (B, …) float32"""
    values = torch.tensor([table[key] for key in ATTRIBUTES[name]], device=attributes.device, dtype=torch.float32)
    return values[attributes[:, list(ATTRIBUTES).index(name)]]


def _frame_times(attributes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the share of the way in each frame (B, T, 2), falling for a backward motion, and the growth (B, 1)"""
    time = torch.linspace(0, 1, FRAMES, device=attributes.device)[:, None]
    direction = _look_up(DIRECTION, "motion", attributes)[:, None]  # (B, 1, 2)
    return torch.where(direction < 0, 1 - time, time), _look_up(GROWTH, "motion", attributes)[:, None]


def _extent(attributes: torch.Tensor, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least x, y of the shape's centre, and the way it can go, (B, 2) each. radius: (B, 1)"""
    low = MARGIN + _look_up(HALF_EXTENT, "shape", attributes) * radius
    return low, SIZE - 2 * low


def draw(attributes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return clips with these attribute numbers. `generator` draws what the prompt leaves open."""
    free = torch.rand(5, len(attributes), generator=generator, device=attributes.device)
    return paint(attributes, free.T)


def paint(attributes: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Return the clips of these numbers, (B, 3, FRAMES, SIZE, SIZE) float32 in [-1, 1].

    attributes: (B, 5) from `indices`. free: (B, 5) in [0, 1]: radius, x, y, speed (of travel or growth), start.
    """
    device, (size, x, y, speed, begin) = attributes.device, free.T[..., None]  # (B, 1) each
    smallest, largest = _look_up(RADIUS, "size", attributes).split(1, dim=1)
    radius = smallest + size * (largest - smallest)
    low, way = _extent(attributes, radius)
    phase, growth = _frame_times(attributes)
    moving = _look_up(DIRECTION, "motion", attributes)[:, None] != 0  # (B, 1, 2)
    travel = (TRAVEL[0] + speed * (TRAVEL[1] - TRAVEL[0]))[..., None]  # (B, 1, 1)
    place = torch.where(moving, begin[..., None] * (1 - travel) + travel * phase, torch.cat([x, y], 1)[:, None])
    centre_x, centre_y = (low[:, None] + way[:, None] * place)[..., None, None].unbind(2)  # (B, T, 1, 1)
    start = START_SCALE[0] + speed * (START_SCALE[1] - START_SCALE[0])
    time = torch.linspace(0, 1, FRAMES, device=device)
    scale = torch.where(growth == 0, 1.0, start + (1 - start) * torch.where(growth > 0, time, 1 - time))  # (B, T)
    r = (scale * radius)[..., None, None]

    pixel = torch.arange(SIZE, device=device) + 0.5
    dx = (pixel - centre_x).abs()  # (B, T, 1, W)
    dy = pixel[:, None] - centre_y  # (B, T, H, 1)
    half_height = HALF_EXTENT["triangle"][1] * r
    distances = {
        "circle": lambda: (dx**2 + dy**2).sqrt() - r,
        "square": lambda: torch.maximum(dx, dy.abs()) - HALF_EXTENT["square"][0] * r,
        "triangle": lambda: torch.maximum(dy - half_height, 0.8660 * dx - 0.5 * (dy + half_height)),
    }
    shape = attributes[:, list(ATTRIBUTES).index("shape"), None, None, None]
    distance = torch.zeros(len(attributes), FRAMES, SIZE, SIZE, device=device)
    for number, name in enumerate(ATTRIBUTES["shape"]):
        distance = torch.where(shape == number, distances[name](), distance)
    coverage = (0.5 - distance).clamp(0, 1)[:, None]  # (B, 1, T, H, W)
    fore, back = colours(attributes)
    return back + coverage * (fore - back)


def colours(attributes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the colours of the shapes and of the backgrounds in [-1, 1], (B, 3, 1, 1, 1) each."""
    fore, back = _look_up(COLOURS, "colour", attributes), _look_up(BACKGROUNDS, "background", attributes)
    return (fore / 127.5 - 1)[..., None, None, None], (back / 127.5 - 1)[..., None, None, None]


def measure(clips: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    """Return the free numbers (B, 5) in [0, 1] of clips (B, 3, T, H, W) that show `attributes`; the inverse of `paint`.

    The shape's area and centroid in each frame give the numbers. Coverage is relative to the clip's strongest pixel,
    because a faint shape has a place too. An empty clip has its place in the middle. A number without effect is 0.5.
    """
    fore, back = colours(attributes)
    coverage = (clips - back).norm(dim=1) / (fore - back).norm(dim=1)  # (B, T, H, W)
    coverage = coverage / coverage.amax((1, 2, 3), keepdim=True).clamp(0.15, 1)
    coverage = coverage.clamp(max=1) * (coverage > 0.3)
    area = coverage.sum((2, 3))  # (B, T)
    pixel = torch.arange(SIZE, device=clips.device) + 0.5
    moments = torch.stack([coverage.sum(2) @ pixel, coverage.sum(3) @ pixel], -1)  # (B, T, 2)
    centre = (moments + 0.005 * SIZE) / (area[..., None] + 0.01)  # the middle, if the clip is empty
    seen = (area > 3) + 1e-3  # weight of a frame
    seen = seen / seen.sum(1, keepdim=True)
    r = (area / torch.pi).sqrt()
    phase, growth = _frame_times(attributes)
    order = torch.where(growth < 0, r.flip(1), r)  # because a shrinking shape grows in reverse
    span = FRAMES // 4
    first, last = order[:, :span].mean(1, keepdim=True), order[:, -span:].mean(1, keepdim=True)
    grows = growth != 0
    # r(t) = radius · (start + (1 − start) · t), read at the mean times of the first and last quarter
    early = (span - 1) / 2 / (FRAMES - 1)
    slope = (last - first) / (1 - 2 * early)
    begin_radius, end_radius = first - slope * early, last + slope * early
    radius = torch.where(grows, end_radius, r.median(1, keepdim=True).values)

    smallest, largest = _look_up(RADIUS, "size", attributes).split(1, dim=1)
    size = ((radius - smallest) / (largest - smallest)).clamp(0, 1)
    radius = smallest + size * (largest - smallest)
    # An upright triangle's centroid lies a third of its half height under the middle of its box.
    triangle = attributes[:, list(ATTRIBUTES).index("shape"), None] == ATTRIBUTES["shape"].index("triangle")
    centre[..., 1] -= torch.where(triangle, HALF_EXTENT["triangle"][1] / 3 * r, torch.zeros_like(r))
    low, way = _extent(attributes, radius)
    place = (centre - low[:, None]) / way[:, None]  # (B, T, 2)

    direction = _look_up(DIRECTION, "motion", attributes)
    moving = direction.abs().sum(1, keepdim=True) > 0
    along = direction[:, 1:].abs()  # 0 where x moves, 1 where y moves
    path = torch.where(along[..., None] > 0, place[..., 1:], place[..., :1])[..., 0]  # (B, T)
    done = torch.where(along[..., None] > 0, phase[..., 1:], phase[..., :1])[..., 0]
    centred = done - (seen * done).sum(1, keepdim=True)
    travel = (seen * centred * path).sum(1, keepdim=True) / (seen * centred.square()).sum(1, keepdim=True)
    travel = travel.clamp(*TRAVEL)
    begin = (seen * (path - travel * done)).sum(1, keepdim=True) / (1 - travel).clamp(min=1e-3)
    speed = torch.where(
        grows,
        (begin_radius / end_radius.clamp(min=1.0) - START_SCALE[0]) / (START_SCALE[1] - START_SCALE[0]),
        torch.where(moving, (travel - TRAVEL[0]) / (TRAVEL[1] - TRAVEL[0]), torch.full_like(travel, 0.5)),
    )
    begin = torch.where(moving, begin, torch.full_like(begin, 0.5))
    return torch.cat([size, (seen[..., None] * place).sum(1), speed, begin], 1).clamp(0, 1)
